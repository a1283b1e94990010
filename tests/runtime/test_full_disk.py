"""A full disk, or a place that cannot be written, at every write: one line, nothing lost, the run goes on if it can."""

import json
import os
import resource
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastrdm import cli, trainer
from fastrdm.files import whole, write_whole
from fastrdm.runtime import checkpoint
from fastrdm.runtime.run_folder import LOCK
from fastrdm.worker import OUTCOMES

SMALL = [
    *("encoder.name=resnet_small", "encoder.width=4", "method.projector={hidden: 16, out: 12}", "loader.subset=48"),
    *("loader.batch_size=16", "loader.views.*.size=8", "train.length=4st", "optim.warmup=1st", "evaluate.every=0st"),
    *("evaluate.baselines=false", "checkpoint.every=1st", "log.every=1", "log.report=false"),
]
STEP = trainer.Trainer.train_step


@contextmanager
def full_disk() -> Iterator[None]:
    """No byte can be written to any file: the system refuses it, to every library and to child processes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run a command; its status, and what it printed, in which no traceback may be."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: str) -> tuple[int, str]:
        status = cli.run(name, arguments)
        told = capsys.readouterr()
        assert "Traceback" not in told.err + told.out
        return status, told.out + told.err

    return run


def wandb_stand_in() -> Any:
    made = types.SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None, summary={})
    return types.SimpleNamespace(init=lambda **_: made, Image=lambda picture: picture)


# What stands in the way of each file of a run, the settings that have it written, the status, and what is told.
IN_THE_WAY = {
    "config.yaml": ([], 0, "training goes on, but run/config.yaml could not be written: Is a directory"),
    "train.log": ([], 0, "lines of run/train.log are lost: Is a directory"),
    "report.html": (["log.report=true"], 0, "no report: "),
    "trace_steps_2-2.json.gz": (["log.profile={start: 1st, steps: 1}"], 0, "training goes on, but run/trace_steps_2-2"),
    "wandb-id.txt": (["log.wandb=project"], 0, "note: no metrics for WandB: IsADirectoryError"),
    "tensorboard": (["log.tensorboard=true"], 0, "note: no metrics for TensorBoard: "),
    "summary.json": ([], 1, "run/summary.json could not be written: Is a directory"),
    "metrics.jsonl": ([], 1, "run/metrics.jsonl: Is a directory"),
    "spectra.jsonl": ([], 1, "run/spectra.jsonl: Is a directory"),
    "checkpoints": ([], 1, "run/checkpoints/step-00000004 could not be written: "),
}


@pytest.mark.parametrize("name", IN_THE_WAY)
def test_a_file_of_the_run_that_cannot_be_written(
    name: str, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, expected, said = IN_THE_WAY[name]
    if name == "tensorboard":
        pytest.importorskip("tensorboard")
    monkeypatch.setitem(sys.modules, "wandb", wandb_stand_in())
    Path("run").mkdir()
    Path("run", LOCK).touch()
    Path("run", name).touch() if name in ("tensorboard", "checkpoints") else Path("run", name).mkdir()
    status, told = run("train", *SMALL, "run=run", *settings)
    assert status == expected and said in told, told
    if status == 0:
        assert "finished 4 steps" in told
        assert checkpoint.existing(Path("run"))[0].name == "step-00000004"
        assert len(Path("run", "metrics.jsonl").read_text().splitlines()) >= 4


def test_the_disk_of_a_run_fills_and_has_room_again(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with full_disk():
        pass  # the limit can be set and lifted
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def train_step(self: trainer.Trainer, batch: Any) -> Any:
        if self.step + 1 == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
        return STEP(self, batch)

    monkeypatch.setattr(trainer.Trainer, "train_step", train_step)
    extra = ["log.tensorboard=true"] if find_spec("tensorboard") else []
    try:
        status, told = run("train", *SMALL, "run=run", *extra)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == cli.EXIT_FAILED
    assert told.count("training goes on, but") == 2, "the line of metrics, and the checkpoint of step 3"
    assert "run/checkpoints/step-00000004 could not be written" in told.splitlines()[-1]
    assert [path.name for path in checkpoint.existing(Path("run"))] == ["step-00000002", "step-00000001"]
    assert [json.loads(line)["step"] for line in Path("run", "metrics.jsonl").read_text().splitlines()] == [1, 2]
    monkeypatch.setattr(trainer.Trainer, "train_step", STEP)
    status, told = run("train", *SMALL, "run=run", *extra)
    assert status == 0 and "continuing from run/checkpoints/step-00000002" in told
    assert {json.loads(line)["step"] for line in Path("run", "metrics.jsonl").read_text().splitlines()} == {1, 2, 3, 4}


def test_a_run_cannot_begin_on_a_full_disk(run: Callable[..., Any]) -> None:
    with full_disk():
        status, told = run("train", *SMALL, "run=run")
    assert status == cli.EXIT_REFUSED and told.splitlines()[-1].startswith(
        "fastrdm: run=run cannot be used as a folder: "
    )
    assert run("train", *SMALL, "run=run")[0] == 0


def test_old_checkpoints_that_cannot_be_removed_end_no_run(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checkpoint.shutil.rmtree

    def rmtree(path: Path, **more: Any) -> None:
        if Path(path).name.startswith("step-") and Path(path).name != "step-00000004":
            raise PermissionError(13, "Permission denied")
        real(path, **more)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", rmtree)
    _, told = run("train", *SMALL, "run=run", "train.length=3st", "checkpoint.keep=1", "checkpoint.best=false")
    assert "training goes on, but run/checkpoints/step-00000001 could not be removed: Permission denied" in told
    assert checkpoint.existing(Path("run"))[0].name == "step-00000003"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, and a folder of images beside it."""
    root = tmp_path_factory.mktemp("finished")
    random = np.random.default_rng(0)
    for label in "ab":
        (root / "images" / label).mkdir(parents=True)
        for number in range(6):
            picture = Image.fromarray(random.integers(0, 256, (20, 20, 3), np.uint8))
            picture.save(root / "images" / label / f"{number}.jpg")
    assert cli.train([*SMALL, f"run={root / 'run'}"]) == 0
    return root


COMMANDS = {
    "eval": ["RUN", "--method", "knn", "--out", "results"],
    "analyze": ["RUN", "--images", "40", "--replicates", "10"],
    "report": ["RUN", "--out", "page.html"],
    "export": ["RUN", "--layout", "safetensors", "--out", "x/encoder.safetensors"],
    "embed": ["RUN", "IMAGES", "--out", "features", "--parquet"],
    "explore": ["RUN", "IMAGES", "--out", "map.html"],
    "pack": ["IMAGES", "packed", "--workers", "1", "--labels", "folders"],
    "pack raw": ["IMAGES", "packed", "--workers", "1", "--labels", "folders", "--mode", "raw", "--size", "16"],
}
LEFT = {"pack": {"packed.partial"}, "pack raw": {"packed.partial"}, "embed": {"features"}}  # where the work goes on


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_on_a_full_disk(name: str, finished: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    if name == "embed":
        pytest.importorskip("pyarrow")
    words = [
        {"RUN": str(finished / "run"), "IMAGES": str(finished / "images")}.get(word, word) for word in COMMANDS[name]
    ]
    held = sorted(path.name for path in (finished / "run").iterdir())
    with full_disk():
        status, told = run(name.split()[0], *words)
    assert status in (cli.EXIT_FAILED, cli.EXIT_REFUSED), told
    last = told.splitlines()[-1]
    assert last.startswith("fastrdm: ") and ("File too large" in last or "Errno 27" in last), told
    named = {"eval": "results/eval-knn-digits.json", "analyze": "analysis.json", "embed": "features/", "pack": "packed"}
    assert named.get(
        name.split()[0], words[-1] if name in ("report", "explore") else "x/encoder.safetensors"
    ) in last or (words[-1] in last), told
    assert sorted(path.name for path in (finished / "run").iterdir()) == held
    left = {path.name for path in tmp_path.iterdir() if not path.is_dir() or any(path.iterdir())}
    assert left <= LEFT.get(name, set()), "nothing half-written is left"
    assert run(name.split()[0], *words)[0] == 0, "with room again, the same command works"


def test_standard_output_that_cannot_be_written() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "fastrdm", "presets"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == cli.EXIT_FAILED
    assert done.stderr.count("\n") == 1 and "No space left on device" in done.stderr


def test_a_worker_that_cannot_tell_its_launcher_how_it_ended(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(OUTCOMES, str(tmp_path / "gone"))
    assert cli.train(["optim.lr=fast"]) == cli.EXIT_REFUSED
    told = capsys.readouterr().err
    assert "optim.lr" in told and "gone: No such file or directory" in told


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_was_there_stays_and_nothing_else_is_left(kind: str, tmp_path: Path) -> None:
    place = tmp_path / "place"
    write_whole(place, "old")
    with pytest.raises(OSError, match="broken") as raised, whole(place, RuntimeError) as partial:
        if kind == "folder":
            partial.mkdir()
            (partial / "part").write_text("new")
        else:
            partial.write_text("new")
        raise RuntimeError("broken")
    assert raised.value.filename == str(place)
    assert os.listdir(tmp_path) == ["place"] and place.read_text() == "old"
