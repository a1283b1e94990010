"""Engine for files: threads decode each image once into a ring of buffers, and every view is cut from there.

On a CPU the threads also make the views. A GPU gets the decoded images where its own kernel cuts the views
(loader.augment=triton), else crops of 8 bits, which it colors; both on a stream beside the training step's.
"""

import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fastrdm.kernels.augment.augment_cpu import augment_cpu
from fastrdm.kernels.augment.layout import Ragged
from fastrdm.loaders.augment.parameters import sample_parameters
from fastrdm.loaders.augment.reference import augment, chosen, color, crop
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


@dataclass
class Pending:
    """A batch in the making, b = batch_size / world."""

    slot: Slot
    index: Tensor  # (b,) int64
    label: Tensor  # (b,) int64
    left: int  # decoding tasks that have not ended
    tasks: list[Future[None]] = field(default_factory=list)
    views: list[Tensor] = field(default_factory=list)  # each (b, 3, S, S): crops uint8, or finished float32
    parameters: list[Tensor] = field(default_factory=list)  # of each view (b, P) float32
    dropped: bool = False  # nobody waits for it


class NativeLoader(EpochLoader):
    """`workers` threads keep up to `prefetch` batches ahead, in no more than `prefetch_mb` of memory for the images."""

    def __init__(self, config: LoaderConfig, source: Source, process: Process) -> None:
        shards = source.shards if config.order == "windowed" else None
        super().__init__(
            len(source), config.batch_size, *process[:3], shards=shards, window=config.window, source=source
        )
        self.source, self.specs, self.device, self.dtype = source, config.views, process.device, process.dtype
        self.views = self.specs
        self.labels = np.asarray(source.labels, np.int64)
        self.prefetch, self.limit = config.prefetch, config.prefetch_mb * 2**20
        self.implementation = chosen(config.augment, process.device)
        self.cropper = "reference" if config.augment == "reference" else chosen("auto", torch.device("cpu"))
        self.reader = Reader(source, self.faults, config.max_corrupt)
        self.side = source.side
        self.cuda = process.device.type == "cuda"
        self.stream = torch.cuda.Stream(process.device) if self.cuda else None
        self.ring = Ring(pin=self.cuda)
        self.watch = Diagnosis(config.workers, source.stored_bytes)
        self.lock = threading.Lock()
        self.pool = start_threads(config.workers, "fastrdm-loader")

    def __iter__(self) -> Iterator[Batch]:
        """The batches of the epoch still to come; what a thread raises is raised here."""
        self.views = tuple(spec.at(self.epoch) for spec in self.specs)
        for pending in self.decoded(cut=self.implementation != "triton"):
            yield self._hand_out(pending)

    def diagnosis(self) -> str | None:
        """What training waits for, in a line, where that has changed since this was last called."""
        return self.watch.words() or super().diagnosis()

    def close(self) -> None:
        """End the threads, after the images they are at."""
        self.pool.shutdown(cancel_futures=True)

    def decoded(self, cut: bool = False) -> Iterator[Pending]:
        """Batches whose images are decoded, and cut into views where told; their slots are to be given back."""
        remaining = self._remaining()
        ahead: deque[Pending] = deque()
        try:
            while True:
                self._fill(ahead, remaining, cut)
                if not ahead:
                    return
                began = time.perf_counter()
                for task in ahead[0].tasks:  # the last one to decode adds those that cut
                    task.result()
                self.watch.waited += time.perf_counter() - began
                self.ring.learn(ahead[0].slot)
                self._fill(ahead, remaining, cut)
                yield ahead.popleft()
        finally:
            for pending in ahead:
                pending.dropped = True
                for task in pending.tasks:
                    task.cancel()

    def _fill(self, ahead: deque[Pending], remaining: Iterator[Indices], cut: bool) -> None:
        """Start batches behind the one that is due, while their number and bytes stay within the limits."""
        while not ahead or (len(ahead) <= self.prefetch and self.ring.fits(len(ahead) + 1, self.limit)):
            indices = next(remaining, None)
            if indices is None:
                return
            ahead.append(self._start(indices, cut))

    def _read_ahead_of(self, shards: set[int]) -> None:
        self.pool.submit(self.source.read_ahead, shards)

    def _start(self, indices: Indices, cut: bool) -> Pending:
        size = len(indices)
        index = torch.empty(size, dtype=torch.int64, pin_memory=self.cuda)
        chunk = CHUNK if self.side is None else SQUARES
        starts = range(0, size, chunk)
        pending = Pending(self.ring.take(size), index, torch.empty_like(index, pin_memory=self.cuda), len(starts))
        for start in starts:
            place = slice(start, min(start + chunk, size))
            pending.tasks.append(self.pool.submit(self._decode, pending, place, indices[place], self.epoch, cut))
        return pending

    def _decode(self, pending: Pending, place: slice, indices: Indices, epoch: int, cut: bool) -> None:
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
        if last and cut and not pending.dropped:
            self._draw(pending, epoch)

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

    def _draw(self, pending: Pending, epoch: int) -> None:
        """Draw the parameters of all views at once, which costs as much as for one image, and start the cutting."""
        images, size = pending.slot.images(), len(pending.index)
        for view, spec in enumerate(self.views):
            drawn = sample_parameters(spec, self.seed, epoch, pending.index, view, images.height, images.width)
            pending.parameters.append(drawn.pin_memory() if self.cuda else drawn)
            pending.views.append(self._room(size, spec.size))
        pending.tasks += [
            self.pool.submit(self._cut, pending, images, slice(start, start + CHUNK)) for start in range(0, size, CHUNK)
        ]

    def _room(self, count: int, side: int) -> Tensor:
        if self.implementation == "cpu":
            return torch.empty(count, side, side, 3).permute(0, 3, 1, 2)
        return torch.empty(count, 3, side, side, dtype=torch.uint8, pin_memory=self.cuda)

    def _cut(self, pending: Pending, images: Ragged, place: slice) -> None:
        """One task of a thread: the views of some images."""
        began = time.perf_counter()
        part = Ragged(images.pixels, images.offset[place], images.height[place], images.width[place])
        singles = [] if self.implementation == "cpu" else [part.image(k) for k in range(len(part.offset))]
        for spec, parameters, made in zip(self.views, pending.parameters, pending.views, strict=True):
            if self.implementation == "cpu":
                augment_cpu(part, parameters[place], spec, made[place])
            else:
                crop(singles, parameters[place], spec, made[place], self.cropper)
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
        if self.implementation == "cpu":
            views = [view.to(self.dtype) for view in pending.views]
        elif self.implementation == "triton":
            images = pending.slot.images().to(self.device, non_blocking=True)
            views = [self._augmented(images, index, view, spec) for view, spec in enumerate(self.views)]
        else:
            views = [
                color(self._moved(crops).float().div_(255), self._moved(parameters), spec, self.dtype)
                for spec, crops, parameters in zip(self.views, pending.views, pending.parameters, strict=True)
            ]
        return Batch(tuple(views), index, label)

    def _augmented(self, images: Ragged, index: Tensor, view: int, spec: ViewSpec) -> Tensor:
        drawn = sample_parameters(spec, self.seed, self.epoch, index, view, images.height, images.width)
        return augment(images, drawn, spec, self.dtype, self.implementation)

    def _moved(self, pinned: Tensor) -> Tensor:
        return pinned.to(self.device, non_blocking=True)


def _row(rows: Pixels, number: int, *_: int) -> Pixels:
    """Where image `number` goes, whatever stands in for it."""
    return rows[number]  # type: ignore[no-any-return]
