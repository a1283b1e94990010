"""Durations and what changes with the step, as plain numbers: every function here is pure."""

import math
from collections.abc import Callable

from fastrdm.schema import require


def _between(share: float, start: float, end: float) -> float:
    """`start` at share 0, `end` at share 1, both to the last bit."""
    return start * (1 - share) + end * share


def linear_ramp(step: int, total: int, base: float, final: float) -> float:
    """`base` at step 0, `final` at step `total` and after; `final` throughout when total is 0."""
    return _between(min(step / total, 1.0), base, final) if total else final


def cosine_ramp(step: int, total: int, base: float, final: float) -> float:
    """`base` at step 0, `final` at step `total` and after, along half a cosine.

    BYOL's momentum of the moving average rises so (Grill et al. 2020, section 3.3; solo/utils/momentum.py, line 87).
    """
    share = min(step / total, 1.0) if total else 1.0
    return _between((1 - math.cos(math.pi * share)) / 2, base, final)


DECAYS: dict[str, Callable[[int, int, float, float], float]] = {"cosine": cosine_ramp, "linear": linear_ramp}
"""Ways from a base to a final value over a number of steps, by the name that `optim.schedule` has for each."""


def warmup_decay(
    step: int, total: int, warmup: int, base: float, final: float = 0.0, start: float = 3e-5, decay: str = "cosine"
) -> float:
    """Linear from `start` at step 0 to `base` at the last of `warmup` steps, then by `decay` to `final` at `total`.

    Step `warmup` is at `base` as well, as in the scheduler of the authors' code, LinearWarmupCosineAnnealingLR of
    lightning-bolts (solo/methods/base.py, lines 323 to 328). `decay` is a name of DECAYS. ValueError if warmup > total.
    """
    require(0 <= warmup <= total, "warmup", f"at most the run's {total} steps", warmup)
    if step < warmup:
        return linear_ramp(step, max(warmup - 1, 1), start, base)
    return DECAYS[decay](step - warmup, total - warmup, base, final)
