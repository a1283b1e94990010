"""Reduce runs to small records, and draw a healthy one beside a collapsed one, as SVG to stdout.

cd benchmarks/records/monitoring
python ../../plot_monitoring.py reduce RUN > simsiam.jsonl
python ../../plot_monitoring.py draw simsiam.jsonl without_stop.jsonl > ../../../docs/monitoring.svg
"""

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

WIDTH, HEIGHT, LEFT, TOP, GAP, BOTTOM = 400, 300, 56, 60, 76, 96
RANK = "erank_l/unit/moment"
COLORS = ("#4c72b0", "#c44e52")
KEPT = (
    "step",
    "epoch",
    "loss",
    *(f"{tap}/{RANK}/window" for tap in ("online", "target")),
    *(f"{tap}/{figure}/batch" for tap in ("target", "hidden", "features") for figure in ("erank_l/unit/cov", "std")),
    "rankme",
    "lidar",
)
Point = tuple[float, float]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def rounded(line: dict[str, Any]) -> dict[str, Any]:
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in line.items()}


def reduce(run: Path) -> Iterable[dict[str, Any]]:
    """Lines with a window's figures, the target's spectra of the first and the last window, and the alarms."""
    for line in read(run / "metrics.jsonl"):
        if f"target/{RANK}/window" in line:
            yield rounded({key: line[key] for key in KEPT})
    spectra = [line for line in read(run / "spectra.jsonl") if line["tap"] == "target"]
    for line in (spectra[0], spectra[-1]):
        yield {**line, "eigenvalues": [float(f"{value:.3g}") for value in line["eigenvalues"]]}
    yield from map(rounded, read(run / "alarms.jsonl"))


def text(x: float, y: float, what: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{what}</text>'


def place(low: float, high: float, start: float, end: float, log: bool) -> Callable[[float], float]:
    """Place of a value on an axis; values beyond its ends stand at them."""
    scale = np.log10 if log else float
    inside = np.clip
    return lambda v: float(
        start + (end - start) * (scale(inside(v, low, high)) - scale(low)) / (scale(high) - scale(low))
    )


def panel(
    left: float, title: str, x: tuple[float, float, bool, str], y: tuple[float, float], curves: list[list[Point]]
) -> list[str]:
    """Curves over an axis x (low, high, logarithmic, name) and a logarithmic y; every second one is dashed."""
    place_x = place(x[0], x[1], left, left + WIDTH, x[2])
    place_y = place(*y, TOP + HEIGHT, TOP, True)
    out = [text(left, TOP - 14, title, 'font-weight="bold"')]
    for exponent in range(round(np.log10(y[0])), round(np.log10(y[1])) + 1):
        at = place_y(10.0**exponent)
        out.append(f'<line x1="{left}" y1="{at:.1f}" x2="{left + WIDTH}" y2="{at:.1f}" stroke="#dddddd"/>')
        out.append(text(left - 8, at + 4, f"{10.0**exponent:g}", 'text-anchor="end"'))
    ticks = [t for t in (1, 10, 100, 1000) if t <= x[1]] if x[2] else np.linspace(x[0], x[1], 5)
    out += [text(place_x(t), TOP + HEIGHT + 18, f"{t:g}", 'text-anchor="middle"') for t in ticks]
    out.append(text(left + WIDTH / 2, TOP + HEIGHT + 38, x[3], 'text-anchor="middle"'))
    for i, curve in enumerate(curves):
        points = " ".join(f"{place_x(a):.1f},{place_y(b):.1f}" for a, b in curve)
        dashes = ' stroke-dasharray="6 4"' if i % 2 else ""
        out.append(f'<polyline points="{points}" fill="none" stroke="{COLORS[i // 2]}" stroke-width="2"{dashes}/>')
    return out


def draw(paths: list[str]) -> Iterable[str]:
    """Rank of both branches over epochs, and the target's first and last spectrum, of two runs."""
    ranks: list[list[Point]] = []
    spectra: list[list[Point]] = []
    for path in paths:
        lines = read(Path(path))
        for tap in ("target", "online"):
            key = f"{tap}/{RANK}/window"
            ranks.append([(line["epoch"], line[key]) for line in lines if key in line])
        first, last = (line for line in lines if "eigenvalues" in line)
        spectra += [list(zip(line["ranks"], line["eigenvalues"], strict=True)) for line in (last, first)]
    width, height = LEFT + 2 * WIDTH + GAP + 20, TOP + HEIGHT + BOTTOM
    yield f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
    yield 'font-family="sans-serif" font-size="12">'
    yield f'<rect width="{width}" height="{height}" fill="white"/>'
    yield text(LEFT, 22, "SimSiam on digits, with and without its stop-gradient", 'font-size="14"')
    end = max(epoch for curve in ranks for epoch, _ in curve)
    yield from panel(LEFT, f"{RANK}, windows", (0, end, False, "epochs"), (1, 100), ranks)
    last_rank = max(index for curve in spectra for index, _ in curve)
    title = "spectrum of the target, shares of its sum"
    yield from panel(LEFT + WIDTH + GAP, title, (1, last_rank, True, "index"), (1e-8, 1), spectra)
    names = [f"{run}: {curve}" for run in ("with", "without") for curve in ("target / last", "online / first window")]
    x = float(LEFT)
    for i, name in enumerate(names):
        dashes = ' stroke-dasharray="6 4"' if i % 2 else ""
        y = TOP + HEIGHT + 66
        yield f'<line x1="{x}" y1="{y}" x2="{x + 30}" y2="{y}" stroke="{COLORS[i // 2]}" stroke-width="2"{dashes}/>'
        yield text(x + 36, y + 4, name)
        x += 56 + 6.2 * len(name)
    yield "</svg>"


def main() -> None:
    task, *paths = sys.argv[1:]
    if task == "reduce":
        print(*map(json.dumps, reduce(Path(paths[0]))), sep="\n")
    else:
        print(*draw(paths), sep="\n")


if __name__ == "__main__":
    main()
