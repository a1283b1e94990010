"""Draw the rates of benchmarks.loaders.throughput as bars.

    python -m benchmarks.plots.loader docs/loader.svg benchmarks/results/loader_views.csv \\
        benchmarks/results/loader_memory.csv

A panel for each file, of its largest number of workers: the rate over that of DataLoader with torchvision in the same
rounds, a stroke from the 20th to the 80th percentile over rounds, a ring for the ratio by processor time. The numbers
at the right are images a second.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from benchmarks import common
from benchmarks.plots import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLES = {
    "loader_views": "ImageNet's files to two views of 224 px",
    "loader_memory": "CIFAR-10 in memory to two views of 32 px",
}
OURS = ("native", "resident", "DALI files", "DALI packed", "DALI", "ffcv")
LEAVE_OUT = ("synthetic",)  # it makes nothing: its rate would squeeze all others
LEGEND = "blue: engines of fastrdm; orange: others; gray: floors\nstroke: spread over rounds; ring: by processor time"


class Table(NamedTuple):
    """The rows of one panel."""

    title: str
    rows: list[dict[str, str]]


def color(name: str) -> str:
    """The color of an engine of fastrdm, of another pipeline, or of a floor."""
    if name.startswith("floor"):
        return style.GRAY
    return style.COLORS[0] if name.startswith(OURS) and "own" not in name else style.COLORS[1]


def table_of(path: Path) -> Table:
    """The rows of a file with the largest number of workers, fastest first."""
    rows = [row for row in common.read_rows(path) if not row["contestant"].startswith(LEAVE_OUT)]
    workers = max(int(row["workers"]) for row in rows)
    chosen = [row for row in rows if int(row["workers"]) == workers and row["plain"] == rows[0]["plain"]]
    first = chosen[0]
    where = f"{first['cpu']}, {workers} of {first['cores']} cores" if first["device"] == "cpu" else first["device"]
    ordered = sorted(chosen, key=lambda row: -float(row["times"]))
    return Table(f"{TITLES.get(path.stem, path.stem)}: {where}", ordered)


def panel(axes: "Axes", table: Table) -> None:
    """Draw the bars of one table."""
    for place, row in enumerate(table.rows):
        times, low, high, core = (float(row[key]) for key in ("times", "times_p20", "times_p80", "times_core"))
        axes.barh(place, times, height=0.65, color=color(row["contestant"]), alpha=0.75)
        axes.plot([low, high], [place, place], color="black", zorder=3)
        axes.plot(core, place, "o", color="black", markerfacecolor="white", markersize=5, zorder=4)
        axes.text(
            1.11, place, f"{float(row['rate']):,.0f}", transform=axes.get_yaxis_transform(), ha="right", va="center"
        )
    axes.text(1.11, -0.9, "images/s", transform=axes.get_yaxis_transform(), ha="right", va="center", color=style.GRAY)
    axes.set_yticks(range(len(table.rows)), [row["contestant"] for row in table.rows])
    axes.set_ylim(len(table.rows) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.locator_params(axis="x", steps=[1, 2, 5, 10])
    axes.set(title=table.title, xlabel=f"times the rate of {table.rows[0]['plain']}")


def drawing(tables: Sequence[Table]) -> str:
    """The picture as SVG."""
    counts = [len(table.rows) for table in tables]
    with style.settings():
        height = sum(1.0 + 0.26 * count for count in counts) + 0.3
        figure, panels = style.subplots(7.2, height, len(tables), gridspec_kw={"height_ratios": counts})
        for axes, table in zip(panels, tables, strict=True):
            panel(axes, table)
        figure.supxlabel(LEGEND, fontsize=9)
        return style.svg(figure)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("out", type=Path, help="SVG to write")
    parser.add_argument("tables", type=Path, nargs="+", metavar="CSV")
    args = parser.parse_args()
    common.require_packages("matplotlib")
    args.out.write_text(drawing([table_of(path) for path in args.tables]))


if __name__ == "__main__":
    main()
