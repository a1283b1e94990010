"""The folder of a run: nothing of others is touched, and one run at a time lives in it."""

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fastrdm.runtime import run_folder
from fastrdm.runtime.run_folder import LOCK, RunFolder

OWNER = {"host": "elsewhere", "boot": "b", "pid": 7, "since": "2026-01-01 00:00:00"}


def hold(path: Path, said: list[str] | None = None) -> Any:
    return RunFolder(path).held((said if said is not None else []).append)


@pytest.mark.parametrize("content", [[], ["slurm-7.out", "nohup.log"]])
def test_new_empty_and_a_schedulers_folders_are_taken(tmp_path: Path, content: list[str]) -> None:
    run = tmp_path / "a" / "run"
    if content:
        run.mkdir(parents=True)
    for name in content:
        (run / name).write_text("x")
    RunFolder(run).check()
    assert run.exists() == bool(content), "looking makes no folder"
    with hold(run):
        assert (run / LOCK).exists()


def test_a_folder_with_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    for name in ("annotations.jsonl", "a.jpg", "b.jpg", "c.jpg"):
        (tmp_path / name).write_text(name)
    with pytest.raises(
        ValueError, match=r"^run must be a new folder, an empty one or that of a run, got .*, which holds a"
    ):
        RunFolder(tmp_path).check()
    with pytest.raises(ValueError, match="which holds"), hold(tmp_path):
        pass
    assert sorted(os.listdir(tmp_path)) == ["a.jpg", "annotations.jsonl", "b.jpg", "c.jpg"]
    assert (tmp_path / "annotations.jsonl").read_text() == "annotations.jsonl"


def test_a_folder_of_a_run_is_known_by_its_lock_or_its_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "notes.jsonl").write_text("{}")
    (tmp_path / "checkpoints" / "step-00000004").mkdir(parents=True)
    RunFolder(tmp_path).check()
    (tmp_path / "checkpoints" / "step-00000004").rmdir()
    with pytest.raises(ValueError, match="which holds"):
        RunFolder(tmp_path).check()
    (tmp_path / LOCK).touch()
    RunFolder(tmp_path).check()


def test_what_cannot_be_a_folder_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"^run must be a folder, got .*file: .*file is a file$"):
        RunFolder(tmp_path / "file").check()
    with pytest.raises(ValueError, match=r"^run must be a folder, got .*/run: .*file is a file$"):
        RunFolder(tmp_path / "file" / "run").check()
    long = tmp_path / ("x" * 300)
    with pytest.raises(ValueError, match=r"cannot be used as a folder: File name too long$") as refused:
        RunFolder(long).check()
    assert len(str(refused.value)) < 200


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(ValueError, match=r"^run must be a folder that can be written, got .*/run: .* cannot$"):
        RunFolder(tmp_path / "run").check()


def test_a_second_run_in_a_folder_is_refused_and_told_who_lives_there(tmp_path: Path) -> None:
    with hold(tmp_path):
        here = rf"is in use by process {os.getpid()} on {platform.node()} since 20"
        for _ in range(2):
            with pytest.raises(ValueError, match=here), hold(tmp_path):
                pass
    with hold(tmp_path):  # and is free afterwards
        pass
    assert (tmp_path / LOCK).read_text() == ""


def test_the_lock_of_a_killed_process_is_taken_over_at_once(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from fastrdm.runtime.run_folder import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).held(print): os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)])
    assert done.returncode == -9
    assert json.loads((tmp_path / LOCK).read_text())["host"] == platform.node()
    began = time.monotonic()
    with hold(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert time.monotonic() - began < 2


def test_another_machines_run_is_waited_for_until_it_is_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "STALE", 1.0)
    (tmp_path / LOCK).write_text(json.dumps(OWNER))
    said: list[str] = []
    began = time.monotonic()
    with hold(tmp_path, said):
        assert time.monotonic() - began > 0.7
    assert len(said) == 1 and "was in use on elsewhere: waiting" in said[0]


def test_a_long_silent_machine_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(json.dumps(OWNER))
    os.utime(tmp_path / LOCK, (time.time() - 1000,) * 2)
    said: list[str] = []
    with hold(tmp_path, said):
        pass
    assert said == []


@pytest.mark.parametrize("locks", [True, False])
def test_a_sign_of_life_of_another_machine_keeps_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool
) -> None:
    monkeypatch.setattr(run_folder, "STALE", 30.0)
    if not locks:
        monkeypatch.setattr(run_folder.fcntl, "flock", no_locks)
    (tmp_path / LOCK).write_text(json.dumps(OWNER))
    beats = iter([0, 0, 1, 1, 1])
    now = time.time()

    def sleep(seconds: float) -> None:
        os.utime(tmp_path / LOCK, (now + next(beats),) * 2)

    monkeypatch.setattr(run_folder.time, "sleep", sleep)
    with pytest.raises(ValueError, match=r"is in use by process 7 on elsewhere since 2026-01-01"), hold(tmp_path):
        pass
    assert json.loads((tmp_path / LOCK).read_text()) == OWNER


def no_locks(*_: object) -> None:
    raise OSError(95, "Operation not supported")


def test_without_locks_signs_of_life_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder.fcntl, "flock", no_locks)
    monkeypatch.setattr(run_folder, "STALE", 0.5)
    with hold(tmp_path):
        pass
    (tmp_path / LOCK).write_text(json.dumps(RunFolder(tmp_path)._me))  # this machine's, but is it alive?
    said: list[str] = []
    with hold(tmp_path, said):
        pass
    assert len(said) == 1


def test_a_run_that_stood_still_notices_that_its_folder_was_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "HEARTBEAT", 0.05)
    folder = RunFolder(tmp_path)
    with folder.held(print):
        (tmp_path / LOCK).write_text(json.dumps(OWNER))
        for _ in range(100):
            if folder.taken_by:
                break
            time.sleep(0.05)
        assert folder.taken_by == OWNER
    assert json.loads((tmp_path / LOCK).read_text()) == OWNER, "it is the other one's"


def test_heartbeats_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "HEARTBEAT", 0.05)
    with hold(tmp_path):
        os.utime(tmp_path / LOCK, (1, 1))
        for _ in range(100):
            if (tmp_path / LOCK).stat().st_mtime > 1:
                break
            time.sleep(0.05)
        assert (tmp_path / LOCK).stat().st_mtime > 1
