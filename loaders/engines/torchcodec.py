"""Engine that decodes on the device that trains, a batch at a time, by torchcodec: nvJPEG on a GPU, else libjpeg-turbo.

Threads read the files; one more decodes and makes the views, on a stream beside the training step's. Order and
parameters are ours, so that a restart in mid-epoch is exact.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
import torch
from torch import Tensor

from fastrdm.kernels.augment.ragged import strided
from fastrdm.loaders.augment.parameters import sample_all_parameters
from fastrdm.loaders.augment.reference import augment, chosen
from fastrdm.loaders.engines.backpressure import Backpressure, moved
from fastrdm.loaders.engines.threads import start_threads
from fastrdm.loaders.order import EpochLoader, Indices, Process
from fastrdm.loaders.sources.decode import decode, orientation, plain_size
from fastrdm.loaders.sources.reader import Reader
from fastrdm.loaders.sources.source import Source
from fastrdm.loaders.spec import Batch, LoaderConfig, ViewSpec
from fastrdm.schema import require

CHUNK = 16  # images a task
MADE = 2  # batches of views in the making, or made and not handed out
JPEG_END = b"\xff\xd9"
CHROMA = (
    "loader.engine=torchcodec decodes on the GPU by nvJPEG, whose chroma of 4:2:0 files may differ from the host's by "
    "some levels: encoders trained so are best evaluated so (docs/data.md)"
)


class Encoded(NamedTuple):
    """An image as it was read."""

    number: int  # in the source, or that of the one that stands in for it
    data: bytes | Tensor  # a JPEG, or (H, W, 3) uint8 where it was decoded on the host
    height: int
    width: int


class TorchcodecLoader(EpochLoader):
    """`workers` threads read `prefetch` batches ahead; two batches at most are decoded."""

    def __init__(self, config: LoaderConfig, source: Source, process: Process) -> None:
        process.check("torchcodec")
        shards = source.shards if config.order == "windowed" else None
        super().__init__(
            len(source), config.batch_size, *process[:3], shards=shards, window=config.window, source=source
        )
        if not source.encoded:
            raise ValueError(f"loader.engine=torchcodec takes JPEG files, packed or not, got {source.name}")
        self.fetch, self.views, self.device, self.dtype = source.fetch, config.views, process.device, process.dtype
        self.decode = _decoder(process.device)
        self.implementation = chosen(config.augment, process.device)
        self.labels = torch.as_tensor(source.labels, dtype=torch.int64)
        self.reader = Reader(source, self.faults, config.max_corrupt)
        self.prefetch = config.prefetch
        self.told = False
        self.refused: set[int] = set()  # JPEGs that torchcodec does not decode: the host does
        self.stream = torch.cuda.Stream(process.device) if process.device.type == "cuda" else None
        self.backpressure = Backpressure(process.device)
        self.pool = start_threads(config.threads, "fastrdm-loader")
        self.maker = start_threads(1, "fastrdm-loader-maker")

    def __iter__(self) -> Iterator[Batch]:
        """The batches of the epoch still to come; what a thread raises is raised here."""
        views = tuple(spec.at(self.epoch) for spec in self.views)
        remaining, reading, making = self._remaining(), deque[list[Future[list[Encoded]]]](), deque[Future[Batch]]()
        try:
            while True:
                reading += map(self._read, islice(remaining, self.prefetch + 1 - len(reading)))
                while reading and len(making) < MADE:
                    making.append(self.maker.submit(self._make, reading.popleft(), views, self.epoch))
                if not making:
                    return
                self.backpressure.step()
                batch = self._handed(making.popleft().result())
                self.position += self.batch_size
                yield batch
        finally:
            for made in making:
                made.cancel()
            for task in chain.from_iterable(reading):
                task.cancel()

    def diagnosis(self) -> str | None:
        """On a GPU once what its decoder does to chroma, then what the source tells."""
        first, self.told = not self.told and self.device.type == "cuda", True
        return CHROMA if first else super().diagnosis()

    def close(self) -> None:
        """End the threads, after what they are at."""
        self.pool.shutdown(cancel_futures=True)
        self.maker.shutdown(cancel_futures=True)

    def _read(self, indices: Indices) -> list[Future[list[Encoded]]]:
        """Start reading a batch."""
        parts = (indices[start : start + CHUNK].tolist() for start in range(0, len(indices), CHUNK))
        return [self.pool.submit(lambda part: [self._encoded(index) for index in part], part) for part in parts]

    def _encoded(self, index: int) -> Encoded:
        return self.reader.first(index, self._image)[1]

    def _image(self, index: int) -> Encoded:
        """An image for the device, or what is no upright, whole and plain JPEG decoded here; raises CorruptImage."""
        data, name = self.fetch(index)
        size = plain_size(data)
        # torchcodec turns images as their EXIF says, which the definition of a view ignores
        turned = b"Exif" in data and orientation(data) != 1
        if size and data.endswith(JPEG_END) and not turned and index not in self.refused:
            return Encoded(index, data, *size)
        pixels = decode(data, name)
        return Encoded(index, torch.from_numpy(pixels), *pixels.shape[:2])

    def _make(self, tasks: list[Future[list[Encoded]]], views: tuple[ViewSpec, ...], epoch: int) -> Batch:
        """The finished batch, on our own stream where there is one, which has ended then."""
        encoded = [image for task in tasks for image in task.result()]
        if self.stream is None:
            return self._made(encoded, views, epoch)
        with torch.cuda.stream(self.stream):
            batch = self._made(encoded, views, epoch)
        self.stream.synchronize()  # this thread waits, not the one that trains
        return batch

    def _made(self, encoded: list[Encoded], views: tuple[ViewSpec, ...], epoch: int) -> Batch:
        decoded = self._decoded(encoded)
        pixels = self._on_device(decoded)
        # The kernels read every image where the decoder left it. Joining them would be a copy an image.
        images = strided(pixels) if self.implementation == "triton" else pixels
        numbers = torch.tensor([image.number for image, _ in decoded])
        sides = torch.tensor([[image.height for image, _ in decoded], [image.width for image, _ in decoded]])
        index, (height, width) = moved(numbers, self.device), moved(sides, self.device).unbind(0)
        drawn = sample_all_parameters(views, self.seed, epoch, index, height, width)
        made = tuple(
            augment(images, parameters, spec, self.dtype, self.implementation)
            for spec, parameters in zip(views, drawn, strict=True)
        )
        return Batch(made, index, moved(self.labels[numbers], self.device))

    def _decoded(self, encoded: list[Encoded]) -> list[tuple[Encoded, Tensor | None]]:
        """Each image with its pixels (H, W, 3) on the device, None for those that the host decoded.

        What cannot be decoded is replaced.
        """
        found = self._try([image.data for image in encoded if isinstance(image.data, bytes)])
        if found is None:  # a call gives all of its images or none
            return [self._one(image) for image in encoded]
        jpegs = iter(found)
        return [(image, next(jpegs) if isinstance(image.data, bytes) else None) for image in encoded]

    def _one(self, image: Encoded) -> tuple[Encoded, Tensor | None]:
        while isinstance(image.data, bytes):
            if found := self._try([image.data]):
                return image, found[0]
            self.refused.add(image.number)
            image = self._encoded(image.number)
        return image, None

    def _on_device(self, decoded: list[tuple[Encoded, Tensor | None]]) -> list[Tensor]:
        """The pixels (H, W, 3) of all images on the device; those that the host decoded go there in one copy."""
        host = [image.data for image, _ in decoded if isinstance(image.data, Tensor)]
        if not host:
            return [pixels for _, pixels in decoded if pixels is not None]
        joined = moved(torch.cat([pixels.reshape(-1) for pixels in host]), self.device)
        parts = joined.split([pixels.numel() for pixels in host])
        copied = (part.view(pixels.shape) for part, pixels in zip(parts, host, strict=True))
        return [next(copied) if pixels is None else pixels for _, pixels in decoded]

    def _try(self, jpegs: list[bytes]) -> list[Tensor] | None:
        """The images on the device, as planes or pixels seen as (H, W, 3), or None if one of them is not decoded."""
        try:
            return [image.permute(1, 2, 0) for image in self.decode(jpegs, device=self.device)] if jpegs else []
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return None

    def _handed(self, batch: Batch) -> Batch:
        """The batch, whose memory the training stream holds from now on."""
        if self.stream is not None:
            train = torch.cuda.current_stream(self.device)
            for tensor in (*batch.views, batch.index, batch.label):
                tensor.record_stream(train)
        return batch


def _decoder(device: torch.device) -> Callable[..., list[Tensor]]:
    """torchcodec's decode_jpeg, tried once on the device: later failures are then those of images."""
    try:
        from torchcodec.decoders import decode_jpeg
    except (ImportError, RuntimeError) as error:
        needs = "loader.engine=torchcodec needs torchcodec 0.16: pip install 'fastrdm[torchcodec]', or take native"
        raise ValueError(f"{needs} ({str(error).splitlines()[0]})") from error
    decode_jpegs: Any = decode_jpeg
    trial = simplejpeg.encode_jpeg(np.zeros((16, 16, 3), np.uint8))
    try:
        (image,) = decode_jpegs([trial], device=device)
    except RuntimeError as error:
        raise ValueError(f"loader.engine=torchcodec does not decode on {device}: {error}") from error
    require(image.shape == (3, 16, 16), "torchcodec", "a release whose decode_jpeg gives (3, H, W)", image.shape)
    return decode_jpegs  # type: ignore[no-any-return]
