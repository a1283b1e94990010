"""The profiler's switch: the steps asked for stand in the trace, and the weights do not know of it."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastrdm.config import run_config
from fastrdm.trainer import Trainer

SMALL = [
    "quickstart.yaml",
    "train.length=8st",
    "optim.warmup=1st",
    "encoder.width=4",
    "method.projector={hidden: 16, out: 12}",
]
SMALL += ["loader.subset=80", "loader.batch_size=16", "loader.views.*.size=8", "evaluate.every=0st"]
SMALL += ["evaluate.baselines=false", "log.report=false", "log.every=3"]


def run(folder: Path, *arguments: str) -> dict[str, torch.Tensor]:
    trainer = Trainer(run_config.load([*SMALL, f"run={folder}", *arguments]))
    assert trainer.train()
    return trainer.learner.state_dict()


def ranges(folder: Path) -> list[dict[str, Any]]:
    """Ranges that somebody named, in the only trace of a run."""
    (path,) = folder.glob("*.json.gz")
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    return [event for event in events if event.get("cat") == "user_annotation"]


def test_the_trace_has_the_steps_asked_for_and_their_parts(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plain = run(tmp_path / "plain")
    capfd.readouterr()
    traced = run(tmp_path / "traced", "log.profile={start: 2st, steps: 3}")
    path = tmp_path / "traced" / "trace_steps_3-5.json.gz"
    assert f"profiler's trace of steps 3 to 5: {path}" in capfd.readouterr().out
    assert not list((tmp_path / "plain").glob("trace*"))
    assert all(torch.equal(x, traced[name]) for name, x in plain.items())
    found = ranges(tmp_path / "traced")
    steps = {event["name"]: event for event in found if event["name"].startswith("step ")}
    assert list(steps) == ["step 3", "step 4", "step 5"]
    for event in steps.values():
        end = event["ts"] + event["dur"]
        inside = {other["name"] for other in found if event["ts"] <= other["ts"] <= end}
        assert {"training step", "monitor"} <= inside
        assert any(name.startswith("Optimizer.step") for name in inside)
    waits = [event for event in found if event["name"] == "wait for data"]
    assert len(waits) == 3, "each step's data is waited for once, after the step before it"


@pytest.mark.parametrize(("start", "steps", "told"), [(6, 10, "7-8"), (0, 1, "1-1"), (8, 1, None), (7, 1, "8-8")])
def test_a_trace_ends_with_the_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], start: int, steps: int, told: str | None
) -> None:
    run(tmp_path, f"log.profile={{start: {start}st, steps: {steps}}}")
    out = capfd.readouterr().out
    if told is None:
        assert "log.profile: the run ended before step 9, nothing is recorded" in out
        assert not list(tmp_path.glob("trace*"))
        return
    assert f"trace_steps_{told}.json.gz" in out
    first, last = map(int, told.split("-"))
    names = [event["name"] for event in ranges(tmp_path)]
    assert [n for n in names if n.startswith("step ")] == [f"step {n}" for n in range(first, last + 1)]


def test_a_run_that_goes_on_behind_the_steps_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first = Trainer(run_config.load([*SMALL, f"run={tmp_path}"]))
    first.stop.asked = True
    assert not first.train()
    run(tmp_path, "log.profile={start: 0st, steps: 2}")
    assert "log.profile: step 1 is over, nothing is recorded" in capfd.readouterr().out
    assert not list(tmp_path.glob("trace*"))
