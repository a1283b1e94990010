"""Reduce runs to small records, and draw a healthy one beside a collapsed one.

    python -m benchmarks.plots.monitoring reduce RUN > benchmarks/records/monitoring/simsiam.jsonl
    python -m benchmarks.plots.monitoring draw docs/monitoring.svg \\
        benchmarks/records/monitoring/simsiam.jsonl benchmarks/records/monitoring/without_stop.jsonl
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.plots import style

RANK = "erank_l/unit/moment"
RUNS = ("with", "without")
KEPT = (
    "step",
    "epoch",
    "loss",
    *(f"{tap}/{RANK}/window" for tap in ("online", "target")),
    *(f"{tap}/{metric}/batch" for tap in ("target", "hidden", "features") for metric in ("erank_l/unit/cov", "std")),
    "rankme",
    "lidar",
)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON Lines file, none if there is no such file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def rounded(line: dict[str, Any]) -> dict[str, Any]:
    """The line with four digits of every number that is no integer."""
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in line.items()}


def reduce(run: Path) -> Iterator[dict[str, Any]]:
    """Lines with a window's metrics, the target's spectra of the first and the last window, and the alarms."""
    for line in read(run / "metrics.jsonl"):
        if f"target/{RANK}/window" in line:
            yield rounded({key: line[key] for key in KEPT})
    spectra = [line for line in read(run / "spectra.jsonl") if line["tap"] == "target"]
    for line in (spectra[0], spectra[-1]):
        yield {**line, "eigenvalues": [float(f"{value:.3g}") for value in line["eigenvalues"]]}
    yield from map(rounded, read(run / "alarms.jsonl"))


def drawing(records: Sequence[Path]) -> str:
    """Ranks of both branches over epochs, and the target's first and last spectrum, of two runs, as SVG."""
    with style.settings():
        figure, (ranks, spectra) = style.subplots(9.6, 4.2, 1, 2)
        figure.suptitle("SimSiam on digits, with and without its stop-gradient", x=0.01, ha="left", fontsize=11)
        for run, path, color in zip(RUNS, records, style.COLORS, strict=False):
            lines = read(path)
            for tap, stroke in (("target", "-"), ("online", "--")):
                key = f"{tap}/{RANK}/window"
                points = [(line["epoch"], line[key]) for line in lines if key in line]
                ranks.plot(*zip(*points, strict=True), stroke, color=color, label=f"{run}: {tap}")
            first, last = (line for line in lines if "eigenvalues" in line)
            for line, stroke, when in ((last, "-", "last"), (first, "--", "first")):
                label = f"{run}: {when} window"
                spectra.plot(line["ranks"], line["eigenvalues"], stroke, color=color, label=label)
        ranks.set(title=f"{RANK}, windows", xlabel="epoch", yscale="log", ylim=(1, 100), xlim=(0, None))
        spectra.set(title="spectrum of the target, shares of its sum", xlabel="index", xscale="log", yscale="log")
        spectra.set(ylim=(1e-8, 1), xlim=(1, None))
        style.plain_numbers(ranks.yaxis)
        style.plain_numbers(spectra.xaxis)
        ranks.locator_params(axis="x", steps=[1, 5, 10])
        for axes in (ranks, spectra):
            axes.legend(ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))
        return style.svg(figure)


def main() -> None:
    tasks = (parser := common.parser(__doc__)).add_subparsers(dest="task", required=True)
    task = tasks.add_parser("reduce", help="print the record of a run")
    task.add_argument("run", type=Path, help="folder of the run")
    task = tasks.add_parser("draw", help="draw two records")
    task.add_argument("out", type=Path, help="SVG to write")
    task.add_argument("records", type=Path, nargs=2, metavar="JSONL", help="the healthy run, then the collapsed one")
    args = parser.parse_args()
    if args.task == "reduce":
        print(*map(json.dumps, reduce(args.run)), sep="\n")
    else:
        common.require_packages("matplotlib")
        args.out.write_text(drawing(args.records))


if __name__ == "__main__":
    main()
