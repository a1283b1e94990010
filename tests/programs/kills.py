"""`python kills.py OUT`: runs that are killed at the worst moments and started again, beside unbroken ones.

Prints a JSON line for each: what was done, exit codes, whether the final weights equal the unbroken run's bit for bit.
"""

import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from forked import launch

from fastrdm import cli, trainer
from fastrdm.runtime import checkpoint, distributed
from fastrdm.training import step

ARGUMENTS = [
    "quickstart.yaml",
    "train.length=12st",  # of 5 steps an epoch
    "optim.warmup=2st",
    "encoder.name=resnet_small",
    "encoder.width=4",
    "encoder.stem=cifar",
    "method.projector.hidden=16",
    "method.projector.out=12",
    "loader.source=digits",
    "loader.subset=80",
    "loader.batch_size=16",
    "loader.views.*.size=8",
    "evaluate.every=5st",
    "checkpoint.every=3st",
    "log.every=2",
]
SCORES = "{name: prototypes, count: 20, freeze: 1st}"
SWAV = ["preset=swav", f"method.online=[{SCORES}]"]
SWAV += [f"method.target=[{SCORES}, {{name: sinkhorn, queue: 48, queue_start: 3st}}]"]
DINO = ["preset=dino", f"method.online=[{SCORES}]", f"method.target=[{SCORES}, center_sharpen]"]
MOVING = ["preset=tico", "method.online=[{name: filter, power: 1, power_end: 0.5, epsilon: 0.1, momentum: 0.3}]"]
MOVING += ["method.regularize=[{name: tico, weight: 8}, {name: sigreg, weight: 0.1, slices: 16}]"]
STEP = trainer.Trainer.train_step


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_step(number: int, act: Callable[[], None]) -> Callable[[], None]:
    """Do `act` when step `number` (from 1) is about to be taken."""

    def patch() -> None:
        def train_step(self: trainer.Trainer, batch: Any) -> Any:
            if self.step + 1 == number:
                act()
            return STEP(self, batch)

        trainer.Trainer.train_step = train_step  # type: ignore[method-assign]

    return patch


def between_parts(number: int) -> Callable[[], None]:
    """Die between the two parts of the `number`-th batch."""

    def patch() -> None:
        counter, whole = itertools.count(1), step.microbatches

        def microbatches(*batch_and_parts: Any) -> Iterator[Any]:
            wanted = next(counter) == number
            for part in whole(*batch_and_parts):
                yield part
                if wanted:
                    die()

        step.microbatches = microbatches

    return patch


def while_saving(number: int) -> Callable[[], None]:
    """Die half-way through the file of the `number`-th checkpoint."""

    def patch() -> None:
        counter, whole = itertools.count(1), torch.save

        def save(state: Any, path: Any, **how: Any) -> None:
            whole(state, path, **how)
            if isinstance(path, Path) and next(counter) == number:
                os.truncate(path, path.stat().st_size // 2)
                die()

        checkpoint.torch.save = save  # type: ignore[attr-defined]

    return patch


def train(
    world: int, run: Path, arguments: list[str], patch: Callable[[], None] = lambda: None, more: Sequence[str] = ()
) -> list[int]:
    """Exit codes of one run; `more` settings come last, over ARGUMENTS."""

    def work(rank: int) -> None:
        sys.stdout = open(run.with_suffix(f".{rank}.log"), "a")  # noqa: SIM115
        patch()
        sys.exit(cli.train([*arguments, *ARGUMENTS, *more, f"run={run}"]))

    run.parent.mkdir(parents=True, exist_ok=True)
    return launch(world, work)


def weights(run: Path) -> bytes:
    return (checkpoint.folder(run, 12) / checkpoint.WEIGHTS).read_bytes()


def metrics(run: Path) -> list[dict[str, float]]:
    """What a run logged, without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clock = {"time", "images_per_second", "data_wait", "monitor_seconds", "monitor_share"}
    clock |= {"gflops", "filter_share", "peak_memory_mib", "seconds_to_first_step"}
    return [{k: round(v, 12) for k, v in line.items() if k not in clock} for line in lines]


CASES = {
    "mid-epoch": (SWAV, at_step(8, die)),
    "last step of an epoch": (DINO, at_step(10, die)),
    "first step of an epoch": (["preset=rdm_simsiam_log1p"], at_step(6, die)),
    "accumulation": (["preset=byol", "method.online.0.hidden=16", "train.accumulate=2"], between_parts(5)),
    "moving matrices": (MOVING, at_step(8, die)),
    "saving": (["preset=rdm_byol_target0.5"], while_saving(2)),
}


def main() -> None:
    out = Path(sys.argv[1])
    for world in (1, 2):
        for name, (arguments, patch) in CASES.items():
            place = out / f"{world}-{name.replace(' ', '-')}"
            codes = [train(world, place / "unbroken", arguments), train(world, place / "killed", arguments, patch)]
            codes.append(train(world, place / "killed", arguments))
            same = weights(place / "unbroken") == weights(place / "killed")
            logged = metrics(place / "unbroken") == metrics(place / "killed")
            print(
                json.dumps({"world": world, "case": name, "codes": codes, "same": same, "logged": logged}), flush=True
            )


if __name__ == "__main__":
    main()
    distributed.stop()
