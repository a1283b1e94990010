"""Alarms on series made by hand: what raises each, what does not, for how long, and once."""

import math
from typing import Any

import pytest

from fastrdm.methods.dual_branch import MethodConfig
from fastrdm.monitoring.advice import ADVICE
from fastrdm.monitoring.alarms import Alarm, Alarms, AlarmsConfig, LossRange, loss_range, non_finite, replay
from fastrdm.schema import Horizon

HEALTHY = {"moment": 6.0, "cov": 7.0, "std": 0.95}
TAPS = ("target", "hidden", "features")


def line(step: int, loss: float = -0.6, **taps: dict[str, float]) -> dict[str, float]:
    """Figures of a log step, healthy but for what is given."""
    metrics = {"step": step, "loss": loss}
    for tap in dict.fromkeys((*TAPS, *taps)):
        values = HEALTHY | taps.get(tap, {})
        metrics |= {f"{tap}/erank_l/unit/{about}/batch": values[about] for about in ("moment", "cov")}
        metrics[f"{tap}/std/batch"] = values["std"]
    return metrics


def alarms(**config: Any) -> Alarms:
    """Over a run of 1,000 steps: 5 % are 50."""
    return Alarms(AlarmsConfig(**config), LossRange(-1.0, 0.0), Horizon(100, 1000))


def raised(lines: list[dict[str, float]], **config: Any) -> list[tuple[int, str, str]]:
    return [(step, a.alarm, a.tap) for step, a in replay(alarms(**config), lines)]


def test_a_healthy_run_raises_nothing() -> None:
    assert raised([line(step) for step in range(10, 1001, 10)]) == []


@pytest.mark.parametrize("tap", TAPS)
def test_complete_collapse_is_a_deviation_and_a_rank_that_are_gone(tap: str) -> None:
    dead: Any = {tap: {"std": 0.05, "moment": 1.1, "cov": 3.0}}
    assert raised([line(step, **dead) for step in range(10, 101, 10)]) == [(60, "complete_collapse", tap)]
    for alive in ({"std": 0.11}, {"moment": 1.21}):
        part: Any = {tap: dead[tap] | alive}
        assert raised([line(step, **part) for step in range(10, 101, 10)]) == []


@pytest.mark.parametrize("tap", TAPS)
def test_dimensional_collapse_is_a_low_rank_of_what_still_varies(tap: str) -> None:
    flat: Any = {tap: {"std": 0.3, "moment": 1.05, "cov": 1.1}}
    assert raised([line(step, **flat) for step in range(10, 101, 10)]) == [(60, "dimensional_collapse", tap)]
    flat[tap]["cov"] = 2.01
    assert raised([line(step, **flat) for step in range(10, 101, 10)]) == []


def test_a_rank_that_falls_late_is_told_and_one_that_falls_early_is_not() -> None:
    early = [20.0, 18, 12, 8, 7, 6, 6, 6, 6, 6]
    config = {"falling_share": 0.5, "falling_after": "20%"}
    assert raised([line(50 * (i + 1), target={"cov": rank}) for i, rank in enumerate(early)], **config) == []
    late = [6.0, 6, 6, 6, 8, 10, 12, 9, 5.9, 5, 4]  # 200 is 20 % of the run
    found = raised([line(50 * (i + 1), target={"cov": rank}) for i, rank in enumerate(late)], **config)
    assert found == [(500, "falling_rank", "target")]


def test_a_loss_at_its_floor_is_told() -> None:
    assert raised([line(step, loss=-0.995) for step in range(10, 101, 10)]) == [(60, "loss_at_floor", "loss")]
    assert raised([line(step, loss=-0.97) for step in range(10, 101, 10)]) == []


def test_patience_starts_again_when_the_condition_ends() -> None:
    low, well = {"cov": 1.5}, {"cov": 3.0}
    series = [low] * 5 + [well] + [low] * 5
    assert raised([line(10 * (i + 1), target=x) for i, x in enumerate(series)]) == []
    found = raised([line(10 * (i + 1), target=x) for i, x in enumerate([*series, low, low, well, *[low] * 6])])
    assert found == [(120, "dimensional_collapse", "target"), (200, "dimensional_collapse", "target")]


def test_thresholds_and_patience_are_fields() -> None:
    lines = [line(step, loss=-0.9, target={"cov": 3.0}) for step in range(10, 101, 10)]
    assert raised(lines) == []
    config = {"dimensional_rank": 4.0, "dimensional_patience": "20st", "floor_share": 0.2, "floor_patience": "0st"}
    assert raised(lines, **config) == [(10, "loss_at_floor", "loss"), (30, "dimensional_collapse", "target")]


def test_the_online_branch_may_have_a_low_rank_and_a_large_mean_but_not_be_one_point() -> None:
    def found(**figures: float) -> list[tuple[int, str, str]]:
        return raised([line(step, online=figures) for step in range(10, 101, 10)])

    point = {"std": 0.05, "moment": 1.0, "cov": 1.1}
    assert found(**point) == [(60, "complete_collapse", "online")]
    for alive in ({"std": 0.11}, {"moment": 1.21}, {"cov": 1.21}):
        assert found(**point | alive) == []
    falling = [line(50 * i, online={"cov": 12.0 if i < 10 else 2.0}) for i in range(1, 21)]
    assert raised(falling) == []


def test_the_target_counts_and_not_its_scores() -> None:
    lines = [line(step) for step in range(10, 101, 10)]
    for metrics in lines:
        metrics |= {f"target_scores/{k.partition('/')[2]}": 1.0 for k in metrics if k.startswith("hidden/")}
    assert raised(lines) == []


def test_an_alarm_says_what_where_and_since_when() -> None:
    ((step, alarm),) = replay(alarms(action="stop"), [line(s, target={"cov": 1.5}) for s in (10, 40, 70)])
    assert step == 70
    seen = ("dimensional_collapse", "target", 1.5, 2.0, "stop", alarm.text)
    assert alarm == Alarm(*seen, *ADVICE["dimensional_collapse"])
    assert alarm.text == "alarm: dimensional collapse at target in steps 10 to 70: effective rank 1.50 below 2"
    assert alarm.told == f"{alarm.text}. {alarm.cause} {alarm.remedy} See docs/collapse.md#dimensional-collapse."
    stopped = non_finite("the loss was not finite in steps 3 to 4")
    assert (stopped.action, stopped[-3:]) == ("stop", ADVICE["non_finite_loss"])


def test_alarms_go_on_from_their_state() -> None:
    lines = [line(50 * i, target={"cov": 12.0 if i < 8 else 1.5}) for i in range(1, 13)]
    whole = list(replay(alarms(), lines))
    assert len(whole) == 2
    for cut in range(len(lines)):
        first, second = alarms(), alarms()
        found = list(replay(first, lines[:cut]))
        second.load_state_dict(first.state_dict())
        assert found + list(replay(second, lines[cut:])) == whole


def test_lines_of_runs_that_did_not_measure_raise_nothing() -> None:
    assert (
        raised([{"step": s, "loss": -0.5, "target/erank_l/unit/moment/batch": 1.0} for s in range(0, 1000, 10)]) == []
    )


@pytest.mark.parametrize(
    ("alignment", "views", "expected"),
    [
        ({"name": "negative_cosine"}, 2, (-1.0, 0.0)),
        ({"name": "byol"}, 2, (0.0, 2.0)),
        ({"name": "byol", "directions": "sum"}, 2, (0.0, 4.0)),
        ({"name": "negative_cosine", "directions": "sum"}, 8, (-14.0, 0.0)),
    ],
)
def test_what_a_loss_can_be(alignment: Any, views: int, expected: tuple[float, float]) -> None:
    assert loss_range(MethodConfig(alignment=alignment), views) == expected


def test_what_a_loss_over_prototypes_can_be() -> None:
    scores: Any = {"name": "prototypes", "count": 300}
    config = MethodConfig(
        online=(scores,),
        target=(scores, {"name": "sinkhorn"}),
        alignment={"name": "cross_entropy"},  # type: ignore[arg-type]
    )
    assert loss_range(config, 2) == (0.0, math.log(300))
