"""Gram matrices of float16 and bfloat16 rows by Triton kernels: exact operands, several inputs in four launches.

Where all entries of a column lie between half of a value c and twice that value, c is subtracted from the column. The
difference has no rounding error (Sterbenz 1974), so it fits the rows' own dtype, and tensor cores multiply it as it is.
What c contributes is added in float64, or, to centered rows, only as far as it does not cancel. Without that, rows that
are nearly alike would lose their spectrum in the float32 sums of their Gram matrix.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrdm.kernels.linalg.tiles_triton import store

BLOCK = 64  # rows and columns of a tile of the product
DEPTH = 64  # columns of features that are shifted by one program, and taken at once by the product
TILE = 32  # rows and columns of a tile of the result
LINE = 512  # rows whose sums are taken at once
OPTIONS = {"num_warps": 4, "num_stages": 4}  # of the product


@triton.jit
def _columns_kernel(  # type: ignore[no-untyped-def]
    x_ptrs, widths, starts, shifted_ptr, along_ptr, size_ptr, height, padded, ROWS: tl.constexpr, DEPTH: tl.constexpr
):
    """Shifts DEPTH columns of one view of one input, and multiplies them by what was subtracted.

    `starts` are the first programs of the inputs. Rows and columns beyond the input are zero.
    """
    program, batch, views = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    x_ptr, width, start = x_ptrs[0], widths[0], starts[0]
    for i in tl.static_range(1, len(x_ptrs)):
        reached = program >= starts[i]
        width, start = tl.where(reached, widths[i], width), tl.where(reached, starts[i], start)
        if reached:
            x_ptr = x_ptrs[i]
    k = tl.arange(0, DEPTH)
    d = (program - start) * DEPTH + k
    x_ptr += batch.to(tl.int64) * height * width
    total = tl.zeros((DEPTH,), tl.float32)
    least, most = total + float("inf"), total - float("inf")
    for b0 in range(0, height, ROWS):
        b = b0 + tl.arange(0, ROWS)
        inside = (b < height)[:, None] & (d < width)[None, :]
        x = tl.load(x_ptr + b.to(tl.int64)[:, None] * width + d[None, :], mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(x, axis=0)
        least = tl.minimum(least, tl.min(tl.where(inside, x, float("inf")), axis=0))
        most = tl.maximum(most, tl.max(tl.where(inside, x, float("-inf")), axis=0))
    # The nearest value of the rows' dtype; no comparison holds for NaN.
    c = (total / height).to(x_ptr.dtype.element_ty).to(tl.float32)
    alike = tl.where(c > 0, (least >= 0.5 * c) & (most <= 2 * c), (most <= 0.5 * c) & (least >= 2 * c))
    c = tl.where(alike, c, 0.0)
    place = program * views + batch
    tl.store(size_ptr + place, tl.sum(c * c, axis=0))
    for b0 in range(0, padded, ROWS):
        b = b0 + tl.arange(0, ROWS)
        inside = (b < height)[:, None] & (d < width)[None, :]
        x = tl.load(x_ptr + b.to(tl.int64)[:, None] * width + d[None, :], mask=inside, other=0.0).to(tl.float32)
        x = tl.where(inside, x - c[None, :], 0.0)
        at = place.to(tl.int64) * padded + b
        tl.store(shifted_ptr + at[:, None] * DEPTH + k[None, :], x.to(shifted_ptr.dtype.element_ty))
        tl.store(along_ptr + at, tl.sum(x * c[None, :], axis=1))


@triton.jit
def _lengths(  # type: ignore[no-untyped-def]
    square, along_ptr, size_ptr, inverse_ptr, share_ptr, whole_ptr, rows, height, padded, views, pair, start, end,
    NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Stores 1 / length of some rows, the share of c in each of them at length 1, and c's own square."""
    along, size = square * 0.0, tl.zeros((), tl.float64)
    for program in range(start, end):
        place = program * views + pair % views
        along += tl.load(along_ptr + place.to(tl.int64) * padded + rows)
        size += tl.load(size_ptr + place)
    square += 2.0 * along + size
    if NORMALIZE:
        # A row of zeros stays one, and so do the rows that pad the tiles.
        inverse = tl.where(square == 0.0, 0.0, 1.0 / tl.sqrt(tl.where(square == 0.0, 1.0, square)))
    else:
        inverse = square * 0.0 + 1.0
    inverse = tl.where(rows < height, inverse, 0.0)
    tl.store(inverse_ptr + pair * padded + rows, inverse)
    tl.store(share_ptr + pair * padded + rows, along * inverse)
    tl.store(whole_ptr + pair, size)


@triton.jit
def _product_kernel(  # type: ignore[no-untyped-def]
    shifted_ptr,
    along_ptr,
    size_ptr,
    starts,
    gram_ptr,
    inverse_ptr,
    share_ptr,
    whole_ptr,
    views,
    height,
    padded,
    NORMALIZE: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One lower tile of the Gram matrix of shifted rows, and from its diagonal the lengths of the rows themselves.

    `starts` are the first programs of the inputs in `_columns_kernel`, and the end of the last input's.
    """
    row_tile, column_tile, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if column_tile > row_tile:
        return
    batch = pair % views
    start, end = starts[0], starts[1]
    for i in tl.static_range(1, len(starts) - 1):
        own = pair // views == i
        start, end = tl.where(own, starts[i], start), tl.where(own, starts[i + 1], end)
    rows = row_tile * BLOCK + tl.arange(0, BLOCK)
    columns = column_tile * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, DEPTH)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for program in range(start, end):
        tile_ptr = shifted_ptr + (program * views + batch).to(tl.int64) * padded * DEPTH
        a = tl.load(tile_ptr + rows[:, None] * DEPTH + k[None, :])
        b = tl.load(tile_ptr + columns[:, None] * DEPTH + k[None, :])
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, tl.trans(b), total)
    if row_tile == column_tile:
        total = 0.5 * (total + tl.trans(total))
        diagonal = tl.sum(tl.where(rows[:, None] == columns[None, :], total, 0.0), axis=1).to(tl.float64)
        _lengths(
            diagonal, along_ptr, size_ptr, inverse_ptr, share_ptr, whole_ptr, rows, height, padded, views, pair,
            start, end, NORMALIZE,
        )  # fmt: skip
    store(gram_ptr + pair.to(tl.int64) * padded * padded, total, rows, columns, padded, padded, True)


@triton.jit
def _means_kernel(gram_ptr, inverse_ptr, mean_ptr, height, padded, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The mean of a row of the Gram matrix of shifted rows over the rows' lengths."""
    row, pair = tl.program_id(0), tl.program_id(1)
    gram_ptr += (pair.to(tl.int64) * padded + row) * padded
    inverse_ptr += pair * padded
    total = tl.zeros((BLOCK,), tl.float64)
    for j0 in range(0, height, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        inverse = tl.load(inverse_ptr + j, mask=j < height, other=0.0)
        total += tl.load(gram_ptr + j, mask=j < height, other=0.0) * inverse
    mean = tl.sum(total, axis=0) * tl.load(inverse_ptr + row) / height
    tl.store(mean_ptr + pair * padded + row, mean)


@triton.jit
def _mean(ptr, height, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The mean of a vector."""
    total = tl.zeros((BLOCK,), tl.float64)
    for j0 in range(0, height, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        total += tl.load(ptr + j, mask=j < height, other=0.0)
    return tl.sum(total, axis=0) / height


@triton.jit
def _result_kernel(  # type: ignore[no-untyped-def]
    gram_ptr,
    inverse_ptr,
    share_ptr,
    whole_ptr,
    mean_ptr,
    plain_ptr,
    centered_ptr,
    height,
    padded,
    PLAIN: tl.constexpr,
    CENTER: tl.constexpr,
    TILE: tl.constexpr,
    LINE: tl.constexpr,
):
    """A lower tile of the Gram matrix of the rows, of the centered rows, or of both, with its mirror image.

    Row i at length 1 is w_i + a_i c: w_i its shifted row over its length, 1 / a_i the length, and s_i = w_i . c.
    """
    row_tile, column_tile, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if column_tile > row_tile:
        return
    i, j = row_tile * TILE + tl.arange(0, TILE), column_tile * TILE + tl.arange(0, TILE)
    inverse_ptr, share_ptr, mean_ptr = inverse_ptr + pair * padded, share_ptr + pair * padded, mean_ptr + pair * padded
    a_i, a_j = tl.load(inverse_ptr + i)[:, None], tl.load(inverse_ptr + j)[None, :]
    s_i, s_j = tl.load(share_ptr + i)[:, None], tl.load(share_ptr + j)[None, :]
    whole = tl.load(whole_ptr + pair)
    at = pair.to(tl.int64) * padded * padded + i[:, None] * padded + j[None, :]
    product = tl.load(gram_ptr + at) * (a_i * a_j)
    start = pair.to(tl.int64) * height * height
    if PLAIN:
        c = product + (s_i * a_j + a_i * s_j) + whole * (a_i * a_j)
        if row_tile == column_tile:
            c = 0.5 * (c + tl.trans(c))
        store(plain_ptr + start, c.to(plain_ptr.dtype.element_ty), i, j, height, height, True)
    if CENTER:
        a, s = _mean(inverse_ptr, height, LINE), _mean(share_ptr, height, LINE)
        a_i, a_j, s_i, s_j = a_i - a, a_j - a, s_i - s, s_j - s
        m_i = tl.load(mean_ptr + i, mask=i < height, other=0.0)[:, None]
        m_j = tl.load(mean_ptr + j, mask=j < height, other=0.0)[None, :]
        c = product - (m_i + m_j) + _mean(mean_ptr, height, LINE)
        c += (s_i * a_j + a_i * s_j) + whole * (a_i * a_j)
        if row_tile == column_tile:
            c = 0.5 * (c + tl.trans(c))
        store(centered_ptr + start, c.to(centered_ptr.dtype.element_ty), i, j, height, height, True)


def takes(x: Tensor) -> bool:
    """Whether the kernels can read x (K, n, d): rows in float16 or bfloat16, at most as many as columns."""
    return x.dtype in (torch.float16, torch.bfloat16) and 0 < x.shape[-2] <= x.shape[-1]


def half_grams(
    inputs: Sequence[Tensor], centers: Sequence[bool], normalize: bool, dtype: torch.dtype
) -> list[list[Tensor]]:
    """x x^T (K, n, n) in `dtype` of each input (K, n, d), one for each of `centers`, as gram.gram defines them.

    Inputs are all float16 or all bfloat16, with the same K and n, and n is at most d. Four launches, or three where
    nothing is centered. Two runs are bitwise equal. Entries are right to 5e-6 of the largest entry of the same matrix
    for d up to 2,048, however nearly alike the rows are. Squares are float32: rows longer than 1e19 give results that
    are not finite, and rows shorter than 1e-19 may count as zeros. ValueError for other inputs.
    """
    count, height = inputs[0].shape[:2]
    kind = inputs[0].dtype
    if not all(takes(x) and x.dtype == kind and x.shape[:2] == (count, height) for x in inputs):
        got = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in inputs)
        raise ValueError(f"precision half-triton takes float16 or bfloat16 rows, at most as many as columns, got {got}")
    inputs = [x.contiguous() for x in inputs]
    widths = tuple(x.shape[-1] for x in inputs)
    starts = [0]
    for width in widths:
        starts.append(starts[-1] + triton.cdiv(width, DEPTH))
    padded = triton.cdiv(height, BLOCK) * BLOCK
    pairs, programs, like = count * len(inputs), starts[-1], inputs[0]
    shifted = like.new_empty((programs, count, padded, DEPTH))
    along = like.new_empty((programs, count, padded), dtype=torch.float32)
    size = like.new_empty((programs, count), dtype=torch.float32)
    _columns_kernel[(programs, count)](
        tuple(inputs), widths, tuple(starts[:-1]), shifted, along, size, height, padded, ROWS=BLOCK, DEPTH=DEPTH
    )
    gram = like.new_empty((pairs, padded, padded), dtype=torch.float32)
    inverse, share, mean = (like.new_empty((pairs, padded), dtype=torch.float64) for _ in range(3))
    whole = like.new_empty(pairs, dtype=torch.float64)
    tiles = triton.cdiv(height, BLOCK)
    # Triton's interpreter takes the bits of bfloat16 for integers when it multiplies; float32 holds the same values.
    widen = kind == torch.bfloat16 and triton.knobs.runtime.interpret
    _product_kernel[(tiles, tiles, pairs)](
        shifted,
        along,
        size,
        tuple(starts),
        gram,
        inverse,
        share,
        whole,
        count,
        height,
        padded,
        NORMALIZE=normalize,
        WIDEN=widen,
        BLOCK=BLOCK,
        DEPTH=DEPTH,
        **OPTIONS,
    )
    if any(centers):
        _means_kernel[(height, pairs)](gram, inverse, mean, height, padded, BLOCK=LINE)
    plain, centered = (
        like.new_empty((pairs, height, height), dtype=dtype) if center in centers else gram for center in (False, True)
    )
    tiles = triton.cdiv(height, TILE)
    _result_kernel[(tiles, tiles, pairs)](
        gram,
        inverse,
        share,
        whole,
        mean,
        plain,
        centered,
        height,
        padded,
        PLAIN=False in centers,
        CENTER=True in centers,
        TILE=TILE,
        LINE=LINE,
    )
    parts = [(centered if center else plain).split(count) for center in centers]
    return [list(of_input) for of_input in zip(*parts, strict=True)]
