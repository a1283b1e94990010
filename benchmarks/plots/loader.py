"""Rates of bench_loader's tables as bars: python -m benchmarks.plots.loader CSV... > docs/loader.svg

A panel a file, of its largest number of workers: the rate over that of DataLoader with torchvision in the same rounds,
a stroke from the 20th to the 80th percentile over rounds, a ring for the ratio by processor time; at the right images a
second.
"""

import csv
import sys
from pathlib import Path

from fastrdm.report.svg.axes import Axis, Scale
from fastrdm.report.svg.line_chart import GRAY, GRID, PALETTE, text

LEFT, RIGHT, WIDTH = 190, 60, 640
TOP, ROW, FOOT = 44, 22, 48
TITLES = {
    "loader_views": "ImageNet's files to two views of 224 px",
    "loader_memory": "CIFAR-10 in memory to two of 32 px",
}
OURS = ("native", "resident", "DALI files", "DALI packed", "DALI", "ffcv")
KEYS = ("times", "times_p20", "times_p80", "times_core")
LEAVE_OUT = ("synthetic",)  # it makes nothing: its rate would squeeze all others


def color(name: str) -> str:
    """Engines of fastrdm, other pipelines, floors."""
    if name.startswith("floor"):
        return GRAY
    return PALETTE[0] if name.startswith(OURS) and "own" not in name else PALETTE[1]


def panel(rows: list[dict[str, str]], title: str, top: float) -> list[str]:
    """The bars of one table, fastest first."""
    rows = sorted(rows, key=lambda row: -float(row["times"]))
    values = [float(row[key]) for row in rows for key in KEYS]
    across = Scale(Axis(f"times the rate of {rows[0]['plain']}", limits=(0.0,)), values, LEFT, WIDTH - RIGHT)
    bottom = top + TOP + ROW * len(rows)
    out = [text(8, top + 18, title), text(WIDTH - 6, top + 36, "images/s", "end", GRAY)]
    for value in across.ticks:
        x = across(value)
        out.append(f'<path d="M{x:.1f} {top + TOP - 6}V{bottom}" stroke="{GRID}"/>')
        out.append(text(x, bottom + 15, across.text(value), "middle"))
    for number, row in enumerate(rows):
        middle = top + TOP + ROW * (number + 0.5)
        end, low, high, core = (across(float(row[key])) for key in KEYS)
        shade, wide = color(row["contestant"]), end - LEFT
        out.append(text(LEFT - 8, middle + 4, row["contestant"], "end"))
        out.append(
            f'<rect x="{LEFT}" y="{middle - 7:.1f}" width="{wide:.1f}" height="14" fill="{shade}" opacity="0.75"/>'
        )
        out.append(f'<path d="M{low:.1f} {middle:.1f}H{high:.1f}" stroke="#000" stroke-width="2"/>')
        out.append(f'<circle cx="{core:.1f}" cy="{middle:.1f}" r="3.5" fill="#fff" stroke="#000"/>')
        out.append(text(WIDTH - 6, middle + 4, f"{float(row['rate']):,.0f}", "end"))
    out.append(text((LEFT + WIDTH - RIGHT) / 2, bottom + 32, across.axis.label, "middle"))
    return out


def drawing(tables: list[tuple[str, list[dict[str, str]]]]) -> str:
    """The whole SVG."""
    parts, top = list[str](), 0.0
    for title, rows in tables:
        parts += panel(rows, title, top)
        top += TOP + ROW * len(rows) + FOOT
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top + 24:.0f}" role="img" '
    head += 'font-family="system-ui, Helvetica, Arial, sans-serif" font-size="11"><title>Rates of loading</title>'
    words = "blue: engines of fastrdm; orange: others; grayscale: floors; stroke: spread; ring: by processor time"
    return "\n".join(
        [head, '<rect width="100%" height="100%" fill="#fff"/>', *parts, text(8, top + 12, words), "</svg>"]
    )


def tables_of(path: Path) -> list[tuple[str, list[dict[str, str]]]]:
    """Title and rows of the largest number of workers in a file."""
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if not row["contestant"].startswith(LEAVE_OUT)]
    workers = max(int(row["workers"]) for row in rows)
    chosen = [row for row in rows if int(row["workers"]) == workers and row["plain"] == rows[0]["plain"]]
    where = (
        f"{chosen[0]['cpu']}, {workers} of {chosen[0]['cores']} cores"
        if chosen[0]["device"] == "cpu"
        else chosen[0]["device"]
    )
    return [(f"{TITLES.get(path.stem, path.stem)}: {where}", chosen)]


def main() -> None:
    print(drawing([table for path in sys.argv[1:] for table in tables_of(Path(path))]))


if __name__ == "__main__":
    main()
