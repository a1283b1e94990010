"""Several processes: what hangs or is slow is named, what dies starts again, and only rank 0 writes."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fastrdm import cli
from fastrdm.kernels import collectives
from fastrdm.runtime import checkpoint, watchdog
from fastrdm.runtime.distributed import Processes
from fastrdm.runtime.watchdog import Pace, Position

ROOT = Path(__file__).parents[2]
PROGRAMS = ROOT / "tests" / "programs"


def errors_of_two_nodes(out: Path, case: str) -> str:
    """What the processes of a broken run said; it must end with the unbroken run's weights and metrics."""
    command = [sys.executable, str(PROGRAMS / "nodes.py"), str(out), case]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    for result in (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")):
        assert result["codes"] == [0, 0], result["errors"][-3000:]
        assert result["same"], "the weights differ"
        assert result["logged"], "metrics.jsonl differs"
        assert not result["written"], "a process other than rank 0 wrote into the run's folder"
    assert (out / case / "run.done").exists(), "nothing broke"
    return str(result["errors"])


def test_two_nodes_start_again_when_a_process_is_killed(tmp_path: Path) -> None:
    assert "not arrived" not in errors_of_two_nodes(tmp_path, "killed")


@pytest.mark.slow
def test_two_nodes_start_again_when_a_process_hangs_and_name_it(tmp_path: Path) -> None:
    errors = errors_of_two_nodes(tmp_path, "hanging")
    assert "no process has moved for 8 s: not arrived: rank 2; the others wait" in errors
    assert f"rank 2 at step 7: {socket.gethostname()}, trainer.py:" in errors


def test_ranks_outside_collectives_are_those_that_others_wait_for() -> None:
    positions = [Position(9, 4, True, "a"), Position(9, 4, False, "host b, native.py:7 in __next__")] * 2
    first, *rest = watchdog.hang(positions, 30)
    assert first == "fastrdm: no process has moved for 30 s: not arrived: rank 1, 3; the others wait"
    assert rest == [f"  rank {r} at step 4: host b, native.py:7 in __next__" for r in (1, 3)]


def test_without_such_ranks_it_is_the_one_with_fewest_signs_of_life() -> None:
    first, *rest = watchdog.hang([Position(9, 4, True, "a"), Position(8, 3, True, "b")], 30)
    assert first.endswith("not arrived: rank 1; the others wait")
    assert rest == ["  rank 1 at step 3: b"]


def test_a_hang_of_all_is_told_as_such() -> None:
    first, *rest = watchdog.hang([Position(9, 4, True, "a")] * 2, 30)
    assert "no rank is behind the others" in first and len(rest) == 2


HANGS = {
    "rank 0 sleeps": "not arrived: rank 0; the others wait",
    "rank 0 is stopped": "not arrived: rank 0, whose process does not answer",
    "rank 2 is stopped": "not arrived: rank 2; the others wait",
    "rank 1 sleeps, garbage": "not arrived: rank 1; the others wait",
}


@pytest.mark.parametrize("case", HANGS)
def test_whichever_rank_hangs_is_named_within_twice_the_timeout(case: str) -> None:
    command = [sys.executable, str(PROGRAMS / "hangs.py"), case]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert f"fastrdm: no process has moved for 3 s: {HANGS[case]}" in done.stderr, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["seconds"] < 6
    assert result["address"][0] == "127.0.0.1", "one node needs the loopback address only"
    assert 1 in result["codes"]


WRONG = [b"", b"\xff", b"{", b"3", b"[]", b"[1, 2, true, 3, 4]", b'[1, -2, true, "x", 4]', b'[1e400, 2, true, "x", 4]']
WRONG += [b'{"beats": 1}', b"[" * 100_000, b'["1", 2, true, "x", 4]', b'[1, 2, true, "x", 4, 5]']


@pytest.mark.parametrize("message", WRONG, ids=lambda message: repr(message[:20]))
def test_a_message_that_is_no_position_counts_for_nothing(message: bytes) -> None:
    assert watchdog.read_position(message) is None


def test_a_position_survives_the_way() -> None:
    told = Position(9, 4, True, "a" * 999, 3)
    assert watchdog.read_position(json.dumps(told).encode()) == told._replace(place="a" * 200)


def test_only_the_lowest_rank_that_still_answers_judges() -> None:
    judges = [watchdog.Judge(rank, 3, timeout=10) for rank in range(3)]
    for now in range(12):
        moving = [Position(5, 1, True, "a", 0), *(Position(5, 1, True, "b", now) for _ in range(2))]
        assert [judge.update(moving, float(now)) != [] for judge in judges] == [False, now > 10, False]
    first, second = judges[1].update(moving, 12.0)
    assert "not arrived: rank 0; the others wait" in first and second.endswith("a, and its process does not answer")
    assert watchdog.Judge(0, 3, 10).update([None] * 3, 0.0) == []


def test_the_stack_tells_who_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    entered, leave = threading.Event(), threading.Event()

    def block() -> int:
        entered.set()
        leave.wait()
        return 1

    def place_within(work: Callable[[], object]) -> tuple[str, bool]:
        entered.clear(), leave.clear()
        thread = threading.Thread(target=work)
        thread.start()
        entered.wait()
        found = watchdog._place(sys._current_frames()[thread.ident or 0])
        leave.set()
        thread.join()
        return found

    assert place_within(block)[1] is False
    monkeypatch.setattr(collectives, "process_count", block)
    assert place_within(lambda: collectives.reduce_over_processes(None, "sum"))[1] is True  # type: ignore[arg-type]


def test_late_data_and_slow_devices_are_named() -> None:
    even = [Pace(data=0.002, work=0.001)] * 3
    assert watchdog.slow([*even, Pace(0.003, 0.0011)], step=0.1) == {}
    found = watchdog.slow([*even, Pace(0.04, 0.001)], step=0.1)
    assert found.keys() == {"data 3"}
    assert found["data 3"].startswith("rank 3 gets its data late: it waits 40.0 ms of a step's 100.0 ms, the median")
    found = watchdog.slow([Pace(0.002, 0.003), *even], step=0.1)
    assert found.keys() == {"work 0"}
    assert "rank 0 computes slowly: 3.0 times" in found["work 0"]


def test_a_slow_rank_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    ranks = watchdog.StragglerDetector(Processes(0, 2, torch.device("cpu")))
    monkeypatch.setattr(watchdog.distributed, "gather_rows", lambda x: torch.cat([x * 0, x * 0 + 0.05]) + 1e-3)
    assert len(ranks.update(0.0, 0.1)) == 2, "data and work of rank 1"
    assert ranks.update(0.0, 0.1) == []


def test_one_process_is_not_watched() -> None:
    import torch

    alone = Processes(0, 1, torch.device("cpu"))
    guard = watchdog.Watchdog(alone, 1e-3)
    guard.heartbeat(1)
    guard.close()
    assert not guard._thread.is_alive()
    assert watchdog.StragglerDetector(alone).update(1.0, 1.0) == []
    assert watchdog.mixed_devices(alone) == []


def test_different_devices_are_told() -> None:
    (line,) = watchdog.mixed(["H100", "A100", "H100"])
    assert line.startswith("devices differ (H100: ranks 0, 2; A100: ranks 1)")
    assert watchdog.mixed(["H100"] * 3) == []


def test_a_batch_that_the_processes_do_not_divide_is_refused(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    start = Processes(0, 3, watchdog.torch.device("cpu"))
    monkeypatch.setattr("fastrdm.trainer.distributed.start", lambda *_: start)
    code = cli.train(["quickstart.yaml", "loader.batch_size=16", f"run={tmp_path / 'run'}"])
    assert code == cli.EXIT_REFUSED
    assert "loader.batch_size must be a multiple of 3 processes" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_torch_without_the_devices_backend_is_refused(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.distributed.is_backend_available", lambda name: False)
    assert cli.train(["quickstart.yaml", "train.device=cpu", f"run={tmp_path / 'run'}"]) == cli.EXIT_REFUSED
    assert "2 processes on cpu need torch built with gloo, which this one lacks" in capfd.readouterr().err
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.train(["quickstart.yaml", "train.device=cuda", f"run={tmp_path / 'run'}"]) == cli.EXIT_REFUSED
    assert "train.device must be 'cpu' or 'auto' here, got 'cuda'" in capfd.readouterr().err


SLURM = {
    "srun": 'echo "$@" > asked; echo $$ > pid; trap "exit $(cat status)" TERM\n'
    "while [ ! -e ended ]; do sleep 0.05; done; exit 3",
    "scancel": "kill -TERM $(cat pid)",
    "scontrol": 'if [ "$1" = show ]; then echo first; echo second; else echo "$@" > requeued; fi',
}


@pytest.mark.parametrize(
    ("over", "saved", "restarts", "status"),
    [(True, 75, 0, 0), (True, 1, 0, 1), (True, 75, 50, 75), (False, 75, 0, 3)],
    ids=["saved", "save failed", "too often", "failed"],
)
def test_the_slurm_script_requeues_when_time_is_over_and_the_run_has_saved(
    tmp_path: Path, over: bool, saved: int, restarts: int, status: int
) -> None:
    for name, body in SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "status").write_text(str(saved))
    environment = {"SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a[1-2]", "HOME": str(tmp_path)}
    environment |= {"SLURM_CPUS_PER_TASK": "64", "SLURM_RESTART_COUNT": str(restarts)}
    environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    job = subprocess.Popen(["bash", str(ROOT / "docs" / "slurm.sh"), "x.yaml", "run=r"], cwd=tmp_path, env=environment)
    while not (tmp_path / "pid").exists():
        time.sleep(0.05)
    time.sleep(0.2)
    if over:
        job.send_signal(signal.SIGUSR1)
    else:
        (tmp_path / "ended").touch()
    assert job.wait(timeout=30) == status
    assert (tmp_path / "requeued").exists() == (status == 0)
    asked = (tmp_path / "asked").read_text()
    assert asked.startswith("--cpus-per-task 64 --kill-on-bad-exit=0 fastrdm train --processes gpu --nodes 2 ")
    assert asked.endswith("--rdzv-endpoint first:29400 --rdzv-id 7 x.yaml run=r\n")


@pytest.mark.slow
def test_torchrun_starts_a_killed_run_again(tmp_path: Path) -> None:
    """The command itself, on one node: a process that dies in step 8 of the first attempt."""
    script = tmp_path / "run.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(PROGRAMS)!r})\n"
        "from pathlib import Path; import nodes\n"
        "nodes.work(Path(sys.argv[1]), nodes.once(1, nodes.die) if sys.argv[2] == 'die' else lambda run: None, [])\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    for name in ("live", "die"):
        subprocess.run([*command, str(tmp_path / name), name], env=environment, check=True, timeout=300)
    live, died = ((checkpoint.folder(tmp_path / n, 12) / checkpoint.WEIGHTS).read_bytes() for n in ("live", "die"))
    assert (tmp_path / "die.done").exists() and live == died
