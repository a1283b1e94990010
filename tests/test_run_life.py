"""The life of a run: whose folder it is, what a restart may change, what a full disk or a signal does, what it says."""

import errno
import json
import os
import re
import signal
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from fastrdm import cli, trainer
from fastrdm.runtime import log
from fastrdm.runtime.run_folder import RunFolder

SMALL = [
    "quickstart.yaml",
    "train.length=6st",
    "optim.warmup=1st",
    "encoder.width=4",
    "method.projector={hidden: 16, out: 12}",
    "loader.subset=80",
    "loader.batch_size=16",
    "loader.views.*.size=8",
    "evaluate.every=0st",
    "evaluate.baselines=false",
    "checkpoint.every=2st",
    "log.every=2",
    "log.report=false",
]
STEP = trainer.Trainer.train_step
Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str) -> tuple[int, str]:
        code = cli.train([*SMALL, f"run={tmp_path / 'run'}", *arguments])
        told = capfd.readouterr()
        assert "Traceback" not in told.err
        return code, told.out + told.err

    return run


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Sixteen images of two classes, and four for evaluation."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        for name in ("a", "b"):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(generator.integers(0, 256, (12, 14, 3), np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "pictures"


FILES = ["loader.source=folder", "loader.subset=null", "loader.batch_size=8"]


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[trainer.Trainer], None]) -> None:
    def train_step(self: trainer.Trainer, batch: Any) -> Any:
        if self.step + 1 == number:
            act(self)
        return STEP(self, batch)

    monkeypatch.setattr(trainer.Trainer, "train_step", train_step)


# shared/cases/01: a user's .jsonl files in the folder named by run= were emptied
def test_a_folder_with_other_files_is_refused_and_nothing_in_it_changes(run: Run, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "annotations.jsonl").write_text('{"image": 1}\n')
    code, told = run()
    assert code == cli.EXIT_REFUSED and "which holds annotations.jsonl" in told and told.count("\n") == 1
    assert os.listdir(tmp_path / "run") == ["annotations.jsonl"]
    assert (tmp_path / "run" / "annotations.jsonl").read_text() == '{"image": 1}\n'


def test_files_put_into_a_runs_folder_later_stay_as_they_are(run: Run, tmp_path: Path) -> None:
    assert run()[0] == 0
    (tmp_path / "run" / "notes.jsonl").write_text('{"note": 1}\n')
    (tmp_path / "run" / "checkpoints" / ".partial-x").touch()
    assert run()[0] == 0
    assert (tmp_path / "run" / "notes.jsonl").read_text() == '{"note": 1}\n'


# shared/cases/04, 10: the same command twice at a time
def test_a_second_run_in_the_folder_is_refused_while_the_first_lives(run: Run, tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run").held(print):
        code, told = run()
    assert code == cli.EXIT_REFUSED and f"is in use by process {os.getpid()}" in told
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert run()[0] == 0


# shared/cases/16 and 09: run= that is a file, has 300 letters, lies in what cannot be written
@pytest.mark.parametrize("name", ["file", "file/run", "x" * 300])
def test_a_run_that_can_be_no_folder_is_refused_in_one_line(run: Run, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    code, told = run(f"run={tmp_path / name}")
    assert code == cli.EXIT_REFUSED
    assert told.startswith("fastrdm: run") and told.count("\n") == 1 and len(told) < 500
    assert sorted(os.listdir(tmp_path)) == ["file"]


# shared/cases/09: the first line of metrics.jsonl is damaged
def test_a_damaged_line_of_metrics_is_left_out_named_and_kept_beside(run: Run, tmp_path: Path) -> None:
    assert run()[0] == 0
    metrics = tmp_path / "run" / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    metrics.write_text("\n".join(['{"step": 1, "ep', *lines[1:]]) + "\n")
    code, told = run()
    assert code == 0 and f"1 damaged lines of {metrics} are left out" in told
    assert all(json.loads(line)["step"] for line in metrics.read_text().splitlines())
    assert metrics.with_suffix(".damaged").read_text().startswith('{"step": 1, "ep\n')


FREE = [
    "log.every=3",
    "loader.workers=1",
    "loader.prefetch=2",
    "loader.max_corrupt=0.5",
    "checkpoint.keep=1",
    "train.device=cpu",
    "train.hang_timeout=50",
    "evaluate.every=2st",
    "evaluate.k=3",
    "analysis.replicates=20",
    "monitor.every=0st",
]


def test_free_settings_change_neither_the_folder_nor_the_run(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("run=null")[0] == 0
    (folder,) = os.listdir("runs")
    for setting in FREE:
        code, told = run("run=null", setting)
        assert code == 0 and "continuing from" in told, setting
    assert os.listdir("runs") == [folder]


def test_another_spelling_of_the_data_sets_folder_is_the_same_run(
    run: Run, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pictures)
    for root in (".", "../pictures", str(pictures)):
        assert run(*FILES, f"loader.root={root}", "run=null")[0] == 0
    assert len(os.listdir("runs")) == 1


@pytest.mark.parametrize("change", ["content", "name", "fewer"])
def test_other_data_in_the_same_folder_is_noticed_and_named(run: Run, pictures: Path, change: str) -> None:
    assert run(*FILES, f"loader.root={pictures}")[0] == 0
    picture = pictures / "train" / "b" / "7.png"
    if change == "content":
        Image.new("RGB", (12, 14)).save(picture)
    elif change == "name":
        (pictures / "train" / "b").rename(pictures / "train" / "c")
        (pictures / "val" / "b").rename(pictures / "val" / "c")
    else:
        picture.unlink()
    code, told = run(*FILES, f"loader.root={pictures}")
    assert code == cli.EXIT_REFUSED
    named = {"content": "other content", "name": "other classes", "fewer": "images: 16 -> 15; other labels"}[change]
    assert "holds a run on other data than" in told and named in told


def test_a_moved_data_set_is_the_same(run: Run, pictures: Path) -> None:
    assert run(*FILES, f"loader.root={pictures}")[0] == 0
    pictures.rename(pictures.with_name("elsewhere"))
    code, told = run(*FILES, f"loader.root={pictures.with_name('elsewhere')}")
    assert code == 0 and "continuing from" in told


def test_what_was_chosen_automatically_is_stored_and_kept(run: Run, tmp_path: Path) -> None:
    code, told = run("train.precision=bf16")
    assert code == 0
    code, told = run()
    assert code == 0 and "bf16 (as this run began)" in told, told
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    train, loader = stored["train"], stored["loader"]
    assert (train["precision"], train["compile"], train["capture"]) == ("bf16", False, False)
    assert loader["engine"] == "resident" and loader["workers"] >= 1
    code, told = run("train.precision=fp32")
    assert code == cli.EXIT_REFUSED and "train.precision: bf16 -> fp32" in told


# shared/cases/11: the disk is full when a line of metrics is written
def test_a_full_disk_at_a_log_line_costs_nothing(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    full, real = [False], Path.open

    def path_open(self: Path, mode: str = "r", *arguments: Any, **more: Any) -> Any:
        if full[0] and mode == "ab" and self.suffix in (".jsonl", ".log"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, mode, *arguments, **more)

    monkeypatch.setattr(Path, "open", path_open)
    at_step(monkeypatch, 2, lambda _: full.__setitem__(0, True))
    code, told = run("log.every=1", "train.length=5st")
    assert code == 0
    assert told.count("training goes on, but") == 1 and "metrics.jsonl could not be written: No space left" in told
    assert "lines of" in told and "are lost: No space left on device" in told
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1


def test_lines_that_waited_for_space_are_written_in_order(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    full, real = [False], Path.open

    def path_open(self: Path, mode: str = "r", *arguments: Any, **more: Any) -> Any:
        if full[0] and mode == "ab":
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, mode, *arguments, **more)

    monkeypatch.setattr(Path, "open", path_open)
    at_step(monkeypatch, 2, lambda _: full.__setitem__(0, True))
    whole = trainer.Trainer.save

    def save(self: trainer.Trainer, must: bool) -> None:
        full[0] = False
        whole(self, must)

    monkeypatch.setattr(trainer.Trainer, "save", save)
    assert "are lost" not in run("log.every=1", "checkpoint.every=4st")[1]
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and set(steps) == {1, 2, 3, 4, 5, 6}


def test_half_a_line_on_a_full_disk_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = log.RunLog(log.LogConfig(), tmp_path, 0, {}, True)
    lines.append("metrics", 1, 0.0, {})
    whole = (tmp_path / "metrics.jsonl").read_text()
    real = Path.open

    class Half:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> "Half":
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def tell(self) -> int:
            return int(self.file.tell())

        def write(self, data: bytes) -> None:
            self.file.write(data[:5])
            self.file.flush()
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda self, mode="r": Half(real(self, mode)))
        lines.append("metrics", 2, 0.0, {})
    assert (tmp_path / "metrics.jsonl").read_text() == whole
    lines.append("metrics", 3, 0.0, {})
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_a_summary_that_cannot_be_written_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Path.write_bytes

    def write_bytes(self: Path, data: bytes) -> int:
        if "summary.json" in self.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(self, data)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    code, told = run()
    assert code == cli.EXIT_FAILED and "summary.json could not be written: No space left on device" in told


def test_an_ignored_hangup_stays_ignored(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    """As `nohup fastrdm train` has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at_step(monkeypatch, 3, lambda _: os.kill(os.getpid(), signal.SIGHUP))
        code, told = run()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert code == 0 and "finished 6 steps" in told


# shared/cases/15: exp1/seed0 and exp2/seed0 were one run on the server
def test_runs_of_one_name_are_different_runs_on_wandb(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = []

    def init(**arguments: Any) -> Any:
        ids.append(arguments["id"])
        return types.SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None, summary={})

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for folder in ("exp1", "exp2", "exp1"):
        assert run(f"run={tmp_path / folder / 'seed0'}", "log.wandb=project")[0] == 0
    assert ids[0] != ids[1] and ids[0] == ids[2]


def test_a_sink_that_fails_ends_no_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    broken = types.SimpleNamespace(
        Image=lambda picture: picture, init=lambda **_: types.SimpleNamespace(log=fail, finish=lambda: None, summary={})
    )
    monkeypatch.setitem(sys.modules, "wandb", broken)
    code, told = run("log.wandb=project")
    assert code == 0 and told.count("note: W&B gets no more metrics: ConnectionError: no network") == 1


# shared/cases/21: run=~/exp1 and $SCRATCH made folders of these names
def test_home_and_variables_in_paths(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pictures: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    assert run(*FILES, "loader.root=$SCRATCH/pictures", "run=~/exp1")[0] == 0
    assert (tmp_path / "home" / "exp1" / "summary.json").exists()
    assert not (tmp_path / "~").exists() and not (tmp_path / "$SCRATCH").exists()
    monkeypatch.delenv("SCRATCH")
    code, told = run("run=${SCRATCH}/a")
    assert code == cli.EXIT_REFUSED
    assert (
        told
        == "fastrdm: run must be a path, got '${SCRATCH}/a' with ${SCRATCH}, which is no variable of the environment\n"
    )
    code, told = run("run=~nobody-of-this-name/a")
    assert code == cli.EXIT_REFUSED and "which is nobody's home" in told


@pytest.mark.parametrize(("variable", "value"), [("WORLD_SIZE", ""), ("RANK", ""), ("LOCAL_RANK", " ")])
def test_an_empty_variable_of_a_launcher_counts_as_none(
    run: Run, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    assert run("train.length=1st", "optim.warmup=0st")[0] == 0
    monkeypatch.setenv(variable, "many")
    code, told = run("train.length=1st", "optim.warmup=0st")
    assert code == cli.EXIT_REFUSED
    assert f"the environment variable {variable} must be a whole number, got 'many'" in told


def test_the_last_lines_accuracy_is_the_summarys(run: Run, tmp_path: Path) -> None:
    code, told = run("evaluate.every=4st")
    assert code == 0
    (line,) = (line for line in told.splitlines() if line.startswith("epoch 1.2/1.2"))
    (accuracy,) = re.findall(r"trained encoder ([0-9.]+) %", told)
    assert f"  k-NN {accuracy} %  " in line


def test_what_is_printed_is_in_the_log_file(run: Run, tmp_path: Path) -> None:
    code, told = run()
    assert code == 0
    assert (tmp_path / "run" / "train.log").read_text() == told
    first = told.splitlines()[0]
    code, again = run()
    assert (tmp_path / "run" / "train.log").read_text() == told + again and again.splitlines()[0] == first


def test_the_live_line_tells_the_rate_and_the_time_that_is_left(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "QUIET", 0.0)
    told = run()[1]
    lines = [line for line in told.splitlines() if line.startswith("epoch ")]
    assert [line.split()[1] for line in lines] == ["0.4/1.2", "0.8/1.2", "1.2/1.2"]
    assert all(re.search(r" \d+ s left  .* lr [0-9.e-]+  loss ", line) for line in lines[:2])
    assert "left" not in lines[2]


def test_what_to_try_next_fits_the_run(run: Run, pictures: Path, tmp_path: Path) -> None:
    assert "quickstart.yaml preset=byol" in run()[1]
    told = run(*FILES, f"loader.root={pictures}", f"run={tmp_path / 'other'}")[1]
    assert f"fastrdm eval {tmp_path / 'other'} measures" in told and "quickstart" not in told


def test_a_warmup_of_nobody_shrinks_and_a_users_is_refused(run: Run, tmp_path: Path) -> None:
    without = [word for word in SMALL if not word.startswith("optim.warmup")][1:]
    own = tmp_path / "own.yaml"
    own.write_text("preset: byol\n")  # whose warm-up is the default of 10 epochs
    small = [*without, "method.online.0.hidden=16", "encoder.name=resnet_small", f"run={tmp_path / 'run'}"]
    assert cli.train([str(own), *small]) == 0
    notes = (tmp_path / "run" / "train.log").read_text()
    assert "note: optim.warmup=10ep is longer than the run of 6 steps: 10 % of it is used" in notes
    code, told = run("optim.warmup=7st", f"run={tmp_path / 'other'}")
    assert code == cli.EXIT_REFUSED
    assert "optim.warmup must be no longer than the run of 6 steps, such as 10%, got '7st'" in told


def test_a_bank_larger_than_the_set_shrinks(run: Run) -> None:
    code, told = run("evaluate.bank=100000", "evaluate.every=3st")
    assert code == 0
    assert "note: evaluate.bank=100000, but the set has 80 images: k-NN uses all of them" in told


def test_a_width_that_no_other_library_has_is_told_before_training(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    small = [word for word in SMALL if "width" not in word]
    cli.train([*small, "encoder={name: resnet18, width: 8, stem: imagenet}", f"run={tmp_path / 'run'}"])
    told = capfd.readouterr().out
    assert "note: --layout torchvision cannot hold encoder.width=8" in told and "leave encoder.width out" in told
    assert told.index("encoder.width=8") < told.index("first step")
