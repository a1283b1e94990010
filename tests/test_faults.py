"""What goes wrong in a run ends in one clear line, a distinct exit code, and nothing lost."""

import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastrdm import cli, trainer
from fastrdm.runtime import checkpoint

ARGUMENTS = [
    "quickstart.yaml",
    "train.length=6st",
    "optim.warmup=1st",
    "encoder.width=4",
    "method.projector.hidden=16",
    "method.projector.out=12",
    "loader.subset=80",
    "loader.batch_size=16",
    "loader.views.*.size=8",
    "evaluate.every=3st",
    "checkpoint.every=2st",
    "log.every=2",
]
STEP = trainer.Trainer.train_step


@pytest.fixture
def run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def run(*arguments: str) -> tuple[int, str]:
        code = cli.train([*ARGUMENTS, f"run={tmp_path / 'run'}", *arguments])
        told = capfd.readouterr()
        assert "Traceback" not in told.err
        return code, told.out + told.err

    return run


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[trainer.Trainer], None]) -> None:
    def train_step(self: trainer.Trainer, batch: Any) -> Any:
        if self.step + 1 == number:
            act(self)
        return STEP(self, batch)

    monkeypatch.setattr(trainer.Trainer, "train_step", train_step)


def saved_steps(tmp_path: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("step-")) for p in checkpoint.existing(tmp_path / "run"))


@pytest.mark.parametrize("number", cli.STOP_SIGNALS)
def test_a_signal_finishes_the_step_saves_and_the_same_command_goes_on(
    run: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int
) -> None:
    # Under nohup SIGHUP is ignored, and a run then goes on through it.
    before = signal.SIG_DFL
    signal.signal(number, before)
    at_step(monkeypatch, 3, lambda _: os.kill(os.getpid(), number))
    code, told = run()
    assert code == cli.EXIT_STOPPED == 75
    assert "saved at step 3" in told and "the same command continues" in told
    assert signal.getsignal(number) == before
    assert 3 in saved_steps(tmp_path)
    assert not (tmp_path / "run" / "summary.json").exists(), "it is not finished"
    monkeypatch.undo()
    code, told = run()
    assert code == 0 and "continuing from" in told and "finished 6 steps" in told
    code, told = run()
    assert code == 0 and "continuing from" in told, "a finished run tells its summary again"
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["knn"] > 0


def test_a_loss_that_is_not_finite_stops_with_the_range_of_steps(
    run: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def poison(self: trainer.Trainer) -> None:
        with torch.no_grad():
            next(self.method.online.projector.parameters()).fill_(torch.nan)

    at_step(monkeypatch, 4, poison)
    code, told = run()
    assert code == cli.EXIT_FAILED
    assert "the loss was not finite in steps 4 to 4" in told
    assert saved_steps(tmp_path) == [2], "nothing poisoned was saved, the sound checkpoint is there"


def test_a_full_disk_costs_one_checkpoint_not_the_run(
    run: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole, calls = checkpoint.save_file, []

    def save_file(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(*arguments)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    code, told = run()
    assert code == 0
    assert "training goes on" in told and "No space left on device" in told
    assert saved_steps(tmp_path) == [2, 6]


def test_a_last_checkpoint_that_cannot_be_written_is_an_error_and_keeps_the_one_before(
    run: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = checkpoint.save_file

    def save_file(tensors: Any, path: Path) -> None:
        if "00000006" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    code, told = run()
    assert code == cli.EXIT_FAILED
    assert "No space left on device" in told
    assert saved_steps(tmp_path) == [2, 4]
    monkeypatch.undo()
    assert run()[0] == 0, "with space again the same command finishes"


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    run: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    assert run()[0] == 0
    expected = (checkpoint.folder(tmp_path / "run", 6) / checkpoint.WEIGHTS).read_bytes()
    newest = checkpoint.folder(tmp_path / "run", 6) / checkpoint.STATE
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    code, told = run()
    assert code == 0
    assert "checkpoint not used" in told and "state.pt is not what was written" in told
    assert "continuing from" in told and "step-00000004" in told
    assert (checkpoint.folder(tmp_path / "run", 6) / checkpoint.WEIGHTS).read_bytes() == expected


def test_checkpoints_that_are_all_damaged_are_an_error(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    assert run()[0] == 0
    for path in checkpoint.existing(tmp_path / "run"):
        (path / checkpoint.META).write_text("{")
    code, told = run()
    assert code == cli.EXIT_FAILED
    assert "no usable checkpoint" in told and "another run=" in told


def test_a_run_of_another_configuration_is_not_continued(run: Callable[..., tuple[int, str]]) -> None:
    assert run()[0] == 0
    code, told = run("optim.lr=0.1", "train.seed=3")
    assert code == cli.EXIT_REFUSED
    assert "another configuration" in told and "optim.lr: 0.2 -> 0.1" in told and "train.seed: 0 -> 3" in told
    assert run("log.every=1")[0] == 0, "what changes neither weights nor order may differ"


@pytest.mark.parametrize("setting", ["train.length=0.001ep", "optim.warmup=7st"])
def test_lengths_that_do_not_fit_the_run_are_refused_before_any_work(
    run: Callable[..., tuple[int, str]], tmp_path: Path, setting: str
) -> None:
    code, told = run(setting)
    assert code == cli.EXIT_REFUSED and setting.split("=")[0] in told and setting.split("=")[1] in told
    assert not (tmp_path / "run").exists()


def test_half_a_metrics_line_of_a_killed_run_is_dropped(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    assert run()[0] == 0
    metrics = tmp_path / "run" / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole + '{"step": 7, "ep')
    assert run()[0] == 0
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()][-1] == 6


def picture_folder(root: Path, corrupt: int = 0) -> Path:
    """Two classes of twelve small JPEGs for each split, cut out of scikit-learn's photographs."""
    from sklearn.datasets import load_sample_images

    simplejpeg = pytest.importorskip("simplejpeg")
    for split in ("train", "val"):
        for name, image in zip(("china", "flower"), load_sample_images().images, strict=True):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(12):
                piece = image[10 * i : 10 * i + 90, 20 * i : 20 * i + 120].copy()
                (folder / f"{i:02d}.jpg").write_bytes(simplejpeg.encode_jpeg(piece))
    for i in range(corrupt):
        (root / "train" / "china" / f"{i:02d}.jpg").write_bytes(b"\xff\xd8 not a picture")
    return root


FILES = ("loader.source=folder", "loader.subset=null", "loader.batch_size=8", "evaluate.every=6st")


def test_an_unreadable_image_is_replaced_counted_and_named(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    root = picture_folder(tmp_path / "pictures", corrupt=1)
    code, told = run(*FILES, f"loader.root={root}", "loader.max_corrupt=0.1")
    assert code == 0, told
    assert "unreadable image" in told and "00.jpg" in told
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert max(json.loads(line).get("unreadable_images", 0) for line in lines) == 1


def test_too_many_unreadable_images_stop_the_run(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    root = picture_folder(tmp_path / "pictures", corrupt=6)
    code, told = run(*FILES, f"loader.root={root}", "loader.max_corrupt=0.1", "evaluate.baselines=false")
    assert code == cli.EXIT_FAILED
    assert "max_corrupt" in told and ".jpg" in told


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_folder_that_is_not_there_or_empty_is_refused_before_any_work(
    run: Callable[..., tuple[int, str]], tmp_path: Path, split: str
) -> None:
    code, told = run(*FILES, f"loader.root={tmp_path / 'nowhere'}")
    assert code == cli.EXIT_REFUSED and "nowhere" in told
    root = picture_folder(tmp_path / "pictures")
    (root / split / "lonely").mkdir()
    code, told = run(*FILES, f"loader.root={root}")
    assert code == cli.EXIT_REFUSED and "lonely" in told
    assert not (tmp_path / "run").exists()


def test_splits_of_other_classes_are_trained_on_and_not_measured(
    run: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    root = picture_folder(tmp_path / "pictures")
    (root / "val" / "flower").rename(root / "val" / "blossom")
    code, told = run(*FILES, f"loader.root={root}")
    assert code == 0, told
    assert "k-NN and probe are not measured: the two splits of folder do not have the same classes" in told
    assert "1 only in training (flower), 1 only in test (blossom)" in told
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert '"knn' not in lines and '"probe"' not in lines


PARTS = {
    "optimizer": {"state": {}, "param_groups": []},
    "losses": {"sum": "x"},
    "monitor": {},
    "best": {"knn": "x"},
    "random": [{"cpu": torch.zeros(3)}],
    "loader": {"position": 0},
}


@pytest.mark.parametrize("part", PARTS)
def test_a_resealed_state_that_is_no_state_is_named(
    run: Callable[..., tuple[int, str]], tmp_path: Path, part: str
) -> None:
    assert run("train.length=1st", "optim.warmup=0st", "evaluate.baselines=false", "log.report=false")[0] == 0
    found = checkpoint.read(checkpoint.folder(tmp_path / "run", 1))
    meta = {key: found.meta[key] for key in ("metrics", "config", "versions")}
    checkpoint.save(tmp_path / "run", 1, found.weights, {**found.state, part: PARTS[part]}, meta)
    code, told = run("train.length=1st", "optim.warmup=0st", "evaluate.baselines=false", "log.report=false")
    assert code == cli.EXIT_FAILED
    assert f"step-00000001 cannot be used: state.pt: {part}: " in told and "no usable checkpoint" in told
