"""Draw error against time of every solver from a CSV of bench_spectral.py, as SVG to stdout.

python -m benchmarks.plots.spectral benchmarks/results/spectral_cpu.csv 512x2048 > docs/spectra.svg
"""

import csv
import math
import sys
from collections.abc import Callable

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, GAP = 460, 330, 64, 48, 56, 30
COLORS = {
    "svd": "#444444",
    "svd torch.compile": "#999999",
    "gram eigh fp32": "#c44e52",
    "eigh": "#4c72b0",
    "gram_power": "#8172b2",
    "newton_schulz": "#dd8452",
    "ladder triton": "#55a868",
}
PANELS = ["power -1 forward", "log1p forward+backward"]


def text(x: float, y: float, what: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{what}</text>'


def axis(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Place of a value on a logarithmic axis."""
    return lambda v: start + (end - start) * (math.log10(v) - math.log10(low)) / (math.log10(high) - math.log10(low))


def panel(rows: list[dict[str, str]], title: str, left: float) -> list[str]:
    """One task: a ring a solver, a bar from the 20th to the 80th percentile of its time."""
    times = [float(row[key]) for row in rows for key in ("p20", "p80")]
    low, high = 10 ** math.floor(math.log10(min(times))), 10 ** math.ceil(math.log10(max(times)))
    place_x = axis(low, high, left, left + WIDTH - LEFT)
    place_y = axis(1e-8, 1e-2, TOP + HEIGHT, TOP)
    out = [text(left, TOP - 14, title, 'font-weight="bold"')]
    for exponent in range(-8, -1):
        y = place_y(10.0**exponent)
        out.append(f'<line x1="{left}" y1="{y:.1f}" x2="{left + WIDTH - LEFT}" y2="{y:.1f}" stroke="#dddddd"/>')
        out.append(text(left - 8, y + 4, f"1e{exponent}", 'text-anchor="end"'))
    for exponent in range(round(math.log10(low)), round(math.log10(high)) + 1):
        x = place_x(10.0**exponent)
        out.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{TOP + HEIGHT}" stroke="#dddddd"/>')
        out.append(text(x, TOP + HEIGHT + 18, f"{10.0**exponent:g}", 'text-anchor="middle"'))
    bar = place_y(1e-3)
    out.append(f'<line x1="{left}" y1="{bar:.1f}" x2="{left + WIDTH - LEFT}" y2="{bar:.1f}" stroke="#444444"/>')
    for row in rows:
        color, y = COLORS[row["provider"]], place_y(float(row["error"]))
        p20, ms, p80 = (place_x(float(row[key])) for key in ("p20", "ms", "p80"))
        out.append(f'<line x1="{p20:.1f}" y1="{y:.1f}" x2="{p80:.1f}" y2="{y:.1f}" stroke="{color}" stroke-width="3"/>')
        out.append(f'<circle cx="{ms:.1f}" cy="{y:.1f}" r="6" fill="{color}" stroke="white"/>')
    out.append(text(left + (WIDTH - LEFT) / 2, TOP + HEIGHT + 38, "milliseconds a call", 'text-anchor="middle"'))
    return out


def main() -> None:
    path, shape = sys.argv[1:]
    with open(path) as file:
        rows = [row for row in csv.DictReader(file) if f"{row['rows']}x{row['width']}" == shape and row["views"] == "1"]
    total = 2 * WIDTH + GAP
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {TOP + HEIGHT + BOTTOM + 40}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{total}" height="{TOP + HEIGHT + BOTTOM + 40}" fill="white"/>',
        text(
            LEFT,
            20,
            f"Error against time, {shape}, {rows[0]['device']}, {rows[0]['threads']} threads",
            'font-size="14"',
        ),
    ]
    shown = set()
    for index, title in enumerate(PANELS):
        chosen = [row for row in rows if row["task"] == title]
        shown |= {row["provider"] for row in chosen}
        out += panel(chosen, f"{title}: error", LEFT + index * (WIDTH + GAP))
    x = float(LEFT)
    for name, color in COLORS.items():
        if name in shown:
            out.append(f'<circle cx="{x}" cy="{TOP + HEIGHT + 62}" r="6" fill="{color}"/>')
            out.append(text(x + 10, TOP + HEIGHT + 66, name))
            x += 30 + 7 * len(name)
    print(*out, "</svg>", sep="\n")


if __name__ == "__main__":
    main()
