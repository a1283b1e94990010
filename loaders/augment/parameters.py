"""The draw of a view: parameters (B, COLUMNS), a pure function of seed, epoch, sample and view."""

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastrdm.kernels.augment.layout import COLUMNS, SWITCHES, Column
from fastrdm.kernels.triton_support import HAS_TRITON, triton_module
from fastrdm.loaders.augment.philox import uniforms
from fastrdm.loaders.spec import ViewSpec

TRIES = 10  # boxes drawn before the central crop is taken, as in torchvision
BOX = 2 * TRIES + 2  # random numbers for a crop's box
COLOR = 12  # random numbers for flip, jitter and blur


def sample_parameters(
    spec: ViewSpec, seed: int, epoch: int | Tensor, index: Tensor, view: int, height: Tensor, width: Tensor
) -> Tensor:
    """Parameters (B, COLUMNS) float32 for samples `index` (B,) int64 of `height` by `width` (B,) pixels.

    layout.Column names the columns. Nothing waits for the device; `epoch` may be a tensor on it. On a GPU with Triton
    one kernel draws them, else `sample_by_torch` does; both give the same.
    """
    if index.is_cuda and HAS_TRITON:
        where = index.device
        epochs = epoch if isinstance(epoch, Tensor) else torch.full((), epoch, dtype=torch.int64, device=where)
        drawn: Tensor = _kernel().draw_triton(_settings(spec, where), seed, epochs, index, view, height, width)
        return drawn
    return sample_by_torch(spec, seed, epoch, index, view, height, width)


def _kernel() -> Any:
    return triton_module("augment.parameters_triton")


@cache
def _settings(spec: ViewSpec, device: torch.device) -> Tensor:
    """What the kernel reads of a view, moved to the device once."""
    return torch.tensor(_kernel().settings_of(spec), dtype=torch.float64, device=device)


def sample_by_torch(
    spec: ViewSpec, seed: int, epoch: int | Tensor, index: Tensor, view: int, height: Tensor, width: Tensor
) -> Tensor:
    """The definition of the draw, in plain torch: some two hundred operators."""
    u = uniforms(seed, epoch, index, view, BOX + COLOR + len(SWITCHES))
    flip, jitter, *scalars = u[:, BOX : BOX + COLOR].unbind(1)
    turns, strengths, (hue, blur, sigma) = scalars[:4], scalars[4:7], scalars[7:]
    drawn = jitter < spec.jitter
    box = _crop_box(spec, u[:, :BOX], height.double()[:, None], width.double()[:, None])
    order = torch.stack(turns, dim=1).argsort(dim=1, stable=True)
    factors = [
        torch.where(drawn, _between(draw, max(0.0, 1 - strength), 1 + strength), 1.0)
        for draw, strength in zip(strengths, (spec.brightness, spec.contrast, spec.saturation), strict=True)
    ]
    columns: dict[int, Tensor] = {
        **dict(enumerate(box, start=Column.TOP)),
        Column.FLIP: flip < spec.flip,
        **dict(enumerate(factors, start=Column.BRIGHTNESS)),
        Column.HUE: torch.where(drawn, _between(hue, -spec.hue, spec.hue), 0.0),
        **dict(enumerate(order.unbind(1), start=Column.ORDER)),
        Column.BLUR: torch.where(blur < spec.blur, _between(sigma, *spec.blur_sigma), 0.0),
    }
    for name, draw in zip(SWITCHES, u[:, BOX + COLOR :].unbind(1), strict=True):
        columns[Column[name.upper()]] = draw < getattr(spec, name)
    return torch.stack([columns[number].float() for number in range(COLUMNS)], dim=1)


def _between(u: Tensor, low: float, high: float) -> Tensor:
    return low + u * (high - low)


def _crop_box(spec: ViewSpec, u: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, ...]:
    """Top, left, height and width (B,) of the crop from uniforms (B, BOX) and sizes (B, 1), all float64.

    As torchvision's RandomResizedCrop; float64, so that it rounds as Python does there.
    """
    area = rows * columns * _between(u[:, :TRIES], *spec.scale)
    ratio = torch.exp(_between(u[:, TRIES : 2 * TRIES], math.log(spec.ratio[0]), math.log(spec.ratio[1])))
    tall, wide = torch.round(torch.sqrt(area / ratio)), torch.round(torch.sqrt(area * ratio))
    fits = (tall > 0) & (tall <= rows) & (wide > 0) & (wide <= columns)
    found = fits.any(dim=1, keepdim=True)
    # argmax takes the first of equal values.
    first = fits.to(torch.uint8).argmax(dim=1, keepdim=True)
    central_tall = torch.minimum(rows, torch.round(columns / spec.ratio[0])).clamp(min=1)
    central_wide = torch.minimum(columns, torch.round(rows * spec.ratio[1])).clamp(min=1)
    tall = torch.where(found, tall.gather(1, first), central_tall)
    wide = torch.where(found, wide.gather(1, first), central_wide)
    corner = u[:, 2 * TRIES :]
    top = torch.where(found, torch.floor(corner[:, :1] * (rows - tall + 1)), torch.floor((rows - tall) / 2))
    left = torch.where(found, torch.floor(corner[:, 1:] * (columns - wide + 1)), torch.floor((columns - wide) / 2))
    return top[:, 0], left[:, 0], tall[:, 0], wide[:, 0]
