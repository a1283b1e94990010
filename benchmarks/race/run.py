"""One entry of the race, timed: a row of results/race.csv.

    python -m benchmarks.race.run ENTRY --data FOLDER [--seed 0]

FOLDER holds CIFAR-10. The clock runs from the start of the process to the last feature of the frozen encoder, by the
rules of benchmarks/race/README.md; accuracies are computed after it has stopped. Call it once a seed.
"""

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import common
from benchmarks.cifar10.rows import where
from benchmarks.race.proxy import build, train
from benchmarks.verdict.truth import linear_accuracy
from fastrdm.evaluation.knn import knn_accuracy

ROWS = common.FOLDER / "results" / "race.csv"
FIELDS = ["entry", "budget", "seed", "seconds", "evaluation_seconds", "epochs", "images", "knn10", "knn200", "linear"]
FIELDS += ["memory_gb", "commit", "torch", "device", "settings"]


class Entry(NamedTuple):
    """A contestant: its settings, and the budget that it is sized for."""

    budget: str
    settings: tuple[str, ...]
    what: str


RACE = "cifar10/race.yaml"
ENTRIES = {
    "cpu": Entry("cpu", ("cifar10/race_cpu.yaml",), "10,000 images, a ResNet of width 16, 40 CPU seconds"),
    "gpu5": Entry("gpu5", (RACE, "train.length=120ep"), "five minutes of a GPU"),
    "gpu15": Entry("gpu15", (RACE,), "a quarter of an hour of a GPU"),
    "simsiam_200": Entry(
        "gpu15",
        ("cifar10/lightly_simsiam.yaml", "loader.batch_size=512", "optim.lr=0.03"),
        "SimSiam as in lightly's benchmark, 200 epochs, batch 512",
    ),
    "byol_200": Entry(
        "gpu15", ("cifar10/lightly_byol.yaml", "loader.batch_size=512"), "BYOL as in lightly's benchmark, 200 epochs"
    ),
    "rdm_byol_target1_200": Entry(
        "gpu15", (RACE, "train.length=200ep"), "the race's recipe at the length of lightly's benchmark"
    ),
}


def seconds_since_start() -> float:
    """Seconds since this process began, by the kernel's clock."""
    stat = Path("/proc/self/stat")
    if not stat.exists():
        sys.exit("benchmarks.race.run needs Linux, whose /proc says when a process began")
    ticks = int(stat.read_text().rpartition(")")[2].split()[19])  # field 22 of proc(5), starttime
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / 100  # USER_HZ is 100 on every Linux


def run(name: str, data: Path, seed: int) -> dict[str, Any]:
    """Train, take features, stop the clock, measure: a row."""
    entry = ENTRIES[name]
    trainer = build((*entry.settings, "evaluate.probe=false", "evaluate.baselines=false"), data, seed)
    train(trainer)
    bank, query = trainer.feature_sets(trainer.method.online.encoder)
    accelerated = trainer.processes.device.type == "cuda"
    if accelerated:
        torch.cuda.synchronize()
    seconds = seconds_since_start()
    found = {  # every neighbor's vote counts alike for k = 10, as in scikit-learn; k = 200 as in lightly's benchmark
        "knn10": knn_accuracy(bank, query, 10, math.inf),
        "knn200": knn_accuracy(bank, query, 200, 0.1),
        "linear": linear_accuracy(bank, query),
    }
    row: dict[str, Any] = {"entry": name, "budget": entry.budget, "seed": seed, "seconds": round(seconds, 1)}
    row |= {"evaluation_seconds": round(seconds_since_start() - seconds, 1), "settings": " ".join(entry.settings)}
    row |= {"epochs": round(trainer.horizon.total / trainer.horizon.steps_per_epoch, 1), "images": len(bank.labels)}
    row |= {key: round(value, 4) for key, value in found.items()}
    row["memory_gb"] = round(torch.cuda.max_memory_allocated() / 2**30, 1) if accelerated else ""
    return row | where(trainer.processes.device.type)


def parser() -> argparse.ArgumentParser:
    p = common.parser(__doc__)
    p.add_argument("entry", choices=list(ENTRIES))
    p.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, default=ROWS, help="file of the rows")
    return p


def main() -> None:
    options = parser().parse_args()
    row = run(options.entry, options.data, options.seed)
    with common.added_rows(options.out, FIELDS) as writer:
        writer.writerow(row)
    print(f"{options.entry}, seed {options.seed}: k-NN {100 * row['knn10']:.1f} % in {row['seconds']:.0f} s")


if __name__ == "__main__":
    main()
