"""`python windows.py OUT`: the same small run on 1 and on 2 processes with the monitor on; OUT/<world> holds it."""

import sys
from pathlib import Path

from forked import launch

from fastrdm import cli

ARGUMENTS = [
    "quickstart.yaml",
    "preset=byol",
    "train.length=8st",
    "train.precision=fp64",
    "optim.warmup=1st",
    "encoder.name=resnet_small",
    "encoder.width=4",
    "encoder.stem=cifar",
    "method.projector.hidden=16",
    "method.projector.out=12",
    "loader.source=digits",
    "loader.subset=80",
    "loader.batch_size=16",
    "loader.views.*.size=8",
    "evaluate.baselines=false",
    "log.every=4",
    "log.report=false",
    "monitor.every=1st",
    "monitor.rows=128",
]


def main() -> None:
    out = Path(sys.argv[1])
    for world in (1, 2):

        def work(rank: int, world: int = world) -> None:
            sys.stdout = open(out / f"{world}.{rank}.log", "w")  # noqa: SIM115
            sys.exit(cli.train([*ARGUMENTS, f"run={out / str(world)}"]))

        if any(launch(world, work)):
            sys.exit(f"a process of {world} failed")


if __name__ == "__main__":
    main()
