"""Engine that decodes in NVIDIA DALI, fed with our order; views are made by our kernels with our parameters.

With loader.augment=dali its graph makes the views too, from the same parameters: some hundred operators a batch, where
the kernels are one or two launches a view. Nothing is drawn inside the graph, so a restart in mid-epoch needs no state
of the pipeline: it is exact from epoch and position, for any number of processes.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fastrdm.kernels.augment.layout import OPERATIONS
from fastrdm.kernels.augment.ragged import Ragged
from fastrdm.loaders.augment.parameters import sample_parameters
from fastrdm.loaders.augment.reference import augment, chosen
from fastrdm.loaders.engines.backpressure import Backpressure, moved
from fastrdm.loaders.engines.threads import start_threads
from fastrdm.loaders.order import EpochLoader, Indices, Process
from fastrdm.loaders.sources.decode import Pixels, decode, new_pixels, plain_size
from fastrdm.loaders.sources.reader import Reader
from fastrdm.loaders.sources.source import ReadTime, Source
from fastrdm.loaders.spec import Batch, LoaderConfig, ViewSpec
from fastrdm.schema import require

IN_GRAPH = ("jitter", "grayscale", "blur", "solarize")  # operations of dali_graph.view
JPEG_END = b"\xff\xd9"
MISSING = "loader.engine=dali needs NVIDIA DALI: pip install 'fastrdm[dali]', or take loader.engine=native"


@dataclass
class Fed:
    """Inputs of DALI's graph for one batch of b = batch_size / world images."""

    asked: Indices  # (b,) the samples that the order names
    index: Tensor  # (b,) int64, those that were read in their place
    images: list[Pixels]  # b encoded images, or pixels (H, W, 3)
    height: Tensor  # (b,) int64
    width: Tensor  # (b,) int64
    parameters: list[Tensor]  # of each view (b, COLUMNS) float32


class DaliLoader(EpochLoader):
    """One thread reads `prefetch` batches ahead; `workers` threads of DALI hold the images of two, decoded."""

    def __init__(self, config: LoaderConfig, source: Source, process: Process) -> None:
        self.make = _pipeline()
        process.check("dali")
        # The implementation of our own that makes the views; None: DALI's graph does.
        self.implementation = None if config.augment == "dali" else chosen(config.augment, process.device)
        if self.implementation is None:
            for name in (name for name in OPERATIONS if name not in IN_GRAPH):
                most = max(getattr(view, name) for view in config.views)
                require(most == 0, f"loader.views.*.{name}", "0 where loader.augment=dali, whose graph lacks it", most)
        shards = source.shards if config.order == "windowed" else None
        super().__init__(
            len(source), config.batch_size, *process[:3], shards=shards, window=config.window, source=source
        )
        self.source, self.views, self.device, self.dtype = source, config.views, process.device, process.dtype
        self.labels = torch.as_tensor(source.labels, dtype=torch.int64)
        self.workers, self.prefetch = config.threads, config.prefetch
        self.reader = Reader(source, self.faults, config.max_corrupt)
        self.fetch = source.fetch if source.encoded else None
        self.pool = start_threads(1, "fastrdm-loader")
        self.backpressure = Backpressure(process.device)
        self.pipe: Any = None
        self.made: tuple[ViewSpec, ...] = ()  # the views that the pipeline makes
        self.ahead: Iterator[Fed] = iter(())
        self.fed: deque[Fed] = deque()  # in the pipeline

    def __iter__(self) -> Iterator[Batch]:
        """The batches of the epoch still to come."""
        views = tuple(spec.at(self.epoch) for spec in self.views)
        if self.pipe is None or views != self.made:
            self.pipe, self.made = self._build(views), views
        self.ahead, ended = self._read_ahead(self._remaining(), self.epoch, views), False
        try:
            while (outputs := self._outputs()) is not None:
                self.backpressure.step()
                batch = self._batch(self.fed.popleft(), outputs)
                self.position += self.batch_size
                yield batch
            ended = True
        finally:
            self.ahead = iter(())
            self.fed.clear()
            if not ended:  # what is in the pipeline belongs to an epoch that nobody reads
                self.pipe = None

    def close(self) -> None:
        """End the threads and free the pipeline."""
        self.pool.shutdown(cancel_futures=True)
        self.pipe = None

    def _build(self, views: tuple[ViewSpec, ...]) -> Any:
        cuda = self.device.type == "cuda"
        number = self.device.index if self.device.index is not None else torch.cuda.current_device() if cuda else None
        return self.make(
            views if self.implementation is None else None,
            self._feed,
            encoded=self.fetch is not None,
            half=self.dtype == torch.float16,
            device_id=number if cuda else None,
            batch_size=self.batch_size // self.world,
            threads=self.workers,
        )

    def _feed(self) -> tuple[Any, ...]:
        """Inputs for the batch that the pipeline asks for, two ahead of the one that it returns."""
        fed = next(self.ahead)
        self.fed.append(fed)
        drawn = [parameters.numpy() for parameters in fed.parameters] if self.implementation is None else []
        return fed.images, *drawn

    def _outputs(self) -> Any:
        """The views of the first batch in the pipeline; None at the end of the epoch.

        DALI gives up a pipeline over one image that it cannot decode. The batches in it are then read again, judged
        image by image on the host, and go through a new pipeline.
        """
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        try:
            return self.pipe.run(stream)
        except StopIteration:
            self.pipe.reset()
            return None
        except RuntimeError:
            asked = [fed.asked for fed in self.fed]
            self.fed.clear()
            judged = [self._read(indices, self.epoch, self.made, judged=True) for indices in asked]
            self.ahead = chain(judged, self.ahead)
            self.pipe = self._build(self.made)
            return self.pipe.run(stream)

    def _batch(self, fed: Fed, outputs: Any) -> Batch:
        parts = [from_dlpack(output.as_tensor()) for output in outputs]
        if self.implementation is None:
            views = [part.permute(0, 3, 1, 2).to(self.dtype) for part in parts]
        else:
            views = self._views(fed, parts[0])
        return Batch(tuple(views), moved(fed.index, self.device), moved(self.labels[fed.index], self.device))

    def _views(self, fed: Fed, rows: Tensor) -> list[Tensor]:
        """The views of images in rows (b, bytes of the largest) on the device, one after the other in each."""
        assert self.implementation is not None
        offset = torch.arange(len(rows)) * rows.stride(0)
        places = (moved(part, self.device) for part in (offset, fed.height.int(), fed.width.int()))
        images = Ragged(rows.view(-1), *places)
        return [
            augment(images, moved(parameters, self.device), spec, self.dtype, self.implementation)
            for spec, parameters in zip(self.made, fed.parameters, strict=True)
        ]

    def _read_ahead(self, remaining: Iterator[Indices], epoch: int, views: tuple[ViewSpec, ...]) -> Iterator[Fed]:
        """Batches as they are read, `prefetch` of them ahead."""
        reading: deque[Future[Fed]] = deque()
        try:
            while True:
                for indices in islice(remaining, self.prefetch + 1 - len(reading)):
                    reading.append(self.pool.submit(self._read, indices, epoch, views))
                if not reading:
                    return
                yield reading.popleft().result()
        finally:
            for task in reading:
                task.cancel()

    def _read(self, indices: Indices, epoch: int, views: tuple[ViewSpec, ...], judged: bool = False) -> Fed:
        found = [self.reader.first(index, partial(self._image, judged=judged)) for index in indices.tolist()]
        index, images = torch.tensor([number for number, _ in found]), [data for _, (data, *_) in found]
        height, width = torch.tensor([size for _, (_, *size) in found]).unbind(1)
        drawn = [
            sample_parameters(spec, self.seed, epoch, index, view, height, width) for view, spec in enumerate(views)
        ]
        return Fed(indices, index, images, height, width, drawn)

    def _image(self, index: int, judged: bool) -> tuple[Pixels, int, int]:
        """Encoded bytes of an image for the pipeline, and its height and width; raises CorruptImage.

        A JPEG whose header is plain and whose end is there goes as it is. Anything else, and everything where `judged`,
        is decoded here, as by the other engines, and goes as a portable pixmap, which DALI reads beside JPEGs.
        """
        if self.fetch is None:
            pixels = self.source.read_into(index, new_pixels, ReadTime())
            return pixels, *pixels.shape[:2]
        data, name = self.fetch(index)
        size = plain_size(data)
        if judged or size is None or not data.endswith(JPEG_END):
            pixels = decode(data, name)
            return pixmap(pixels), *pixels.shape[:2]
        return np.frombuffer(data, np.uint8), *size


def pixmap(pixels: Pixels) -> Pixels:
    """(H, W, 3) uint8 as the bytes (n,) of a PPM file."""
    height, width, _ = pixels.shape
    return np.frombuffer(b"P6 %d %d 255\n" % (width, height) + pixels.tobytes(), np.uint8)


def _pipeline() -> Callable[..., Any]:
    try:
        from fastrdm.loaders.engines.dali_graph import pipeline
    except ImportError as error:
        raise ValueError(MISSING) from error
    return pipeline
