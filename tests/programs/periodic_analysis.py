"""`python periodic_analysis.py OUT`: a small run with and without the analysis, on 1 and 2 processes, also resumed.

OUT/<name> holds each: off, on, two, two_off, resumed, small (without the switch at first).
"""

import sys
from pathlib import Path
from typing import Any

from forked import launch

from fastrdm import cli, trainer

SCORES = "{name: prototypes, count: 12, freeze: 1st}"
ARGUMENTS = [
    "quickstart.yaml",
    "preset=swav",
    "train.length=12st",  # of 5 steps an epoch
    "train.precision=fp64",
    "optim.warmup=1st",
    "encoder.name=resnet_small",
    "encoder.width=4",
    "encoder.stem=cifar",
    "method.projector.hidden=16",
    "method.projector.out=8",
    f"method.online=[{SCORES}]",
    f"method.target=[{SCORES}, {{name: sinkhorn, queue: 48, queue_start: 3st}}]",
    "loader.source=digits",
    "loader.subset=80",
    "loader.batch_size=16",
    "loader.views.*.size=8",
    "evaluate.baselines=false",
    "checkpoint.every=3st",
    "log.every=4",
    "log.report=false",
]
ON = ["analysis.every=5st", "analysis.replicates=10"]
STEP = trainer.Trainer.train_step


def stop_at(number: int) -> None:
    """Ask the run to stop in step `number`."""

    def train_step(self: trainer.Trainer, batch: Any) -> Any:
        if self.step + 1 == number:
            self.stop.ask()
        return STEP(self, batch)

    trainer.Trainer.train_step = train_step  # type: ignore[method-assign]


def main() -> None:
    out = Path(sys.argv[1])

    def run(name: str, world: int, settings: list[str], stop: int = 0, status: int = 0) -> None:
        def work(rank: int) -> None:
            sys.stdout = open(out / f"{name}.{rank}.log", "a")  # noqa: SIM115
            if stop:
                stop_at(stop)
            sys.exit(cli.train([*ARGUMENTS, *settings, f"run={out / name}"]))

        codes = launch(world, work)
        if codes != [status] * world:
            sys.exit(f"{name}: exit codes {codes}")

    run("off", 1, [])
    run("on", 1, ON)
    run("two", 2, ON)
    run("two_off", 2, [])
    run("resumed", 1, ON, stop=7, status=75)
    run("resumed", 1, ON)
    run("small", 1, [], stop=7, status=75)
    run("small", 1, ON)


if __name__ == "__main__":
    main()
