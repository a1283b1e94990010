"""A table like CIFAR-10's on two other sets, so that nothing is tuned to CIFAR-10 alone: results/small_sets.csv.

    python -m benchmarks.race.sets --cifar100 FOLDER --photos FOLDER [--cpu-minutes 40]

The first FOLDER holds CIFAR-100, or a part of it, as arrays; the second holds train and val of photographs in class
folders. Nothing is tuned to either: settings are those of CIFAR-10's recipes for a CPU, with an encoder of width 16 and
as many steps for every preset of a set. Rows that are there are not run again.
"""

import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import common
from benchmarks.cifar10.reproduce import recipe
from benchmarks.cifar10.rows import where
from benchmarks.race.proxy import build, train
from benchmarks.verdict.truth import linear_accuracy
from fastrdm.evaluation.features import raw_pixels
from fastrdm.evaluation.knn import knn_accuracy, wilson_interval
from fastrdm.kernels.linalg.effective_rank import effective_rank

ROWS = common.FOLDER / "results" / "small_sets.csv"
FIELDS = ["set", "preset", "seed", "steps", "images", "raw_pixels", "random", "knn", "low", "high", "linear", "rank"]
FIELDS += ["cpu_seconds", "commit", "torch", "device"]
NEIGHBORS, TEMPERATURE = 20, 0.07
COMMON = ("encoder.width=16", "evaluate.probe=false", "evaluate.baselines=false", "train.device=cpu")


class Set(NamedTuple):
    """Images, the presets that are tried on them, and what differs from CIFAR-10's recipes."""

    presets: tuple[str, ...]
    steps: int
    settings: tuple[str, ...]


SETS = {
    "cifar100": Set(
        ("rdm_byol_target1", "rdm_byol_target0.7", "byol", "simsiam", "swav", "swav_target", "dino", "rdm_byol",
         "rdm_simsiam", "rdm_simsiam_target0.7"),
        300,
        ("loader.source=cifar100", "loader.subset=5000", "loader.views.*.mean=[0.5071, 0.4865, 0.4409]",
         "loader.views.*.std=[0.2673, 0.2564, 0.2762]"),
    ),
    "photos": Set(
        ("rdm_byol_target1", "byol", "simsiam", "swav_target", "rdm_simsiam"),
        120,
        ("loader.source=folder", "loader.subset=null", "loader.workers=1", "loader.views.*.size=64",
         "loader.views.*.mean=[0.485, 0.456, 0.406]", "loader.views.*.std=[0.229, 0.224, 0.225]"),
    ),
}  # fmt: skip


def run(name: str, preset: str, root: Path) -> dict[str, Any]:
    """Train and measure with seed 0: a row."""
    chosen = SETS[name]
    settings = (recipe(preset, "cpu"), f"preset={preset}", *COMMON, *chosen.settings)
    trainer = build(settings, root, 0, chosen.steps)
    found = {"raw_pixels": knn_accuracy(*trainer.feature_sets(raw_pixels), NEIGHBORS, TEMPERATURE)}
    encoder = trainer.method.online.encoder
    found["random"] = knn_accuracy(*trainer.feature_sets(encoder), NEIGHBORS, TEMPERATURE)
    seconds = train(trainer)
    bank, query = trainer.feature_sets(encoder)
    found["knn"] = knn_accuracy(bank, query, NEIGHBORS, TEMPERATURE)
    found["low"], found["high"] = wilson_interval(round(found["knn"] * len(query.labels)), len(query.labels))
    found["linear"] = linear_accuracy(bank, query)
    found["rank"] = float(effective_rank(bank.features - bank.features.mean(0)))
    row: dict[str, Any] = {"set": name, "preset": preset, "seed": 0, "steps": chosen.steps, "images": len(bank.labels)}
    row |= {key: round(value, 4) for key, value in found.items()}
    return row | {"cpu_seconds": round(seconds, 1)} | where("cpu")


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--cifar100", type=Path, help="folder of CIFAR-100 as arrays; without it that set is left out")
    parser.add_argument("--photos", type=Path, help="folder of photographs; without it that set is left out")
    parser.add_argument("--cpu-minutes", type=float, default=40.0, help="after which no run begins")
    parser.add_argument("--out", type=Path, default=ROWS, help="file of the rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name, chosen in SETS.items():
        root = getattr(options, name)
        known = {(row["set"], row["preset"]) for row in common.read_rows(options.out)}
        for preset in chosen.presets if root else ():
            if (name, preset) in known or time.process_time() > 60 * options.cpu_minutes:
                continue
            row = run(name, preset, root)
            with common.added_rows(options.out, FIELDS) as writer:
                writer.writerow(row)
            print(f"{name} {preset}: k-NN {row['random']} -> {row['knn']}, {row['cpu_seconds']} CPU s", flush=True)


if __name__ == "__main__":
    main()
