"""Durations and what changes with the step, as plain numbers: every function here is pure."""

import math
import re
from typing import Annotated

from pydantic import BeforeValidator

from fastrdm.loaders.spec import require

_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ep|%)|([0-9]+)(st)")


def _parsed(duration: object) -> tuple[float, str]:
    match = _DURATION.fullmatch(str(duration))
    if match is None:
        raise ValueError(
            f"a duration is written '50ep' (epochs), '2000st' (steps) or '5%' (of the run), got {duration!r}"
        )
    number, unit = float(match[1] or match[3]), match[2] or match[4]
    require(unit != "%" or number <= 100, "a share of the run", "at most 100%", duration)
    return number, unit


def _checked(duration: object) -> object:
    _parsed(duration)
    return duration


Duration = Annotated[str, BeforeValidator(_checked)]


def steps_of(duration: str, steps_per_epoch: int, total: int | None = None) -> int:
    """Optimiser steps in `duration`, rounded to the nearest; a share needs the run's `total` steps."""
    number, unit = _parsed(duration)
    if unit == "%":
        require(total is not None, "the length of the run", "in epochs or steps, such as '50ep'", duration)
        assert total is not None
        return round(number / 100 * total)
    return round(number * (steps_per_epoch if unit == "ep" else 1))


def _between(share: float, start: float, end: float) -> float:
    """`start` at share 0, `end` at share 1, both to the last bit."""
    return start * (1 - share) + end * share


def linear_ramp(step: int, total: int, base: float, final: float) -> float:
    """`base` at step 0, `final` at step `total` and after; `final` throughout when total is 0."""
    return _between(min(step / total, 1.0), base, final) if total else final


def cosine_ramp(step: int, total: int, base: float, final: float) -> float:
    """`base` at step 0, `final` at step `total` and after, along half a cosine; EMA momentum in BYOL (paper.md 5.4)."""
    share = min(step / total, 1.0) if total else 1.0
    return _between((1 - math.cos(math.pi * share)) / 2, base, final)


def warmup_cosine(step: int, total: int, warmup: int, base: float, final: float = 0.0, start: float = 3e-5) -> float:
    """Linear from `start` at step 0 to `base` at the last of `warmup` steps, then a cosine to `final` at `total`.

    Step `warmup` is at `base` as well, as in the authors' scheduler (paper.md 5.4). ValueError if warmup > total.
    """
    require(0 <= warmup <= total, "warmup", f"at most the run's {total} steps", warmup)
    if step < warmup:
        return linear_ramp(step, max(warmup - 1, 1), start, base)
    return cosine_ramp(step - warmup, total - warmup, base, final)
