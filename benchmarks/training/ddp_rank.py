"""The step under DistributedDataParallel on one process: eager, compiled, captured; CSV to stdout.

    python -m benchmarks.training.ddp_rank --encoder resnet18 --width 64 --stem cifar --size 32 --batch 512 \\
        --precision bf16 > benchmarks/results/ddp_rank_h100.csv

One process joins a group of its own, by nccl on CUDA, else by gloo. alone: the trainer's step. ddp: the same step in
DistributedDataParallel, whose buckets go through the group. The sums of one process change nothing, so that losses must
be those of `alone`. What is seen is what the wrapper costs, and whether such a step can be compiled and captured:
`fastrdm train` captures no step of several processes. A step that is to be captured is built and run AHEAD times on the
stream that records it, for DistributedDataParallel remembers its stream and orders its buckets anew in the first
steps. What is captured is compiled too. It is left out on a CPU.

outcome: ok, or the error. loss_difference: the largest difference of a loss from the eager step's alone, over COMPARED
steps, as a share of the largest loss; AHEAD steps from the same weights came before. to_alone: the time of `alone` in
the same way over this one's, median over turns.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import common
from benchmarks.common import Row
from benchmarks.training.step import add_arguments, named, ratio, trainer_of
from fastrdm.kernels.cuda_graph import recorder
from fastrdm.loaders.spec import Batch
from fastrdm.methods.presets import PRESETS
from fastrdm.runtime import distributed
from fastrdm.runtime.distributed import Processes
from fastrdm.trainer import Trainer
from fastrdm.training.step import TrainStep

FIELDS = ["preset", "encoder", "width", "stem", "size", "batch", "precision", "backend", "compile", "capture"]
FIELDS += ["contestant", "outcome", "repeats", "ms", "p20", "p80", "to_alone", "loss_difference", *common.ENVIRONMENT]
WAYS = {"eager": (False, False), "compiled": (True, False), "captured": (True, True)}  # compiled, captured
AHEAD = 12  # steps before a recording
COMPARED = 6  # losses
Losses = Callable[[], Tensor]  # runs a step and returns its loss (), on the device


def join(device: torch.device, folder: str) -> str:
    """Make a group of this process alone, which meets in a file of `folder`; the name of its backend."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    bound = torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else None
    dist.init_process_group(backend, f"file://{folder}/group", rank=0, world_size=1, device_id=bound)
    return backend


def stepper_of(trainer: Trainer, wrapped: bool) -> TrainStep:
    """The trainer's step, or the same step as one of several processes takes it."""
    if not wrapped:
        return trainer.stepper
    processes = Processes(0, 2, trainer.processes.device)
    return TrainStep(trainer.settings, trainer.learner, trainer.horizon, processes)


def steps(trainer: Trainer, batch: Batch, wrapped: bool, captured: bool) -> Losses:
    """A function that runs one step, its schedule left at the start."""
    inputs = (*batch.views, batch.label)
    if not captured:
        stepper = stepper_of(trainer, wrapped)
        stepper.schedule(0)
        return lambda: stepper.compute(*inputs).loss.detach()
    record = recorder(trainer.processes.device, "captured")
    inner: TrainStep = record.aside(lambda: stepper_of(trainer, wrapped))
    inner.schedule(0)
    for _ in range(AHEAD):
        record.aside(lambda: inner.compute(*inputs))
    replay, output = record.record(lambda: inner.compute(*inputs))

    def run() -> Tensor:
        replay()
        loss: Tensor = output.loss.detach()
        return loss

    return run


def losses_of(step: Losses) -> Tensor:
    """Losses (COMPARED,) float64 of the next steps."""
    return torch.stack([step().double() for _ in range(COMPARED)])


def contestant(
    args: argparse.Namespace, batch: Batch, wrapped: bool, compiled: bool, captured: bool
) -> tuple[Losses, Tensor]:
    """A step that has run, and the losses of its first COMPARED steps behind the AHEAD ones that a recording needs."""
    trainer = trainer_of(args.preset, args, compiled, False)
    step = steps(trainer, batch, wrapped, captured)
    if not captured:
        for _ in range(AHEAD):
            step()
    return step, losses_of(step)


def rows(args: argparse.Namespace, device: torch.device, backend: str) -> Iterator[Row]:
    """Two rows for each way, as soon as it is timed: a capture that fails may leave a device that computes no more."""
    cuda = device.type == "cuda"
    first = trainer_of(args.preset, args, False, False)
    batch, eager = next(iter(first.loader)), None
    shared = {"backend": backend, **common.environment(device)}
    for way in (way for way in WAYS if way in args.ways and (cuda or way != "captured")):
        compiled, captured = WAYS[way]
        args.compile, args.capture = ("yes" if on else "no" for on in (compiled, captured))
        made: dict[str, Losses] = {}
        said: dict[str, Row] = {}
        for name in ("alone", "ddp"):
            try:
                made[name], found = contestant(args, batch, name == "ddp", compiled, captured)
            except Exception as error:  # which one a wrapped step ends with is what this program is to find out
                if name == "alone" or not cuda:
                    raise
                said[name] = {"outcome": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
                continue
            eager = found if eager is None else eager
            off = ((found - eager).abs().max() / eager.abs().max()).item()
            said[name] = {"outcome": "ok", "loss_difference": f"{off:.1e}"}
        taken = common.in_turns(made, args.repeats, common.CLOCKS["wall"], cuda)
        for name, own in said.items():
            row = {**named(args.preset, name, args, first), **shared, **own}
            if name in taken:
                row |= {**common.times(taken[name], 2), "to_alone": f"{ratio(taken['alone'], taken[name]):.3f}"}
            yield {key: value for key, value in row.items() if key in FIELDS}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--preset", default="simsiam", choices=PRESETS, metavar="PRESET")
    add_arguments(parser)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args(arguments)
    args.optimize_ddp, args.clock = "", "wall"
    device = common.available_device()
    with TemporaryDirectory(prefix="fastrdm-") as folder:
        backend = join(device, folder)
        common.print_rows(FIELDS, rows(args, device, backend))
        distributed.stop()


if __name__ == "__main__":
    main()
