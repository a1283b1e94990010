"""Images without chance: the centre view, each sample once."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from fastrdm.loaders.augment import normalise, resample, resize_weights
from fastrdm.loaders.decode import CorruptImage
from fastrdm.loaders.order import Indices
from fastrdm.loaders.sources import Source
from fastrdm.loaders.spec import ViewSpec

CPU = torch.device("cpu")
AHEAD = 2  # batches decoded in advance


def centre_view(images: Tensor, spec: ViewSpec, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, 3, S, S) `dtype`, channels-last, normalised, of images (B, H, W, 3) uint8 of one size.

    The short side is resized to 256 / 224 of the view, or to the view where the image is no larger than it; then the
    centre square is cut. Both in one resampling, equal to torchvision's resize and centre crop.
    """
    sides = images.shape[1:3]
    short = spec.size if min(sides) <= spec.size else round(spec.size * 256 / 224)
    weights = []
    for side in sides:
        resized = int(short * side / min(sides))
        place = torch.arange(spec.size, device=images.device) + round((resized - spec.size) / 2)
        scale, start, length = (torch.full((1, 1), n, device=images.device) for n in (side / resized, 0.0, float(side)))
        matrix = resize_weights(place.float(), scale, start, length, side, spec.interpolation)
        weights.append(matrix.expand(len(images), -1, -1))
    return normalise(resample(images, *weights), spec.mean, spec.std, dtype)


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

    Process `rank` of `world` gets one contiguous part; parts may differ by one sample. Images that cannot be decoded
    are left out and noted in `faults`; without it, CorruptImage is raised.
    """
    mine = np.array_split(np.arange(len(source)), world)[rank]
    parts = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    labels = torch.as_tensor(source.labels)
    if source.images is None:
        pieces = _from_files(source, parts, spec, workers, faults)
    else:
        pieces = (
            (centre_view(torch.as_tensor(source.images[part], device=device), spec, dtype), part) for part in parts
        )
    for views, part in pieces:
        index = torch.as_tensor(part)
        yield views.to(device, dtype), index.to(device), labels[index].to(device)


def _from_files(
    source: Source, parts: list[Indices], spec: ViewSpec, workers: int, faults: dict[int, str] | None
) -> Iterator[tuple[Tensor, Indices]]:
    """Views and numbers of each part, decoded on threads a little ahead."""

    def view(index: int) -> Tensor | None:
        try:
            return centre_view(torch.from_numpy(source.read(index))[None], spec)
        except CorruptImage as error:
            if faults is None:
                raise
            faults[index] = str(error)
            return None

    pool = ThreadPoolExecutor(workers, thread_name_prefix="fastrdm-evaluation")
    ahead: deque[tuple[Indices, list[Future[Tensor | None]]]] = deque()
    try:
        for part in parts:
            ahead.append((part, [pool.submit(view, int(index)) for index in part]))
            if len(ahead) > AHEAD:
                yield _collect(*ahead.popleft())
        while ahead:
            yield _collect(*ahead.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _collect(part: Indices, tasks: list[Future[Tensor | None]]) -> tuple[Tensor, Indices]:
    views = [task.result() for task in tasks]
    read = [view is not None for view in views]
    return torch.cat([view for view in views if view is not None]), part[read]
