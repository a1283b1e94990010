"""Color jitter and grayscale of a tile of pixels, the device functions of augment_triton.py."""

import triton
import triton.language as tl

from fastrdm.kernels.augment.layout import Adjustment, Column

BRIGHTNESS, ORDER = tl.constexpr(int(Column.BRIGHTNESS)), tl.constexpr(int(Column.ORDER))
GRAYSCALE = tl.constexpr(int(Column.GRAYSCALE))
CONTRAST, SATURATION = tl.constexpr(int(Adjustment.CONTRAST)), tl.constexpr(int(Adjustment.SATURATION))
HUE = tl.constexpr(int(Adjustment.HUE))


@triton.jit
def clamp(x):  # type: ignore[no-untyped-def]
    return tl.minimum(tl.maximum(x, 0.0), 255.0)


@triton.jit
def luma(red, green, blue):  # type: ignore[no-untyped-def]
    return 0.2989 * red + 0.587 * green + 0.114 * blue


@triton.jit
def _ramp(x, span, low):  # type: ignore[no-untyped-def]
    return tl.minimum(tl.maximum(x, 0.0), 1.0) * span + low


@triton.jit
def _hue(red, green, blue, turns):  # type: ignore[no-untyped-def]
    """Hue turned at constant HSV saturation and value; a sixth of the circle is the unit."""
    high = tl.maximum(red, tl.maximum(green, blue))
    low = tl.minimum(red, tl.minimum(green, blue))
    span = high - low
    part = tl.where(high == green, (blue - red) + 2.0 * span, (red - green) + 4.0 * span)
    part = tl.where(high == red, green - blue, part)
    hue = part / tl.maximum(span, 1e-9) + 6.0 * turns
    hue = hue - 6.0 * tl.floor(hue / 6.0)
    red = _ramp(tl.abs(hue - 3.0) - 1.0, span, low)
    green = _ramp(2.0 - tl.abs(hue - 2.0), span, low)
    return red, green, _ramp(2.0 - tl.abs(hue - 4.0), span, low)


@triton.jit
def jitter(red, green, blue, row_ptr, mean, SECOND: tl.constexpr):  # type: ignore[no-untyped-def]
    """The turns before contrast or, if SECOND, contrast and those behind it; `mean` is the gray that contrast needs."""
    started = False
    for turn in tl.static_range(4):
        operation = tl.load(row_ptr + ORDER + turn).to(tl.int32)
        started = started | (operation == CONTRAST)
        now = started if SECOND else not started
        drawn = tl.load(row_ptr + BRIGHTNESS + operation)
        factor = tl.where(now & (operation != HUE), drawn, 1.0)
        other = tl.where(operation == SATURATION, 1.0 - factor, 0.0) * luma(red, green, blue)
        other += tl.where(operation == CONTRAST, 1.0 - factor, 0.0) * mean
        red, green, blue = clamp(factor * red + other), clamp(factor * green + other), clamp(factor * blue + other)
        if now & (operation == HUE) & (drawn != 0.0):
            red, green, blue = _hue(red, green, blue, drawn)
    return red, green, blue


@triton.jit
def colored(  # type: ignore[no-untyped-def]
    plane_ptr, row_ptr, mean, y, x, size, JITTER: tl.constexpr, GRAY: tl.constexpr
):
    """Pixels of rows y and columns x of the planes, after the jitter from contrast on and grayscale; 0 outside."""
    inside = (y < size)[:, None] & (x < size)[None, :]
    at = plane_ptr + y[:, None] * size + x[None, :]
    red = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    green = tl.load(at + size * size, mask=inside, other=0.0).to(tl.float32)
    blue = tl.load(at + 2 * size * size, mask=inside, other=0.0).to(tl.float32)
    if JITTER:
        red, green, blue = jitter(red, green, blue, row_ptr, mean, SECOND=True)
    if GRAY:
        gray = luma(red, green, blue)
        drawn = tl.load(row_ptr + GRAYSCALE) > 0
        red, green, blue = tl.where(drawn, gray, red), tl.where(drawn, gray, green), tl.where(drawn, gray, blue)
    return red, green, blue
