"""The verdict on real runs: the labelled runs of the record, its page and pictures, and the README's second example."""

import json
import math
import re
from importlib.metadata import version
from pathlib import Path

import pytest

from benchmarks.plots import collapse
from benchmarks.verdict import record
from benchmarks.verdict.arms import CHOOSE, JUDGE
from benchmarks.verdict.record import Labelled
from benchmarks.verdict.truth import Outcome, possible_labels
from fastrdm.monitoring.verdict import Judge, judge

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runs() -> list[Labelled]:
    return record.load()


def test_the_verdict_tells_collapsed_runs_from_others_on_the_seeds_that_judge(runs: list[Labelled]) -> None:
    chosen, judged = ([run for run in runs if run.seed in seeds] for seeds in (CHOOSE, JUDGE))
    assert sum(run.told for run in judged) == len(judged) == 29
    assert sum(run.told for run in chosen) >= 0.95 * len(chosen)
    assert {run.data for run in chosen} == {"digits", "cifar10"}
    assert {run.state for run in judged} == set(record.STATES[:4])
    assert len(runs) >= 60


@pytest.mark.parametrize(("seeds", "least"), [(CHOOSE, 0.96), (JUDGE, 0.92)])
def test_the_verdict_tells_the_states_that_the_test_images_decide(
    runs: list[Labelled], seeds: tuple[int, ...], least: float
) -> None:
    decided = [run for run in runs if run.seed in seeds and len(run.states) == 1]
    assert sum(run.verdict.state == run.state for run in decided) >= least * len(decided)
    assert len(decided) >= 0.85 * sum(run.seed in seeds for run in runs)


def test_a_label_is_open_where_a_measurement_is_within_its_error_of_a_bound() -> None:
    plain = dict.fromkeys(Outcome._fields, 0.5) | {"information": math.nan}

    def labels(images: int = 360, best: float = 0.5, **measured: float) -> tuple[str, ...]:
        return possible_labels(Outcome(**{**plain, **measured}), images, best)

    assert labels(knn=0.7) == ("healthy",)
    assert labels(knn=0.51) == ("healthy", "weak")
    assert labels(knn=0.51, images=1_000_000) == ("healthy",)
    assert labels(knn=0.49) == ("weak", "healthy")
    assert labels(linear=0.4) == ("weak",)
    assert labels(knn=0.7, leading=0.69) == ("healthy", "dimensional collapse")
    assert labels(knn=0.7, leading=0.75) == ("dimensional collapse",)
    assert labels(knn=0.7, spread=0.0049) == ("complete collapse", "healthy")
    assert labels(knn=0.7, spread=0.001) == ("complete collapse",)
    assert labels(knn=0.7, information=0.009) == ("complete collapse",)
    assert labels(knn=0.7, best=0.76) == ("healthy",), "6 points of 360 images are within two standard errors"
    assert labels(knn=0.7, best=0.76, images=10_000) == ("weak",)
    assert labels(knn=0.7, best=0.74, images=10_000) == ("healthy",), "below 5 points"


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
    assert record.rising(runs) in page
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
