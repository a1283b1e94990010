"""The race of whole trainings: contestants stand still while it is not their turn, and do the same work."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.training import race

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, sys, time
print("a library says hello")
print(json.dumps({"parameters": 100, "images": 8, "views": 2, "loss": -0.1}), flush=True)
for line in sys.stdin:
    began = time.process_time()
    while time.process_time() - began < 0.05 * int(line): pass
    print(json.dumps({"seconds": 0.05 * int(line)}), flush=True)
"""


def stands_still(process: int) -> bool:
    """Whether the process is stopped, some time after it was asked to."""
    for _ in range(100):
        if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "T":
            return True
        time.sleep(0.1)
    return False


def test_a_contestant_is_stopped_but_for_its_turn_and_its_processor_time_is_counted() -> None:
    runner = race.Runner("loop", [sys.executable, "-c", PROGRAM])
    try:
        assert runner.work["images"] == 8 and stands_still(runner.process.pid)
        seconds, spent = runner.turn(4)
        assert seconds == pytest.approx(0.2) and 0.15 < spent < 0.6, "the step that comes first is not in it"
        assert stands_still(runner.process.pid)
    finally:
        runner.close()
    assert runner.process.returncode == 0


def test_one_that_ends_early_is_named() -> None:
    with pytest.raises(ValueError, match="broken ended without an answer, status 3"):
        race.Runner("broken", [sys.executable, "-c", "raise SystemExit(3)"])


class Told:
    """A contestant as far as its work goes."""

    def __init__(self, name: str, **other: Any) -> None:
        self.name, self.work = name, {"parameters": 100, "images": 8, "views": 2, "loss": 1.0, **other}


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({}, None),
        ({"parameters": 101}, None),
        ({"parameters": 104}, "other trains 104 parameters, ours 100"),
        ({"images": 4}, "other takes 4 images in 2 views, ours does not"),
        ({"views": 3}, "other takes 8 images in 3 views, ours does not"),
        ({"loss": float("nan")}, "other's first loss is nan"),
    ],
)
def test_a_race_of_unlike_work_is_called_off(other: dict[str, Any], reason: str | None) -> None:
    assert race.called_off([Told("ours"), Told("other", **other)]) == reason  # type: ignore[list-item]


@pytest.mark.slow
@pytest.mark.parametrize("method", race.METHODS)
def test_lightlys_loop_does_our_work(method: str) -> None:
    pytest.importorskip("lightly")
    small = ["--source", "digits", "--width", "4", "--size", "8", "--batch", "16", "--turns", "1", "--steps", "1"]
    small += ["--contestants", "fastrdm-outside", "lightly"]
    command = [sys.executable, "-m", "benchmarks.training.race", method, *small]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 3 and json.dumps(method)[1:-1] in done.stdout
