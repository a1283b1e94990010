"""The analysis while a run goes on: what they write, that the run does not notice, and what they refuse."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastrdm.commands.analyze import analyze_run
from fastrdm.config import run_config
from fastrdm.runtime import checkpoint
from fastrdm.trainer import Trainer

PROGRAMS = Path(__file__).parents[1] / "programs"
STEPS = [0, 5, 10, 12]
PLAIN = {"step", "epoch", "loss", "learning_rate", "knn", "probe", "rankme", "lidar", "metrics", "curves"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("throughout")
    subprocess.run([sys.executable, str(PROGRAMS / "periodic_analysis.py"), str(out)], check=True, timeout=900)
    return out


def lines(run: Path, name: str) -> list[dict[str, Any]]:
    """What a run wrote, without what depends on the clock and the machine."""
    found = [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if ("/" in k and k != "analysis/seconds") or k in PLAIN} for line in found]


def metrics(run: Path) -> list[dict[str, float]]:
    return [{"step": line["step"], **line["metrics"]} for line in lines(run, "analysis")]


def weights(run: Path) -> bytes:
    return (checkpoint.folder(run, 12) / checkpoint.WEIGHTS).read_bytes()


def test_they_measure_at_the_start_every_so_often_and_at_the_end(runs: Path) -> None:
    """As lines of both files, as metrics of the run's end, and in words."""
    found = lines(runs / "on", "analysis")
    assert [line["step"] for line in found] == STEPS
    logged = [line for line in lines(runs / "on", "metrics") if "analysis/images" in line]
    assert [line["step"] for line in logged] == STEPS
    for one, other in zip(found, logged, strict=True):
        assert {f"analysis/{key}": value for key, value in one["metrics"].items()}.items() <= other.items()
        assert one["metrics"]["images"] == 80 and one["metrics"]["dimension"] == 12 and one["metrics"]["biased"] == 1
        assert {"scores/images", "difference/erank_l/unit/moment/low", "alignment/chance"} <= one["metrics"].keys()
        assert {"filter/root", "spectrum/target", "scores/filter/root"} <= one["curves"].keys()
        assert [i for i, _ in one["curves"]["spectrum/online"]] == list(range(1, 13))
    summary = json.loads((runs / "on" / "summary.json").read_text())
    assert summary["analysis/filter/body"] == found[-1]["metrics"]["filter/body"]
    assert summary["analysis/seconds"] > 0
    said = (runs / "on.0.log").read_text()
    assert said.count("analysis: rank online ") == 4
    assert "note: the analysis of 80 images is biased: a white spectrum of 12 dimensions reads 11" in said


def test_the_end_is_what_the_command_measures(runs: Path) -> None:
    """`fastrdm analyze` on the last checkpoint."""
    measured = analyze_run(runs / "on", images=80, replicates=10)
    expected = {"step": 12, **measured.metrics}  # on another number of threads
    assert metrics(runs / "on")[-1] == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(("off", "on"), [("off", "on"), ("two_off", "two")])
def test_the_run_does_not_notice(runs: Path, off: str, on: str) -> None:
    """Weights, running statistics, queue: bit for bit; everything else that was logged."""
    assert weights(runs / off) == weights(runs / on)
    without = [line for line in lines(runs / on, "metrics") if "analysis/images" not in line]
    assert lines(runs / off, "metrics") == without
    assert not (runs / off / "analysis.jsonl").exists()


def test_processes_do_not_change_the_metrics(runs: Path) -> None:
    for one, two in zip(metrics(runs / "on"), metrics(runs / "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-8, abs=1e-8)


def test_a_stopped_run_goes_on_with_the_same_metrics(runs: Path) -> None:
    assert weights(runs / "resumed") == weights(runs / "on")
    for name in ("analysis", "metrics"):
        assert lines(runs / "resumed", name) == lines(runs / "on", name)


def test_a_run_may_switch_them_on_later(runs: Path) -> None:
    assert weights(runs / "small") == weights(runs / "off")
    assert metrics(runs / "small") == [line for line in metrics(runs / "on") if line["step"] >= 10]


SMALL: dict[str, Any] = {
    "train": {"length": "2ep"},
    "optim": {"warmup": "0st"},
    "encoder": {"name": "resnet_small", "width": 8},
    "method": {"projector": {"hidden": 16, "out": 32}},
    "loader": {"source": "digits", "subset": 80, "batch_size": 40, "views": {"*": {"size": 8}}},
}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": "3ep"}, "analysis.every must be no longer than the run of 4 steps, got '3ep'"),
        ({"every": "1ep", "images": 81}, "analysis.images must be at most the 80 of .* in batches of 40, got 81"),
        ({"every": "1ep", "images": 31}, "analysis.images must be at least the 32 dimensions, and 10 times that"),
        ({"every": "soon"}, "analysis.every: .*a duration is written '50ep'"),
        ({"every": "1ep", "replicates": 9}, "analysis.replicates: .*greater than or equal to 10, got 9"),
        ({"every": "1ep", "split": "val"}, "analysis.split: .*'train' or 'test', got 'val'"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(run_config.resolve(SMALL, {"analysis": settings, "run": str(tmp_path / "run")}))


def test_a_set_of_fewer_images_than_dimensions_is_refused(tmp_path: Path) -> None:
    wide = {"method": {"projector": {"out": 96}}, "analysis": {"every": "1ep"}}
    with pytest.raises(ValueError, match=r"analysis.images must be at least the 96 dimensions.*, got 80"):
        Trainer(run_config.resolve(SMALL, wide, {"run": str(tmp_path / "run")}))


def test_the_test_split_can_be_measured(tmp_path: Path) -> None:
    settings = {"train": {"length": "1st"}, "evaluate": {"baselines": False}}
    settings |= {"analysis": {"every": "1%", "split": "test", "replicates": 10}}  # less than a step: each
    trainer = Trainer(run_config.resolve(SMALL, settings, {"run": str(tmp_path / "run")}))
    assert trainer.train()
    found = metrics(tmp_path / "run")
    assert [line["step"] for line in found] == [0, 1] and found[0]["images"] == 360
    assert found[1] != found[0] | {"step": 1}
