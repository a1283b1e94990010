"""Alarms over the metrics of a run: what collapses, when it began, and whether the run goes on."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from fastrdm.methods.alignment import pairs_of
from fastrdm.methods.dual_branch import MethodConfig
from fastrdm.methods.losses import LossRange, find_loss
from fastrdm.methods.prototypes import PrototypesConfig
from fastrdm.monitoring.advice import ADVICE, Advice
from fastrdm.monitoring.settings import AlarmsConfig as AlarmsConfig
from fastrdm.schema import Duration, Horizon


class Alarm(NamedTuple):
    """A line of alarms.jsonl, without step and epoch."""

    alarm: str
    tap: str
    value: float | None
    threshold: float | None
    action: str
    text: str
    cause: str
    remedy: str
    page: str

    @property
    def told(self) -> str:
        """The printed message: what was seen, what usually causes it, what to try, and where to read on."""
        return f"{self.text}. {Advice(self.cause, self.remedy, self.page).text}"


def loss_range(config: MethodConfig, views: int) -> LossRange | None:
    """The range of a method's loss, joined over all its pairs of views; None where the loss tells none.

    A loss with regularizers, whose sum has no lowest value that a collapse would reach, has none.
    """
    one = find_loss(config.alignment.name).range
    if one is None or config.regularize:
        return None
    width = next((t.count for t in config.online if isinstance(t, PrototypesConfig)), config.projector.out)
    met = pairs_of(views, config.target_views, config.alignment)
    factor = config.alignment.weight * (len(met) if config.alignment.directions == "sum" else 1)
    return LossRange(*(factor * value for value in one(config.alignment, width)))


class Finding(NamedTuple):
    """A condition that holds at a step."""

    alarm: str
    tap: str
    value: float
    threshold: float
    patience: Duration
    text: str


class Alarms:
    """Turns findings that last into alarms. Call `update` with the metrics of each log step, on every process.


    `losses`: what the run's loss can be, None where that is not known and no alarm watches for its floor.
    """

    def __init__(self, config: AlarmsConfig, losses: LossRange | None, horizon: Horizon) -> None:
        self.config, self.losses, self.horizon = config, losses, horizon
        self.since: dict[str, int] = {}  # step at which a finding began
        self.raised: list[str] = []
        self.peaks: dict[str, float] = {}

    def update(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
        """Alarms that the metrics of this step raise. Missing metrics raise none."""
        found = {f"{f.alarm}/{f.tap}": f for f in self._findings(step, metrics)}
        self.since = {key: self.since.get(key, step) for key in found}
        self.raised = [key for key in self.raised if key in found]
        due = [key for key, f in found.items() if key not in self.raised and self._lasts(key, f, step)]
        self.raised += due
        return [self._alarm(found[key], self.since[key], step) for key in due]

    def _lasts(self, key: str, finding: Finding, step: int) -> bool:
        return step - self.since[key] >= self.horizon.steps(finding.patience)

    def _alarm(self, finding: Finding, since: int, step: int) -> Alarm:
        name = finding.alarm.replace("_", " ")
        text = f"alarm: {name} at {finding.tap} in steps {since} to {step}: {finding.text}"
        seen = finding.alarm, finding.tap, finding.value, finding.threshold, self.config.action, text
        return Alarm(*seen, *ADVICE[finding.alarm])

    def _findings(self, step: int, metrics: Mapping[str, float]) -> Iterator[Finding]:
        for tap in ("target", "online", "hidden", "features"):
            rank = metrics.get(f"{tap}/erank_l/unit/cov/batch")
            if rank is not None:
                yield from self._of_tap(tap, rank, step, metrics)
        share = self._above_floor(metrics["loss"]) if "loss" in metrics else math.inf
        if share < (threshold := self.config.floor_share):
            text = f"{100 * share:.2g} % above the lowest loss there is, below {100 * threshold:g} %"
            yield Finding("loss_at_floor", "loss", metrics["loss"], threshold, self.config.floor_patience, text)

    def _of_tap(self, tap: str, rank: float, step: int, metrics: Mapping[str, float]) -> Iterator[Finding]:
        c = self.config
        deviation, moment = metrics[f"{tap}/std/batch"], metrics[f"{tap}/erank_l/unit/moment/batch"]
        point = deviation < c.complete_std and moment < c.complete_rank
        if tap == "online":
            # A low rank is what the online branch is for, and a large mean makes it look like a point.
            point, low = point and rank < c.complete_rank, False
        else:
            low = rank < c.dimensional_rank
        if point:
            text = f"deviation {deviation:.3f} below {c.complete_std:g}, rank {moment:.2f} below {c.complete_rank:g}"
            yield Finding("complete_collapse", tap, deviation, c.complete_std, c.complete_patience, text)
        elif low:
            text = f"effective rank {rank:.2f} below {c.dimensional_rank:g}"
            yield Finding("dimensional_collapse", tap, rank, c.dimensional_rank, c.dimensional_patience, text)
        if tap != "online" and step >= self.horizon.steps(c.falling_after):
            peak = self.peaks[tap] = max(self.peaks.get(tap, 0.0), rank)
            if rank < c.falling_share * peak:
                text = f"effective rank {rank:.2f} below {c.falling_share:g} of its highest, {peak:.2f}"
                yield Finding("falling_rank", tap, rank, c.falling_share * peak, c.falling_patience, text)

    def _above_floor(self, loss: float) -> float:
        if self.losses is None:
            return math.inf
        floor, unrelated = self.losses
        return (loss - floor) / (unrelated - floor)

    def state_dict(self) -> dict[str, Any]:
        return {"since": dict(self.since), "raised": list(self.raised), "peaks": dict(self.peaks)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.since, self.raised, self.peaks = dict(state["since"]), list(state["raised"]), dict(state["peaks"])


def non_finite(text: str) -> Alarm:
    """The alarm of a loss that is no finite number; it always stops the run."""
    return Alarm("non_finite_loss", "loss", None, None, "stop", f"alarm: {text}", *ADVICE["non_finite_loss"])


def replay(alarms: Alarms, lines: Iterable[Mapping[str, float]]) -> Iterator[tuple[int, Alarm]]:
    """Steps and alarms that the lines of a metrics.jsonl would have raised."""
    for line in lines:
        if "loss" in line:
            yield from ((int(line["step"]), alarm) for alarm in alarms.update(int(line["step"]), line))
