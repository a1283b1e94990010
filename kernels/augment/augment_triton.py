"""The augmentation by Triton kernels, in two passes.

Crop: resized crop, flip and the jitter's turns before contrast, as float16 planes of 0 to 255, and each tile's sum of
gray. Finish: the mean gray, the other turns, grayscale, blur, solarize, normalize. Both resize and blur a tile as
matrix x pixels x matrix on the tensor cores, with weights made on the spot, so any scale and blur takes one pass.

Bytes a view of S x S: the crop's 3 h w once, 6 S S written and read between the passes, the view once. At S = 224 from
500 x 375 (crops of 110,000 pixels on average) to float32: 1.53 MB, 1.6 times what must be read and written; bfloat16:
1.23 MB, 2.0 times. Where blurred, tiles read their neighbors' borders again, mostly from the cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrdm.kernels.augment.color_triton import clamp, colored, jitter, luma
from fastrdm.kernels.augment.layout import COLUMNS, Column, ViewRecipe
from fastrdm.kernels.augment.ragged import Ragged, Strided

BLOCK = 32  # rows and columns of a tile of the view
STEP = 16  # rows and columns of the pixels it is made of, taken at once; 32 would take 250 registers a thread
TOP, LEFT, HEIGHT = tl.constexpr(int(Column.TOP)), tl.constexpr(int(Column.LEFT)), tl.constexpr(int(Column.HEIGHT))
WIDTH, FLIP = tl.constexpr(int(Column.WIDTH)), tl.constexpr(int(Column.FLIP))
BLUR, SOLARIZE = tl.constexpr(int(Column.BLUR)), tl.constexpr(int(Column.SOLARIZE))


@triton.jit
def _taps(place, source, scale, length, CUBIC: tl.constexpr):  # type: ignore[no-untyped-def]
    """Weights (BLOCK, STEP) float16 of source pixels for output pixels, not yet summing to 1."""
    distance = tl.abs(source[None, :] + 0.5 - (place[:, None] + 0.5) * scale) / tl.maximum(scale, 1.0)
    if CUBIC:  # Keys 1981, a = -1/2
        near = (1.5 * distance - 2.5) * distance * distance + 1.0
        far = ((-0.5 * distance + 2.5) * distance - 4.0) * distance + 2.0
        weights = tl.where(distance < 1.0, near, tl.where(distance < 2.0, far, 0.0))
    else:
        weights = tl.maximum(1.0 - distance, 0.0)
    return tl.where((source < length)[None, :], weights, 0.0).to(tl.float16)


@triton.jit
def _span(low, high, scale, length, CUBIC: tl.constexpr):  # type: ignore[no-untyped-def]
    """First source pixel of the output pixels low to high, and the one behind the last."""
    reach = tl.maximum(scale, 1.0) * (2.0 if CUBIC else 1.0)
    first = tl.maximum((low + 0.5) * scale - reach, 0.0).to(tl.int32)
    return first, tl.minimum(((high + 0.5) * scale + reach).to(tl.int32) + 1, length)


@triton.jit
def _tile(size, tiles_across, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """First row and column of this program's tile."""
    return tl.program_id(0) // tiles_across * BLOCK, tl.program_id(0) % tiles_across * BLOCK


@triton.jit
def _image(number, pixel_ptr, place_ptr, width_ptr, STRIDED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Address of an image, and its bytes from row to row, from pixel to pixel and from channel to channel."""
    if STRIDED:
        place = place_ptr + number * 4
        image_ptr = tl.load(place).to(tl.pointer_type(tl.uint8))
        down_by, right_by, channel = tl.load(place + 1), tl.load(place + 2).to(tl.int32), tl.load(place + 3)
    else:
        image_ptr = pixel_ptr + tl.load(place_ptr + number)
        down_by, right_by, channel = tl.load(width_ptr + number) * 3, 3, 1
    return image_ptr, down_by, right_by, channel


@triton.jit
def _crop_kernel(  # type: ignore[no-untyped-def]
    pixel_ptr,
    place_ptr,
    width_ptr,
    drawn_ptr,
    plane_ptr,
    part_ptr,
    size,
    tiles_across,
    COLUMNS: tl.constexpr,
    CUBIC: tl.constexpr,
    JITTER: tl.constexpr,
    STRIDED: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    number = tl.program_id(1)
    row_ptr = drawn_ptr + number * COLUMNS
    top, left = tl.load(row_ptr + TOP).to(tl.int32), tl.load(row_ptr + LEFT).to(tl.int32)
    tall, wide = tl.load(row_ptr + HEIGHT).to(tl.int32), tl.load(row_ptr + WIDTH).to(tl.int32)
    flip = tl.load(row_ptr + FLIP) > 0
    image_ptr, down_by, right_by, channel = _image(number, pixel_ptr, place_ptr, width_ptr, STRIDED)
    image_ptr += top.to(tl.int64) * down_by + left * right_by
    y_scale, x_scale = tall.to(tl.float32) / size, wide.to(tl.float32) / size
    y0, x0 = _tile(size, tiles_across, BLOCK)
    y, x = y0 + tl.arange(0, BLOCK), x0 + tl.arange(0, BLOCK)
    last_y, last_x = tl.minimum(y0 + BLOCK, size) - 1, tl.minimum(x0 + BLOCK, size) - 1
    y_place, x_place = tl.minimum(y, last_y), tl.minimum(x, last_x)
    x_place = tl.where(flip, size - 1 - x_place, x_place)
    y_first, y_end = _span(y0, last_y, y_scale, tall, CUBIC)
    low, high = tl.where(flip, size - 1 - last_x, x0), tl.where(flip, size - 1 - x0, last_x)
    x_first, x_end = _span(low, high, x_scale, wide, CUBIC)
    red = tl.zeros((BLOCK, BLOCK), tl.float32)
    green = tl.zeros((BLOCK, BLOCK), tl.float32)
    blue = tl.zeros((BLOCK, BLOCK), tl.float32)
    x_sum = tl.zeros((BLOCK,), tl.float32)
    for k0 in range(x_first, x_end, STEP):
        k = k0 + tl.arange(0, STEP)
        across = _taps(x_place, k, x_scale, wide, CUBIC)
        x_sum += tl.sum(across.to(tl.float32), axis=1)
        y_sum = tl.zeros((BLOCK,), tl.float32)
        red_rows = tl.zeros((BLOCK, STEP), tl.float32)
        green_rows = tl.zeros((BLOCK, STEP), tl.float32)
        blue_rows = tl.zeros((BLOCK, STEP), tl.float32)
        for j0 in range(y_first, y_end, STEP):
            j = j0 + tl.arange(0, STEP)
            down = _taps(y_place, j, y_scale, tall, CUBIC)
            y_sum += tl.sum(down.to(tl.float32), axis=1)
            at = image_ptr + j[:, None].to(tl.int64) * down_by + k[None, :] * right_by
            inside = (j < tall)[:, None] & (k < wide)[None, :]
            red_rows = tl.dot(down, tl.load(at, mask=inside, other=0).to(tl.float16), red_rows)
            green_rows = tl.dot(down, tl.load(at + channel, mask=inside, other=0).to(tl.float16), green_rows)
            blue_rows = tl.dot(down, tl.load(at + 2 * channel, mask=inside, other=0).to(tl.float16), blue_rows)
        across = tl.trans(across)
        red = tl.dot((red_rows / y_sum[:, None]).to(tl.float16), across, red)
        green = tl.dot((green_rows / y_sum[:, None]).to(tl.float16), across, green)
        blue = tl.dot((blue_rows / y_sum[:, None]).to(tl.float16), across, blue)
    red, green, blue = clamp(red / x_sum[None, :]), clamp(green / x_sum[None, :]), clamp(blue / x_sum[None, :])
    inside = (y < size)[:, None] & (x < size)[None, :]
    if JITTER:
        red, green, blue = jitter(red, green, blue, row_ptr, 0.0, SECOND=False)
        gray = tl.where(inside, luma(red, green, blue), 0.0)
        tl.store(part_ptr + number * tl.num_programs(0) + tl.program_id(0), tl.sum(tl.sum(gray, axis=1), axis=0))
    at = plane_ptr + number.to(tl.int64) * 3 * size * size + y[:, None] * size + x[None, :]
    tl.store(at, red, mask=inside)
    tl.store(at + size * size, green, mask=inside)
    tl.store(at + 2 * size * size, blue, mask=inside)


@triton.jit
def _gauss(distance, sigma, reach):  # type: ignore[no-untyped-def]
    d = distance.to(tl.float32)
    return tl.where(tl.abs(distance) <= reach, tl.exp(-0.5 * d * d / (sigma * sigma)), 0.0)


@triton.jit
def _blur_taps(place, source, sigma, reach, size):  # type: ignore[no-untyped-def]
    """Weights (BLOCK, STEP) float16 of source pixels and of their mirror images, not yet summing to 1."""
    i, j, end = place[:, None], source[None, :], size - 1
    weights = _gauss(j - i, sigma, reach) + tl.where(j > 0, _gauss(i + j, sigma, reach), 0.0)
    weights += tl.where(j < end, _gauss(2 * end - i - j, sigma, reach), 0.0)
    return tl.where(j < size, weights, 0.0).to(tl.float16)


@triton.jit
def _blurred(  # type: ignore[no-untyped-def]
    plane_ptr,
    row_ptr,
    mean,
    y,
    x,
    size,
    JITTER: tl.constexpr,
    GRAY: tl.constexpr,
    REACH: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """One tile blurred, reflected at the border; without a sigma the weights are 1 in their places."""
    sigma = tl.load(row_ptr + BLUR)
    reach = tl.minimum((sigma * 6.07).to(tl.int32) + (sigma > 0).to(tl.int32), REACH)  # the rest adds less than 1e-8
    sigma = tl.maximum(sigma, 1e-6)
    y_place, x_place = tl.minimum(y, size - 1), tl.minimum(x, size - 1)
    y0, x0 = tl.min(y, axis=0), tl.min(x, axis=0)
    y_end, x_end = tl.minimum(y0 + BLOCK + reach, size), tl.minimum(x0 + BLOCK + reach, size)
    red = tl.zeros((BLOCK, BLOCK), tl.float32)
    green = tl.zeros((BLOCK, BLOCK), tl.float32)
    blue = tl.zeros((BLOCK, BLOCK), tl.float32)
    x_sum = tl.zeros((BLOCK,), tl.float32)
    for k0 in range(tl.maximum(x0 - reach, 0), x_end, STEP):
        k = k0 + tl.arange(0, STEP)
        across = _blur_taps(x_place, k, sigma, reach, size)
        x_sum += tl.sum(across.to(tl.float32), axis=1)
        y_sum = tl.zeros((BLOCK,), tl.float32)
        red_rows = tl.zeros((BLOCK, STEP), tl.float32)
        green_rows = tl.zeros((BLOCK, STEP), tl.float32)
        blue_rows = tl.zeros((BLOCK, STEP), tl.float32)
        for j0 in range(tl.maximum(y0 - reach, 0), y_end, STEP):
            j = j0 + tl.arange(0, STEP)
            down = _blur_taps(y_place, j, sigma, reach, size)
            y_sum += tl.sum(down.to(tl.float32), axis=1)
            r, g, b = colored(plane_ptr, row_ptr, mean, j, k, size, JITTER, GRAY)
            red_rows = tl.dot(down, r.to(tl.float16), red_rows)
            green_rows = tl.dot(down, g.to(tl.float16), green_rows)
            blue_rows = tl.dot(down, b.to(tl.float16), blue_rows)
        across = tl.trans(across)
        red = tl.dot((red_rows / y_sum[:, None]).to(tl.float16), across, red)
        green = tl.dot((green_rows / y_sum[:, None]).to(tl.float16), across, green)
        blue = tl.dot((blue_rows / y_sum[:, None]).to(tl.float16), across, blue)
    return red / x_sum[None, :], green / x_sum[None, :], blue / x_sum[None, :]


@triton.jit
def _finish_kernel(  # type: ignore[no-untyped-def]
    plane_ptr,
    part_ptr,
    drawn_ptr,
    out_ptr,
    size,
    tiles_across,
    threshold,
    red_mean,
    green_mean,
    blue_mean,
    red_std,
    green_std,
    blue_std,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    JITTER: tl.constexpr,
    GRAY: tl.constexpr,
    REACH: tl.constexpr,
    SOLARIZED: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    number, tiles = tl.program_id(1), tl.num_programs(0)
    row_ptr = drawn_ptr + number * COLUMNS
    plane_ptr += number.to(tl.int64) * 3 * size * size
    mean = 0.0
    if JITTER:
        part = tl.arange(0, PARTS)
        mean = tl.sum(tl.load(part_ptr + number * tiles + part, mask=part < tiles, other=0.0), axis=0) / (size * size)
    y0, x0 = _tile(size, tiles_across, BLOCK)
    y, x = y0 + tl.arange(0, BLOCK), x0 + tl.arange(0, BLOCK)
    if REACH > 0:
        red, green, blue = _blurred(plane_ptr, row_ptr, mean, y, x, size, JITTER, GRAY, REACH, BLOCK, STEP)
    else:
        red, green, blue = colored(plane_ptr, row_ptr, mean, y, x, size, JITTER, GRAY)
    if SOLARIZED:
        threshold = tl.where(tl.load(row_ptr + SOLARIZE) > 0, threshold, 1e9)
        red = tl.where(red >= threshold, 255.0 - red, red)
        green = tl.where(green >= threshold, 255.0 - green, green)
        blue = tl.where(blue >= threshold, 255.0 - blue, blue)
    inside = (y < size)[:, None] & (x < size)[None, :]
    at = out_ptr + number.to(tl.int64) * 3 * size * size + (y[:, None] * size + x[None, :]) * 3
    tl.store(at, (red - red_mean) / red_std, mask=inside)
    tl.store(at + 1, (green - green_mean) / green_std, mask=inside)
    tl.store(at + 2, (blue - blue_mean) / blue_std, mask=inside)


def augment_triton(
    images: Ragged | Strided, parameters: Tensor, recipe: ViewRecipe, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Views (B, 3, S, S) `dtype`, channels-last, normalized, of images and parameters (B, COLUMNS) on one device.

    Two launches, however many images there are and wherever they lie.

    Reference: fastrdm.loaders.augment, from which it differs by at most 2/255 before normalization (float16 weights).
    No image may be smaller than its crop box: boxes are not checked. Sums are made in a fixed order.
    """
    count, size = len(parameters), recipe.size
    parameters = parameters.float().contiguous()
    across = triton.cdiv(size, BLOCK)
    planes = parameters.new_empty((count, 3, size, size), dtype=torch.float16)
    parts = parameters.new_empty((count, across * across))
    out = parameters.new_empty((count, size, size, 3), dtype=dtype)
    grid = (across * across, count)
    shape = {"COLUMNS": COLUMNS, "JITTER": recipe.jitter > 0, "BLOCK": BLOCK, "STEP": STEP}
    apart = isinstance(images, Strided)
    where = (None, images.place, None) if isinstance(images, Strided) else (images.pixels, images.offset, images.width)
    cubic = recipe.interpolation == "bicubic"
    _crop_kernel[grid](*where, parameters, planes, parts, size, across, CUBIC=cubic, STRIDED=apart, **shape)
    _finish_kernel[grid](
        planes,
        parts,
        parameters,
        out,
        size,
        across,
        float(recipe.solarize_threshold),
        *(255.0 * value for value in (*recipe.mean, *recipe.std)),
        PARTS=triton.next_power_of_2(across * across),
        GRAY=recipe.grayscale > 0,
        REACH=min(recipe.blur_kernel // 2, size - 1) if recipe.blur > 0 else 0,
        SOLARIZED=recipe.solarize > 0,
        **shape,
    )
    return out.permute(0, 3, 1, 2)
