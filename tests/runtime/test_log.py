"""What a run says: metrics.jsonl across kills, the live line, TensorBoard and W&B present or absent."""

import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastrdm.loaders.spec import ViewSpec
from fastrdm.runtime.log import LogConfig, RunLog
from fastrdm.runtime.trackers import view_picture


def open_log(run: Path, step: int = 0, main: bool = True, **config: Any) -> RunLog:
    return RunLog(LogConfig(**config), run, step, {"a": {"b": 1}}, main)


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def steps(run: Path) -> list[float]:
    return [line["step"] for line in lines(run)]


def test_one_line_for_each_write(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.write(20, 0.123456, {"loss": -0.5, "online/erank": 3.25})
    log.write(40, 2.0, {"loss": -0.75})
    first, second = lines(tmp_path)
    assert first.pop("time") <= second.pop("time")
    assert first == {"step": 20, "epoch": 0.1235, "loss": -0.5, "online/erank": 3.25}
    assert second == {"step": 40, "epoch": 2.0, "loss": -0.75}


def test_a_resumed_run_drops_what_it_will_write_again(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    for step in (0, 10, 20, 20, 30):
        log.write(step, 0.0, {})
    log = open_log(tmp_path, step=20)
    assert steps(tmp_path) == [0, 10, 20, 20]
    log.write(25, 0.0, {})
    assert steps(tmp_path) == [0, 10, 20, 20, 25]
    open_log(tmp_path)  # nothing to go on from: the baselines of step 0 are measured again too
    assert steps(tmp_path) == []
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_other_files_are_cut_back_with_the_metrics(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    for step in (10, 20, 30):
        log.append("alarms", step, step / 7, {"alarm": "falling_rank"})
    (tmp_path / "alarms.jsonl").open("a").write('{"step": 31, "al')
    open_log(tmp_path, step=20)
    kept = [json.loads(line) for line in (tmp_path / "alarms.jsonl").read_text().splitlines()]
    assert [(line["step"], line["epoch"], line["alarm"]) for line in kept] == [
        (10, 1.4286, "falling_rank"),
        (20, 2.8571, "falling_rank"),
    ]
    open_log(tmp_path, main=False).append("alarms", 40, 1.0, {})
    assert len((tmp_path / "alarms.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("half", ['{"step": 20, "lo', '{"step": 20}', "{", "\0\0\0"])
def test_half_a_last_line_is_dropped(tmp_path: Path, half: str) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 10}\n' + half)
    open_log(tmp_path, step=100).write(30, 0.0, {})
    assert steps(tmp_path) == [10, 30]


def test_only_the_main_process_speaks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = open_log(tmp_path, main=False, tensorboard=True)
    log.write(1, 0.0, {"loss": 1.0})
    log.say("a line")
    log.progress("a line", 0.1)
    log.close()
    assert os.listdir(tmp_path) == []
    assert capsys.readouterr().out == ""


def test_lines_stay_where_no_terminal_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = open_log(tmp_path)
    log.progress("x" * 200, 0.5)
    log.say("said")
    assert capsys.readouterr().out == "x" * 200 + "\nsaid\n"


def test_tensorboard_gets_the_same_metrics(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for step, values in ((0, (10, 20, 30)), (20, (25, 30))):  # killed after step 30, continued from 20
        log = open_log(tmp_path, step=step, tensorboard=True)
        for value in values:
            log.write(value, 0.0, {"loss": float(value + step)})
        log.close()
    found = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert "b: 1" in found.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert str(tmp_path / "report.html") in found.Tensors("report/text_summary")[0].tensor_proto.string_val[0].decode()
    events = found.Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(10, 10.0), (20, 20.0), (25, 45.0), (30, 50.0)]
    assert steps(tmp_path) == [10, 20, 25, 30]


@pytest.mark.parametrize(
    ("module", "config"), [("torch.utils.tensorboard", {"tensorboard": True}), ("wandb", {"wandb": "project"})]
)
def test_what_is_not_installed_is_refused_with_the_command(
    tmp_path: Path, module: str, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 10}\n')
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not there
    extra = module.split(".")[-1]
    with pytest.raises(ValueError, match=rf"^log.{extra} needs {extra}: pip install 'fastrdm\[{extra}\]'$"):
        open_log(tmp_path, **config)
    assert steps(tmp_path) == [10]


def test_wandb_gets_the_settings_and_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Run:
        summary: dict[str, str] = {}  # noqa: RUF012

        def log(self, metrics: dict[str, float], step: int) -> None:
            calls.append((metrics, step))

        def finish(self) -> None:
            calls.append("finished")

    def init(**arguments: Any) -> Run:
        calls.append(arguments)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    log = open_log(tmp_path, wandb="project")
    log.write(3, 0.0, {"loss": 1.0})
    log.close()
    opened, *rest = calls
    assert (opened["project"], opened["name"], opened["config"]) == ("project", tmp_path.name, {"a": {"b": 1}})
    assert rest == [({"loss": 1.0}, 3), "finished"]
    assert Run.summary == {"report": str(tmp_path / "report.html")}


def test_pictures_of_views_and_spectra_are_shown(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    specs = [ViewSpec(size=8, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)), ViewSpec(size=4)]
    white, black = torch.full((3, 3, 8, 8), 2.0), torch.full((3, 3, 4, 4), -9.0)
    picture = view_picture((white, black), specs)
    assert picture.shape == (16, 24, 3) and picture.dtype == np.uint8
    assert (picture[:8] == 255).all() and (picture[8:12, :4] == 0).all() and (picture[12:] == 128).all()
    log = open_log(tmp_path, tensorboard=True)
    log.show_views(5, (white, black), specs)
    log.append("spectra", 7, 1.0, {"tap": "online", "convention": "c", "ranks": [1, 2], "eigenvalues": [0.9, 0.1]})
    log.close()
    found = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (views,), (spectrum,) = found.Images("views"), found.Images("spectrum/online/c")
    assert (views.step, views.height, views.width, spectrum.step) == (5, 16, 24, 7)
    assert spectrum.width == 400
