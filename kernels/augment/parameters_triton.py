"""The draw of the parameters of all views by one Triton kernel: fastrdm.loaders.augment.parameters, bit for bit.

A thread draws for one image and view. The arithmetic is float64 as there, and products and sums are not contracted to
fused multiply-adds, which round once where the reference rounds twice. Philox makes four random numbers at a time; the
compiler joins the calls that make the same four.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrdm.kernels.augment import layout
from fastrdm.kernels.augment.layout import COLUMNS, SWITCHES, Column, Draw, Number

BLOCK = 128  # images that a program draws for
# Triton kernels read globals only where they are constexpr: places of random numbers, of settings, of results.
TRIES = tl.constexpr(layout.TRIES)
DRAW_AREA, DRAW_RATIO = tl.constexpr(int(Draw.AREA)), tl.constexpr(int(Draw.RATIO))
DRAW_TOP, DRAW_LEFT = tl.constexpr(int(Draw.TOP)), tl.constexpr(int(Draw.LEFT))
DRAW_FLIP, DRAW_JITTER = tl.constexpr(int(Draw.FLIP)), tl.constexpr(int(Draw.JITTER))
DRAW_TURNS, DRAW_FACTORS = tl.constexpr(int(Draw.TURNS)), tl.constexpr(int(Draw.FACTORS))
DRAW_HUE, DRAW_BLUR = tl.constexpr(int(Draw.HUE)), tl.constexpr(int(Draw.BLUR))
DRAW_SIGMA, DRAW_SWITCHES = tl.constexpr(int(Draw.SIGMA)), tl.constexpr(int(Draw.SWITCHES))
SCALE, LOG_RATIO = tl.constexpr(int(Number.SCALE)), tl.constexpr(int(Number.LOG_RATIO))
RATIO, FLIP = tl.constexpr(int(Number.RATIO)), tl.constexpr(int(Number.FLIP))
JITTER, FACTORS = tl.constexpr(int(Number.JITTER)), tl.constexpr(int(Number.FACTORS))
HUE, BLUR = tl.constexpr(int(Number.HUE)), tl.constexpr(int(Number.BLUR))
SIGMA, SWITCHED = tl.constexpr(int(Number.SIGMA)), tl.constexpr(int(Number.SWITCHES))
TOP, LEFT = tl.constexpr(int(Column.TOP)), tl.constexpr(int(Column.LEFT))
HEIGHT, WIDTH = tl.constexpr(int(Column.HEIGHT)), tl.constexpr(int(Column.WIDTH))
FLIPPED, BRIGHTNESS = tl.constexpr(int(Column.FLIP)), tl.constexpr(int(Column.BRIGHTNESS))
HUED, ORDER = tl.constexpr(int(Column.HUE)), tl.constexpr(int(Column.ORDER))
BLURRED = tl.constexpr(int(Column.BLUR))
SWITCH_COLUMNS = tl.constexpr(tuple(int(Column[name.upper()]) for name in SWITCHES))


@triton.jit
def _uniform(sample, view, epoch, low, high, PLACE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Random number PLACE of each sample (BLOCK,) uint32, float64 in (0, 1)."""
    nothing = sample * 0
    a, b, c, d = tl.philox_impl(nothing + PLACE // 4, nothing + view, nothing + epoch, sample, low, high)
    word = a if PLACE % 4 == 0 else b if PLACE % 4 == 1 else c if PLACE % 4 == 2 else d
    return (word.to(tl.float64) + 0.5) * 2.0**-32


@triton.jit
def _round(x):  # type: ignore[no-untyped-def]
    """The nearest whole number, halves to even: below 2^51 what a sum with 1.5 2^52 keeps."""
    return (x + 6755399441055744.0) - 6755399441055744.0


@triton.jit
def _between(u, table_ptr, PLACE: tl.constexpr, SPAN: tl.constexpr):  # type: ignore[no-untyped-def]
    """u in (0, 1) moved to the range whose lower end stands at PLACE and whose length SPAN places behind it."""
    return tl.load(table_ptr + PLACE) + u * tl.load(table_ptr + PLACE + SPAN)


@triton.jit
def _draw_kernel(  # type: ignore[no-untyped-def]
    table_ptr,
    epoch_ptr,
    index_ptr,
    height_ptr,
    width_ptr,
    out_ptr,
    count,
    seed_low,
    seed_high,
    NUMBERS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SWITCHES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    view = tl.program_id(1)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    table_ptr += view * NUMBERS
    out = out_ptr + (view * count + place) * COLUMNS
    v, e = view.to(tl.uint32), tl.load(epoch_ptr).to(tl.uint32)
    low, high = seed_low.to(tl.uint32), seed_high.to(tl.uint32)
    s = tl.load(index_ptr + place, mask=inside, other=0).to(tl.uint32)
    rows = tl.load(height_ptr + place, mask=inside, other=1).to(tl.float64)
    columns = tl.load(width_ptr + place, mask=inside, other=1).to(tl.float64)

    # The first of TRIES boxes that fits, else the central one.
    least, most = tl.load(table_ptr + RATIO), tl.load(table_ptr + RATIO + 1)
    tall = tl.maximum(tl.minimum(rows, _round(columns / least)), 1.0)
    wide = tl.maximum(tl.minimum(columns, _round(rows * most)), 1.0)
    found = rows < 0
    for k in tl.static_range(TRIES):
        area = rows * columns * _between(_uniform(s, v, e, low, high, DRAW_AREA + k), table_ptr, SCALE, 1)
        ratio = tl.exp(_between(_uniform(s, v, e, low, high, DRAW_RATIO + k), table_ptr, LOG_RATIO, 1))
        h, w = _round(tl.sqrt(area / ratio)), _round(tl.sqrt(area * ratio))
        fits = (h > 0) & (h <= rows) & (w > 0) & (w <= columns) & (found == 0)
        tall, wide, found = tl.where(fits, h, tall), tl.where(fits, w, wide), found | fits
    down, right = _uniform(s, v, e, low, high, DRAW_TOP), _uniform(s, v, e, low, high, DRAW_LEFT)
    top = tl.where(found, tl.floor(down * (rows - tall + 1)), tl.floor((rows - tall) / 2))
    left = tl.where(found, tl.floor(right * (columns - wide + 1)), tl.floor((columns - wide) / 2))
    tl.store(out + TOP, top.to(tl.float32), mask=inside)
    tl.store(out + LEFT, left.to(tl.float32), mask=inside)
    tl.store(out + HEIGHT, tall.to(tl.float32), mask=inside)
    tl.store(out + WIDTH, wide.to(tl.float32), mask=inside)
    flipped = _uniform(s, v, e, low, high, DRAW_FLIP) < tl.load(table_ptr + FLIP)
    tl.store(out + FLIPPED, flipped.to(tl.float32), mask=inside)

    # The jitter: three factors, the hue, and the order of its four turns, which is that of four random numbers.
    drawn = _uniform(s, v, e, low, high, DRAW_JITTER) < tl.load(table_ptr + JITTER)
    for k in tl.static_range(3):
        factor = _between(_uniform(s, v, e, low, high, DRAW_FACTORS + k), table_ptr, FACTORS + k, 3)
        tl.store(out + BRIGHTNESS + k, tl.where(drawn, factor, 1.0).to(tl.float32), mask=inside)
    turned = _between(_uniform(s, v, e, low, high, DRAW_HUE), table_ptr, HUE, 1)
    tl.store(out + HUED, tl.where(drawn, turned, 0.0).to(tl.float32), mask=inside)
    for k in tl.static_range(4):
        own, rank = _uniform(s, v, e, low, high, DRAW_TURNS + k), place * 0
        for other in tl.static_range(4):
            theirs = _uniform(s, v, e, low, high, DRAW_TURNS + other)
            rank += ((theirs < own) | ((theirs == own) & (other < k))).to(tl.int32)
        tl.store(out + ORDER + rank, (place * 0 + k).to(tl.float32), mask=inside)

    blurred = _uniform(s, v, e, low, high, DRAW_BLUR) < tl.load(table_ptr + BLUR)
    sigma = _between(_uniform(s, v, e, low, high, DRAW_SIGMA), table_ptr, SIGMA, 1)
    tl.store(out + BLURRED, tl.where(blurred, sigma, 0.0).to(tl.float32), mask=inside)
    for k in tl.static_range(SWITCHES):
        on = _uniform(s, v, e, low, high, DRAW_SWITCHES + k) < tl.load(table_ptr + SWITCHED + k)
        tl.store(out + SWITCH_COLUMNS[k], on.to(tl.float32), mask=inside)


def draw_triton(table: Tensor, seed: int, epoch: int | Tensor, index: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """Parameters (V, B, COLUMNS) float32 of all views of samples `index` (B,) int64 of `height` by `width` (B,) pixels.

    `table` (V, NUMBERS) float64 holds the settings of each view by layout.Number. `epoch` is a number, or a 0-d int64
    tensor on the device, which is read there: one launch, and nothing waits.
    """
    views, count = len(table), len(index)
    if not isinstance(epoch, Tensor):
        epoch = torch.full((), epoch, dtype=torch.int64, device=index.device)
    out = torch.empty((views, count, COLUMNS), device=index.device)
    _draw_kernel[(triton.cdiv(count, BLOCK), views)](
        table,
        epoch,
        index.contiguous(),
        height.contiguous(),
        width.contiguous(),
        out,
        count,
        seed & 0xFFFFFFFF,
        (seed >> 32) & 0xFFFFFFFF,
        NUMBERS=layout.NUMBERS,
        COLUMNS=COLUMNS,
        SWITCHES=len(SWITCHES),
        BLOCK=BLOCK,
        enable_fp_fusion=False,
    )
    return out
