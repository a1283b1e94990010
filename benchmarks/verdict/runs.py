"""Train the labelled runs of the verdict's record: `python -m benchmarks.verdict.runs --data FOLDER`.

FOLDER holds CIFAR-10; 2,000 training and 1,000 test images of it are used. Each finished run becomes a row of
results/verdict_runs.csv (its settings, its outcome, CPU seconds) and a line of records/verdict/series.jsonl.gz (every
figure that it logged, over its log lines), and is not run again.
"""

import contextlib
import csv
import gzip
import io
import json
import math
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from benchmarks import common
from benchmarks.verdict.arms import Arm, jobs
from benchmarks.verdict.truth import Outcome, accuracies, measure
from fastrdm.config import run_config
from fastrdm.trainer import Trainer

HERE = Path(__file__).parents[1]
ROWS, SERIES = HERE / "results" / "verdict_runs.csv", HERE / "records" / "verdict" / "series.jsonl.gz"
FIELDS = ["data", "arm", "seed", "expected", *Outcome._fields, "cpu_seconds", "torch", "settings"]
TRAIN, TEST = 2_000, 1_000  # images of CIFAR-10
TESTED = {"digits": 360, "cifar10": TEST}
UNUSED = ("time", "images_per_second", "data_wait", "monitor_seconds", "monitor_share", "unreadable_images",
          "seconds_to_first_step", "gflops", "peak_memory_mib", "flop_utilization", "filter_share",
          "knn_images")  # fmt: skip
RECIPES = {"cifar10": "cifar10/cpu.yaml", "digits": "quickstart.yaml"}


def smaller(root: Path, out: Path) -> Path:
    """The first images of each class of CIFAR-10, as arrays in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", TRAIN), ("test", TEST)):
        labels = np.load(root / f"{split}.labels.npy")
        kept = np.sort(np.concatenate([np.flatnonzero(labels == c)[: count // 10] for c in range(10)]))
        np.save(out / f"{split}.images.npy", np.load(root / f"{split}.images.npy")[kept])
        np.save(out / f"{split}.labels.npy", labels[kept])
    shutil.copy(root / "classes.json", out)
    return out


def rounded(value: float) -> float | None:
    """Four digits; None for what is no finite number."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def series(lines: Sequence[dict[str, Any]]) -> dict[str, list[float | None]]:
    """Every figure over all lines, None where it was not logged."""
    keys = [k for k in dict.fromkeys(key for line in lines for key in line) if k not in UNUSED]
    return {key: [rounded(line[key]) if key in line else None for line in lines] for key in keys}


def for_any_preset(recipe: str, out: Path) -> str:
    """Write a recipe without the patterns of the presets it is made for, since arms bring settings of their own."""
    content = yaml.safe_load((run_config.RECIPES / recipe).read_text())
    content.pop("presets", None)
    out.write_text(yaml.safe_dump(content))
    return str(out)


def done(file: Path) -> dict[tuple[str, str, str], float]:
    """CPU seconds of the runs that were made."""
    if not file.exists():
        return {}
    with file.open(newline="") as lines:
        rows = csv.DictReader(lines)
        return {(row["data"], row["arm"], row["seed"]): float(row["cpu_seconds"]) for row in rows}


def run(arm: Arm, seed: int, cifar: Path, folder: Path) -> None:
    """Train, measure, note."""
    began = time.process_time()
    recipe = for_any_preset(RECIPES[arm.data], folder.with_suffix(".yaml"))
    arguments = [recipe, *arm.settings, f"train.seed={seed}", f"run={folder}", "checkpoint.every=100%"]
    arguments += ["log.report=false", "train.device=cpu"]
    arguments += [f"loader.root={cifar}"] if arm.data == "cifar10" else []
    trainer = Trainer(run_config.load(arguments))
    random = accuracies(trainer)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    outcome = measure(trainer, random)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seconds = time.process_time() - began
    settings = " ".join(arm.settings)
    row = [arm.data, arm.name, seed, arm.expected, *(rounded(v) for v in outcome), round(seconds, 1)]
    losses, horizon = trainer.monitor.alarms.losses, trainer.horizon
    assert losses is not None
    record = {
        "data": arm.data,
        "arm": arm.name,
        "seed": seed,
        "steps_per_epoch": horizon.steps_per_epoch,
        "total": horizon.total,
        "batch": trainer.settings.loader.batch_size,
        "losses": list(losses),
        "series": series(lines),
    }
    with gzip.open(SERIES, "at") as file:
        file.write(json.dumps(record, separators=(",", ":")) + "\n")
    new = not ROWS.exists()
    with ROWS.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(FIELDS)
        writer.writerow([*row, torch.__version__, settings])
    told = {k: rounded(v) for k, v in outcome._asdict().items()}
    print(f"{arm.data} {arm.name} {seed}: {seconds:.0f} s {told}", flush=True)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10 as arrays")
    parser.add_argument("--only", nargs="+", default=[], help="names of arms; all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[], help="all")
    parser.add_argument("--cpu-minutes", type=float, default=45.0, help="of all runs of the table; then none begins")
    options = parser.parse_args()
    torch.set_num_threads(1)
    SERIES.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        finished = done(ROWS)
        wanted = [job for job in jobs() if not options.only or job[0].name in options.only]
        wanted = [job for job in wanted if not options.seeds or job[1] in options.seeds]
        cifar = Path(scratch) / "cifar10"
        if any(arm.data == "cifar10" for arm, _ in wanted):
            smaller(options.data, cifar)
        spent = sum(finished.values())
        for arm, seed in wanted:
            if (arm.data, arm.name, str(seed)) in finished:
                continue
            if spent + time.process_time() > 60 * options.cpu_minutes:
                break
            folder = Path(scratch) / f"{arm.data}-{arm.name}-{seed}"
            run(arm, seed, cifar, folder)
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
