"""Time of a training step with the channels of maps last in memory and in planes; CSV to stdout.

    python -m benchmarks.training.layout --sizes 32 96 > benchmarks/results/layout_cpu.csv

Both take one step each in turn, on noise, eagerly, by processor time, the first turn not counted. ms, p20, p80: median,
20th and 80th percentile. planes_to_last: the time with channels last over that in planes, median over turns; above 1
planes are faster. `train.channels_last=auto` goes by it.
"""

import argparse
import statistics
from collections.abc import Iterator, Sequence

import torch

from benchmarks import common
from benchmarks.common import Row
from benchmarks.training.step import trainer_of, whole_step

FIELDS = ["encoder", "width", "size", "batch", "precision", "turns", "layout", "ms", "p20", "p80", "planes_to_last"]
FIELDS += common.ENVIRONMENT
LAYOUTS = {"planes": "false", "channels_last": "true"}


def rows(args: argparse.Namespace) -> Iterator[Row]:
    """Two rows for each size."""
    for size in args.sizes:
        args.size, args.stem = size, "cifar" if size < 64 else "imagenet"
        calls = {}
        for layout, value in LAYOUTS.items():
            trainer = trainer_of(args.preset, args, False, False, f"train.channels_last={value}")
            calls[layout] = whole_step(trainer, next(iter(trainer.loader)))
        times = common.in_turns(calls, args.turns + 1, common.CLOCKS["cpu"], cuda=False)
        found = {layout: of[1:] for layout, of in times.items()}
        ratio = statistics.median(a / b for a, b in zip(found["channels_last"], found["planes"], strict=True))
        for layout, of in found.items():
            yield {
                **{name: getattr(args, name) for name in ("encoder", "width", "size", "batch", "precision", "turns")},
                "layout": layout,
                **common.times(of, 1),
                "planes_to_last": f"{ratio:.3f}",
                **common.environment(torch.device("cpu")),
            }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--preset", default="simsiam")
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 96])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args(arguments)
    args.crops, args.crop_size, args.settings = 0, 0, ["evaluate.baselines=false"]
    common.print_rows(FIELDS, rows(args))


if __name__ == "__main__":
    main()
