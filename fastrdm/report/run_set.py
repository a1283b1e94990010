"""The runs of a report side by side: their colors, their alarms, and the curves of a metric over epochs."""

from collections.abc import Sequence
from typing import NamedTuple

from fastrdm.config.tree import Tree
from fastrdm.report.chart import Axis, Line, Mark, color_of
from fastrdm.report.run_files import Run


class Alarm(NamedTuple):
    """An alarm of one kind at one tap of one run: when it first rang, and how often."""

    run: Run
    place: int  # number of the run
    first: Tree  # its line of alarms.jsonl
    tap: str  # empty: of the loss
    times: int

    @property
    def words(self) -> str:
        """Name of the alarm and its tap as they are written in prose."""
        return alarm_name(self.first["alarm"]) + (
            f" at {self.tap.replace('_', ' ')}" if self.tap not in ("", "loss") else ""
        )


class Runs(NamedTuple):
    """The runs of a report and their alarms."""

    runs: list[Run]
    alarms: list[Alarm]

    def colors(self) -> list[tuple[Run, str, str]]:
        """Each run with its color and dash."""
        return [(run, *color_of(i)) for i, run in enumerate(self.runs)]

    def epochs(self) -> Axis:
        """Axis over the epochs of all runs."""
        return Axis("epoch", limits=(0.0, *(line["epoch"] for run in self.runs for line in run.metrics[-1:])))

    def marks(self, only: Run | None = None) -> list[Mark]:
        """Marks of all alarms, or of those of one run, for a chart over epochs."""
        shown = [a for a in self.alarms if only is None or a.run is only]
        return [Mark(a.first["epoch"], a.words, color_of(a.place)[0], a.place) for a in shown]


def alarm_name(kind: str) -> str:
    """Name of an alarm as it is written in prose."""
    return kind.replace("_", " ")


def with_alarms(runs: Sequence[Run]) -> Runs:
    """The runs, and their alarms in the order of runs and epochs."""
    found: list[Alarm] = []
    for i, run in enumerate(runs):
        for first in sorted(run.alarms, key=lambda line: line["epoch"]):
            found.append(Alarm(run, i, first, str(first.get("tap") or ""), first["times"]))
    return Runs(list(runs), found)


def curves(all_runs: Runs, key: str, dash: str = "", suffix: str = "") -> list[Line]:
    """One line for each run that has the metric, with its band where there is one."""
    lines = []
    for i, (run, color, own_dash) in enumerate(all_runs.colors()):
        if run.series(key)[0]:
            lines.append(curve(run, key, f"{run.name}{suffix}", color, dash or own_dash, i))
    return lines


def curve(run: Run, key: str, label: str, color: str, dash: str = "", index: int = -1) -> Line:
    """One metric of a run over epochs, with a band where both limits were logged with every value."""
    x, y = run.series(key)
    low, high = run.series(f"{key}/low")[1], run.series(f"{key}/high")[1]
    whole = len(low) == len(high) == len(y)
    return Line(label, x, y, color, dash, low if whole else (), high if whole else (), index)


def missing(all_runs: Runs, key: str) -> str:
    """A sentence on the runs without this metric; empty if all have it."""
    names = [run.name for run in all_runs.runs if not run.series(key)[0]]
    if not names:
        return ""
    return f" Not logged: {key}." if len(names) == len(all_runs.runs) else f" Not logged by {', '.join(names)}: {key}."
