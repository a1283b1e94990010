"""The runs of a report side by side: their colors, their alarms, and the curves of a metric over epochs."""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from fastrdm.config.tree import Tree
from fastrdm.report.run_files import Run
from fastrdm.report.svg.axes import Axis
from fastrdm.report.svg.line_chart import Line, Mark, color_of


class Alarm(NamedTuple):
    """An alarm of one kind at one tap of one run: when it first rang, and how often."""

    number: int
    run: Run
    color: str
    first: Tree  # its line of alarms.jsonl
    tap: str  # empty: of the loss
    times: int


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

    def marks(self) -> list[Mark]:
        """Marks of all alarms for a chart over epochs."""
        return [
            Mark(a.first["epoch"], str(a.number), a.color, f"{a.run.name}: {a.first['alarm']}") for a in self.alarms
        ]


def with_alarms(runs: Sequence[Run]) -> Runs:
    """The runs, and their alarms numbered in the order of runs and epochs."""
    found: list[Alarm] = []
    for i, run in enumerate(runs):
        for first in sorted(run.alarms, key=lambda line: line["epoch"]):
            color, tap = color_of(i)[0], str(first.get("tap") or "")
            found.append(Alarm(len(found) + 1, run, color, first, tap, first["times"]))
    return Runs(list(runs), found)


def figure(title: str, drawing: str, caption: str) -> str:
    """A figure of a page; without a drawing the caption says why."""
    words = f"<figcaption><b>{escape(title)}.</b> {escape(caption)}</figcaption>"
    return f"<figure{'' if drawing else ' class=missing'}>{drawing}{words}</figure>"


def curves(all_runs: Runs, key: str, dash: str = "", suffix: str = "") -> list[Line]:
    """One line for each run that has the metric, with its band where there is one."""
    lines = []
    for run, color, own_dash in all_runs.colors():
        if run.series(key)[0]:
            lines.append(curve(run, key, f"{run.name}{suffix}", color, dash or own_dash))
    return lines


def curve(run: Run, key: str, label: str, color: str, dash: str = "") -> Line:
    """One metric of a run over epochs, with a band where both limits were logged with every value."""
    x, y = run.series(key)
    low, high = run.series(f"{key}/low")[1], run.series(f"{key}/high")[1]
    whole = len(low) == len(high) == len(y)
    return Line(label, x, y, color, dash, low if whole else (), high if whole else ())


def missing(all_runs: Runs, key: str) -> str:
    """A sentence on the runs without this metric; empty if all have it."""
    names = [run.name for run in all_runs.runs if not run.series(key)[0]]
    if not names:
        return ""
    return f" Not logged: {key}." if len(names) == len(all_runs.runs) else f" Not logged by {', '.join(names)}: {key}."
