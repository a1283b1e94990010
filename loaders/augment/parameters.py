"""What is drawn for a view: explicit parameters (B, P), a pure function of seed, epoch, sample and view."""

import math
from enum import IntEnum

import torch
from torch import Tensor

from fastrdm.loaders.augment.philox import uniforms
from fastrdm.loaders.spec import ViewSpec

COLUMNS = 16
TRIES = 10  # boxes drawn before the central crop is taken, as in torchvision


class Column(IntEnum):
    """Columns of the parameters; ORDER to ORDER + 3 hold the jitter operation (0 to 3, in this order) of each turn."""

    TOP = 0  # crop box, pixels
    LEFT = 1
    HEIGHT = 2
    WIDTH = 3
    FLIP = 4  # 0 or 1
    BRIGHTNESS = 5  # factors; 1 leaves the image as it is
    CONTRAST = 6
    SATURATION = 7
    HUE = 8  # turns, 0 leaves the image as it is
    ORDER = 9
    GRAYSCALE = 13  # 0 or 1
    BLUR = 14  # sigma in pixels, 0 = none
    SOLARIZE = 15  # 0 or 1


def sample_parameters(
    spec: ViewSpec, seed: int, epoch: int | Tensor, index: Tensor, view: int, height: Tensor, width: Tensor
) -> Tensor:
    """(B, 16) float32 for samples `index` (B,) int64 whose images measure `height` by `width` (B,) pixels.

    Nothing waits for the device; `epoch` may be a tensor on it.
    """
    u = uniforms(seed, epoch, index, view, 2 * TRIES + 2 + 14)
    flip, jitter, *scalars = u[:, 2 * TRIES + 2 :].unbind(1)
    turns, strengths, (hue, blur, sigma, gray, solarize) = scalars[:4], scalars[4:7], scalars[7:]
    drawn = jitter < spec.jitter
    factors = [
        torch.where(drawn, _between(draw, max(0.0, 1 - strength), 1 + strength), 1.0)
        for draw, strength in zip(strengths, (spec.brightness, spec.contrast, spec.saturation), strict=True)
    ]
    columns = (
        *_crop_box(spec, u[:, : 2 * TRIES + 2], height.double()[:, None], width.double()[:, None]),
        flip < spec.flip,
        *factors,
        torch.where(drawn, _between(hue, -spec.hue, spec.hue), 0.0),
        *torch.stack(turns, dim=1).argsort(dim=1, stable=True).unbind(1),
        gray < spec.grayscale,
        torch.where(blur < spec.blur, _between(sigma, *spec.blur_sigma), 0.0),
        solarize < spec.solarize,
    )
    return torch.stack([column.float() for column in columns], dim=1)


def _between(u: Tensor, low: float, high: float) -> Tensor:
    return low + u * (high - low)


def _crop_box(spec: ViewSpec, u: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, ...]:
    """Top, left, height and width (B,) of the crop from uniforms (B, 22) and sizes (B, 1), all float64.

    As torchvision's RandomResizedCrop; float64, so that it rounds as Python does there.
    """
    area = rows * columns * _between(u[:, :TRIES], *spec.scale)
    ratio = torch.exp(_between(u[:, TRIES : 2 * TRIES], math.log(spec.ratio[0]), math.log(spec.ratio[1])))
    tall, wide = torch.round(torch.sqrt(area / ratio)), torch.round(torch.sqrt(area * ratio))
    fits = (tall > 0) & (tall <= rows) & (wide > 0) & (wide <= columns)
    found = fits.any(dim=1, keepdim=True)
    first = fits.to(torch.uint8).argmax(dim=1, keepdim=True)  # of equal values, the first
    central_tall = torch.minimum(rows, torch.round(columns / spec.ratio[0])).clamp(min=1)
    central_wide = torch.minimum(columns, torch.round(rows * spec.ratio[1])).clamp(min=1)
    tall = torch.where(found, tall.gather(1, first), central_tall)
    wide = torch.where(found, wide.gather(1, first), central_wide)
    corner = u[:, 2 * TRIES :]
    top = torch.where(found, torch.floor(corner[:, :1] * (rows - tall + 1)), torch.floor((rows - tall) / 2))
    left = torch.where(found, torch.floor(corner[:, 1:] * (columns - wide + 1)), torch.floor((columns - wide) / 2))
    return top[:, 0], left[:, 0], tall[:, 0], wide[:, 0]
