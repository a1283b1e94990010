"""`fastrdm train --processes`: one line once, the run's own status, restarts for what they mend, no orphans."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fastrdm import cli
from fastrdm.runtime import checkpoint
from fastrdm.runtime.launch import Outcome, _Agent, _death, _tell

SMALL = [
    "quickstart.yaml",
    "encoder.width=4",
    "method.projector={hidden: 16, out: 12}",
    "loader.subset=80",
    "loader.batch_size=16",
    "loader.views.*.size=8",
    "evaluate.every=0st",
    "evaluate.baselines=false",
    "checkpoint.every=5st",
    "log.every=5",
    "log.report=false",
    "train.device=cpu",
]
REFUSED = {
    "loader.batch_size=15": "loader.batch_size must be a multiple of 2 processes x train.accumulate=1, got 15",
    "optim.lrr=1": "unknown configuration key 'optim.lrr': did you mean 'optim.lr'?",
    "--nodes=0": "--nodes must be at least 1, got 0",
    "--nodes=2": "--rdzv-endpoint must be HOST:PORT of the first of 2 nodes, got None",
    "--nodes=x": "argument --nodes: invalid int value: 'x'; see fastrdm train --help",
    "--processes=0": "--processes must be a number from 1 up, or gpu where there are GPUs, got '0'",
}


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "fastrdm", "train", *words]


def run(*words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*words), capture_output=True, text=True, timeout=300, **more)


@pytest.mark.parametrize("word", REFUSED)
def test_what_is_wrong_is_told_before_any_worker_starts(
    word: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastrdm.runtime.launch.launch", None)  # never reached
    assert cli.train(["--processes", "2", *SMALL, word]) == cli.EXIT_REFUSED
    assert capsys.readouterr().err == f"fastrdm: {REFUSED[word]}\n"


def test_a_batch_that_nobody_set_is_left_to_the_workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("fastrdm.runtime.launch.launch", lambda words, how, *rest: 100 + how.processes)
    assert cli.train(["--processes", "3", "preset=byol", f"run={tmp_path / 'run'}"]) == 103


def test_options_of_several_processes_need_processes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.train(["--nodes", "2"]) == cli.EXIT_REFUSED
    assert "--nodes must be given together with --processes, got 2" in capsys.readouterr().err


def test_processes_are_left_out_under_torchrun(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    assert cli.train(["--processes", "2"]) == cli.EXIT_REFUSED
    assert "--processes must be left out under torchrun" in capsys.readouterr().err


def test_two_processes_train_and_what_a_worker_refuses_is_one_line(tmp_path: Path) -> None:
    done = run("--processes", "2", *SMALL, "train.length=10st", f"run={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished 10 steps") == 1 and "on 2 x cpu" in done.stdout
    done = run("--processes", "2", *SMALL, "loader.source=folder", "loader.root=none", f"run={tmp_path / 'run'}")
    assert done.returncode == cli.EXIT_REFUSED
    assert done.stderr == "fastrdm: loader.root must be a folder of images, got 'none', which is no folder\n"


def started(run: Path, words: list[str]) -> subprocess.Popen[str]:
    """A run of two processes that has saved a checkpoint."""
    long = [*SMALL, "train.length=100000st", f"run={run}", *words]
    process = subprocess.Popen(
        command("--processes", "2", *long), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for _ in range(1200):
        if checkpoint.existing(run) or process.poll() is not None:
            break
        time.sleep(0.1)
    assert process.poll() is None and checkpoint.existing(run)
    return process


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in children.read_text().split()]


def test_a_signal_stops_the_run_with_75(tmp_path: Path) -> None:
    process = started(tmp_path / "run", [])
    process.send_signal(signal.SIGUSR1)
    said, errors = process.communicate(timeout=120)
    assert process.returncode == cli.EXIT_STOPPED, errors
    assert said.count("asked to stop: saved at step") == 1 and errors == ""


def test_no_worker_outlives_its_launcher(tmp_path: Path) -> None:
    process = started(tmp_path / "run", [])
    workers = workers_of(process)
    assert len(workers) >= 2
    process.kill()
    process.wait()
    for _ in range(600):
        alive = [pid for pid in workers if Path(f"/proc/{pid}").exists() and " Z " not in _stat(pid)]
        if not alive:
            break
        time.sleep(0.1)
    assert alive == []


def _stat(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return " Z "


def test_a_killed_worker_is_started_again_where_that_is_allowed(tmp_path: Path) -> None:
    process = started(tmp_path / "run", ["--max-restarts", "1"])
    before = workers_of(process)
    os.kill(before[-1], signal.SIGKILL)
    for _ in range(1200):
        now = workers_of(process)
        if len(set(now) - set(before)) >= 2:
            break
        time.sleep(0.1)
    assert len(set(now) - set(before)) >= 2, "new workers"
    os.kill(now[-1], signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == cli.EXIT_FAILED
    assert "was ended by SIGKILL" in errors.splitlines()[-1]


def test_what_workers_tell_is_told_once_and_their_status_is_the_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert _tell([Outcome(0, ""), Outcome(3, ""), Outcome(3, "")]) == 3
    assert _tell([Outcome(2, "fastrdm: a"), Outcome(2, "fastrdm: a"), Outcome(2, "fastrdm: b")]) == 2
    assert capsys.readouterr().err == "fastrdm: a\nfastrdm: b\n"
    assert _tell([]) == 0


def test_outcomes_end_restarts(tmp_path: Path) -> None:
    (tmp_path / "1").write_text('[75, ""]')
    (tmp_path / "0").write_text("[0, ")  # being written
    agent = _Agent.__new__(_Agent)
    agent.folder, agent._failures = tmp_path, {}
    assert agent.outcomes() == {1: Outcome(75, "")}
    assert agent.ended() == [Outcome(75, "")]


def test_deaths_in_words() -> None:
    assert _death(-9) == "was ended by SIGKILL"
    assert _death(1).startswith("ended with status 1")
