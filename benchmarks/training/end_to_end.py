"""Training with its loader against the same training on noise, and against a reference-style loop; CSV to stdout.

    python -m benchmarks.training.end_to_end cifar10/cpu.yaml loader.root=FOLDER > benchmarks/results/end_to_end.csv
    python -m benchmarks.training.end_to_end imagenet/simsiam.yaml loader.source=packed loader.root=PACKED \\
        loader.engine=native loader.workers=16 ...
    python -m benchmarks.training.end_to_end imagenet/simsiam.yaml loader.source=packed loader.root=PACKED \\
        --loader native loader.engine=native --loader ffcv loader.engine=ffcv loader.root=BETON --no-reference

Takes what `fastrdm train` takes. real: the configuration's loader and training step, monitor as configured. --loader
NAME SETTINGS puts a loader with these settings in its place, and another with each further one; those whose package is
not installed are skipped. synthetic: the same with loader.engine=synthetic, noise that lies on the device. All of them
feed one and the same trainer. reference: torch's DataLoader over Pillow views with our parameters, and the reference
step of benchmarks.training.step. Blocks of steps in turn, so that what slows the machine slows all, after a pause in
which loaders fill their queues: else one's workers would slow the next one's steps. A loader that fails in its first
block gets no row, and the program ends with its error after the rows of the others.

ms, p20, p80: a step with its loading, median over blocks. to_synthetic: the synthetic median over this one's, 1 is
best. to_reference: the reference's over this one's. data_wait: share of the time in which the device waits for a batch,
between two events in its queue; on a CPU the host.
"""

import argparse
import io
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import count, product
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks import common
from benchmarks.common import Row
from benchmarks.loaders.pillow_view import pillow_view
from benchmarks.training.step import reference_step
from fastrdm.config import run_config
from fastrdm.efficiency.speed import forever
from fastrdm.kernels.cuda_graph import recorder
from fastrdm.loaders.augment.parameters import sample_parameters
from fastrdm.loaders.build import build_loader
from fastrdm.loaders.engines.resident import ResidentLoader
from fastrdm.loaders.order import epoch_order
from fastrdm.loaders.sources.open import open_source
from fastrdm.loaders.sources.source import Source
from fastrdm.loaders.spec import Batch, Loader, LoaderConfig
from fastrdm.methods.dual_branch import Output
from fastrdm.runtime.distributed import Processes
from fastrdm.runtime.timers import Stopwatch
from fastrdm.trainer import Trainer
from fastrdm.training import automatic

FIELDS = ["preset", "encoder", "source", "engine", "batch", "precision", "compile", "capture", "contestant"]
FIELDS += ["blocks", "steps", "ms", "p20", "p80", "images_per_second", "to_synthetic", "to_reference", "data_wait"]
FIELDS += common.ENVIRONMENT


PACKAGES = {"dali": "nvidia.dali", "ffcv": "ffcv", "torchcodec": "torchcodec.decoders"}  # that engines need
Loaders = Mapping[str, Sequence[str]]  # name of a loader -> the settings in which it differs


class Timed(NamedTuple):
    """Seconds of a block."""

    whole: float
    waited: float


class Pictures(Dataset[Any]):
    """Pillow views of a source's images, one image at a time, parameters of epoch 0."""

    def __init__(self, source: Source, loader: LoaderConfig) -> None:
        self.source, self.views = source, loader.views

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        if self.source.images is not None:
            image = Image.fromarray(self.source.images[index])
        else:
            image = Image.open(io.BytesIO(self.source.fetch(index)[0])).convert("RGB")
        where = torch.tensor([index]), torch.tensor([image.height]), torch.tensor([image.width])
        drawn = [sample_parameters(spec, 0, 0, where[0], view, *where[1:]) for view, spec in enumerate(self.views)]
        views = [pillow_view(image, d[0].tolist(), spec) for d, spec in zip(drawn, self.views, strict=True)]
        return *views, index, int(self.source.labels[index])


def another_loader(trainer: Trainer, settings: Sequence[str]) -> Loader:
    """A loader that feeds the trainer, with views and batches as it takes them."""
    own, p = trainer.settings.loader, trainer.processes
    config = replace(run_config.load(settings).loader, views=own.views, batch_size=own.batch_size)
    source = trainer.source if config.engine == "synthetic" else open_source(config, "train")
    seed = trainer.settings.train.seed
    loader = build_loader(config, source, seed=seed, device=p.device, dtype=trainer.dtype)
    if trainer.settings.train.capture is True and isinstance(loader, ResidentLoader):
        loader.capture(recorder(p.device, "train.capture"))
    return loader


def reference_batches(trainer: Trainer) -> Iterator[Batch]:
    """Batches of the DataLoader, epoch after epoch, moved to the trainer's device."""
    c, device = trainer.settings.loader, trainer.processes.device
    data, workers = Pictures(trainer.source, c), c.threads
    for epoch in count():
        order = epoch_order(len(trainer.source), trainer.settings.train.seed, epoch).tolist()
        for *views, index, label in DataLoader(data, c.batch_size, order, num_workers=workers, drop_last=True):
            moved = tuple(view.to(device, trainer.dtype) for view in views)
            yield Batch(moved, index.to(device), label.to(device))


def monitored(trainer: Trainer, batch: Batch) -> Output:
    """A training step with the losses and the monitor that the trainer's loop feeds."""
    output = trainer.train_step(batch)
    trainer.step += 1
    trainer.losses.add(output.loss, trainer.step)
    trainer.monitor.push(output, trainer.step)
    return output


def block(trainer: Trainer, batches: Iterator[Batch], step: Callable[[Batch], object], steps: int) -> Timed:
    """`steps` steps with their loading, finished on the device."""
    began, waiting = time.perf_counter(), Stopwatch(trainer.processes.device, "wait for data")
    for _ in range(steps):
        with waiting:
            batch = next(batches)
        step(batch)
    trainer.losses.sum.item()
    if trainer.processes.device.type == "cuda":
        torch.cuda.synchronize()
    taken = time.perf_counter() - began
    trainer.monitor.clock.lap()  # drops its events
    return Timed(taken, waiting.lap())


def feed(trainer: Trainer, settings: Sequence[str]) -> Iterator[Batch]:
    """The batches of another loader, which is made when the first one is asked for."""
    yield from forever(another_loader(trainer, settings))


def contestants(
    settings: Sequence[str], loaders: Loaders, steps: int, reference: bool
) -> dict[str, Callable[[], Timed]]:
    """For each contestant a function that runs and times one block of steps."""
    trainer = Trainer(run_config.load(settings))
    feeds = {name: feed(trainer, [*settings, *own]) for name, own in loaders.items()}
    feeds = feeds or {"real": forever(trainer.loader)}
    feeds["synthetic"] = feed(trainer, [*settings, "loader.engine=synthetic"])

    def run(batches: Iterator[Batch]) -> Timed:
        return block(trainer, batches, partial(monitored, trainer), steps)

    runs: dict[str, Callable[[], Timed]] = {name: partial(run, batches) for name, batches in feeds.items()}
    if reference:
        plain = Trainer(
            run_config.load([*settings, "train.compile=false", "train.capture=false", "train.channels_last=false"])
        )
        theirs = reference_batches(plain)
        runs["reference"] = lambda: block(plain, theirs, lambda batch: reference_step(plain, batch)(), steps)
    return runs


def timed_blocks(
    runs: dict[str, Callable[[], Timed]], blocks: int, pause: float
) -> tuple[dict[str, list[Timed]], dict[str, str]]:
    """The blocks of every contestant, in turns, and what failed in a first round that warms up and is not counted."""
    found: dict[str, list[Timed]] = {name: [] for name in runs}
    failed: dict[str, str] = {}
    for name, run in runs.items():
        time.sleep(pause)
        try:
            run()
        except Exception as error:  # of any library that loads images; the others are worth their rows
            failed[name] = f"{type(error).__name__}: {error}"
            del found[name]
    for _, name in product(range(blocks), list(found)):
        time.sleep(pause)
        found[name].append(runs[name]())
    return found, failed


def installed(settings: Sequence[str], loaders: Loaders) -> Loaders:
    """The loaders whose packages are there; the others are named on stderr with the reason."""
    kept = dict(loaders)
    for name, own in loaders.items():
        package = PACKAGES.get(run_config.load([*settings, *own]).loader.engine)
        if package and (error := common.import_error(package)):
            print(f"{name}: skipped, {error}", file=sys.stderr)
            del kept[name]
    return kept


def rows(args: argparse.Namespace) -> Iterator[Row]:
    """A row for each contestant, after all of them were timed."""
    settings, blocks, steps = args.settings, args.blocks, args.steps
    loaders = installed(settings, {name: own for name, *own in args.loader})
    c = automatic.choose(run_config.load(settings), Processes(0, 1, common.available_device()))[0]
    found, failed = timed_blocks(contestants(settings, loaders, steps, not args.no_reference), blocks, args.pause)
    median = {name: 1e3 * statistics.median(t.whole for t in timed) / steps for name, timed in found.items()}
    environment = common.environment(common.available_device())
    engines: dict[str, str] = {name: run_config.load([*settings, *own]).loader.engine for name, own in loaders.items()}
    engines |= {"real": c.loader.engine, "synthetic": "synthetic", "reference": "DataLoader"}
    for name, timed in found.items():
        ours, ms = name != "reference", median[name]
        yield {
            "preset": c.preset,
            "encoder": c.encoder.name,
            "source": c.loader.source,
            "engine": engines[name],
            "batch": c.loader.batch_size,
            "precision": c.train.precision,
            "compile": "yes" if c.train.compile and ours else "no",
            "capture": "yes" if c.train.capture and ours else "no",
            "contestant": name,
            "blocks": blocks,
            "steps": steps,
            **common.times([1e3 * t.whole / steps for t in timed], 2),
            "images_per_second": f"{1e3 * c.loader.batch_size / ms:.1f}",
            **{f"to_{other}": f"{median[other] / ms:.3f}" for other in ("synthetic", "reference") if other in median},
            "data_wait": f"{sum(t.waited for t in timed) / sum(t.whole for t in timed):.3f}",
            **environment,
        }
    if failed:
        sys.exit("\n".join(f"{name} failed: {why}" for name, why in failed.items()))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("settings", nargs="*", metavar="CONFIG.yaml a.b=c")
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="steps of a block")
    parser.add_argument("--pause", type=float, default=3.0, help="seconds before a block")
    parser.add_argument("--loader", nargs="+", action="append", default=[], metavar=("NAME", "a.b=c"))
    parser.add_argument("--no-reference", action="store_true", help="without torch's DataLoader and Pillow")
    args = parser.parse_intermixed_args(arguments)
    if not args.no_reference:
        common.require_packages("torchvision")
    common.print_rows(FIELDS, rows(args))


if __name__ == "__main__":
    main()
