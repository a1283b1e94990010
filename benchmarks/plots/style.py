"""Style of the project's static pictures: matplotlib's settings, colors, and SVG text.

The SVG is the same in every run with one version of matplotlib: it holds no date, its ids come from a fixed salt, and
its text stays text in the font that matplotlib brings along.
"""

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#8a6d00", "#000000")  # Okabe and Ito, 2008
STROKES = ("-", "--", ":")  # after the last color the first one comes again, dashed
GRAY = "#666666"
SETTINGS: Any = {  # of matplotlib.rcParams, whose keys differ between versions
    "svg.hashsalt": "fastrdm",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.0,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.1,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}


class Curve(NamedTuple):
    """One line of a chart; an empty label keeps it out of the legend."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: str
    stroke: str = "-"


class Pair(NamedTuple):
    """Two values of one thing, drawn as a ring and a disc; an empty label adds it to the row above."""

    label: str
    ring: float
    disc: float
    color: str


@contextmanager
def settings() -> Iterator[None]:
    """Draw and save figures inside with SETTINGS over matplotlib's defaults, whatever the user's own are."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        yield


def subplots(
    width: float, height: float, rows: int = 1, columns: int = 1, **options: Any
) -> "tuple[Figure, list[Axes]]":
    """A figure of so many inches, and its panels row by row; `options` as those of Figure.subplots."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def svg(figure: "Figure") -> str:
    """The figure as SVG."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def color_of(index: int) -> tuple[str, str]:
    """Color and stroke of the curve of that number."""
    return COLORS[index % len(COLORS)], STROKES[index // len(COLORS) % len(STROKES)]


def plain_numbers(axis: "Axis") -> None:
    """Label a logarithmic axis 1, 10, 100 in place of powers of ten, where it has no more than four decades.

    Where it has less than two, it is labeled 1, 2, 5, 10. Call it when all that is drawn is there.
    """
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    if decades > 4:
        return
    if decades < 2:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axis.set_minor_formatter(NullFormatter())


def chart(
    curves: Sequence[Curve], x: str, y: str, *, title: str, logs: str = "", level: tuple[float, str] | None = None
) -> str:
    """Curves with their legend beside them. `logs`: which of the axes "x" and "y" are logarithmic.

    `level` is the height and the name of a dashed line to compare with.
    """
    with settings():
        figure, (axes,) = subplots(7.2, 3.6)
        axes.set(title=title, xlabel=x, ylabel=y)
        axes.set_xscale("log" if "x" in logs else "linear")
        axes.set_yscale("log" if "y" in logs else "linear")
        for curve in curves:
            few = "o" if len(curve.x) <= 12 else ""
            label = curve.label or "_"
            axes.plot(curve.x, curve.y, curve.stroke, color=curve.color, label=label, marker=few, markersize=3)
        if level:
            axes.axhline(level[0], color=GRAY, linestyle=(0, (3, 3)), linewidth=1, label=level[1])
        for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
            if name in logs:
                plain_numbers(axis)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        return svg(figure)


def dumbbells(pairs: Sequence[Pair], x: str, *, title: str, log: bool = False) -> str:
    """Pairs of values, a row for each label: a ring, a disc, and a line between them."""
    labels = [pair.label for pair in pairs if pair.label]
    with settings():
        figure, (axes,) = subplots(7.2, 0.9 + 0.26 * len(labels))
        axes.set(title=title, xlabel=x, xscale="log" if log else "linear")
        row, below = -1, 0
        for pair in pairs:
            row, below = (row + 1, 0) if pair.label else (row, below + 1)
            y = row - 0.26 + 0.26 * below
            axes.plot([pair.ring, pair.disc], [y, y], color=pair.color, linewidth=1.2, zorder=2)
            axes.plot(pair.ring, y, "o", color=pair.color, markerfacecolor="white", markersize=3.6, zorder=3)
            axes.plot(pair.disc, y, "o", color=pair.color, markersize=3.6, zorder=3)
        if log:
            plain_numbers(axes.xaxis)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        return svg(figure)
