"""Gram matrices of features in three float16 products by Triton kernels.

Only lower tiles are computed, and stored with their mirror images.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrdm.kernels.linalg.matmul import power_of_two
from fastrdm.kernels.linalg.tiles_triton import SPLIT, split, store

BLOCK = 64  # rows and columns of a tile
DEPTH = 32  # terms of the sums taken at once
TARGET_TILES = 264  # twice the multiprocessors of an H100: sums are split until so many tiles run


@triton.jit
def _row_scales_kernel(x_ptr, scale_ptr, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    square = tl.zeros((BLOCK,), tl.float32)
    for d0 in range(0, width, BLOCK):
        d = d0 + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * width + d, mask=d < width, other=0.0).to(tl.float32)
        square += x * x
    length = tl.sqrt(tl.sum(square, axis=0))
    # A row of zeros stays one.
    tl.store(scale_ptr + row, tl.where(length > 0.0, 1.0 / length, 0.0))


@triton.jit
def _column_means_kernel(  # type: ignore[no-untyped-def]
    x_ptr, scale_ptr, mean_ptr, height, width, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    batch = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for b0 in range(0, height, ROWS):
        b = b0 + tl.arange(0, ROWS)
        inside = (b < height)[:, None] & (d < width)[None, :]
        x = tl.load(x_ptr + (batch * height + b)[:, None] * width + d[None, :], mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(x * tl.load(scale_ptr + batch * height + b, mask=b < height, other=0.0)[:, None], axis=0)
    tl.store(mean_ptr + batch * width + d, total / height, mask=d < width)


@triton.jit
def _features(  # type: ignore[no-untyped-def]
    x_ptr, scale_ptr, mean_ptr, height, width, i, k, TALL: tl.constexpr, CENTER: tl.constexpr
):
    """A tile of normalized, centered features: the Gram matrix's index i down, the summed index k across, 0 outside."""
    row, column = (k[None, :], i[:, None]) if TALL else (i[:, None], k[None, :])
    inside = (row < height) & (column < width)
    x = tl.load(x_ptr + row.to(tl.int64) * width + column, mask=inside, other=0.0).to(tl.float32)
    x = x * tl.load(scale_ptr + row, mask=row < height, other=0.0)
    if CENTER:
        x = tl.where(inside, x - tl.load(mean_ptr + column, mask=column < width, other=0.0), 0.0)
    return x


@triton.jit
def _gram_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    scale_ptr,
    mean_ptr,
    part_ptr,
    height,
    width,
    share,
    splits,
    TALL: tl.constexpr,
    CENTER: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One lower tile of one split of the sum, into the workspace (K, splits, n, n)."""
    row_tile, column_tile = tl.program_id(0), tl.program_id(1)
    if column_tile > row_tile:
        return
    batch, part = tl.program_id(2) // splits, tl.program_id(2) % splits
    n = width if TALL else height
    x_ptr += batch.to(tl.int64) * height * width
    scale_ptr += batch * height
    mean_ptr += batch * width
    rows = row_tile * BLOCK + tl.arange(0, BLOCK)
    columns = column_tile * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    cross = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k0 in range(part * share, (part + 1) * share, DEPTH):
        k = k0 + tl.arange(0, DEPTH)
        a = _features(x_ptr, scale_ptr, mean_ptr, height, width, rows, k, TALL, CENTER)
        b = _features(x_ptr, scale_ptr, mean_ptr, height, width, columns, k, TALL, CENTER)
        a_high, a_low = split(a)
        b_high, b_low = split(b)
        total = tl.dot(a_high, tl.trans(b_high), total)
        cross = tl.dot(a_low, tl.trans(b_high), cross)
        cross = tl.dot(a_high, tl.trans(b_low), cross)
    inside = (rows < n)[:, None] & (columns < n)[None, :]
    out_ptr = part_ptr + tl.program_id(2).to(tl.int64) * n * n
    tl.store(out_ptr + rows[:, None] * n + columns[None, :], total + cross / SPLIT, mask=inside)


@triton.jit
def _sum_kernel(part_ptr, unit_ptr, out_ptr, n, splits, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The splits of one lower tile added in order, scaled back and mirrored."""
    row_tile, column_tile, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if column_tile > row_tile:
        return
    rows = row_tile * BLOCK + tl.arange(0, BLOCK)
    columns = column_tile * BLOCK + tl.arange(0, BLOCK)
    inside = (rows < n)[:, None] & (columns < n)[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for part in range(splits):
        at = (batch * splits + part) * n * n + rows[:, None] * n + columns[None, :]
        total += tl.load(part_ptr + at, mask=inside, other=0.0)
    unit = tl.load(unit_ptr + batch)
    if row_tile == column_tile:
        total = 0.5 * (total + tl.trans(total))
    store(out_ptr + batch * n * n, total * unit * unit, rows, columns, n, n, True)


def gram_triton(x: Tensor, center: bool, normalize: bool) -> Tensor:
    """Gram matrices (K, n, n) float32 of features (K, B, D), as gram.gram defines them; sums in a fixed order.

    ValueError for float64.
    """
    if x.dtype == torch.float64:
        raise ValueError("precision fp16x3-triton takes features of at most float32, got float64")
    x = x.contiguous()
    count, height, width = x.shape
    n, depth, tall = min(height, width), max(height, width), height > width
    unit = x.new_ones((count, 1), dtype=torch.float32)
    if normalize:
        scales = x.new_empty((count, height), dtype=torch.float32)
        _row_scales_kernel[(count * height,)](x, scales, width, BLOCK=min(1024, triton.next_power_of_2(width)))
    else:
        unit = power_of_two(x.float())[..., 0]
        scales = (1 / unit).expand(count, height).contiguous()
    means = x.new_zeros((count, width), dtype=torch.float32)
    if center:
        _column_means_kernel[(triton.cdiv(width, BLOCK), count)](x, scales, means, height, width, ROWS=16, BLOCK=BLOCK)
    tiles = triton.cdiv(n, BLOCK)
    wanted = max(1, TARGET_TILES // (count * tiles * (tiles + 1) // 2))
    share = triton.cdiv(triton.cdiv(depth, wanted), DEPTH) * DEPTH
    splits = triton.cdiv(depth, share)
    parts = x.new_empty((count, splits, n, n), dtype=torch.float32)
    _gram_kernel[(tiles, tiles, count * splits)](
        x,
        scales,
        means,
        parts,
        height,
        width,
        share,
        splits,
        TALL=tall,
        CENTER=center,
        BLOCK=BLOCK,
        DEPTH=DEPTH,
    )
    out = x.new_empty((count, n, n), dtype=torch.float32)
    _sum_kernel[(tiles, tiles, count)](parts, unit, out, n, splits, BLOCK=BLOCK)
    return out
