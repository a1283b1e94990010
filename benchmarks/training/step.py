"""Time of a training step against its encoder passes alone and against a reference-style step; CSV to stdout.

    python -m benchmarks.training.step --clock cpu > benchmarks/results/step_cpu.csv
    python -m benchmarks.training.step --encoder resnet50 --width 64 --stem imagenet --size 224 --batch 256 \\
        --compile yes --capture yes --precision bf16 > benchmarks/results/step_h100.csv
    python -m benchmarks.training.step --presets dino --encoder timm/vit_small_patch16_224 --size 224 --crops 8 \\
        --crop-size 96 --settings 'encoder.options={dynamic_img_size: true}' ...

All contestants of a preset take one step each in turn, on noise that lies on the device. step: the trainer's, whole.
ceiling: the same encoder passes alone, forward and backward for the online network, forward for an EMA target, compiled
and captured as the step is. reference: as the authors' codes do it: eager, NCHW, a pass for each view, filters by
torch.linalg.svd (of a moving moment by eigh); the same losses, precision, optimizer and batch. svd: the step, its
filters by torch.linalg.svd (presets with filters; not captured). base, only where it is asked for: the step of the
method that a preset varies. Under torchrun: the steps of all processes together, --optimize-ddp as torch.compile takes
it.

ms, p20, p80: median, 20th and 80th percentile; with --clock cpu processor time, for a machine that others use. to_X:
X's time over this one's, the median over turns, so that a machine that slows down slows both; to_ceiling is at most 1,
and 1 is best. gflops: arithmetic of this process a second
(that of matrix products and convolutions, as fastrdm plan counts it). peak_mb: memory that a contestant adds to the
device at most, CUDA only; without the ceiling, which shares the step's weights.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import groupby
from types import MethodType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.common import Row
from benchmarks.kernels.spectral import svd_weights
from fastrdm.config import run_config
from fastrdm.kernels.batchnorm import set_views
from fastrdm.kernels.cuda_graph import Captured, recorder
from fastrdm.loaders.spec import Batch
from fastrdm.methods import spectral_filter
from fastrdm.methods.dual_branch import Network
from fastrdm.methods.presets import PRESETS
from fastrdm.methods.spectral_filter import FilterConfig, Weighting
from fastrdm.runtime import distributed
from fastrdm.trainer import Trainer

FIELDS = ["preset", "encoder", "width", "stem", "size", "crops", "views", "batch", "precision", "compile", "capture"]
FIELDS += ["processes", "optimize_ddp", "contestant", "repeats", "clock", "ms", "p20", "p80", "images_per_second"]
FIELDS += ["gflops", "to_ceiling", "to_reference", "to_svd", "to_base", "peak_mb", *common.ENVIRONMENT]
COMPARED = ("ceiling", "reference", "svd", "base")
CONTESTANTS = ("step", *COMPARED)
BASES = {"swav_target": "swav", "dino_online": "dino", "simsiam_target": "simsiam"}  # and what begins with rdm_
Step = Callable[[], object]


def base_of(preset: str) -> str | None:
    """The method that a preset varies."""
    return preset.split("_")[1] if preset.startswith("rdm_") else BASES.get(preset)


def trainer_of(preset: str, args: argparse.Namespace, compiled: bool, captured: bool, *more: str) -> Trainer:
    """A trainer on noise. A preset's queue is made so short that it is full from the first step on; whitening takes
    fewer dimensions than rows.
    """
    resnet = "/" not in args.encoder
    settings = [
        "quickstart.yaml",
        f"preset={preset}",
        f"encoder.name={args.encoder}",
        f"train.precision={args.precision}",
    ]
    settings += [f"encoder.width={args.width if resnet else 'null'}"]
    settings += [f"encoder.stem={args.stem if resnet else 'imagenet'}"]
    settings += ["train.length=1000000st", "optim.warmup=0st", "loader.source=digits", "loader.engine=synthetic"]
    settings += [f"loader.batch_size={args.batch}", "loader.subset=null", "loader.max_enlarge=1000"]
    if args.crops:
        views = [args.size] * 2 + [args.crop_size] * args.crops
        settings.append(f"loader.views=[{', '.join(f'{{size: {size}}}' for size in views)}]")
    settings += [] if args.crops else [f"loader.views.*.size={args.size}"]
    for side, places in ((s, PRESETS[preset]["method"][s]) for s in ("online", "target")):
        for i, transform in enumerate(places):
            if isinstance(transform, dict) and transform.get("queue"):
                settings.append(f"method.{side}.{i}.queue={args.batch * max(transform['queue'] // args.batch, 1)}")
            if isinstance(transform, dict) and transform["name"] == "whiten":
                settings.append(
                    f"method.projector.out={min(PRESETS[preset]['method']['projector']['out'], args.batch // 2)}"
                )
    settings += [f"train.compile={str(compiled).lower()}", f"train.capture={str(captured).lower()}"]
    return Trainer(run_config.load([*settings, "evaluate.probe=false", *args.settings, *more]))


def whole_step(trainer: Trainer, batch: Batch) -> Step:
    """The trainer's step on one batch."""

    def step() -> None:
        trainer.train_step(batch)
        trainer.step += 1

    return step


def encoder_passes(trainer: Trainer, batch: Batch, compiled: bool, captured: bool) -> Step:
    """The passes of the encoders that a step cannot do without."""
    method = trainer.method
    compiles: Callable[[Any], Any] = partial(torch.compile, dynamic=False) if compiled else lambda encoder: encoder
    encoder = compiles(method.online.encoder)
    target = compiles(method.target.encoder) if method.target else None
    alike = [list(same) for _, same in groupby(batch.views, key=lambda view: view.shape)]
    counts = [len(same) if method.online.per_view else 1 for same in alike]
    joined, both = [torch.cat(same) for same in alike], torch.cat(batch.views[:2])

    def passes() -> None:
        features = []
        with torch.autocast(both.device.type, method.precision) if method.precision else nullcontext():
            for views, count in zip(joined, counts, strict=True):
                set_views(method.online.encoder, count)
                features.append(encoder(views))
            if target is not None and method.target is not None:
                set_views(method.target.encoder, 2 if method.online.per_view else 1)
                with torch.no_grad():
                    target(both)
        torch.autograd.backward(features, [torch.ones_like(x) for x in features])
        method.zero_grad(set_to_none=True)

    if not captured:
        return passes
    graph = Captured(passes, recorder(both.device, "--capture"))
    return lambda: graph("passes")


def svd_filter(
    x: Tensor,
    kind: str | Callable[[Tensor], Tensor],
    power: float | None,
    *,
    basis: Tensor | None = None,
    gram: Tensor | None = None,
    side: str = "online",
    **_: Any,
) -> Tensor:
    """The authors' filter, W without gradient: of a full SVD, or of a moving moment's eigenvectors (DirectPred).

    DirectCopy's W is the moment itself over its norm, without a decomposition.
    """
    with torch.no_grad():
        if gram is None:
            assert isinstance(kind, str)
            w = svd_weights(x if basis is None else basis, kind, power)
        elif isinstance(kind, Weighting) and kind.config.power == 2:
            w = gram / gram.norm()
        else:
            assert callable(kind)
            values, vectors = torch.linalg.eigh(gram)
            w = (vectors * kind(values.clamp_min(0).sqrt().unsqueeze(0))) @ vectors.mT
    return x @ w if side == "online" else x.detach() @ w


def by_svd(step: Step) -> Step:
    """The step, its filters by the SVD."""

    def patched() -> None:
        with patch.object(spectral_filter, "spectral_filter", svd_filter):
            step()

    return patched


def one_by_one(network: Network, views: list[Tensor]) -> Tensor:
    """A pass of the encoder for each view."""
    set_views(network.encoder, 1)
    return torch.cat([network.encoder(view) for view in views])


def reference_step(trainer: Trainer, batch: Batch) -> Step:
    """A step as the authors' codes do it: a pass for each view and filters by the SVD."""
    for network in filter(None, (trainer.method.online, trainer.method.target)):
        network._encode = MethodType(one_by_one, network)  # type: ignore[method-assign]
    plain = Batch(tuple(view.contiguous() for view in batch.views), batch.index, batch.label)
    return by_svd(whole_step(trainer, plain))


def contestants(preset: str, args: argparse.Namespace, ours: Trainer) -> dict[str, Callable[[], Step]]:
    """Builders of the contestants that were asked for and that the preset has."""
    batch, compiled, captured = next(iter(ours.loader)), args.compile == "yes", args.capture == "yes"

    def another(name: str, captured: bool) -> Step:
        return whole_step(trainer_of(name, args, compiled, captured), batch)

    made: dict[str, Callable[[], Step]] = {
        "step": lambda: whole_step(ours, batch),
        "ceiling": lambda: encoder_passes(ours, batch, compiled, captured),
        "reference": lambda: reference_step(trainer_of(preset, args, False, False, "train.channels_last=false"), batch),
    }
    if any(isinstance(t, FilterConfig) for t in (*ours.method.config.online, *ours.method.config.target)):
        made["svd"] = lambda: by_svd(another(preset, False))
    base = base_of(preset)
    if base:
        made["base"] = lambda: another(base, captured)
    return {name: make for name, make in made.items() if name in args.contestants}


def warmed_up(makers: dict[str, Callable[[], Step]], cuda: bool, steps: int) -> tuple[dict[str, Step], dict[str, str]]:
    """Each contestant after its first steps, and the MB that it added to the device at most, empty without CUDA."""
    made, memory = {}, {}
    for name, make in makers.items():
        before = torch.cuda.memory_allocated() if cuda else 0
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        made[name] = make()
        for _ in range(steps):
            made[name]()
        told = cuda and name != "ceiling"
        memory[name] = f"{(torch.cuda.max_memory_allocated() - before) / 1e6:.0f}" if told else ""
    return made, memory


def rows(preset: str, args: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """The rows of one preset; none on processes other than the main one."""
    torch.compiler.reset()  # else the presets would count as recompilations of one function
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated() if cuda else 0
    ours = trainer_of(preset, args, args.compile == "yes", args.capture == "yes")
    weights = (torch.cuda.memory_allocated() - before) / 1e6 if cuda else 0.0
    steps, memory = warmed_up(contestants(preset, args, ours), cuda, 3 + 3 * (args.capture == "yes"))
    if memory.get("step"):
        memory["step"] = f"{float(memory['step']) + weights:.0f}"
    times = common.in_turns(steps, args.repeats, common.CLOCKS[args.clock], cuda)
    if not ours.processes.main:
        return
    flops, environment = ours.utilization.step_flops(0), common.environment(device)
    for name, taken in times.items():
        ms = statistics.median(taken)
        yield {
            **named(preset, name, args, ours),
            **common.times(taken, 2),
            "images_per_second": f"{1e3 * args.batch / ms:.1f}",
            "gflops": "" if name in ("ceiling", "base") else f"{flops / ms / 1e6:.1f}",
            **{f"to_{other}": f"{ratio(times[other], taken):.3f}" for other in COMPARED if other in times},
            "peak_mb": memory[name],
            **environment,
        }


def ratio(theirs: list[float], ours: list[float]) -> float:
    """Median of the ratio over turns."""
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


def named(preset: str, contestant: str, args: argparse.Namespace, ours: Trainer) -> dict[str, object]:
    """The columns that say what was timed, and how."""
    resnet, world = "/" not in args.encoder, ours.processes.world
    return {
        "preset": preset,
        "encoder": args.encoder,
        "width": args.width if resnet else "",
        "stem": args.stem if resnet else "",
        "size": args.size,
        "crops": f"{args.crops}x{args.crop_size}" if args.crops else "",
        "views": len(ours.settings.loader.views),
        "batch": args.batch,
        "precision": args.precision,
        "compile": "no" if contestant == "reference" else args.compile,
        "capture": "no" if contestant in ("reference", "svd") else args.capture,
        "processes": world,
        "optimize_ddp": args.optimize_ddp if world > 1 else "",
        "contestant": contestant,
        "repeats": args.repeats,
        "clock": args.clock,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `trainer_of` reads of a command line, but for how the step runs."""
    parser.add_argument("--encoder", default="resnet_small", help="or timm/NAME")
    parser.add_argument("--width", type=int, default=16, help="of a ResNet")
    parser.add_argument("--stem", default="cifar", help="of a ResNet")
    parser.add_argument("--size", type=int, default=32, help="px")
    parser.add_argument("--crops", type=int, default=0, help="local crops besides the two global views")
    parser.add_argument("--crop-size", type=int, default=96, help="px")
    parser.add_argument("--batch", type=int, default=128, help="of all processes")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--settings", nargs="*", default=[], metavar="a.b=c", help="more of fastrdm train's settings")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), choices=PRESETS, metavar="PRESET")
    parser.add_argument("--contestants", nargs="+", default=CONTESTANTS[:4], choices=CONTESTANTS, metavar="CONTESTANT")
    add_arguments(parser)
    parser.add_argument("--compile", default="no", choices=["no", "yes"])
    parser.add_argument("--capture", default="no", choices=["no", "yes"], help="as CUDA graphs")
    parser.add_argument("--optimize-ddp", default="ddp_optimizer", choices=["ddp_optimizer", "no_optimization"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--clock", choices=common.CLOCKS, default="wall")
    parser.add_argument("--no-head", action="store_true", help="rows for a table that has its first line")
    args = parser.parse_args(arguments)
    device = common.available_device()
    if args.capture == "yes" and device.type == "cpu":
        parser.error("--capture yes needs a CUDA device")
    if device.type == "cpu":
        torch.set_num_threads(1)
    torch._dynamo.config.optimize_ddp = args.optimize_ddp
    head = distributed.start().main and not args.no_head
    common.print_rows(FIELDS, (row for preset in args.presets for row in rows(preset, args, device)), head)
    distributed.stop()


if __name__ == "__main__":
    main()
