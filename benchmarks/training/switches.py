"""Time of a training step on a CPU with a switch that `auto` sets in both positions; CSV to stdout.

    python -m benchmarks.training.switches layout --sizes 32 96 > benchmarks/results/layout_cpu.csv
    python -m benchmarks.training.switches precision --sizes 32 96 > benchmarks/results/precision_cpu.csv

Both positions take one step each in turn, on noise, eagerly, by processor time, the first turn not counted. ms, p20,
p80: median, 20th and 80th percentile. The last column is the time of the second position over that of the first, median
over turns: below 1 the second is faster. `train.channels_last=auto` and `train.precision=auto` go by it.
"""

import argparse
import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from benchmarks import common
from benchmarks.common import Row
from benchmarks.training.step import trainer_of, whole_step


class Switch(NamedTuple):
    """Two positions of a switch by name, each with its setting, and the column of their ratio."""

    positions: dict[str, str]
    ratio: str


SWITCHES = {
    "layout": Switch(
        {"planes": "train.channels_last=false", "channels_last": "train.channels_last=true"}, "planes_to_last"
    ),
    "precision": Switch({"fp32": "train.precision=fp32", "bf16": "train.precision=bf16"}, "fp32_to_bf16"),
}


def fields_of(name: str) -> list[str]:
    fixed = ["encoder", "width", "size", "batch", *(["precision"] if name != "precision" else []), "turns"]
    return [*fixed, name, "ms", "p20", "p80", SWITCHES[name].ratio, *common.ENVIRONMENT]


def rows(args: argparse.Namespace) -> Iterator[Row]:
    """Two rows for each size."""
    switch = SWITCHES[args.switch]
    for size in args.sizes:
        args.size, args.stem = size, "cifar" if size < 64 else "imagenet"
        calls = {}
        for position, setting in switch.positions.items():
            trainer = trainer_of(args.preset, args, False, False, setting)
            calls[position] = whole_step(trainer, next(iter(trainer.loader)))
        times = common.in_turns(calls, args.turns + 1, common.CLOCKS["cpu"], cuda=False)
        found = {position: of[1:] for position, of in times.items()}
        first, second = found.values()
        ratio = statistics.median(b / a for a, b in zip(first, second, strict=True))
        for position, of in found.items():
            yield {
                **{name: getattr(args, name) for name in ("encoder", "width", "size", "batch", "turns")},
                "precision": args.precision,
                args.switch: position,
                **common.times(of, 1),
                switch.ratio: f"{ratio:.3f}",
                **common.environment(torch.device("cpu")),
            }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("switch", choices=tuple(SWITCHES))
    parser.add_argument("--preset", default="simsiam")
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 96])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of both layouts")
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args(arguments)
    args.crops, args.crop_size, args.settings = 0, 0, ["evaluate.baselines=false"]
    common.print_rows(fields_of(args.switch), rows(args))


if __name__ == "__main__":
    main()
