"""Durations mean what they say; schedules start and end on the exact value."""

import itertools
import math
from itertools import pairwise

import pytest
from pydantic import TypeAdapter

from fastrdm.optim.schedules import cosine_ramp, linear_ramp, warmup_decay
from fastrdm.schema import Duration, steps_of


@pytest.mark.parametrize(
    ("duration", "steps"),
    [("50ep", 9750), ("0.5ep", 98), ("0ep", 0), ("2000st", 2000), ("5%", 39), ("0.5%", 4), ("100%", 780), ("0st", 0)],
)
def test_steps_of_a_duration(duration: str, steps: int) -> None:
    assert steps_of(duration, steps_per_epoch=195, total=780) == steps
    assert TypeAdapter(Duration).validate_python(duration) == duration


@pytest.mark.parametrize("duration", ["50", "ep", "1.5st", "-1ep", "5 %", "1e3st", "50epochs", "nanep", "٣ep", ""])
def test_bad_durations_are_refused(duration: str) -> None:
    with pytest.raises(ValueError, match="a duration is written '50ep'"):
        TypeAdapter(Duration).validate_python(duration)


def test_a_share_is_of_the_run_and_at_most_all_of_it() -> None:
    with pytest.raises(ValueError, match="at most 100%, got '101%'"):
        TypeAdapter(Duration).validate_python("101%")
    with pytest.raises(ValueError, match="the length of the run must be in epochs or steps, such as '50ep', got '5%'"):
        steps_of("5%", 195)


def test_warmup_decay_follows_its_formula() -> None:
    total, warmup, base, final, start = 1000, 100, 0.5, 1e-3, 3e-5
    for step in range(total + 1):
        if step < warmup:
            expected = start + step * (base - start) / (warmup - 1)
        else:
            angle = math.pi * (step - warmup) / (total - warmup)
            expected = final + 0.5 * (base - final) * (1 + math.cos(angle))
        assert warmup_decay(step, total, warmup, base, final, start) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("base", [0.5, 0.1, 1 / 3])
def test_warmup_decay_ends_are_exact(base: float) -> None:
    def rate(step: int, warmup: int = 10) -> float:
        return warmup_decay(step, 70, warmup, base, final=0.07, start=3e-5)

    assert (rate(0), rate(9), rate(10), rate(70), rate(99)) == (3e-5, base, base, 0.07, 0.07)
    assert rate(0, warmup=0) == base
    assert (rate(0, warmup=1), rate(1, warmup=1)) == (3e-5, base)
    assert (rate(69, warmup=70), rate(70, warmup=70)) == (base, 0.07)
    assert rate(40) == pytest.approx((base + 0.07) / 2)


def test_a_linear_decay_is_a_line_from_the_warmup_to_the_end() -> None:
    rates = [warmup_decay(step, 70, 10, 0.5, final=0.2, start=0.1, decay="linear") for step in range(71)]
    assert (rates[0], rates[9], rates[10], rates[70]) == (0.1, 0.5, 0.5, 0.2)
    assert [round(b - a, 12) for a, b in pairwise(rates[10:])] == [-0.005] * 60


def test_a_warmup_longer_than_the_run_is_refused() -> None:
    with pytest.raises(ValueError, match="warmup must be at most the run's 50 steps, got 60"):
        warmup_decay(0, 50, 60, 0.5)


def test_ema_ramp_is_byols() -> None:
    for step in range(0, 101, 7):
        expected = 1 - (1 - 0.99) * (math.cos(math.pi * step / 100) + 1) / 2
        assert cosine_ramp(step, 100, 0.99, 1.0) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("ramp", [linear_ramp, cosine_ramp])
@pytest.mark.parametrize(("base", "final"), [(0.99, 1.0), (0.04, 0.07), (0.07, 0.04), (0.9995, 0.9995)])
def test_ramps_end_exactly_and_stay(ramp: object, base: float, final: float) -> None:
    assert callable(ramp)
    values = [ramp(step, 30, base, final) for step in range(40)]
    assert values[0] == base and values[30:] == [final] * 10
    assert values[15] == pytest.approx((base + final) / 2)
    steps = [(b - a) * (final - base) for a, b in itertools.pairwise(values)]
    assert min(steps) >= 0
    assert ramp(0, 0, base, final) == final


def test_linear_ramp_is_linear() -> None:
    assert [linear_ramp(step, 4, 0.0, 1.0) for step in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
