"""The draw of views: parameters (B, COLUMNS), a pure function of seed, epoch, sample and view."""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from fastrdm.kernels.augment.layout import COLUMNS, DRAWS, NUMBERS, SWITCHES, Column, Draw, Number
from fastrdm.kernels.triton_support import HAS_TRITON, triton_module
from fastrdm.loaders.augment.philox import uniforms
from fastrdm.loaders.spec import ViewSpec


def sample_parameters(
    spec: ViewSpec, seed: int, epoch: int | Tensor, index: Tensor, view: int, height: Tensor, width: Tensor
) -> Tensor:
    """Parameters (B, COLUMNS) float32 for samples `index` (B,) int64 of `height` by `width` (B,) pixels.

    layout.Column names the columns. Nothing waits for the device; `epoch` may be a tensor on it.
    """
    u = uniforms(seed, epoch, index, view, DRAWS)
    drawn = u[:, Draw.JITTER] < spec.jitter
    box = _crop_box(spec, u[:, : Draw.FLIP], height.double()[:, None], width.double()[:, None])
    order = u[:, Draw.TURNS : Draw.FACTORS].argsort(dim=1, stable=True)
    factors = [
        torch.where(drawn, _between(draw, *span), 1.0)
        for draw, span in zip(u[:, Draw.FACTORS : Draw.HUE].unbind(1), _factor_ranges(spec), strict=True)
    ]
    sigma = _between(u[:, Draw.SIGMA], *spec.blur_sigma)
    columns: dict[int, Tensor] = {
        **dict(enumerate(box, start=Column.TOP)),
        Column.FLIP: u[:, Draw.FLIP] < spec.flip,
        **dict(enumerate(factors, start=Column.BRIGHTNESS)),
        Column.HUE: torch.where(drawn, _between(u[:, Draw.HUE], -spec.hue, spec.hue), 0.0),
        **dict(enumerate(order.unbind(1), start=Column.ORDER)),
        Column.BLUR: torch.where(u[:, Draw.BLUR] < spec.blur, sigma, 0.0),
    }
    for name, draw in zip(SWITCHES, u[:, Draw.SWITCHES :].unbind(1), strict=True):
        columns[Column[name.upper()]] = draw < getattr(spec, name)
    return torch.stack([columns[number].float() for number in range(COLUMNS)], dim=1)


def sample_all_parameters(
    specs: Sequence[ViewSpec], seed: int, epoch: int | Tensor, index: Tensor, height: Tensor, width: Tensor
) -> Tensor:
    """Parameters (V, B, COLUMNS) float32 of views 0 to V - 1, each as `sample_parameters` draws it.

    On CUDA they are one Triton kernel where Triton is installed, in place of more than a hundred kernels a view.
    """
    if index.is_cuda and HAS_TRITON:
        table = settings_table(tuple(tuple(_settings(spec)) for spec in specs), index.device)
        drawn: Tensor = triton_module("augment.parameters_triton").draw_triton(table, seed, epoch, index, height, width)
        return drawn
    views = [sample_parameters(spec, seed, epoch, index, view, height, width) for view, spec in enumerate(specs)]
    return torch.stack(views)


def _factor_ranges(spec: ViewSpec) -> list[tuple[float, float]]:
    """Ends of the ranges of brightness, contrast and saturation factors."""
    return [(max(0.0, 1 - strength), 1 + strength) for strength in (spec.brightness, spec.contrast, spec.saturation)]


def _settings(spec: ViewSpec) -> list[float]:
    """The row of a view in the table that the Triton kernel reads: layout.Number says what stands where."""
    factors, (low, high) = _factor_ranges(spec), (math.log(end) for end in spec.ratio)
    places: dict[int, list[float]] = {
        Number.SCALE: _span(*spec.scale),
        Number.LOG_RATIO: _span(low, high),
        Number.RATIO: list(spec.ratio),
        Number.FLIP: [spec.flip],
        Number.JITTER: [spec.jitter],
        Number.FACTORS: [*(low for low, _ in factors), *(high - low for low, high in factors)],
        Number.HUE: _span(-spec.hue, spec.hue),
        Number.BLUR: [spec.blur],
        Number.SIGMA: _span(*spec.blur_sigma),
        Number.SWITCHES: [getattr(spec, name) for name in SWITCHES],
    }
    row = [number for place in sorted(places) for number in places[place]]
    assert len(row) == NUMBERS
    return row


@lru_cache
def settings_table(rows: tuple[tuple[float, ...], ...], device: torch.device) -> Tensor:
    """The settings of all views (V, NUMBERS) float64, copied to the device once."""
    return torch.tensor(rows, dtype=torch.float64, device=device)


def _span(low: float, high: float) -> list[float]:
    """A range as the kernel takes it: its lower end and its length, as `_between` computes it."""
    return [low, high - low]


def _between(u: Tensor, low: float, high: float) -> Tensor:
    return low + u * (high - low)


def _crop_box(spec: ViewSpec, u: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, ...]:
    """Top, left, height and width (B,) of the crop from uniforms (B, Draw.FLIP) and sizes (B, 1), all float64.

    As torchvision's RandomResizedCrop; float64, so that it rounds as Python does there.
    """
    area = rows * columns * _between(u[:, Draw.AREA : Draw.RATIO], *spec.scale)
    ratio = torch.exp(_between(u[:, Draw.RATIO : Draw.TOP], math.log(spec.ratio[0]), math.log(spec.ratio[1])))
    tall, wide = torch.round(torch.sqrt(area / ratio)), torch.round(torch.sqrt(area * ratio))
    fits = (tall > 0) & (tall <= rows) & (wide > 0) & (wide <= columns)
    found = fits.any(dim=1, keepdim=True)
    # argmax takes the first of equal values.
    first = fits.to(torch.uint8).argmax(dim=1, keepdim=True)
    central_tall = torch.minimum(rows, torch.round(columns / spec.ratio[0])).clamp(min=1)
    central_wide = torch.minimum(columns, torch.round(rows * spec.ratio[1])).clamp(min=1)
    tall = torch.where(found, tall.gather(1, first), central_tall)
    wide = torch.where(found, wide.gather(1, first), central_wide)
    corner = u[:, Draw.TOP :]
    top = torch.where(found, torch.floor(corner[:, :1] * (rows - tall + 1)), torch.floor((rows - tall) / 2))
    left = torch.where(found, torch.floor(corner[:, 1:] * (columns - wide + 1)), torch.floor((columns - wide) / 2))
    return top[:, 0], left[:, 0], tall[:, 0], wide[:, 0]
