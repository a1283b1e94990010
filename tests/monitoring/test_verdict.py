"""The verdict on series made by hand: each state and its bounds, what is missing, and which state comes first."""

import math
from pathlib import Path
from typing import Any

import pytest

from fastrdm.monitoring import verdict as module
from fastrdm.monitoring.advice import ADVICE
from fastrdm.monitoring.verdict import Judge, Verdict, judge

ROOT = Path(__file__).parents[2]
HEALTHY = {"cov": 9.0, "moment": 6.0, "std": 0.9}
POINT = {"cov": 12.0, "moment": 1.1, "std": 0.05}
FLAT = {"cov": 1.3, "moment": 1.2, "std": 0.6}
BASE = {"step": 0, "knn_raw_pixels": 0.9, "knn_random_encoder": 0.5}


def line(step: int, kind: str = "batch", loss: float = -0.5, **taps: dict[str, float]) -> dict[str, Any]:
    """A log line with figures of both branches, healthy but for what is given."""
    metrics: dict[str, Any] = {"step": step, "epoch": step / 10, "loss": loss}
    for tap in dict.fromkeys(("online", "target", *taps)):
        values = HEALTHY | taps.get(tap, {})
        metrics |= {f"{tap}/erank_l/unit/{about}/{kind}": values[about] for about in ("moment", "cov")}
        metrics[f"{tap}/std/{kind}"] = values["std"]
    return metrics


def run(*accuracies: float, count: int = 5, **taps: Any) -> list[dict[str, Any]]:
    """A run of `count` lines, with its random encoder and these k-NN accuracies at its end."""
    return [BASE, *(line(i, **taps) for i in range(1, count + 1)), *({"step": count, "knn": a} for a in accuracies)]


def state(lines: list[dict[str, Any]], images: int | None = 128) -> str:
    return judge(lines, images).state


def test_healthy_is_a_run_that_beats_its_random_encoder_without_a_collapse() -> None:
    found = judge(run(0.6, 0.7), 128)
    assert found == Verdict("healthy", found.reason)
    assert found.text == f"healthy: {found.reason}"
    assert "effective rank 9.0 at target" in found.reason
    assert "70.0%" in found.reason and "50.0%" in found.reason


@pytest.mark.parametrize("newest", [0.5, 0.49])
def test_weak_is_a_run_that_is_no_better_than_its_random_encoder(newest: float) -> None:
    found = judge(run(newest), 128)
    assert (found.state, found[2:]) == ("weak", ADVICE["no_gain"])
    assert state(run(0.501)) == "healthy"


def test_weak_is_a_run_that_fell_from_its_best() -> None:
    assert state(run(0.7, 0.7 - module.LOST_ACCURACY + 1e-6)) == "healthy"
    found = judge(run(0.7, 0.7 - module.LOST_ACCURACY - 1e-6), 128)
    assert (found.state, found[2:]) == ("weak", ADVICE["falling_accuracy"])
    assert state(run(0.6, 0.8, 0.79)) == "healthy", "the newest accuracy counts, not the first"


def test_a_fall_that_the_number_of_test_images_cannot_tell_is_none() -> None:
    def tested(images: int, newest: float) -> str:
        return state([{"step": 0, "knn_images": images}, *run(0.6, newest)])

    # The standard error of the difference of 60 % and 53 % on 360 images is 3.7 points, on 10,000 images 0.7.
    assert tested(360, 0.53) == "healthy"
    assert tested(360, 0.52) == "weak"
    assert tested(10_000, 0.56) == "healthy", "5 points are needed however many images there are"
    assert tested(10_000, 0.54) == "weak"


def test_a_gain_below_the_sampling_error_is_told_as_such() -> None:
    words = "by less than the sampling error of 360 test images"
    images = {"step": 5, "knn_images": 360}
    assert words in judge([*run(0.53), images], 128).reason
    assert "sampling error" not in judge([*run(0.54), images], 128).reason
    assert "sampling error" not in judge(run(0.501), 128).reason, "nobody knows how many images there were"


def test_a_rising_loss_is_weak_where_no_accuracy_was_measured() -> None:
    def losses(*values: float) -> list[dict[str, Any]]:
        return [line(i, loss=value) for i, value in enumerate(v for v in values for _ in range(3))]

    found = judge(losses(2.0, 1.0, 1.6), 128)
    assert (found.state, found[2:]) == ("weak", ADVICE["rising_loss"])
    assert found.reason == "the loss began at 2, fell to 1 and rose again to 1.6"
    assert state(losses(2.0, 1.0, 1.4)) == "not judged", "less than half of the fall"
    assert state(losses(2.0, 1.5, 1.0)) == "not judged"
    assert state(losses(1.0, 1.2, 1.4)) == "weak", "it never fell"
    assert state(losses(1.0, 1.0, 1.0)) == "not judged"
    assert state([BASE, *losses(2.0, 1.0, 1.9), {"knn": 0.8}]) == "healthy", "the accuracy tells more"
    scored = [{**one, "target_scores/std/batch": 0.5} for one in losses(2.0, 1.0, 1.9)]
    assert state(scored) == "not judged", "the entropy of moving targets rises with them"
    one = losses(2.0, 1.0, 1.0)
    one[-1] = line(9, loss=5.0)
    assert state(one) == "not judged", "a single line does not decide"


@pytest.mark.parametrize("scored", [False, True])
def test_complete_collapse_is_a_deviation_of_the_target_that_is_gone(scored: bool) -> None:
    least = module.ASSIGNMENTS_DEVIATION if scored else module.FEATURES_DEVIATION
    scores: dict[str, Any] = {"target_scores": {}} if scored else {}
    found = judge(run(0.9, target=POINT | {"std": least - 0.001}, **scores), 128)
    assert (found.state, found[2:]) == ("complete collapse", ADVICE["complete_collapse"])
    assert f"{least - 0.001:.3f}" in found.reason
    assert state(run(0.9, target=POINT | {"std": least}, **scores)) == "healthy"


def test_complete_collapse_of_the_online_branch_leaves_one_direction() -> None:
    point = POINT | {"cov": module.ONLINE_RANK - 0.01}
    found = judge(run(0.9, online=point), 128)
    assert (found.state, found[2:]) == ("complete collapse", ADVICE["complete_collapse"])
    assert "online" in found.reason
    assert state(run(0.9, online=point | {"std": module.FEATURES_DEVIATION})) == "healthy"
    assert state(run(0.9, online=point | {"cov": module.ONLINE_RANK})) == "healthy", "a large mean is no collapse"
    assert state(run(0.9, online=point, target=FLAT)) == "dimensional collapse", "the target tells more"


def test_dimensional_collapse_is_a_low_rank_of_the_target_about_its_mean() -> None:
    found = judge(run(0.9, target=FLAT), 128)
    assert (found.state, found[2:]) == ("dimensional collapse", ADVICE["dimensional_collapse"])
    assert "1.30" in found.reason
    assert state(run(0.9, target=FLAT | {"cov": module.DIMENSIONAL_RANK})) == "healthy"
    assert state(run(0.9, online=FLAT)) == "healthy", "the online branch may have a low rank"


def test_a_collapse_is_told_before_a_weakness_and_without_labels() -> None:
    assert state(run(0.1, target=FLAT)) == "dimensional collapse"
    assert state(run(0.1, target=POINT)) == "complete collapse"
    assert state([line(i, target=FLAT) for i in range(5)]) == "dimensional collapse"


def test_assignments_are_judged_and_not_scores_where_there_are_prototypes() -> None:
    assert state(run(0.9, target_scores=FLAT, online_scores=POINT)) == "healthy"
    assert state(run(0.9, target_scores=HEALTHY, target=POINT)) == "complete collapse"


def test_one_batch_does_not_decide_and_the_newest_do() -> None:
    lines = run(0.9)
    assert state([*lines, line(6, target=FLAT)]) == "healthy"
    assert state([*lines, line(6, target=FLAT), line(7, target=FLAT)]) == "dimensional collapse"
    assert state([*run(0.9, target=FLAT), line(6), line(7)]) == "healthy", "it recovered"


def test_what_is_not_judged_says_why() -> None:
    assert judge([], 128) == Verdict("not judged", "no training step was logged yet")
    assert judge([BASE], 128).reason == "no training step was logged yet"
    few = judge(run(0.9, count=2), 128)
    assert few.state == "not judged" and "fewer than 3 log lines" in few.reason
    unlabelled = judge([line(i) for i in range(5)], 128)
    assert unlabelled.state == "not judged"
    assert "no sign of collapse" in unlabelled.reason and "no k-NN accuracy" in unlabelled.reason
    alone = judge(run(0.9)[1:], 128)
    assert alone.state == "not judged" and "evaluate.baselines" in alone.reason


def test_batches_that_are_too_small_are_not_judged_but_windows_are() -> None:
    least = module.LEAST_IMAGES
    assert state(run(0.9, target=FLAT), least) == "dimensional collapse"
    small = judge(run(0.9, target=FLAT), least - 1)
    assert small.state == "not judged"
    assert f"batches of {least - 1} images are too small, at least {least}" in small.reason
    for kind in ("window", "sample"):
        assert state(run(0.9, kind=kind, target=FLAT), least - 1) == "dimensional collapse"
        assert state(run(0.9, kind=kind), least - 1) == "healthy"
    assert state(run(0.9), None) == "not judged", "nobody knows how many rows a batch has"
    assert state(run(0.9, kind="window"), None) == "healthy"
    assert state(run(0.9, kind="window", target=FLAT) + run(0.9), 128) == "healthy", "batches where they are large"


def test_a_loss_that_is_not_finite_is_weak() -> None:
    found = judge([*run(0.9), {"step": 6, "loss": math.nan}], 128)
    assert (found.state, found[2:]) == ("weak", ADVICE["non_finite_loss"])
    assert state([*run(0.9), {"loss": math.nan}, line(7)]) == "healthy"


def test_lines_that_hold_something_else_are_passed_over() -> None:
    odd = {
        "step": 9,
        "knn": None,
        "target/std/batch": "x",
        "online/erank_l/unit/cov/batch": math.nan,
        "knn_target": 0.1,
    }
    assert judge([*run(0.9), odd], 128) == judge(run(0.9), 128)


def test_the_judge_says_at_any_line_what_judge_says_of_the_lines_so_far() -> None:
    lines = [*run(0.4, 0.6), *(line(i, target=FLAT) for i in range(6, 10)), *(line(i) for i in range(10, 14))]
    found = Judge(128)
    seen = []
    for i, one in enumerate(lines, 1):
        found.update(one)
        assert found.verdict() == judge(lines[:i], 128)
        seen.append(found.verdict().state)
    states = ["not judged", "weak", "healthy", "dimensional collapse", "healthy"]
    assert list(dict.fromkeys(seen)) == states[:-1] and seen[-1] == states[-1]


def test_every_page_of_the_advice_is_a_section_of_the_documentation() -> None:
    for key, (cause, remedy, page) in ADVICE.items():
        file, _, section = page.partition("#")
        titles = [t for t in (ROOT / file).read_text().splitlines() if t.startswith("## ")]
        anchors = {t[3:].lower().replace(" ", "-") for t in titles}
        assert section in anchors, key
        assert cause.endswith(".") and remedy.endswith("."), key


def test_the_documentation_names_every_state() -> None:
    page = (ROOT / "docs" / "collapse.md").read_text()
    for name in module.State.__args__:  # type: ignore[attr-defined]
        assert f"| [{name}](#{name.replace(' ', '-')}) |" in page
    assert f"fewer than {module.LEAST_IMAGES} images" in page
