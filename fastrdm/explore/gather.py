"""One reading of the images: features of every encoder, pixels, small pictures, and augmented views."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fastrdm.evaluation.evaluator import Machine
from fastrdm.evaluation.features import raw_pixels
from fastrdm.loaders.augment.parameters import sample_parameters
from fastrdm.loaders.augment.reference import augment
from fastrdm.loaders.evaluation import evaluation_batches
from fastrdm.loaders.sources.decode import CorruptImage, Pixels
from fastrdm.loaders.sources.source import Source
from fastrdm.loaders.spec import ViewSpec

PICTURE = 64  # pixels of a picture's side, or the view's where that is smaller
COMPARED = 16  # pixels of a side of the images whose pixels are compared
DRAWS = 2  # epochs whose views are shown


class Gathered(NamedTuple):
    """Rows of the images that could be read, in the order of the source."""

    numbers: NDArray[np.int64]  # (N,) of each image in the source
    features: list[Tensor]  # of each encoder (N, D)
    pixels: Tensor  # (N, 3 * COMPARED ** 2)
    pictures: Pixels  # (N, S, S, 3)
    faults: dict[int, str]  # images that could not be read: number -> name and reason


@torch.no_grad()
def gather(
    source: Source,
    encoders: Sequence[tuple[nn.Module, ViewSpec]],
    machine: Machine,
    tell: Callable[[str], None],
) -> Gathered:
    """Read every image once for each different view that the encoders take."""
    rows: dict[int, list[Tensor]] = {i: [] for i in range(len(encoders))}
    numbers: list[Tensor] = []
    pixels: list[Tensor] = []
    pictures: list[Pixels] = []
    faults: dict[int, str] = {}
    first = encoders[0][1]
    for view in dict.fromkeys(view.plain() for _, view in encoders):
        takers = [i for i, (_, own) in enumerate(encoders) if own.plain() == view]
        batches = evaluation_batches(
            source, view, machine.batch_size, device=machine.device, workers=machine.workers, faults=faults
        )
        done = 0
        for images, index, _ in batches:
            # Before the encoders: the host waits for the pictures, and should not wait for this batch's features.
            if view == first.plain():
                numbers.append(index)
                pixels.append(raw_pixels(F.adaptive_avg_pool2d(images, min(COMPARED, view.size))).float())
                pictures.append(_pictures(images, view))
            for i in takers:
                with torch.autocast(machine.device.type, torch.bfloat16, enabled=machine.bf16):
                    rows[i].append(encoders[i][0](images).float())
            done += len(index)
            tell(f"{done:,} of {len(source):,} images")
    if not numbers:
        reason = next(iter(faults.values()), "it is empty")
        raise ValueError(f"SOURCE must hold an image that can be read: such as {reason}")
    features = [torch.cat(rows[i]) for i in range(len(encoders))]
    return Gathered(torch.cat(numbers).numpy(), features, torch.cat(pixels), np.concatenate(pictures), faults)


def _pictures(images: Tensor, view: ViewSpec, side: int = PICTURE) -> Pixels:
    """Normalized views (B, 3, S, S) as pictures (B, S', S', 3) uint8 of at most `side` pixels."""
    mean, std = (torch.tensor(x, device=images.device).view(3, 1, 1) for x in (view.mean, view.std))
    x = (images.float() * std + mean).clamp(0, 1)
    if view.size > side:
        x = F.interpolate(x, size=(side, side), mode="bilinear", antialias=True)
    found: Pixels = x.mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return found


def views_of(source: Source, numbers: Sequence[int], views: Sequence[ViewSpec], seed: int) -> Pixels:
    """Pictures (len(numbers), DRAWS * V, S, S, 3) uint8 of the views that training draws in its first epochs."""
    out = np.zeros((len(numbers), DRAWS * len(views), PICTURE, PICTURE, 3), np.uint8)
    for row, number in enumerate(numbers):
        try:
            image = torch.from_numpy(source.read(number).copy())
        except CorruptImage:
            continue
        index, sides = torch.tensor([number]), [torch.tensor([side]) for side in image.shape[:2]]
        for epoch in range(DRAWS):
            for i, spec in enumerate(view.at(epoch) for view in views):
                drawn = sample_parameters(spec, seed, epoch, index, i, *sides)
                picture = _pictures(augment(image[None], drawn, spec), spec)
                tensor = torch.from_numpy(picture).permute(0, 3, 1, 2)
                grown = F.interpolate(tensor, size=(PICTURE, PICTURE)) if picture.shape[1] != PICTURE else tensor
                out[row, epoch * len(views) + i] = grown[0].permute(1, 2, 0).numpy()
    return out
