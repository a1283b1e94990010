"""Training with its loader against the same training on noise, and against a reference-style loop; CSV to stdout.

    python -m benchmarks.training.end_to_end cifar10/cpu.yaml loader.root=FOLDER > benchmarks/results/end_to_end.csv
    python -m benchmarks.training.end_to_end imagenet/simsiam.yaml loader.source=packed loader.root=PACKED \\
        loader.engine=native loader.workers=16 ...

Takes what `fastrdm train` takes. real: the configuration's loader and training step, monitor as configured. synthetic:
the same with loader.engine=synthetic, noise that lies on the device. reference: torch's DataLoader over Pillow views
with our parameters, and the reference step of benchmarks.training.step. Blocks of steps in turn, so that what slows the
machine slows all, after a pause in which loaders fill their queues: else one's workers would slow the next one's steps.

ms, p20, p80: a step with its loading, median over blocks. to_synthetic: the synthetic median over this one's, 1 is
best. to_reference: the reference's over this one's. data_wait: share of the time in which the device waits for a batch,
between two events in its queue; on a CPU the host.
"""

import io
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks import common
from benchmarks.common import Row
from benchmarks.loaders.pillow_view import pillow_view
from benchmarks.training.step import reference_step
from fastrdm.config import run_config
from fastrdm.loaders.augment.parameters import sample_parameters
from fastrdm.loaders.order import epoch_order
from fastrdm.loaders.sources.source import Source
from fastrdm.loaders.spec import Batch, LoaderConfig
from fastrdm.methods.dual_branch import Output
from fastrdm.runtime.distributed import Processes
from fastrdm.runtime.timers import Stopwatch
from fastrdm.trainer import Trainer
from fastrdm.training import automatic

FIELDS = ["preset", "encoder", "source", "engine", "batch", "precision", "compile", "capture", "contestant"]
FIELDS += ["blocks", "steps", "ms", "p20", "p80", "images_per_second", "to_synthetic", "to_reference", "data_wait"]
FIELDS += common.ENVIRONMENT


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


def forever(trainer: Trainer) -> Iterator[Batch]:
    """The loader's epochs, one after the other."""
    for epoch in count():
        trainer.loader.set_epoch(epoch)
        yield from trainer.loader


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


def contestants(settings: Sequence[str], steps: int) -> dict[str, Callable[[], Timed]]:
    """For each contestant a function that runs and times one block of steps."""
    real = Trainer(run_config.load(settings))
    noise = Trainer(run_config.load([*settings, "loader.engine=synthetic"]))
    plain = Trainer(
        run_config.load([*settings, "train.compile=false", "train.capture=false", "train.channels_last=false"])
    )
    plain_batches, feeds = reference_batches(plain), {"real": forever(real), "synthetic": forever(noise)}
    return {
        "real": lambda: block(real, feeds["real"], lambda batch: monitored(real, batch), steps),
        "synthetic": lambda: block(noise, feeds["synthetic"], lambda batch: monitored(noise, batch), steps),
        "reference": lambda: block(plain, plain_batches, lambda batch: reference_step(plain, batch)(), steps),
    }


def timed_blocks(settings: Sequence[str], blocks: int, steps: int, pause: float) -> dict[str, list[Timed]]:
    """The blocks of every contestant, in turns; a first round that warms up is not counted."""
    runs = contestants(settings, steps)
    found: dict[str, list[Timed]] = {name: [] for name in runs}
    for number in range(-1, blocks):
        for name, run in runs.items():
            time.sleep(pause)
            timed = run()
            if number >= 0:
                found[name].append(timed)
    return found


def rows(settings: Sequence[str], blocks: int, steps: int, pause: float) -> Iterator[Row]:
    """A row for each contestant, after all of them were timed."""
    here = Processes(0, 1, common.available_device())
    c, found = automatic.choose(run_config.load(settings), here)[0], timed_blocks(settings, blocks, steps, pause)
    median = {name: 1e3 * statistics.median(t.whole for t in timed) / steps for name, timed in found.items()}
    environment = common.environment(common.available_device())
    engines = {"real": c.loader.engine, "synthetic": "synthetic", "reference": "DataLoader"}
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
            "to_synthetic": f"{median['synthetic'] / ms:.3f}",
            "to_reference": f"{median['reference'] / ms:.3f}",
            "data_wait": f"{sum(t.waited for t in timed) / sum(t.whole for t in timed):.3f}",
            **environment,
        }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("settings", nargs="*", metavar="CONFIG.yaml a.b=c")
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="steps of a block")
    parser.add_argument("--pause", type=float, default=3.0, help="seconds before a block")
    args = parser.parse_intermixed_args(arguments)
    common.require_packages("torchvision")
    common.print_rows(FIELDS, rows(args.settings, args.blocks, args.steps, args.pause))


if __name__ == "__main__":
    main()
