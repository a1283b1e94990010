"""Levers on a small proxy of the race, each with the same processor time: a row of results/race_proxy.csv a run.

    python -m benchmarks.race.proxy --data FOLDER [--cpu-minutes 75]

FOLDER holds CIFAR-10. Rows that are there are not run again, so that a call goes on where the last one stopped. How
many steps a contestant gets is settled before its first seed, by steps of it and of the base that are timed in turns;
its other seeds take as many. Seeds are paired: a seed has the same first weights and order of images everywhere.
"""

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.cifar10.rows import where
from benchmarks.race.levers import BASE, STEPS, Lever, jobs
from benchmarks.verdict.truth import linear_accuracy
from fastrdm.config import run_config
from fastrdm.evaluation.features import FeatureSet
from fastrdm.evaluation.knn import knn_accuracy
from fastrdm.kernels.linalg.effective_rank import effective_rank
from fastrdm.loaders.spec import Batch
from fastrdm.trainer import Trainer

ROWS = common.FOLDER / "results" / "race_proxy.csv"
ACCURACIES = ["knn10", "knn200", "linear"]
FIELDS = ["lever", "group", "seed", "steps", "batch", "cpu_seconds", *ACCURACIES, "knn10_whitened"]
FIELDS += ["knn10_target", "linear_target", "knn10_projection", "rank", "commit", "torch", "device", "settings"]
TURNS = 9  # steps of base and contestant that are timed to find what a step costs
TEMPERATURE = 0.07
FLOOR = 0.01  # of the mean eigenvalue, added to all of them before whitening


def build(settings: Sequence[str], root: Path, seed: int, steps: int | None = None) -> Trainer:
    """A trainer for that many steps, None: as many as the settings say. It writes nothing unless it is asked to."""
    length = [] if steps is None else [f"train.length={steps}st"]
    return Trainer(run_config.load([*settings, f"loader.root={root}", f"train.seed={seed}", *length]))


def batches(trainer: Trainer) -> Iterator[Batch]:
    """The batches of the run, epoch after epoch."""
    while True:
        trainer.loader.set_epoch(trainer.step // trainer.horizon.steps_per_epoch)
        yield from trainer.loader


def train(trainer: Trainer) -> float:
    """Train to the end; processor seconds that it took. A loss that is no finite number ends the program."""
    began = time.process_time()
    for batch in batches(trainer):
        output = trainer.train_step(batch)
        trainer.step += 1
        if trainer.step == trainer.horizon.total:
            break
    assert output.loss.isfinite(), "the loss is no finite number"
    trainer.loader.close()
    return time.process_time() - began


def step_costs(trainers: Sequence[Trainer]) -> list[float]:
    """Processor seconds of one step of each trainer, the median of TURNS that they take in turns."""
    streams = [batches(trainer) for trainer in trainers]
    costs: list[list[float]] = [[] for _ in trainers]
    for turn in range(TURNS + 2):
        for trainer, stream, found in zip(trainers, streams, costs, strict=True):
            began = time.process_time()
            trainer.train_step(next(stream))
            trainer.step += 1
            if turn >= 2:  # the first steps allocate
                found.append(time.process_time() - began)
    return [median(found) for found in costs]


def phases(trainer: Trainer) -> list[int]:
    """Steps at which the size of the views changes, 0 first."""
    views = trainer.settings.loader.views
    epochs = sorted({0, *(epoch for view in views for epoch, _ in view.progressive)})
    return [epoch * trainer.horizon.steps_per_epoch for epoch in epochs]


def affordable(settings: Sequence[str], base: Sequence[str], root: Path, base_steps: int) -> int:
    """The number of steps that cost as much processor time as `base_steps` of the base do."""
    against, own = (build(s, root, 0, 10**6) for s in (base, settings))
    left, total, starts = float(base_steps), 0, phases(own)
    for start, end in zip(starts, [*starts[1:], 10**9], strict=True):
        own.step = start
        base_cost, cost = step_costs([against, own])
        steps = min(end - start, round(left * base_cost / cost))
        left, total = left - steps * cost / base_cost, total + steps
    for trainer in (against, own):
        trainer.loader.close()
    return total


def whitened(bank: FeatureSet, query: FeatureSet) -> tuple[FeatureSet, FeatureSet]:
    """Both with the mean of the bank taken off and multiplied by the inverse root of its covariance."""
    mean = bank.features.double().mean(0)
    values, vectors = torch.linalg.eigh((bank.features.double() - mean).T.cov())
    values = values.clamp_min(0)
    matrix = vectors * (values + FLOOR * values.mean()).rsqrt()
    bank_rows, query_rows = ((s.features.double() - mean) @ matrix for s in (bank, query))
    return FeatureSet(bank_rows.float(), bank.labels), FeatureSet(query_rows.float(), query.labels)


def measure(trainer: Trainer) -> dict[str, Any]:
    """Accuracies of the frozen encoder, online and of the moving average, and the features' effective rank."""
    sets = trainer.feature_sets(trainer.method.online.encoder)
    network = trainer.method.target or trainer.method.online

    def project(images: Tensor) -> Tensor:
        projected: Tensor = network([images], None).projection[0]
        return projected

    found = {f"knn{k}": knn_accuracy(*sets, k, TEMPERATURE) for k in (10, 200)}
    found |= {"linear": linear_accuracy(*sets), "knn10_whitened": knn_accuracy(*whitened(*sets), 10, TEMPERATURE)}
    if trainer.method.target:
        averaged = trainer.feature_sets(trainer.method.target.encoder)
        found |= {"knn10_target": knn_accuracy(*averaged, 10, TEMPERATURE), "linear_target": linear_accuracy(*averaged)}
    found["knn10_projection"] = knn_accuracy(*trainer.feature_sets(project), 10, TEMPERATURE)
    centered = sets[0].features - sets[0].features.mean(0)
    found["rank"] = float(effective_rank(centered))
    return {key: round(value, 4) for key, value in found.items() if math.isfinite(value)}


def run(lever: Lever, seed: int, root: Path, known: Sequence[dict[str, str]]) -> dict[str, Any]:
    """Train and measure: a row."""
    mine = [int(row["steps"]) for row in known if row["lever"] == lever.name]
    steps = STEPS if lever.settings == BASE else (mine or [affordable(lever.settings, BASE, root, STEPS)])[0]
    trainer = build(lever.settings, root, seed, steps)
    seconds = train(trainer)
    row = {"lever": lever.name, "group": lever.group, "seed": seed, "steps": steps, "cpu_seconds": round(seconds, 1)}
    row |= {"batch": trainer.settings.loader.batch_size, "settings": " ".join(lever.settings)}
    return row | measure(trainer) | where("cpu")


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10")
    parser.add_argument("--cpu-minutes", type=float, default=75.0, help="after which no run begins")
    parser.add_argument("--seeds", type=int, default=3, help="of each lever")
    parser.add_argument("--only", nargs="+", default=[], help="names of levers; all")
    parser.add_argument("--out", type=Path, default=ROWS, help="file of the rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for lever, seed in jobs(options.seeds):
        if time.process_time() > 60 * options.cpu_minutes:
            break
        known = common.read_rows(options.out)
        done = any(row["lever"] == lever.name and row["seed"] == str(seed) for row in known)
        if done or (options.only and lever.name not in options.only):
            continue
        row = run(lever, seed, options.data, known)
        with common.added_rows(options.out, FIELDS) as writer:
            writer.writerow(row)
        told = f"{row['steps']} steps, {row['cpu_seconds']} CPU s, k-NN {100 * row['knn10']:.1f} %"
        print(f"{lever.name}, seed {seed}: {told} ({time.process_time() / 60:.1f} CPU minutes so far)", flush=True)


if __name__ == "__main__":
    main()
