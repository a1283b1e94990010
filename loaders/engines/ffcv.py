"""Engine for .beton files: ffcv reads and decodes each image once, our kernels make the views.

For a GPU the pixels are joined in pinned memory that is used again and again, and copied and augmented on a stream
beside the one that trains.

Order and parameters are ours, so that a restart in mid-epoch is exact. ffcv decodes with the fast transform and fast
upsampling of libjpeg-turbo: pixels differ from the other engines' by a level or two.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastrdm.kernels.augment.ragged import Ragged, ragged
from fastrdm.loaders.augment.parameters import sample_all_parameters
from fastrdm.loaders.augment.reference import augment, chosen
from fastrdm.loaders.engines.backpressure import Backpressure, moved
from fastrdm.loaders.engines.ring import Ring, Slot
from fastrdm.loaders.order import EpochLoader, Process
from fastrdm.loaders.sources.beton import check_ffcv
from fastrdm.loaders.sources.reader import Reader
from fastrdm.loaders.sources.source import BetonImages, Source
from fastrdm.loaders.spec import Batch, LoaderConfig, ViewSpec


class FfcvLoader(EpochLoader):
    """`workers` threads of ffcv decode `prefetch` batches ahead into rows as long as the largest image of the set."""

    def __init__(self, config: LoaderConfig, source: Source, process: Process) -> None:
        check_ffcv("loader.engine=ffcv")
        if (beton := source.beton) is None:
            raise ValueError(
                "loader.engine=ffcv reads .beton files (fastrdm pack --format beton, loader.source=packed), got "
                f"loader.source={source.name}"
            )
        super().__init__(len(source), config.batch_size, *process[:3])
        process.check("ffcv")
        self.source, self.views, self.device, self.dtype = source, config.views, process.device, process.dtype
        self.implementation = chosen(config.augment, process.device)
        self.labels = torch.as_tensor(source.labels, dtype=torch.int64)
        self.height, self.width = torch.from_numpy(beton.height), torch.from_numpy(beton.width)
        self.beton = beton
        self.reader = Reader(source, self.faults, config.max_corrupt)
        share, row = batch_rows(config, process.world, beton)
        ahead = max(1, min(config.prefetch, config.prefetch_mb * 2**20 // (share * row) - 2))
        cuda = process.device.type == "cuda"
        self.ring, self.backpressure = Ring(pin=cuda), Backpressure(process.device)
        self.stream = torch.cuda.Stream(process.device) if cuda else None
        make, self.start = _graph()
        self.loader = make(beton.path, share, config.threads, ahead)

    def __iter__(self) -> Iterator[Batch]:
        """The batches of the epoch still to come."""
        shares = list(self._remaining())
        if not shares:
            return
        self.beton.check()
        views = tuple(spec.at(self.epoch) for spec in self.views)
        decoded = self.start(self.loader, self.beton.numbers[np.concatenate(shares)])
        try:
            for indices, (rows,) in zip(shares, decoded, strict=True):
                index, images = self._images(torch.from_numpy(indices), torch.as_tensor(rows))
                self.backpressure.step()
                batch = self._batch(index, images, views)
                self.position += self.batch_size
                yield batch
        finally:
            decoded.close()

    def _batch(self, index: Tensor, images: Ragged, views: tuple[ViewSpec, ...]) -> Batch:
        """The batch on the device; on a GPU made beside the stream that trains, which waits for it."""
        if self.stream is None:
            return self._made(index, images, views)
        slot = self.ring.take(len(index))
        joined = gathered(slot, images)
        train = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.stream):
            batch = self._made(index, joined.to(self.device, non_blocking=True), views)
            slot.copied = self.stream.record_event()
        self.ring.give(slot)
        train.wait_stream(self.stream)
        for tensor in (*batch.views, batch.index, batch.label):
            tensor.record_stream(train)
        return batch

    def _made(self, index: Tensor, images: Ragged, views: tuple[ViewSpec, ...]) -> Batch:
        placed = moved(index, self.device)
        drawn = sample_all_parameters(views, self.seed, self.epoch, placed, images.height, images.width)
        made = tuple(
            augment(images, parameters, spec, self.dtype, self.implementation)
            for spec, parameters in zip(views, drawn, strict=True)
        )
        return Batch(made, placed, moved(self.labels[index], self.device))

    def _images(self, index: Tensor, rows: Tensor) -> tuple[Tensor, Ragged]:
        """Numbers and pixels of a batch as ffcv decoded it; what it could not is read as by the other engines."""
        height, width = self.height[index], self.width[index]
        failed = rows[:, -1].nonzero().flatten().tolist()
        if not failed:
            offset = torch.arange(len(rows)) * rows.stride(0)
            return index, Ragged(rows.view(-1), offset, height.int(), width.int())
        index = index.clone()
        singles = [row[: 3 * h * w].view(h, w, 3) for row, h, w in zip(rows, height, width, strict=True)]
        for k in failed:
            index[k], pixels = self.reader.first(int(index[k]), self.source.read)
            singles[k] = torch.from_numpy(pixels)
        return index, ragged(singles)


def gathered(slot: Slot, images: Ragged) -> Ragged:
    """The images back to back in the slot's memory, without the gaps of ffcv's rows."""
    sides = zip(images.height.tolist(), images.width.tolist(), strict=True)
    for number, (height, width) in enumerate(sides):
        slot.place(number, height, width)[:] = images.image(number).numpy()
    return slot.images()


def batch_rows(config: LoaderConfig, world: int, images: BetonImages) -> tuple[int, int]:
    """Rows of a process's batch, and bytes of a row."""
    return config.batch_size // world, 3 * int((images.height * images.width).max()) + 1


def _graph() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from fastrdm.loaders.engines.ffcv_graph import epoch, open_beton

    return open_beton, epoch
