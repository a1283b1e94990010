"""Axes of a chart as plain numbers: round ticks, values to positions, fewer points, labels that do not overlap."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

POINTS = 600  # of a line, at most


class Axis(NamedTuple):
    """Label and scale of an axis. The data widen its limits."""

    label: str
    log: bool = False
    percent: bool = False  # shares, written as per cent
    limits: tuple[float, ...] = ()  # values that must be on it


class Scale:
    """Values to positions along one axis."""

    def __init__(self, axis: Axis, values: Iterable[float], start: float, end: float) -> None:
        self.axis, self.start, self.end = axis, start, end
        shown = [v for v in (*values, *axis.limits) if math.isfinite(v) and (v > 0 or not axis.log)]
        low, high = (min(shown), max(shown)) if shown else (1.0, 10.0) if axis.log else (0.0, 1.0)
        if axis.log:
            self.low, self.high = (low, high) if high > low else (low / 2, low * 2)
            self.ticks = log_ticks(self.low, self.high)
        else:
            self.ticks = nice_ticks(low, high)
            self.low, self.high = min(low, self.ticks[0]), max(high, self.ticks[-1])

    def holds(self, value: float) -> bool:
        """True if the value can be drawn: finite, and above 0 on a logarithmic axis."""
        return math.isfinite(value) and (value > 0 or not self.axis.log)

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.axis.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def text(self, value: float) -> str:
        """A tick's label."""
        if self.axis.percent:
            return f"{100 * value:.10g} %"
        if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
            power = math.floor(math.log10(abs(value)) + 1e-9)
            factor = f"{value / 10.0**power:.3g}"
            return ("" if factor == "1" else f"{factor}·") + "10" + str(power).translate(_SUPERSCRIPT)
        return f"{value:,.10g}".replace("-", "\N{MINUS SIGN}")


_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` multiples of 1, 2 or 5 x 10^n, the first at or below `low`, the last at or above `high`."""
    if not high - low > 1e-9 * max(abs(low), abs(high)):
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (-1.0, 1.0)
    rough = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def log_ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Powers of ten in [low, high], every n-th where there are many, with 2 and 5 between where there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    every = -(-(last - first + 1) // most)
    ticks = [float(f"{m}e{n}") for n in range(first, last + 1, every) for m in factors]
    return [t for t in ticks if low * (1 - 1e-9) <= t <= high * (1 + 1e-9)] or [low, high]


def thin(y: Sequence[float], most: int = POINTS) -> list[int]:
    """Indices of at most `most` values: of every stretch its least and largest one and a gap, and both ends."""
    if len(y) <= most:
        return list(range(len(y)))
    stretches = (most - 2) // 3
    kept = {0, len(y) - 1}
    for i in range(stretches):
        stretch = range(i * len(y) // stretches, (i + 1) * len(y) // stretches)
        finite = [j for j in stretch if math.isfinite(y[j])]
        kept |= {min(finite, key=y.__getitem__), max(finite, key=y.__getitem__)} if finite else set()
        kept |= {next(j for j in stretch if not math.isfinite(y[j]))} if len(finite) < len(stretch) else set()
    return sorted(kept)


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move places as little as needed to lie `gap` apart in [low, high], in the same order; closer if too many."""
    gap = min(gap, (high - low) / max(len(places) - 1, 1))
    order = sorted(range(len(places)), key=places.__getitem__)
    moved = [min(max(places[i], low), high) for i in order]
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + gap)
    if moved and moved[-1] > high:
        moved[-1] = high
        for i in range(len(moved) - 2, -1, -1):
            moved[i] = min(moved[i], moved[i + 1] - gap)
    out = [0.0] * len(places)
    for i, place in zip(order, moved, strict=True):
        out[i] = place
    return out
