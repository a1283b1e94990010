"""Rows and curves of CIFAR-10 runs: what a finished run's folder says, the CSV files that hold it, means over seeds.

Of each budget there are results/cifar10_BUDGET.csv, results/analysis_cifar10_BUDGET.csv and .json.
"""

import csv
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks import common
from fastrdm.methods.presets import PRESETS
from fastrdm.monitoring.rank_statistics import HEADLINE_CONVENTION
from fastrdm.report.run_files import Measurement, Run, Series, read_runs

BATCH = f"{HEADLINE_CONVENTION}/batch"
FIELDS = ["preset", "seed", "random", "trained", "probe", "rank_online", "rank_target", "loss", "raw_pixels", "alarms"]
FIELDS += ["cpu_seconds", "commit", "torch", "device"]
PUBLISHED_FIELDS = [*FIELDS, "best", "minutes", "memory_gb"]  # of runs of a published schedule
DIFFERENCE = f"difference/{HEADLINE_CONVENTION}"
BRANCHES = [f"{branch}/{HEADLINE_CONVENTION}" for branch in ("online", "target")]
NULLS = [f"null/{branch}" for branch in BRANCHES]
HEADLINE = [*BRANCHES, *(f"{DIFFERENCE}{end}" for end in ("", "/low", "/high"))]
FILTER = ["verdict", "body", "body/low", "body/high", "tail", "null", "null/low", "null/high", "tilt", "directions"]
FILTER = [f"filter/{name}" for name in FILTER]
METRICS = ["images", "dimension", "biased", *HEADLINE, *NULLS, "difference/erank_l/unit/cov", *FILTER]
METRICS += [f"alignment/{name}" for name in ("value", "chance", "crossed", "ceiling", "published")]
SCORES = [f"scores/{name}" for name in [*HEADLINE, *FILTER[:4], FILTER[-1], "alignment/value", "alignment/chance"]]
MEASURED = ["preset", "seed", *METRICS, *SCORES, "cpu_seconds", "commit", "torch", "device"]
RANKS = {name: f"{name}/{HEADLINE_CONVENTION}/window" for name in ("online", "target", "difference")}
POINTS = 40  # of a curve, evenly spaced in the logarithm of the direction's number
SMALLEST = 1e-12  # a value whose logarithm is taken is at least this
Row = dict[str, str]
Curves = dict[str, dict[str, Series]]  # preset, name of the curve: numbers and values, means over seeds


def append(file: Path, row: dict[str, Any], fields: Sequence[str]) -> None:
    """Add what `fields` name of a row, in the place of one of the same preset and seed; rows lie in the order of
    presets and seeds.
    """
    same = (row["preset"], str(row["seed"]))
    rows: list[dict[str, Any]] = [row, *(old for old in common.read_rows(file) if (old["preset"], old["seed"]) != same)]
    rows.sort(key=lambda row: (list(PRESETS).index(row["preset"]), int(row["seed"])))
    partial = file.with_suffix(".partial")
    with partial.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, fields, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(file)


def where(device: str) -> dict[str, str]:
    """The last columns of a row: commit, version of torch, device."""
    name = f"{common.processor()}, {os.cpu_count()} cores"
    if device == "cuda":
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {"commit": common.commit(), "torch": torch.__version__, "device": name}


def trained_row(preset: str, seed: int, run: Path, seconds: float, device: str) -> dict[str, Any]:
    """The row of a finished run."""
    f = json.loads((run / "summary.json").read_text())
    metrics = {"random": f["knn_random_encoder"], "trained": f["knn"], "probe": f["probe"], "loss": f["loss"]}
    metrics |= {"rank_online": f[f"online/{BATCH}"], "rank_target": f[f"target/{BATCH}"]}
    metrics["raw_pixels"] = f["knn_raw_pixels"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics["best"] = max(line["knn"] for line in lines if "knn" in line)  # of all evaluations, as lightly tells
    metrics["minutes"] = (lines[-1]["time"] - lines[0]["time"]) / 60
    metrics["memory_gb"] = f["peak_memory_mib"] / 1024
    told = run / "alarms.jsonl"
    alarms = {json.loads(line)["alarm"] for line in told.read_text().splitlines()} if told.exists() else set()
    row = {"preset": preset, "seed": seed, "alarms": " ".join(sorted(alarms)), "cpu_seconds": round(seconds)}
    return row | {key: round(value, 4) for key, value in metrics.items()} | where(device)


def measured_row(preset: str, seed: int, measured: Measurement, seconds: float, device: str) -> dict[str, Any]:
    """The row of the analysis of a finished run."""
    metrics = {key: round(measured.metrics[key], 4) for key in [*METRICS, *SCORES] if key in measured.metrics}
    return {"preset": preset, "seed": seed, **metrics, "cpu_seconds": round(seconds, 1), **where(device)}


def averaged(folders: Sequence[Path]) -> dict[str, Series]:
    """Means over the runs of a preset: curves over directions at the end, geometric, and ranks during training."""
    runs = read_runs(folders)
    last = [run.analysis[-1].curves for run in runs if run.analysis]
    names = {name for curves in last for name in curves}
    out = {name: over_directions([curves[name] for curves in last if name in curves]) for name in sorted(names)}
    return out | {f"training/{name}": over_epochs(runs, key) for name, key in RANKS.items()}


def over_directions(curves: Sequence[Series]) -> Series:
    """Geometric mean at some of the numbers that all curves reach; between the numbers of one, in logarithms."""
    length = min(curve[0][-1] for curve in curves)
    kept = sorted({round(math.exp(i / (POINTS - 1) * math.log(length))) for i in range(POINTS)})
    values = [math.exp(mean(math.log(max(at(curve, n), SMALLEST)) for curve in curves)) for n in kept]
    return [float(n) for n in kept], [float(f"{v:.4g}") for v in values]


def at(curve: Series, number: float) -> float:
    """Value of a curve at a number within its own."""
    numbers, values = curve
    right = next(i for i, n in enumerate(numbers) if n >= number)
    if numbers[right] == number:
        return values[right]
    left = right - 1
    share = math.log(number / numbers[left]) / math.log(numbers[right] / numbers[left])
    low, high = (math.log(max(values[i], SMALLEST)) for i in (left, right))
    return math.exp(low + share * (high - low))


def over_epochs(runs: Sequence[Run], key: str) -> Series:
    """Mean of a figure of metrics.jsonl at the epochs at which all runs have it."""
    series = [dict(zip(*run.series(key), strict=True)) for run in runs if run.series(key)[0]]
    epochs = sorted(set.intersection(*map(set, series))) if series else []
    return epochs, [float(f"{mean(one[epoch] for one in series):.4g}") for epoch in epochs]
