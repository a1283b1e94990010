"""Evaluation batches: the center view of every sample once, without random augmentation."""

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from fastrdm.loaders.augment.reference import normalize, resample, resize_weights
from fastrdm.loaders.engines.backpressure import moved
from fastrdm.loaders.engines.threads import start_threads
from fastrdm.loaders.order import Indices, shard_groups
from fastrdm.loaders.sources.decode import CorruptImage, Pixels, blame_the_image, new_pixels
from fastrdm.loaders.sources.source import ReadTime, Source
from fastrdm.loaders.spec import ViewSpec

CPU = torch.device("cpu")
AHEAD = 4  # images a thread decodes in advance
AHEAD_BYTES = 256 << 20  # of decoded images held in advance


def short_side(size: int, whole: bool) -> int:
    """Pixels of an image's short side before the center square of `size` pixels is cut."""
    return size if whole else round(size * 256 / 224)


def center_view(
    images: Tensor, spec: ViewSpec, dtype: torch.dtype = torch.float32, whole: bool | None = None
) -> Tensor:
    """(B, 3, S, S) `dtype`, channels-last, normalized, of images (B, H, W, 3) uint8 of one size.

    The short side is resized to the view where `whole`, as in the protocols of 32 px sets, else to 256 / 224 of it, as
    in those of photographs; then the center square is cut. None: whole where the image is no larger than the view. All
    in one resampling, equal to torchvision's resize and center crop.
    """
    sides = images.shape[1:3]
    whole = min(sides) <= spec.size if whole is None else whole
    short = short_side(spec.size, whole)
    weights = []
    for side in sides:
        resized = int(short * side / min(sides))
        place = torch.arange(spec.size, device=images.device) + round((resized - spec.size) / 2)
        scale, start, length = (torch.full((1, 1), n, device=images.device) for n in (side / resized, 0.0, float(side)))
        matrix = resize_weights(place.float(), scale, start, length, side, spec.interpolation)
        weights.append(matrix.expand(len(images), -1, -1))
    return normalize(resample(images, *weights), spec.mean, spec.std, dtype)


def evaluation_batches(
    source: Source,
    spec: ViewSpec,
    batch_size: int,
    *,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    rank: int = 0,
    world: int = 1,
    workers: int = 2,
    faults: dict[int, str] | None = None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(views (b, 3, S, S), index (b,), label (b,)) over each sample of the source once, in its order, nothing dropped.

    Views and labels lie on `device`. The index lies on the host, where it is known without a wait for the device.

    Process `rank` of `world` gets one contiguous part; parts may differ by one sample. Images that cannot be decoded
    are left out and noted in `faults`; without it, CorruptImage is raised.
    """
    mine = np.array_split(np.arange(len(source)), world)[rank]
    labels = torch.as_tensor(source.labels, dtype=torch.int64)

    def views(images: Tensor) -> Tensor:
        return center_view(images, spec, dtype, source.whole_view)

    if source.images is None:
        # For a GPU the threads make the views as well, and a batch is one copy: there each image would be a copy that
        # waits and some forty kernels.
        made = (lambda image: views(torch.as_tensor(image[None]))) if device.type != "cpu" else (lambda image: image)
        decoded = _decoded(source, mine, workers, faults, made)
        single = ((index, x if isinstance(x, Tensor) else views(torch.as_tensor(x[None]))) for index, x in decoded)
        batches = ((moved(x, device), index) for x, index in _joined(single, batch_size))
    else:
        parts = (mine[start : start + batch_size] for start in range(0, len(mine), batch_size))
        batches = (
            (views(moved(torch.as_tensor(source.images[part]), device)), torch.from_numpy(part)) for part in parts
        )
    for x, index in batches:
        yield x, index, moved(labels[index], device)


def _decoded(
    source: Source,
    indices: Indices,
    workers: int,
    faults: dict[int, str] | None,
    made: Callable[[Pixels], Pixels | Tensor],
) -> Iterator[tuple[int, Pixels | Tensor]]:
    """Number of each image that can be decoded and what `made` makes of its pixels, in order, ahead by threads."""

    def read(index: int) -> Pixels | Tensor | None:
        try:
            return made(source.read_into(index, new_pixels, ReadTime()))
        except CorruptImage as error:
            blame_the_image(error)
            if faults is None:
                raise
            faults[index] = str(error)
            return None

    pool = start_threads(workers, "fastrdm-evaluation")
    tasks = ((index, pool.submit(read, index)) for index in indices.tolist())
    shards = None if source.shards is None else source.shards[indices]
    groups = [] if shards is None else shard_groups(np.arange(len(shards)), shards, 1)
    ahead, shard, largest = deque(islice(tasks, 1)), -1, 0
    with source.planned(groups):
        try:
            while ahead:
                # no more ahead than there is room for, were all images as large as the largest so far
                room = max(AHEAD_BYTES // largest, 1) if largest else 1
                ahead.extend(islice(tasks, max(min(AHEAD * workers, room) - len(ahead) + 1, 0)))
                index, task = ahead.popleft()
                if source.shards is not None and source.shards.item(index) != shard:
                    shard = source.shards.item(index)
                    source.read_ahead({shard})
                if (image := task.result()) is not None:
                    largest = max(largest, image.nbytes)
                    yield index, image
        finally:
            pool.shutdown(cancel_futures=True)


def _joined(single: Iterator[tuple[int, Tensor]], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Views (1, 3, S, S) and their numbers, as batches of `size`."""
    while part := list(islice(single, size)):
        index, views = zip(*part, strict=True)
        yield torch.cat(views), torch.tensor(index)
