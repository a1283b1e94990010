"""Charts of the report as plain data: lines over a pair of axes. assets/report.js draws them by uPlot."""

import json
import math
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

POINTS = 600  # of a line, at most
COLORS = 7  # colors of runs, which assets/report.css names for a light and a dark page
DASHES = ("", "7 3", "2 3")  # after the last color the first one comes again, dashed
MUTED = "muted"  # color of what is there to compare with


class Axis(NamedTuple):
    """Label and scale of an axis. The data widen its limits."""

    label: str
    log: bool = False
    percent: bool = False  # shares, written as per cent
    limits: tuple[float, ...] = ()  # values that must be on it


class Line(NamedTuple):
    """One curve; a value that is not finite is a gap."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: str
    dash: str = ""
    low: Sequence[float] = ()  # of a band around it, or empty
    high: Sequence[float] = ()
    run: int = -1  # number of the run that the line belongs to; it is hidden with it


class Level(NamedTuple):
    """A horizontal value to compare with."""

    y: float
    label: str


class Mark(NamedTuple):
    """A moment at which something happened to a run, such as an alarm, in words."""

    x: float
    label: str
    color: str
    run: int


class Chart(NamedTuple):
    """Lines over one pair of axes."""

    lines: Sequence[Line]
    x: Axis
    y: Axis
    levels: Sequence[Level] = ()
    marks: Sequence[Mark] = ()
    points: int = POINTS


class Figure(NamedTuple):
    """A chart or a table with its title and caption; with neither, the caption says why."""

    title: str
    caption: str
    chart: Chart | None = None
    table: str = ""  # HTML
    run: int = -1  # number of the only run that it shows; it is hidden with it


def color_of(index: int) -> tuple[str, str]:
    """Color and dash of the run of that number."""
    return f"run{index % COLORS}", DASHES[index // COLORS % len(DASHES)]


def color_at(share: float) -> str:
    """Color of a moment: share 0 is the start, 1 the end."""
    return f"time{min(max(share, 0.0), 1.0):.3f}"


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


def to_json(value: Any) -> str:
    """JSON that may stand inside a script element: no character of it can end the element."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def as_tree(chart: Chart) -> dict[str, Any]:
    """The chart as what assets/report.js reads. What cannot be drawn on its axis is None."""
    return {
        "x": chart.x._asdict(),
        "y": chart.y._asdict(),
        "lines": [_line(line, chart) for line in chart.lines],
        "levels": [level._asdict() for level in chart.levels if math.isfinite(level.y)],
        "marks": [mark._asdict() for mark in chart.marks],
    }


def _line(line: Line, chart: Chart) -> dict[str, Any]:
    kept = [i for i in thin(line.y, chart.points) if _number(line.x[i], chart.x) is not None]
    series = {"x": (line.x, chart.x), "y": (line.y, chart.y), "low": (line.low, chart.y), "high": (line.high, chart.y)}
    drawn = {name: [_number(values[i], axis) for i in kept] for name, (values, axis) in series.items() if values}
    return {"label": line.label, "color": line.color, "dash": line.dash, "run": line.run, "x": [], "y": [], **drawn}


def _number(value: float, axis: Axis) -> float | None:
    """The value with six digits; None where it is not finite, or not above 0 on a logarithmic axis."""
    if not math.isfinite(value) or (axis.log and value <= 0):
        return None
    short = float(f"{value:.6g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


def html(figure: Figure, charts: list[dict[str, Any]]) -> str:
    """The figure as HTML. Its chart is appended to `charts`, which the page holds as JSON."""
    words = f"<figcaption><b>{escape(figure.title)}</b> {escape(figure.caption)}</figcaption>"
    run = f' data-run="{figure.run}"' if figure.run >= 0 else ""
    if figure.chart is None:
        return f"<figure{'' if figure.table else ' class=missing'}{run}>{words}{figure.table}</figure>"
    charts.append({"title": figure.title, **as_tree(figure.chart)})
    return f'<figure{run}>{words}<div class="chart" data-chart="{len(charts) - 1}"></div></figure>'


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int] | range = (), kind: str = ""
) -> str:
    """Rows of HTML cells below a head of plain words; on a phone, each row is a list of its cells."""
    style = [' class="n"' if i in numeric else "" for i in range(len(head))]
    top = "".join(f"<th{s}>{escape(word)}</th>" for s, word in zip(style, head, strict=True))
    body = "\n".join(
        f"<tr>{''.join(_cell(s, word, cell) for s, word, cell in zip(style, head, row, strict=True))}</tr>"
        for row in rows
    )
    name = f' class="{kind}"' if kind else ""
    return f'<div class="wide"><table{name}><thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def _cell(style: str, head: str, cell: str) -> str:
    return f'<td{style} data-head="{escape(head)}">{cell}</td>'
