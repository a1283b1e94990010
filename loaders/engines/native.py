"""Engine for files: threads decode each image once into a ring of buffers, and every view is cut from there.

Who does what is left after decoding depends on loader.augment: the threads make finished views (FinishedInThreads), or
the device makes them from the decoded images (MadeOnDevice), or the threads cut crops of 8 bits and the device colors
them (ColoredOnDevice). What a GPU does runs on a stream beside the training step's.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fastrdm.kernels.augment.augment_cpu import augment_cpu
from fastrdm.kernels.augment.ragged import Ragged
from fastrdm.loaders.augment.parameters import sample_all_parameters
from fastrdm.loaders.augment.reference import augment, chosen, color, crop
from fastrdm.loaders.engines.backpressure import Backpressure
from fastrdm.loaders.engines.bottleneck import Diagnosis
from fastrdm.loaders.engines.ring import Ring, Slot
from fastrdm.loaders.engines.threads import start_threads
from fastrdm.loaders.order import EpochLoader, Indices, Process
from fastrdm.loaders.sources.decode import CorruptImage, Pixels
from fastrdm.loaders.sources.reader import Reader
from fastrdm.loaders.sources.source import ReadTime, Source
from fastrdm.loaders.spec import Batch, LoaderConfig, ViewSpec

CHUNK = 16  # images a task
SQUARES = 64  # images a task that only copies, which takes a hundredth of the time of decoding
CPU = torch.device("cpu")
Views = tuple[ViewSpec, ...]
Draw = Callable[[Tensor, Ragged], Tensor]  # indices (b,), images -> parameters of all views (V, b, COLUMNS)


@dataclass
class Pending:
    """A batch in the making, b = batch_size / world."""

    slot: Slot
    index: Tensor
    """(b,) int64."""
    label: Tensor
    """(b,) int64."""
    left: int
    """Decoding tasks that have not ended."""
    tasks: list[Future[None]] = field(default_factory=list)
    views: list[Tensor] = field(default_factory=list)
    """Each (b, 3, S, S): crops uint8, or finished float32."""
    parameters: list[Tensor] = field(default_factory=list)
    """(b, COLUMNS) float32 for each view."""
    dropped: bool = False
    """True when nobody waits for the batch any more."""


Cut = tuple[ViewSpec, Tensor, Tensor]  # a view, its parameters (n, COLUMNS), the memory it goes to (n, 3, S, S)


class Cutter(Protocol):
    """The step of the threads after decoding: it makes the views of decoded images."""

    def room(self, count: int, side: int) -> Tensor:
        """Memory (count, 3, side, side) for one view of a batch."""

    def cut(self, images: Ragged, cuts: Iterable[Cut]) -> None:
        """Make all views of some images."""


class ViewMaker(Protocol):
    """How a batch's decoded images become views on the device, in the training dtype."""

    @property
    def cutter(self) -> Cutter | None:
        """None where the threads have nothing to do but decode."""

    def finish(self, pending: Pending, index: Tensor, specs: Views, draw: Draw) -> list[Tensor]:
        """The batch's views (b, 3, S, S); `index` (b,) lies on the device."""


class FinishedViews:
    """The threads make whole views by the compiled augmentation, on a CPU."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.cutter, self.dtype = self, dtype

    def room(self, count: int, side: int) -> Tensor:
        return torch.empty(count, side, side, 3).permute(0, 3, 1, 2)

    def cut(self, images: Ragged, cuts: Iterable[Cut]) -> None:
        for spec, parameters, out in cuts:
            augment_cpu(images, parameters, spec, out)

    def finish(self, pending: Pending, index: Tensor, specs: Views, draw: Draw) -> list[Tensor]:
        return [view.to(self.dtype) for view in pending.views]


class ColoredCrops:
    """The threads cut crops of 8 bits, by `cpu` or `reference`, which the device colors in plain torch."""

    def __init__(self, device: torch.device, dtype: torch.dtype, cut_by: str) -> None:
        self.cutter, self.device, self.dtype, self.cut_by = self, device, dtype, cut_by

    def room(self, count: int, side: int) -> Tensor:
        return torch.empty(count, 3, side, side, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    def cut(self, images: Ragged, cuts: Iterable[Cut]) -> None:
        singles = [images.image(k) for k in range(len(images.offset))]
        for spec, parameters, out in cuts:
            crop(singles, parameters, spec, out, self.cut_by)

    def finish(self, pending: Pending, index: Tensor, specs: Views, draw: Draw) -> list[Tensor]:
        return [
            color(self._moved(crops).float().div_(255), self._moved(parameters), spec, self.dtype)
            for spec, crops, parameters in zip(specs, pending.views, pending.parameters, strict=True)
        ]

    def _moved(self, pinned: Tensor) -> Tensor:
        return pinned.to(self.device, non_blocking=True)


class TritonViews:
    """The decoded images go to the GPU, whose kernels cut the views."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.cutter, self.device, self.dtype = None, device, dtype

    def finish(self, pending: Pending, index: Tensor, specs: Views, draw: Draw) -> list[Tensor]:
        images = pending.slot.images().to(self.device, non_blocking=True)
        return [
            augment(images, parameters, spec, self.dtype, "triton")
            for spec, parameters in zip(specs, draw(index, images), strict=True)
        ]


def view_maker(augmentation: str, device: torch.device, dtype: torch.dtype) -> ViewMaker:
    """The maker that loader.augment names on `device`. ValueError where it cannot run."""
    name = chosen(augmentation, device)
    if name == "cpu":
        return FinishedViews(dtype)
    if name == "triton":
        return TritonViews(device, dtype)
    # Where the user asked for the reference, it cuts the crops too.
    return ColoredCrops(device, dtype, "reference" if augmentation == "reference" else chosen("auto", CPU))


class NativeLoader(EpochLoader):
    """`workers` threads keep up to `prefetch` batches ahead, in no more than `prefetch_mb` of memory for the images."""

    def __init__(self, config: LoaderConfig, source: Source, process: Process) -> None:
        shards = source.shards if config.order == "windowed" else None
        super().__init__(
            len(source), config.batch_size, *process[:3], shards=shards, window=config.window, source=source
        )
        self.source, self.views, self.device = source, config.views, process.device
        self.epoch_views = self.views  # each at the size that it has in the epoch at hand
        self.labels = np.asarray(source.labels, np.int64)
        self.prefetch, self.limit = config.prefetch, config.prefetch_mb * 2**20
        self.maker = view_maker(config.augment, process.device, process.dtype)
        self.reader = Reader(source, self.faults, config.max_corrupt)
        self.side = source.side
        self.cuda = process.device.type == "cuda"
        self.stream = torch.cuda.Stream(process.device) if self.cuda else None
        self.ring, self.backpressure = Ring(pin=self.cuda), Backpressure(process.device)
        self.watch = Diagnosis(config.threads, source.stored_bytes)
        self.lock = threading.Lock()
        self.pool = start_threads(config.threads, "fastrdm-loader")

    def __iter__(self) -> Iterator[Batch]:
        """The batches of the epoch still to come; what a thread raises is raised here."""
        self.epoch_views = tuple(spec.at(self.epoch) for spec in self.views)
        for pending in self.decoded(self.maker.cutter):
            self.backpressure.step()
            yield self._hand_out(pending)

    def diagnosis(self) -> str | None:
        """Message on what training waits for, if that has changed since the last call, else what the source tells."""
        return self.watch.describe() or super().diagnosis()

    def close(self) -> None:
        """End the threads, after the images they are at."""
        self.pool.shutdown(cancel_futures=True)

    def decoded(self, cutter: Cutter | None = None) -> Iterator[Pending]:
        """Batches whose images are decoded, and cut into views by `cutter`; their slots are to be given back."""
        remaining = self._remaining()
        ahead: deque[Pending] = deque()
        try:
            while True:
                self._fill(ahead, remaining, cutter)
                if not ahead:
                    return
                began = time.perf_counter()
                # The last task to decode adds those that cut.
                for task in ahead[0].tasks:
                    task.result()
                self.watch.waited += time.perf_counter() - began
                self.ring.learn(ahead[0].slot)
                self._fill(ahead, remaining, cutter)
                yield ahead.popleft()
        finally:
            for pending in ahead:
                pending.dropped = True
                for task in pending.tasks:
                    task.cancel()

    def _fill(self, ahead: deque[Pending], remaining: Iterator[Indices], cutter: Cutter | None) -> None:
        """Start batches behind the one that is due, while their number and bytes stay within the limits."""
        while not ahead or (len(ahead) <= self.prefetch and self.ring.fits(len(ahead) + 1, self.limit)):
            indices = next(remaining, None)
            if indices is None:
                return
            ahead.append(self._start(indices, cutter))

    def _read_ahead_of(self, shards: set[int]) -> None:
        self.pool.submit(self.source.read_ahead, shards)

    def _start(self, indices: Indices, cutter: Cutter | None) -> Pending:
        size = len(indices)
        index = torch.empty(size, dtype=torch.int64, pin_memory=self.cuda)
        chunk = CHUNK if self.side is None else SQUARES
        starts = range(0, size, chunk)
        pending = Pending(self.ring.take(size), index, torch.empty_like(index, pin_memory=self.cuda), len(starts))
        for start in starts:
            place = slice(start, min(start + chunk, size))
            pending.tasks.append(self.pool.submit(self._decode, pending, place, indices[place], self.epoch, cutter))
        return pending

    def _decode(self, pending: Pending, place: slice, indices: Indices, epoch: int, cutter: Cutter | None) -> None:
        """One task of a thread: decode some images; the last one starts the cutting."""
        spent = ReadTime()
        numbers = self._squares(pending, place, indices, spent) or [
            self.reader.read(index, partial(pending.slot.place, k), spent)
            for k, index in enumerate(indices.tolist(), start=place.start)
        ]
        pending.index.numpy()[place], pending.label.numpy()[place] = numbers, self.labels[numbers]
        self.watch.add(spent, len(numbers))
        with self.lock:
            pending.left -= 1
            last = pending.left == 0
        if last and cutter is not None and not pending.dropped:
            self._cut_all(pending, epoch, cutter)

    def _squares(self, pending: Pending, place: slice, indices: Indices, spent: ReadTime) -> list[int] | None:
        """Copy images that are stored as squares of one size; None where they are not."""
        if self.side is None:
            return None
        began = time.perf_counter()
        rows = pending.slot.rows(place, self.side)
        try:
            if self.faults:
                raise CorruptImage("read one by one: some may be replaced")
            self.source.gather(indices, rows)
            numbers: list[int] = indices.tolist()
        except CorruptImage:
            pairs = enumerate(indices.tolist())
            numbers = [self.reader.read(index, partial(_row, rows, k), ReadTime()) for k, index in pairs]
        spent.read += time.perf_counter() - began
        return numbers

    def _cut_all(self, pending: Pending, epoch: int, cutter: Cutter) -> None:
        """Draw the parameters of all views at once, which costs as much as for one image, and start the cutting."""
        images, size = pending.slot.images(), len(pending.index)
        drawn = self._draw(epoch, pending.index, images)
        for spec, parameters in zip(self.epoch_views, drawn, strict=True):
            pending.parameters.append(parameters.pin_memory() if self.cuda else parameters)
            pending.views.append(cutter.room(size, spec.size))
        pending.tasks += [
            self.pool.submit(self._cut, pending, images, slice(start, start + CHUNK), cutter)
            for start in range(0, size, CHUNK)
        ]

    def _draw(self, epoch: int, index: Tensor, images: Ragged) -> Tensor:
        """Parameters (V, b, COLUMNS) of all views for samples `index` (b,); one kernel where they lie on a GPU."""
        return sample_all_parameters(self.epoch_views, self.seed, epoch, index, images.height, images.width)

    def _cut(self, pending: Pending, images: Ragged, place: slice, cutter: Cutter) -> None:
        """One task of a thread: the views of some images."""
        began = time.perf_counter()
        part = Ragged(images.pixels, images.offset[place], images.height[place], images.width[place])
        parts = zip(self.epoch_views, pending.parameters, pending.views, strict=True)
        cutter.cut(part, ((spec, parameters[place], made[place]) for spec, parameters, made in parts))
        self.watch.add(ReadTime(decode=time.perf_counter() - began), 0)

    def _hand_out(self, pending: Pending) -> Batch:
        """The finished batch on the device; on a GPU made beside the stream that trains, which waits for it."""
        if self.stream is None:
            batch = self._finish(pending)
        else:
            train = torch.cuda.current_stream(self.device)
            with torch.cuda.stream(self.stream):
                batch = self._finish(pending)
                pending.slot.copied = self.stream.record_event()
            train.wait_stream(self.stream)
            for tensor in (*batch.views, batch.index, batch.label):
                tensor.record_stream(train)
        self.ring.give(pending.slot)
        self.position += self.batch_size
        return batch

    def _finish(self, pending: Pending) -> Batch:
        index, label = self._moved(pending.index), self._moved(pending.label)
        views = self.maker.finish(pending, index, self.epoch_views, partial(self._draw, self.epoch))
        return Batch(tuple(views), index, label)

    def _moved(self, pinned: Tensor) -> Tensor:
        return pinned.to(self.device, non_blocking=True)


def _row(rows: Pixels, number: int, *_: int) -> Pixels:
    """Memory of image `number`, whatever the size of the image that stands in for it."""
    return rows[number]  # type: ignore[no-any-return]
