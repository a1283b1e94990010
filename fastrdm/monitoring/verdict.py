"""One state for a whole run, judged from the metrics that it logged: healthy, weak, collapsed, or not judged.

The thresholds were chosen on half of the labelled runs of benchmarks/records/verdict.md and judged on the other half.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from statistics import median
from typing import Literal, NamedTuple

from fastrdm.monitoring.advice import ADVICE
from fastrdm.monitoring.rank_statistics import CENTERED_CONVENTION, HEADLINE_CONVENTION

State = Literal["healthy", "weak", "dimensional collapse", "complete collapse", "not judged"]

# The median of a figure's newest values counts, so that a single batch never decides.
READINGS = 3
# Ranks of batches of fewer images say too little.
LEAST_IMAGES = 16
# Outputs whose deviation and effective rank lie below these are one point. Rows of unit length that fill their
# dimensions have a deviation of 1.
COMPLETE_DEVIATION, COMPLETE_RANK = 0.1, 1.2
# Outputs whose effective rank about the mean lies below this differ along one or a few directions only.
DIMENSIONAL_RANK = 3.0
# An online branch is one point if, besides, what is left of it has an effective rank about the mean below this.
ONLINE_RANK = 1.5
# A run is weak if its k-NN accuracy is this far below its best.
LOST_ACCURACY = 0.05
# A run is weak if its loss has risen again by this share of its fall.
LOST_LOSS = 0.5
# Readings of figures that the verdict needs, at each tap.
FIGURES = (CENTERED_CONVENTION, HEADLINE_CONVENTION, "std")


class Verdict(NamedTuple):
    """What became of a run, or what is becoming of a run that goes on."""

    state: State
    reason: str
    cause: str = ""
    remedy: str = ""
    page: str = ""

    @property
    def text(self) -> str:
        """The state and its reason in one line."""
        return f"{self.state}: {self.reason}"


class Tap(NamedTuple):
    """The newest figures of one tap."""

    name: str
    rank: float  # effective rank about the mean
    moment: float  # effective rank about 0
    deviation: float

    @property
    def point(self) -> bool:
        """Whether all outputs are one point."""
        return self.deviation < COMPLETE_DEVIATION and self.moment < COMPLETE_RANK


class Judge:
    """Takes the lines of metrics.jsonl one after the other, and gives the verdict after any of them.

    `images` is the number of images, over all processes, whose rows a figure of a batch is made of. If it is None or
    below LEAST_IMAGES, figures of windows are judged instead.
    """

    def __init__(self, images: int | None = None) -> None:
        self.images = images
        self.kinds = ("batch",) if images is not None and images >= LEAST_IMAGES else ("window", "sample")
        self.figures: dict[str, deque[float]] = {}
        self.losses: list[float] = []
        self.accuracies: list[float] = []
        self.random = math.nan

    def replay(self, lines: Iterable[Mapping[str, object]]) -> None:
        """Take the lines that a run has logged so far."""
        for line in lines:
            self.update(line)

    def update(self, line: Mapping[str, object]) -> None:
        """Take one line. Keys that are missing and values that are no numbers are passed over."""
        for key, value in line.items():
            if not isinstance(value, int | float):
                continue
            if key == "loss":
                self.losses.append(float(value))
            elif not math.isfinite(value):
                continue
            elif key == "knn":
                self.accuracies.append(float(value))
            elif key == "knn_random_encoder":
                self.random = float(value)
            elif key.partition("/")[2].rpartition("/")[0] in FIGURES:
                self.figures.setdefault(key, deque(maxlen=READINGS)).append(float(value))

    def verdict(self) -> Verdict:
        """The state after the lines so far."""
        if not self.losses:
            return Verdict("not judged", "no training step was logged yet")
        if not math.isfinite(self.losses[-1]):
            return _advised("weak", "the newest loss is not a finite number", "non_finite_loss")
        target, online = self._tap("target"), self._tap("online")
        if target is None or online is None:
            return Verdict("not judged", self._why_no_figures())
        return self._collapse(target, online) or self._weakness() or self._health(target)

    def _tap(self, branch: str) -> Tap | None:
        """The figures of what enters the loss on a branch; None where they were not logged."""
        for kind in self.kinds:
            found = [self.figures.get(f"{branch}/{figure}/{kind}") for figure in FIGURES]
            values = [median(readings) for readings in found if readings and len(readings) == READINGS]
            if len(values) == len(FIGURES):
                return Tap(branch, *values)
        return None

    def _why_no_figures(self) -> str:
        if self.images is not None and self.images < LEAST_IMAGES:
            return (
                f"batches of {self.images} images are too small, at least {LEAST_IMAGES} are needed, and fewer than "
                f"{READINGS} windows were read: see monitor.every and monitor.rows"
            )
        return f"fewer than {READINGS} log lines hold ranks and deviations of both branches"

    def _collapse(self, target: Tap, online: Tap) -> Verdict | None:
        # Healthy online outputs may have a large mean, which looks like a point: what varies must be gone as well.
        for tap, gone in ((target, target.point), (online, online.point and online.rank < ONLINE_RANK)):
            if gone:
                reason = f"the deviation at {tap.name} is {tap.deviation:.3f} and its effective rank {tap.moment:.2f}"
                return _advised("complete collapse", reason, "complete_collapse")
        if target.rank < DIMENSIONAL_RANK:
            reason = f"the effective rank at {target.name} about the mean is {target.rank:.2f}"
            return _advised("dimensional collapse", reason, "dimensional_collapse")
        return None

    def _weakness(self) -> Verdict | None:
        if self.accuracies:
            newest, best = self.accuracies[-1], max(self.accuracies)
            if newest <= self.random:
                reason = f"k-NN accuracy {newest:.1%} is not above the {self.random:.1%} of the random encoder"
                return _advised("weak", reason, "no_gain")
            if newest < best - LOST_ACCURACY:
                return _advised("weak", f"k-NN accuracy fell from {best:.1%} to {newest:.1%}", "falling_accuracy")
        elif (risen := self._risen()) > LOST_LOSS:
            reason = f"the loss rose again by {risen:.0%} of what it had fallen"
            return _advised("weak", reason, "rising_loss")
        return None

    def _risen(self) -> float:
        """By what share of its fall the loss has risen again, of medians of READINGS lines; 0 if it never fell."""
        spans = [self.losses[i : i + READINGS] for i in range(len(self.losses) - READINGS + 1)]
        levels = [median(span) for span in spans]
        if not levels or min(levels) >= levels[0]:
            return math.inf if levels and levels[-1] > levels[0] else 0.0
        return (levels[-1] - min(levels)) / (levels[0] - min(levels))

    def _health(self, target: Tap) -> Verdict:
        seen = f"no sign of collapse, effective rank {target.rank:.1f} at {target.name}"
        if not self.accuracies:
            return Verdict("not judged", f"{seen}, but no k-NN accuracy was measured since training began")
        if math.isnan(self.random):
            return Verdict("not judged", f"{seen}, but the random encoder was not measured (evaluate.baselines)")
        newest = self.accuracies[-1]
        return Verdict(
            "healthy", f"{seen}, and k-NN accuracy {newest:.1%} is above the random encoder's {self.random:.1%}"
        )


def judge(lines: Iterable[Mapping[str, object]], images: int | None = None) -> Verdict:
    """The verdict on a run from all lines of its metrics.jsonl; `images` as of `Judge`."""
    found = Judge(images)
    found.replay(lines)
    return found.verdict()


def _advised(state: State, reason: str, key: str) -> Verdict:
    return Verdict(state, reason, *ADVICE[key])
