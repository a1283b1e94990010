"""The draw of a view's parameters as one Triton kernel: Philox4x32-10, the crop's box and everything behind it.

Reference: fastrdm.loaders.augment.parameters, which this repeats number by number in int64 and float64. One program
draws one sample, and shares nothing with another one.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrdm.kernels.augment.layout import COLUMNS, SWITCHES, Column, DrawRecipe

TRIES = tl.constexpr(10)
LANES = tl.constexpr(16)  # tries, padded to a power of two
WORD = tl.constexpr(0xFFFFFFFF)
LEFT_OUT = tl.constexpr(1 << 20)  # behind every try
TOP, FLIP, FIRST_FACTOR = (
    tl.constexpr(int(Column.TOP)),
    tl.constexpr(int(Column.FLIP)),
    tl.constexpr(int(Column.BRIGHTNESS)),
)
HUE, ORDER, BLUR = tl.constexpr(int(Column.HUE)), tl.constexpr(int(Column.ORDER)), tl.constexpr(int(Column.BLUR))
FIRST_SWITCH, SECOND_SWITCH = (tl.constexpr(int(Column[name.upper()])) for name in SWITCHES)


@triton.jit
def _uniform(number, view, epoch, sample, key0, key1):  # type: ignore[no-untyped-def]
    """Random number `number` of a sample in (0, 1), float64; `number` may be a tensor of them."""
    number = sample - sample + number
    a = number // 4
    zero = a - a
    b, c, d = zero + view, zero + epoch, zero + sample
    first, second = zero + key0, zero + key1
    for _ in tl.static_range(10):
        left, right = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = ((right >> 32) & WORD) ^ b ^ first, right & WORD, ((left >> 32) & WORD) ^ d ^ second, left & WORD
        first, second = (first + 0x9E3779B9) & WORD, (second + 0xBB67AE85) & WORD
    lane = number % 4
    word = tl.where(lane == 0, a, tl.where(lane == 1, b, tl.where(lane == 2, c, d)))
    return (word.to(tl.float64) + 0.5) / 4294967296.0


@triton.jit
def _pick(numbers, at, place):  # type: ignore[no-untyped-def]
    """The one of `numbers` whose `at` is `place`."""
    return tl.sum(tl.where(at == place, numbers, 0.0), axis=0)


@triton.jit
def _round(x):  # type: ignore[no-untyped-def]
    """The nearest whole number of x >= 0, of two equally near ones the even one, as torch.round."""
    low = tl.floor(x)
    over = x - low
    odd = low - 2.0 * tl.floor(low * 0.5)
    return tl.where((over > 0.5) | ((over == 0.5) & (odd == 1.0)), low + 1.0, low)


@triton.jit
def _between(u, low, high):  # type: ignore[no-untyped-def]
    return low + u * (high - low)


@triton.jit
def _store_box(  # type: ignore[no-untyped-def]
    out, setting_ptr, rest, lane, rows, columns, view, epoch, sample, key0, key1
):
    """The crop's box: the first of ten tries that lies in the image, else its middle."""
    some = tl.minimum(lane, TRIES - 1)
    area = _between(_uniform(some, view, epoch, sample, key0, key1), tl.load(setting_ptr), tl.load(setting_ptr + 1))
    area = rows * columns * area
    ratio = _uniform(some + TRIES, view, epoch, sample, key0, key1)
    ratio = tl.exp(_between(ratio, tl.load(setting_ptr + 2), tl.load(setting_ptr + 3)))
    tall, wide = _round(tl.sqrt(area / ratio)), _round(tl.sqrt(area * ratio))
    fits = (lane < TRIES) & (tall > 0) & (tall <= rows) & (wide > 0) & (wide <= columns)
    first = tl.min(tl.where(fits, lane, LEFT_OUT), axis=0)
    chosen = lane == first
    found = first < LEFT_OUT
    least, most = tl.load(setting_ptr + 4), tl.load(setting_ptr + 5)
    central_tall = tl.maximum(tl.minimum(rows, _round(columns / least)), 1.0)
    central_wide = tl.maximum(tl.minimum(columns, _round(rows * most)), 1.0)
    tall = tl.where(found, tl.sum(tl.where(chosen, tall, 0.0), axis=0), central_tall)
    wide = tl.where(found, tl.sum(tl.where(chosen, wide, 0.0), axis=0), central_wide)
    down = _pick(rest, lane, 0)
    right = _pick(rest, lane, 1)
    top = tl.where(found, tl.floor(down * (rows - tall + 1)), tl.floor((rows - tall) / 2))
    left = tl.where(found, tl.floor(right * (columns - wide + 1)), tl.floor((columns - wide) / 2))
    tl.store(out + TOP, top.to(tl.float32))
    tl.store(out + TOP + 1, left.to(tl.float32))
    tl.store(out + TOP + 2, tall.to(tl.float32))
    tl.store(out + TOP + 3, wide.to(tl.float32))


@triton.jit
def _draw_kernel(  # type: ignore[no-untyped-def]
    index_ptr,
    height_ptr,
    width_ptr,
    epoch_ptr,
    setting_ptr,
    out_ptr,
    view,
    key0,
    key1,
    COLUMNS: tl.constexpr,
):
    number = tl.program_id(0)
    sample = tl.load(index_ptr + number).to(tl.int64) & WORD
    epoch = tl.load(epoch_ptr).to(tl.int64)
    rows, columns = tl.load(height_ptr + number).to(tl.float64), tl.load(width_ptr + number).to(tl.float64)
    out = out_ptr + number * COLUMNS

    # What is drawn behind the tries, one number a lane.
    lane = tl.arange(0, LANES)
    rest = _uniform(lane + 2 * TRIES, view, epoch, sample, key0, key1)

    _store_box(out, setting_ptr, rest, lane, rows, columns, view, epoch, sample, key0, key1)
    flip = _pick(rest, lane, 2) < tl.load(setting_ptr + 6)
    drawn = _pick(rest, lane, 3) < tl.load(setting_ptr + 7)
    tl.store(out + FLIP, flip.to(tl.float32))
    # The order of the four turns: how many are drawn smaller, of equal ones how many come before.
    four = tl.arange(0, 4)
    turns = _uniform(four + (2 * TRIES + 4), view, epoch, sample, key0, key1)
    before = (turns[None, :] < turns[:, None]) | ((turns[None, :] == turns[:, None]) & (four[None, :] < four[:, None]))
    tl.store(out + ORDER + tl.sum(before.to(tl.int32), axis=1), four.to(tl.float32))
    for k in tl.static_range(3):
        factor = _pick(rest, lane, 8 + k)
        factor = _between(factor, tl.load(setting_ptr + 8 + 2 * k), tl.load(setting_ptr + 9 + 2 * k))
        tl.store(out + FIRST_FACTOR + k, tl.where(drawn, factor, 1.0).to(tl.float32))
    hue = _pick(rest, lane, 11)
    hue = _between(hue, tl.load(setting_ptr + 14), tl.load(setting_ptr + 15))
    tl.store(out + HUE, tl.where(drawn, hue, 0.0).to(tl.float32))
    blurred = _pick(rest, lane, 12) < tl.load(setting_ptr + 16)
    sigma = _pick(rest, lane, 13)
    sigma = _between(sigma, tl.load(setting_ptr + 17), tl.load(setting_ptr + 18))
    tl.store(out + BLUR, tl.where(blurred, sigma, 0.0).to(tl.float32))
    gray = _pick(rest, lane, 14) < tl.load(setting_ptr + 19)
    solarized = _pick(rest, lane, 15) < tl.load(setting_ptr + 20)
    tl.store(out + FIRST_SWITCH, gray.to(tl.float32))
    tl.store(out + SECOND_SWITCH, solarized.to(tl.float32))


def settings_of(recipe: DrawRecipe) -> list[float]:
    """The numbers of a view that the draw reads, in the kernel's order."""
    strengths = (recipe.brightness, recipe.contrast, recipe.saturation)
    factors = [bound for strength in strengths for bound in (max(0.0, 1 - strength), 1 + strength)]
    ratios = [*map(math.log, recipe.ratio), *recipe.ratio]
    switches = [getattr(recipe, name) for name in SWITCHES]
    chances = [recipe.flip, recipe.jitter]
    return [
        *recipe.scale,
        *ratios,
        *chances,
        *factors,
        -recipe.hue,
        recipe.hue,
        recipe.blur,
        *recipe.blur_sigma,
        *switches,
    ]


def draw_triton(
    settings: Tensor, seed: int, epoch: Tensor, index: Tensor, view: int, height: Tensor, width: Tensor
) -> Tensor:
    """Parameters (B, COLUMNS) float32 for samples `index` (B,) int64 of `height` by `width` (B,) pixels, in one launch.

    `settings` (21,) float64 is settings_of the view, `epoch` 0-d int64; all tensors lie on one device.
    """
    out = torch.empty(len(index), COLUMNS, device=index.device)
    words = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    sides = height.contiguous(), width.contiguous()
    # A multiplication fused with an addition would round once where the reference rounds twice.
    exact = {"enable_fp_fusion": False} if index.is_cuda else {}
    _draw_kernel[(len(index),)](
        index.contiguous(), *sides, epoch, settings, out, view, *words, COLUMNS=COLUMNS, **exact
    )
    return out
