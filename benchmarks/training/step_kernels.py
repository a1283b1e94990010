"""What a training step spends its time on, by torch's profiler: a table of its kernels; CSV to stdout.

    python -m benchmarks.training.step_kernels --encoder resnet50 --width 64 --stem imagenet --size 224 --batch 128 \\
        --compile yes --precision bf16 > benchmarks/results/step_kernels_h100.csv

The step is the trainer's, whole, on noise that lies on the device. First it is timed without the profiler, then some
steps are recorded. On CUDA the rows are kernels and copies, on a CPU operators with their own time. `step` is the time
without the profiler, `all kernels` the sum of what was recorded: on CUDA the difference is what the device waited for
the host, less what ran side by side.

calls: of a step. ms: of a step, that of `step` a median. share: of `step`. kind, on CUDA: triton (what inductor and
fastrdm write), convolution, product, copy, collective or other, by the kernel's name.
"""

import argparse
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import common
from benchmarks.common import Row
from benchmarks.training.step import Step, add_arguments, named, trainer_of, whole_step
from fastrdm.methods.presets import PRESETS

FIELDS = ["preset", "encoder", "width", "stem", "size", "batch", "precision", "compile", "capture", "steps", "name"]
FIELDS += ["kind", "calls", "ms", "share", *common.ENVIRONMENT]
KINDS = {
    "triton": r"^triton_|^_\w+_kernel$",
    "collective": r"nccl",
    "copy": r"^mem(cpy|set)",
    "convolution": r"conv|fprop|dgrad|wgrad|cudnn|implicit",
    "product": r"gemm|gemv|cublas|cutlass|nvjet",
}
WIDE = 120  # characters of a name


def kind_of(kernel: str) -> str:
    """What a kernel of CUDA does, by its name."""
    return next((kind for kind, names in KINDS.items() if re.search(names, kernel, re.IGNORECASE)), "other")


def recorded(events: Sequence[Any], device: torch.device) -> Iterator[tuple[str, int, float]]:
    """Name, calls and milliseconds of what ran on the device, of a profiler's averages."""
    for event in events:
        # A range that a program names spans the kernels in it, which have rows of their own.
        if (
            event.device_type.name.lower() != device.type
            or event.is_user_annotation
            or event.key.startswith("ProfilerStep")
        ):
            continue
        time = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        yield event.key, event.count, time / 1e3


def profiled(step: Step, steps: int, device: torch.device, trace: str | None) -> list[tuple[str, int, float]]:
    """Name, calls and milliseconds of everything that `steps` steps ran, the longest first."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    if trace:
        profiler.export_chrome_trace(trace)
    found = defaultdict[str, list[tuple[int, float]]](list)
    for name, calls, ms in recorded(profiler.key_averages(), device):
        found[name[:WIDE]].append((calls, ms))
    rows = [(name, sum(c for c, _ in parts), sum(ms for _, ms in parts)) for name, parts in found.items()]
    return sorted(rows, key=lambda row: -row[2])


def rows(args: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """The step, all kernels, and a row for each of the longest."""
    captured = args.capture == "yes"
    trainer = trainer_of(args.preset, args, args.compile == "yes", captured)
    step = whole_step(trainer, next(iter(trainer.loader)))
    for _ in range(3 + 3 * captured):
        step()
    whole = common.in_turns({"step": step}, args.steps, common.CLOCKS["wall"], device.type == "cuda")["step"]
    total, found = statistics.median(whole), profiled(step, args.steps, device, args.trace)
    shared = {**named(args.preset, "step", args, trainer), "steps": args.steps, **common.environment(device)}
    shared = {key: value for key, value in shared.items() if key in FIELDS}

    def row(name: str, kind: str, calls: float, ms: float) -> Row:
        counted = f"{calls:g}" if calls else ""
        return {**shared, "name": name, "kind": kind, "calls": counted, "ms": f"{ms:.4f}", "share": f"{ms / total:.4f}"}

    yield row("step", "", 1, total)
    parts = [(name, calls / args.steps, ms / args.steps) for name, calls, ms in found]
    yield row("all kernels", "", sum(calls for _, calls, _ in parts), sum(ms for *_, ms in parts))
    cuda = device.type == "cuda"
    if cuda:
        for kind in (*KINDS, "other"):
            some = [(calls, ms) for name, calls, ms in parts if kind_of(name) == kind]
            yield row(f"all of {kind}", kind, sum(calls for calls, _ in some), sum(ms for _, ms in some))
    for name, calls, ms in parts[: args.top]:
        yield row(name, kind_of(name) if cuda else "", calls, ms)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--preset", default="simsiam", choices=PRESETS, metavar="PRESET")
    add_arguments(parser)
    parser.add_argument("--compile", default="no", choices=["no", "yes"])
    parser.add_argument("--capture", default="no", choices=["no", "yes"], help="as CUDA graphs")
    parser.add_argument("--steps", type=int, default=10, help="that are timed, and that are recorded")
    parser.add_argument("--top", type=int, default=60, help="rows of the longest")
    parser.add_argument("--trace", help="file .json.gz for Perfetto or chrome://tracing")
    args = parser.parse_args(arguments)
    args.optimize_ddp, args.repeats, args.clock = "", args.steps, "wall"
    common.print_rows(FIELDS, rows(args, common.available_device()))


if __name__ == "__main__":
    main()
