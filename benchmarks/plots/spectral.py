"""Draw error against time of every solver from a table of benchmarks.kernels.spectral.

python -m benchmarks.plots.spectral docs/spectra.svg benchmarks/results/spectral_cpu.csv 512x2048

A panel for each task, a disc for each solver, and a stroke from the 20th to the 80th percentile of its time.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks import common
from benchmarks.plots import style

COLORS = {
    "svd": "#444444",
    "svd torch.compile": "#999999",
    "gram eigh fp32": "#c44e52",
    "eigh": "#4c72b0",
    "gram_power": "#8172b2",
    "newton_schulz": "#dd8452",
    "newton_schulz triton": "#55a868",
}
TASKS = ("power -1 forward", "log1p forward+backward")
BAR = 1e-3  # the largest error that a solver may have


def decades(rows: Sequence[dict[str, str]]) -> tuple[float, float]:
    """The powers of ten below and above the times of these rows."""
    times = [float(row[key]) for row in rows if row["task"] in TASKS for key in ("p20", "p80")]
    return 10.0 ** math.floor(math.log10(min(times))), 10.0 ** math.ceil(math.log10(max(times)))


def drawing(rows: Sequence[dict[str, str]], shape: str) -> str:
    """The picture as SVG, of the rows of one shape (rows x width)."""
    chosen = [row for row in rows if f"{row['rows']}x{row['width']}" == shape and row["views"] == "1"]
    if not chosen:
        raise SystemExit(f"SHAPE must be one of the table's, got {shape}")
    with style.settings():
        figure, panels = style.subplots(9.6, 4.2, 1, len(TASKS), sharey=True)
        title = f"Error against time, {shape}, {chosen[0]['device']}, {chosen[0]['threads']} threads"
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        for axes, task in zip(panels, TASKS, strict=True):
            for row in (row for row in chosen if row["task"] == task):
                low, ms, high, error = (float(row[key]) for key in ("p20", "ms", "p80", "error"))
                color = COLORS[row["provider"]]
                axes.plot([low, high], [error, error], color=color, linewidth=2.5)
                axes.plot(ms, error, "o", color=color, markersize=6, markeredgecolor="white", label=row["provider"])
            axes.axhline(BAR, color=style.GRAY, linewidth=1)
            axes.set(title=f"{task}: error", xlabel="milliseconds a call", xscale="log", yscale="log")
            axes.set(xlim=decades(chosen), ylim=(1e-8, 1e-2))
            style.plain_numbers(axes.xaxis)
        found = {
            name: handle for axes in panels for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        names = [name for name in COLORS if name in found]
        figure.legend([found[name] for name in names], names, loc="outside lower left", ncols=len(names))
        return style.svg(figure)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("out", type=Path, help="SVG to write")
    parser.add_argument("table", type=Path, metavar="CSV")
    parser.add_argument("shape", metavar="SHAPE", help="rows x width, as 512x2048")
    args = parser.parse_args()
    common.require_packages("matplotlib")
    args.out.write_text(drawing(common.read_rows(args.table), args.shape))


if __name__ == "__main__":
    main()
