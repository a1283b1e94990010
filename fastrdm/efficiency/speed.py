"""How fast images are loaded and trained on here: engines, threads, packs and the training step, in a bounded time."""

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch

from fastrdm.config.run_config import Config
from fastrdm.loaders.build import ENGINES, build_loader
from fastrdm.loaders.order import epoch_order
from fastrdm.loaders.packing.pack import pack_source
from fastrdm.loaders.sources.decode import CorruptImage, new_pixels
from fastrdm.loaders.sources.packed import PackedSource
from fastrdm.loaders.sources.source import ReadTime, Source, Subset
from fastrdm.loaders.spec import Batch, Engine, Loader, cores_of_a_process
from fastrdm.methods.sinkhorn import SinkhornConfig
from fastrdm.runtime.distributed import Processes
from fastrdm.runtime.timers import TrainingClock
from fastrdm.schema import Horizon, steps_of
from fastrdm.training.learner import DTYPES, build_learner, build_method, dummy_batch
from fastrdm.training.step import TrainStep

LOADED = 64  # images of a batch where loading alone is timed: the rate of an image hardly depends on it
READ = 64  # images that are read one by one
PACKED = 256  # images that are packed to see what packing brings
REPEATS = 64  # readings of a sample that make an epoch, so that starting an epoch does not count
SMALLEST = 8  # images of the smallest timed step
AFTERWARDS = 5  # steps without a loader that the steps with it are compared with
CLEARLY = 1.15  # times as fast as our own engines that another one must be to be preferred
MORE = 1.05  # times as fast as another that a rate must be to count as faster
AMPLE = 1.25  # times the rate of the training step at which loading keeps up with it


class ReadCost(NamedTuple):
    """Mean milliseconds of one thread on one image: getting its bytes, and decoding them."""

    read: float
    decode: float


class LoadRate(NamedTuple):
    """Loading alone, views included."""

    engine: Engine
    workers: int
    data: str
    """`set`, or the sample that was packed: `sample` as it is, `jpeg` and `raw` packed in that mode."""

    images_per_second: float | None
    """None where the engine cannot take the set, or where the time was over."""

    first: float
    """Seconds from building the loader to its first batch."""

    reason: str = ""
    """Why nothing was measured."""


class StepRate(NamedTuple):
    """The training step on images that lie on the device."""

    images: int
    seconds: float
    """Mean of a step."""

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds


class Together(NamedTuple):
    """Training with its loader."""

    images: int
    """Images of a step."""

    images_per_second: float
    waited: float
    """Share of the time in which the step waited for a batch."""

    alone: float
    """Images per second of the step on one of those batches right afterwards, without a loader beside it."""

    @property
    def cost(self) -> float:
        """Share of the step's speed that loading costs: by waiting, and on a CPU by sharing the cores as well."""
        return max(1 - self.images_per_second / self.alone, 0.0)


class Budget:
    """Seconds that are left, shared out to what is measured."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.end = seconds, time.monotonic() + seconds

    def share(self, part: float) -> float:
        """`part` of the whole, or what is left of it."""
        return max(min(part * self.seconds, self.left), 0.0)

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


def read_cost(source: Source, seconds: float) -> ReadCost | None:
    """The cost of getting images, from a few random ones; None for a set in memory, or where none could be read."""
    if source.images is not None:
        return None
    spent, done, end = ReadTime(), 0, time.monotonic() + seconds
    for index in epoch_order(len(source), 0, 0)[:READ].tolist():
        try:
            source.read_into(index, new_pixels, spent)
        except CorruptImage:
            continue
        done += 1
        if time.monotonic() > end:
            break
    return ReadCost(1e3 * spent.read / done, 1e3 * spent.decode / done) if done else None


def forever(loader: Loader) -> Iterator[Batch]:
    """The loader's epochs, one after the other."""
    for epoch in count():
        loader.set_epoch(epoch)
        yield from loader


def load_rate(
    settings: Config, source: Source, process: Processes, engine: Engine, workers: int, data: str, seconds: float
) -> LoadRate:
    """Rate of one engine, from its first batch on for about `seconds`, and for two batches at least.

    Each engine and number of threads has an order of its own, so that none reads what another one has just read.
    """
    c = replace(settings.loader, engine=engine, workers=workers, batch_size=min(LOADED, len(source)))
    began, seed = time.perf_counter(), 1 + 1000 * list(ENGINES).index(engine) + workers
    try:
        loader = build_loader(c, source, seed=seed, device=process.device, dtype=DTYPES[settings.train.precision])
    except ValueError as error:
        return LoadRate(engine, workers, data, None, 0.0, str(error).partition("\n")[0])
    with closing(loader), closing(forever(loader)) as batches:  # type: ignore[type-var]
        next(batches)
        _wait(process)
        first = time.perf_counter()
        batch_count = 0
        while batch_count < 2 or time.perf_counter() - first < seconds:
            next(batches)
            batch_count += 1
        _wait(process)
        rate = batch_count * c.batch_size / (time.perf_counter() - first)
    return LoadRate(engine, workers, data, rate, first - began)


def engine_rates(settings: Config, source: Source, process: Processes, budget: Budget) -> list[LoadRate]:
    """Every engine on all cores."""
    names: list[Any] = [name for name in ENGINES if name != "synthetic"]
    each, cores = budget.share(0.24) / len(names), cores_of_a_process()
    return [_in_time(settings, source, process, name, cores, "set", each, budget) for name in names]


def thread_rates(
    settings: Config, source: Source, process: Processes, chosen: LoadRate | None, budget: Budget
) -> list[LoadRate]:
    """The engine to take on other numbers of threads; none for the resident engine, which has no threads."""
    if chosen is None or chosen.engine == "resident":
        return []
    cores = cores_of_a_process()
    others = sorted({cores * 2, cores // 2, cores // 4, 1} - {cores, 0}, reverse=True)[:3]
    each = budget.share(0.1) / len(others)
    return [_in_time(settings, source, process, chosen.engine, n, "set", each, budget) for n in others]


def pack_rates(settings: Config, source: Source, process: Processes, budget: Budget) -> list[LoadRate]:
    """The native engine on a sample of the images, as it is and packed in both modes; none for a set in memory.

    The sample lies in the page cache, so that what packing brings beside a slow storage is not in the numbers.
    """
    if source.images is not None or source.side is not None:
        return []
    chosen = np.sort(epoch_order(len(source), 0, 0)[:PACKED])
    workers, found = cores_of_a_process(), []
    sample, end = Subset(source, chosen), budget.share(0.2)
    with TemporaryDirectory(prefix="fastrdm-bench-") as folder:
        for data in ("sample", "jpeg", "raw"):
            packed: Source = sample
            if data != "sample":
                try:
                    pack_source(sample, Path(folder, data), data, workers)
                except (ValueError, OSError) as error:
                    found.append(LoadRate("native", workers, data, None, 0.0, str(error).partition("\n")[0]))
                    continue
                packed = PackedSource(Path(folder, data))
            again = Subset(packed, np.tile(np.arange(len(packed)), REPEATS))
            found.append(_in_time(settings, again, process, "native", workers, data, end / 6, budget))
    return found


def _in_time(
    settings: Config,
    source: Source,
    process: Processes,
    engine: Engine,
    workers: int,
    data: str,
    seconds: float,
    budget: Budget,
) -> LoadRate:
    """As load_rate, unless the time is over."""
    if budget.left <= 0:
        return LoadRate(engine, workers, data, None, 0.0, "the time was over")
    return load_rate(settings, source, process, engine, workers, data, seconds)


def best(rates: list[LoadRate]) -> LoadRate | None:
    """The fastest of those that were measured."""
    measured = [rate for rate in rates if rate.images_per_second is not None]
    return max(measured, key=lambda rate: rate.images_per_second or 0.0, default=None)


def plain(settings: Config) -> Config:
    """The settings with the step as it is written, neither compiled nor recorded, and all views at their last size.

    Compiling would take the time of all other measurements. Warm-up is of no account to speed.
    """
    views = tuple(replace(view, progressive=()) for view in settings.loader.views)
    return replace(
        settings,
        train=replace(settings.train, compile=False, capture=False),
        optim=replace(settings.optim, warmup="0st"),
        loader=replace(settings.loader, views=views),
    )


def preferred(rates: list[LoadRate]) -> LoadRate | None:
    """The fastest one of the engine to take: fastrdm's own unless another one is clearly faster."""
    on_set = [rate for rate in rates if rate.data == "set"]
    own, fastest = best([rate for rate in on_set if rate.engine in ("resident", "native")]), best(on_set)
    if own is None or fastest is None:
        return fastest
    clearly = (fastest.images_per_second or 0.0) > CLEARLY * (own.images_per_second or 0.0)
    return fastest if clearly else own


def training_step(settings: Config, source: Source, process: Processes, classes: int) -> TrainStep:
    """The trainer's step, with freshly initialized weights; `classes`: of the probe, 0 without labels."""
    torch.manual_seed(settings.train.seed)
    epoch = max(len(source) // settings.loader.batch_size, 1)
    horizon = Horizon(epoch, max(steps_of(settings.train.length, epoch), 1))
    layout = torch.channels_last if settings.train.channels_last else torch.contiguous_format
    learner = build_learner(build_method(settings, horizon), settings, classes)
    return TrainStep(settings, learner.to(process.device).to(memory_format=layout), horizon, process)


def step_rates(settings: Config, step: TrainStep, process: Processes, most: int, seconds: float) -> list[StepRate]:
    """Steps on more and more images, up to `most`, as far as the time and the memory of the device allow."""
    sizes = [view.size for view in settings.loader.views]
    dtype, end = DTYPES[settings.train.precision], time.monotonic() + seconds
    transforms = (*settings.method.online, *settings.method.target)
    ring = any(isinstance(transform, SinkhornConfig) and transform.queue for transform in transforms)
    # a queue takes whole batches
    images = most if ring else min(SMALLEST * settings.train.accumulate, most)
    found: list[StepRate] = []
    while True:
        try:
            batch = dummy_batch(images, sizes, process.device, dtype)
            once = _timed(step, batch, process, 1)  # allocates, and chooses algorithms
            found.append(StepRate(images, _timed(step, batch, process, min(max(int(seconds / 8 / once), 1), 20))))
        except torch.OutOfMemoryError:
            return found
        larger = min(2 * images, most)
        # the next size takes about twice as long, and is run twice at least
        if larger == images or time.monotonic() + 4 * found[-1].seconds > end:
            return found
        images = larger


def together(
    settings: Config,
    source: Source,
    step: TrainStep,
    process: Processes,
    loading: LoadRate,
    images: int,
    seconds: float,
) -> Together:
    """Training on batches of `images` from the loader, for about `seconds` after a first step that does not count."""
    c = replace(settings.loader, engine=loading.engine, workers=loading.workers, batch_size=images)
    loader = build_loader(c, source, seed=0, device=process.device, dtype=DTYPES[settings.train.precision])
    with closing(loader), closing(forever(loader)) as batches:  # type: ignore[type-var]
        step(next(batches), 0)
        clock = TrainingClock(process.device)
        began = time.monotonic()
        for batch in clock.waiting(batches):
            step(batch, 0)
            if time.monotonic() - began > seconds and clock.steps >= 2:
                break
        lap = clock.lap()
    alone = images / _timed(step, batch, process, min(lap.steps, AFTERWARDS))
    return Together(images, lap.steps * images / lap.seconds, lap.waited / lap.seconds, alone)


def _timed(step: TrainStep, batch: Batch, process: Processes, repeats: int) -> float:
    """Mean seconds of a step."""
    _wait(process)
    began = time.perf_counter()
    for _ in range(repeats):
        step(batch, 0)
    _wait(process)
    return (time.perf_counter() - began) / repeats


def _wait(process: Processes) -> None:
    if process.device.type == "cuda":
        torch.cuda.synchronize(process.device)
