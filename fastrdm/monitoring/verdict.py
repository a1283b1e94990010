"""One state for a whole run, judged from the metrics that it logged: healthy, weak, collapsed, or not judged.

The thresholds were chosen on labelled runs, and judged on others that were made when they were fixed:
benchmarks/records/verdict.md.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from statistics import median
from typing import Literal, NamedTuple

from fastrdm.monitoring.advice import ADVICE
from fastrdm.monitoring.rank_statistics import CENTERED_CONVENTION

State = Literal["healthy", "weak", "dimensional collapse", "complete collapse", "not judged"]

# The median of a figure's newest values counts, so that a single batch never decides.
READINGS = 3
# Ranks of batches of fewer images say too little.
LEAST_IMAGES = 16
# Outputs whose deviation lies below this are one point; it is 1 where rows of unit length fill their dimensions.
# Features vary less in healthy runs than assignments to prototypes do, since their mean may be large.
FEATURES_DEVIATION, ASSIGNMENTS_DEVIATION = 0.07, 0.19
# For the online branch, whose mean may be larger still, what varies must also lie along one direction.
ONLINE_RANK = 1.2
# Outputs whose effective rank about the mean lies below this differ along one or a few directions only.
DIMENSIONAL_RANK = 2.5
# A run is weak if its k-NN accuracy is this far below its best, and by so many standard errors of the difference.
LOST_ACCURACY, LOST_ERRORS = 0.05, 2
# A run is weak if its loss has risen again by this share of its fall.
LOST_LOSS = 0.5
# Readings of figures that the verdict needs, at each tap.
FIGURES = (CENTERED_CONVENTION, "std")


class Verdict(NamedTuple):
    """The state of a finished run, or of a run so far."""

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

    rank: float  # effective rank about the mean
    deviation: float


class Judge:
    """Takes the lines of metrics.jsonl one after the other, and gives the verdict after any of them.

    `images` is the number of images, over all processes, whose rows a figure of a batch is made of. If it is None or
    below LEAST_IMAGES, figures of windows are judged instead.
    """

    def __init__(self, images: int | None = None) -> None:
        self.images = images
        self.kinds = ("batch",) if images is not None and images >= LEAST_IMAGES else ("window", "sample")
        self.figures: dict[str, deque[float]] = {}
        self.loss = math.nan
        self.losses: deque[float] = deque(maxlen=READINGS)
        # Medians of READINGS losses that follow each other: the first, the lowest and the newest.
        self.levels: tuple[float, float, float] | None = None
        self.started = False
        self.prototypes = False
        self.accuracies: list[float] = []
        self.random = math.nan
        self.tested: int | None = None  # images of a k-NN accuracy

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
                self._take_loss(float(value))
            elif not math.isfinite(value):
                continue
            elif key == "knn":
                self.accuracies.append(float(value))
            elif key == "knn_random_encoder":
                self.random = float(value)
            elif key == "knn_images":
                self.tested = int(value)
            elif key.startswith("target_scores/"):
                self.prototypes = True
            elif key.partition("/")[2].rpartition("/")[0] in FIGURES:
                self.figures.setdefault(key, deque(maxlen=READINGS)).append(float(value))

    def _take_loss(self, loss: float) -> None:
        self.loss, self.started = loss, True
        if not math.isfinite(loss):
            return
        self.losses.append(loss)
        if len(self.losses) == READINGS:
            level = median(self.losses)
            first, lowest, _ = self.levels or (level, level, level)
            self.levels = first, min(lowest, level), level

    def verdict(self) -> Verdict:
        """The state after the lines so far."""
        if not self.started:
            return Verdict("not judged", "no training step was logged yet")
        if not math.isfinite(self.loss):
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
                return Tap(*values)
        return None

    def _why_no_figures(self) -> str:
        if self.images is not None and self.images < LEAST_IMAGES:
            return (
                f"batches of {self.images} images are too small, at least {LEAST_IMAGES} are needed, and fewer than "
                f"{READINGS} windows were read: see monitor.every and monitor.rows"
            )
        return f"fewer than {READINGS} log lines hold ranks and deviations of both branches"

    def _collapse(self, target: Tap, online: Tap) -> Verdict | None:
        least = ASSIGNMENTS_DEVIATION if self.prototypes else FEATURES_DEVIATION
        if target.deviation < least:
            reason = f"the deviation at target is {target.deviation:.3f}, below {least:g}"
            return _advised("complete collapse", reason, "complete_collapse")
        if target.rank < DIMENSIONAL_RANK:
            reason = f"the effective rank at target about the mean is {target.rank:.2f}, below {DIMENSIONAL_RANK:g}"
            return _advised("dimensional collapse", reason, "dimensional_collapse")
        if online.deviation < least and online.rank < ONLINE_RANK:
            reason = f"the deviation at online is {online.deviation:.3f}, and what varies has rank {online.rank:.2f}"
            return _advised("complete collapse", reason, "complete_collapse")
        return None

    def _weakness(self) -> Verdict | None:
        if self.accuracies:
            newest, best = self.accuracies[-1], max(self.accuracies)
            if newest <= self.random:
                reason = f"k-NN accuracy {newest:.1%} is not above the {self.random:.1%} of the random encoder"
                return _advised("weak", reason, "no_gain")
            if best - newest > max(LOST_ACCURACY, LOST_ERRORS * self._error(best, newest)):
                return _advised("weak", f"k-NN accuracy fell from {best:.1%} to {newest:.1%}", "falling_accuracy")
        elif self.levels is not None and not self.prototypes:
            # A cross-entropy with moving targets rises with their entropy, in healthy runs too.
            first, lowest, newest = self.levels
            if newest - lowest > LOST_LOSS * (first - lowest):
                reason = f"the loss began at {first:.4g}, fell to {lowest:.4g} and rose again to {newest:.4g}"
                return _advised("weak", reason, "rising_loss")
        return None

    def _health(self, target: Tap) -> Verdict:
        seen = f"no sign of collapse, effective rank {target.rank:.1f} at target"
        if not self.accuracies:
            return Verdict("not judged", f"{seen}, but no k-NN accuracy was measured since training began")
        if math.isnan(self.random):
            return Verdict("not judged", f"{seen}, but the random encoder was not measured (evaluate.baselines)")
        newest = self.accuracies[-1]
        gain = f"{seen}, and k-NN accuracy {newest:.1%} is above the random encoder's {self.random:.1%}"
        if newest - self.random < self._error(newest, self.random):
            gain += f", though by less than the sampling error of {self.tested:,} test images"
        return Verdict("healthy", gain)

    def _error(self, first: float, second: float) -> float:
        """Binomial standard error of the difference of two accuracies; 0 where the number of images is not known.

        Both are taken as measured on different images. They share them, so that the error is at most this.
        """
        return math.sqrt((first * (1 - first) + second * (1 - second)) / self.tested) if self.tested else 0.0


def judge(lines: Iterable[Mapping[str, object]], images: int | None = None) -> Verdict:
    """The verdict on a run from all lines of its metrics.jsonl; `images` as of `Judge`."""
    found = Judge(images)
    found.replay(lines)
    return found.verdict()


def _advised(state: State, reason: str, key: str) -> Verdict:
    return Verdict(state, reason, *ADVICE[key])
