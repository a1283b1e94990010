"""The verdict on real runs: the labelled runs of the record, its page and pictures, and the README's second example."""

import json
import re
from importlib.metadata import version
from pathlib import Path

import pytest

from benchmarks.plots import collapse
from benchmarks.verdict import record
from benchmarks.verdict.arms import CHOOSE, JUDGE
from benchmarks.verdict.record import Labelled
from fastrdm.monitoring.verdict import Judge, judge

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runs() -> list[Labelled]:
    return record.load()


def test_the_verdict_tells_collapsed_runs_from_others_on_the_seeds_that_judge(runs: list[Labelled]) -> None:
    judged = [run for run in runs if run.seed in JUDGE]
    states = [(run, judge(run.lines, run.batch).state) for run in judged]
    assert sum(run.collapsed == (state in record.COLLAPSED) for run, state in states) >= 0.95 * len(judged)
    assert sum(run.state == state for run, state in states) >= 0.88 * len(judged)
    assert {run.data for run in judged} == {"digits", "cifar10"}
    assert {run.state for run in judged} == set(record.STATES[:4])
    assert len(runs) >= 60


def test_what_the_live_line_shows_separates_collapsed_runs_from_the_others(runs: list[Labelled]) -> None:
    for seeds in (CHOOSE, JUDGE):
        assert record.score([run for run in runs if run.seed in seeds], record.rule).right >= 0.95


def test_windows_judge_as_batches_do(runs: list[Labelled]) -> None:
    found = [(run, judge(run.lines).state) for run in runs]
    told = [(run, state) for run, state in found if state != "not judged"]
    assert len(told) >= len(runs) / 2
    assert sum(run.collapsed == (state in record.COLLAPSED) for run, state in told) >= 0.95 * len(told)


def test_a_run_without_labels_is_never_called_healthy(runs: list[Labelled]) -> None:
    for run in runs:
        lines = [{key: v for key, v in line.items() if not key.startswith("knn")} for line in run.lines]
        state = judge(lines, run.batch).state
        assert (state in record.COLLAPSED) == (judge(run.lines, run.batch).state in record.COLLAPSED)
        assert state != "healthy"


def test_the_second_example_of_the_readme_is_healthy_and_does_not_look_collapsed() -> None:
    lines = [json.loads(line) for line in (Path(__file__).parent / "readme_byol.jsonl").read_text().splitlines()]
    assert judge(lines, 128).state == "healthy"
    steps = [line for line in lines if "loss" in line]
    assert all(line["online/erank_l/unit/moment/batch"] < 1.2 for line in steps[1:]), "the rank that was shown before"
    assert all(line["online/erank_l/unit/cov/batch"] > 2.5 for line in steps), "the rank that is shown"
    found, seen = Judge(128), set()
    for line in lines:
        found.update(line)
        seen.add(found.verdict().state)
    assert seen == {"not judged", "healthy"}


def test_the_record_says_what_the_runs_say(runs: list[Labelled]) -> None:
    page = (ROOT / "benchmarks" / "records" / "verdict.md").read_text()
    for part in (record.rules, record.disagreements, record.surprises, record.alarm_table):
        assert "\n".join(part(runs)) in page
    for seeds in (CHOOSE, JUDGE):
        assert "\n".join(record.confusion([run for run in runs if run.seed in seeds])) in page


def test_the_pictures_are_drawn_from_the_record() -> None:
    pytest.importorskip("matplotlib")
    (pinned,) = re.findall(r"^matplotlib==([\w.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    if version("matplotlib") != pinned:
        pytest.skip(f"matplotlib {version('matplotlib')} draws other SVG than {pinned}, which drew the pictures")
    for name, picture in collapse.drawings().items():
        assert (ROOT / "docs" / name).read_text() == picture, name
