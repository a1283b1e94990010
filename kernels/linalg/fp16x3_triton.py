"""Products of float32 matrices in three float16 products, by Triton (needs it): operands are split once, not per tile.

A product writes its result's halves beside the result, so that chains of products never split again. Of symmetric
results only lower tiles are computed, and stored with their mirror images.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrdm.kernels.linalg.matmul import BOUNDED_SCALE

CHUNK = 2048  # elements that a program splits or combines


@triton.jit
def _halves(x):  # type: ignore[no-untyped-def]
    high = x.to(tl.float16)
    return high, ((x - high.to(tl.float32)) * 2048.0).to(tl.float16)


@triton.jit
def _unit(largest):  # type: ignore[no-untyped-def]
    """matmul.power_of_two: 1 for 0."""
    return tl.exp2(tl.floor(tl.log2(tl.where(largest == 0.0, 1.0, largest))))


@triton.jit
def _split_kernel(x_ptr, largest_ptr, high_ptr, low_ptr, size, scale, UNITS: tl.constexpr, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    batch, place = tl.program_id(1).to(tl.int64), tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    inside, at = place < size, batch * size + place
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) * scale
    if UNITS:
        x = x / _unit(tl.load(largest_ptr + batch))
    high, low = _halves(x)
    tl.store(high_ptr + at, high, mask=inside)
    tl.store(low_ptr + at, low, mask=inside)


@triton.jit
def _store(ptr, tile, rows, columns, m, n, MIRROR: tl.constexpr):  # type: ignore[no-untyped-def]
    """The tile of an (m, n) matrix and, where asked for, its mirror image."""
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    tl.store(ptr + rows[:, None] * n + columns[None, :], tile, mask=inside)
    if MIRROR:
        tl.store(ptr + columns[:, None] * n + rows[None, :], tl.trans(tile), mask=tl.trans(inside))


@triton.jit
def _product_kernel(  # type: ignore[no-untyped-def]
    a_high_ptr,
    a_low_ptr,
    b_high_ptr,
    b_low_ptr,
    a_largest_ptr,
    b_largest_ptr,
    add_ptr,
    out_ptr,
    high_ptr,
    low_ptr,
    m,
    n,
    depth,
    a_row,
    a_column,
    b_row,
    b_column,
    alpha,
    beta,
    gamma,
    scale,
    UNITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    ADD: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One tile of alpha a b + beta add + gamma I, and of its halves times `scale`."""
    row_tile, column_tile = tl.program_id(0), tl.program_id(1)
    if SYMMETRIC and column_tile > row_tile:
        return
    batch = tl.program_id(2).to(tl.int64)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, DEPTH)
    a_at = batch * m * depth + rows[:, None] * a_row + k[None, :] * a_column
    b_at = batch * n * depth + k[:, None] * b_row + columns[None, :] * b_column
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    cross = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, depth, DEPTH):
        if EVEN:
            a_high, a_low = tl.load(a_high_ptr + a_at), tl.load(a_low_ptr + a_at)
            b_high, b_low = tl.load(b_high_ptr + b_at), tl.load(b_low_ptr + b_at)
        else:
            a_inside = (rows < m)[:, None] & (k0 + k < depth)[None, :]
            b_inside = (k0 + k < depth)[:, None] & (columns < n)[None, :]
            a_high = tl.load(a_high_ptr + a_at, mask=a_inside, other=0.0)
            a_low = tl.load(a_low_ptr + a_at, mask=a_inside, other=0.0)
            b_high = tl.load(b_high_ptr + b_at, mask=b_inside, other=0.0)
            b_low = tl.load(b_low_ptr + b_at, mask=b_inside, other=0.0)
        total = tl.dot(a_high, b_high, total)
        cross = tl.dot(a_low, b_high, cross)
        cross = tl.dot(a_high, b_low, cross)
        a_at += DEPTH * a_column
        b_at += DEPTH * b_row
    c = alpha * (total + cross / 2048.0)
    if UNITS:
        c = c * _unit(tl.load(a_largest_ptr + batch)) * _unit(tl.load(b_largest_ptr + batch))
    if SYMMETRIC and row_tile == column_tile:
        c = 0.5 * (c + tl.trans(c))
    start = batch * m * n
    if ADD:
        inside = (rows < m)[:, None] & (columns < n)[None, :]
        c += beta * tl.load(add_ptr + start + rows[:, None] * n + columns[None, :], mask=inside, other=0.0)
    if SYMMETRIC:
        c += tl.where(rows[:, None] == columns[None, :], gamma, 0.0)
    _store(out_ptr + start, c, rows, columns, m, n, SYMMETRIC)
    if SPLIT:
        high, low = _halves(c * scale)
        _store(high_ptr + start, high, rows, columns, m, n, SYMMETRIC)
        _store(low_ptr + start, low, rows, columns, m, n, SYMMETRIC)


@triton.jit
def _combine_kernel(  # type: ignore[no-untyped-def]
    weight_ptr, stride, t1_ptr, t2_ptr, t3_ptr, minus_ptr, out_ptr, n, MINUS: tl.constexpr, CHUNK: tl.constexpr
):
    batch, place = tl.program_id(1).to(tl.int64), tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    inside, at = place < n * n, batch * n * n + place
    w = weight_ptr + batch * stride
    c = tl.where(place // n == place % n, tl.load(w), 0.0)
    c += tl.load(w + 1) * tl.load(t1_ptr + at, mask=inside, other=0.0)
    c += tl.load(w + 2) * tl.load(t2_ptr + at, mask=inside, other=0.0)
    c += tl.load(w + 3) * tl.load(t3_ptr + at, mask=inside, other=0.0)
    if MINUS:
        c -= tl.load(minus_ptr + at, mask=inside, other=0.0)
    tl.store(out_ptr + at, c, mask=inside)


class Halves(NamedTuple):
    """A matrix times `scale` over its unit as high + low / 2048, laid out in memory as the matrix is."""

    high: Tensor
    low: Tensor
    largest: Tensor | None  # (K,) float32, the largest magnitude, whose power of two is the unit; None: 1


class _Kept(NamedTuple):
    version: int  # of the matrix when it was split: torch counts what writes to it
    scale: float
    halves: Halves


def _dense(x: Tensor) -> Tensor:
    return x if x.is_contiguous() or x.mT.is_contiguous() else x.contiguous()


def halves(x: Tensor, scale: float | None) -> Halves:
    """Of a dense (K, m, k): kept from the product that made it, else made here; scale None: over its own unit."""
    kept: _Kept | None = getattr(x, "_fastrdm_halves", None)
    if kept is not None and (kept.version, kept.scale) == (x._version, scale):
        return kept.halves
    largest = torch.linalg.vector_norm(x, torch.inf, (-2, -1)).float() if scale is None else None
    high, low = (torch.empty_like(x, dtype=torch.float16) for _ in range(2))
    size = x[0].numel()
    _split_kernel[(triton.cdiv(size, CHUNK), len(x))](
        x, largest, high, low, size, scale or 1.0, UNITS=scale is None, CHUNK=CHUNK
    )
    found = Halves(high, low, largest)
    if scale is not None:
        _keep(x, scale, found)
    return found


def _keep(x: Tensor, scale: float, found: Halves) -> None:
    x._fastrdm_halves = _Kept(x._version, scale, found)  # type: ignore[attr-defined]


class Tile(NamedTuple):
    """How a product is cut."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def tile_of(symmetric: bool, m: int, n: int) -> Tile:
    """The fastest of benchmarks/results/products_h200.csv for a result (m, n): small ones where tiles are few."""
    if symmetric:
        return Tile(32, 32, 64, 2, 4) if m <= 256 else Tile(64, 64, 64, 4, 3)
    if m <= 128 or n <= 512:
        return Tile(64, 64, 64, 4, 4)
    return Tile(64, 128, 64, 4, 3) if m <= 256 else Tile(128, 128, 64, 8, 3)


def _run(
    a: Tensor,
    b: Tensor,
    scale: float | None,
    *,
    symmetric: bool,
    split: float | None,
    alpha: float = 1.0,
    beta: float = 0.0,
    add: Tensor | None = None,
    gamma: float = 0.0,
) -> Tensor:
    """alpha a b + beta add + gamma I of operands split at `scale`; the result's halves are kept at scale `split`."""
    a, b = _dense(a), _dense(b)
    count, m, depth = a.shape
    n = b.shape[-1]
    first = halves(a, scale)
    # x x^T: the second operand is the first, seen the other way round
    same = symmetric and b.data_ptr() == a.data_ptr() and b.stride() == a.mT.stride()
    second = Halves(first.high.mT, first.low.mT, first.largest) if same else halves(b, scale)
    tile = tile_of(symmetric, m, n)
    out = a.new_empty((count, m, n), dtype=torch.float32)
    high, low = (torch.empty_like(out, dtype=torch.float16) if split else out for _ in range(2))
    _product_kernel[(triton.cdiv(m, tile.rows), triton.cdiv(n, tile.columns), count)](
        first.high,
        first.low,
        second.high,
        second.low,
        first.largest,
        second.largest,
        out if add is None else add.contiguous(),
        out,
        high,
        low,
        m,
        n,
        depth,
        *first.high.stride()[1:],
        *second.high.stride()[1:],
        alpha / (scale or 1.0) ** 2,
        beta,
        gamma,
        split or 1.0,
        UNITS=scale is None,
        SYMMETRIC=symmetric,
        ADD=add is not None,
        SPLIT=split is not None,
        EVEN=not (m % tile.rows or n % tile.columns or depth % tile.depth),
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        DEPTH=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if split:
        _keep(out, split, Halves(high, low, None))
    return out


def axpby_triton(a: Tensor, b: Tensor, add: Tensor | None, alpha: float, beta: float, gamma: float) -> Tensor:
    """alpha a b + beta add + gamma I for commuting symmetric float32 (K, n, n) of entries below 65504; symmetric."""
    return _run(a, b, 1.0, symmetric=True, split=1.0, alpha=alpha, beta=beta, add=add, gamma=gamma)


def axpby_reference(a: Tensor, b: Tensor, add: Tensor | None, alpha: float, beta: float, gamma: float) -> Tensor:
    """The definition: alpha a b + beta add + gamma I for commuting symmetric matrices (K, n, n)."""
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    return alpha * (a @ b) + (0 if add is None else beta * add) + gamma * eye


def product_triton(a: Tensor, b: Tensor, bounded: bool) -> Tensor:
    """a @ b of float32 (K, m, k), (K, k, n) of any scale, or of entries below 512 where `bounded`."""
    scale = BOUNDED_SCALE if bounded else None
    return _run(a, b, scale, symmetric=False, split=scale)


def square_triton(x: Tensor) -> Tensor:
    """x x^T (K, n, n) of float32 (K, n, d) of entries below 512, exactly symmetric."""
    return _run(x, x.mT, BOUNDED_SCALE, symmetric=True, split=1.0)


def combine_triton(weights: Tensor, terms: tuple[Tensor, Tensor, Tensor], minus: Tensor | None) -> Tensor:
    """w_0 I + w_1 t_1 + w_2 t_2 + w_3 t_3 - minus of (K, n, n) and weights (K or 1, 4), all float32."""
    t1, t2, t3 = (t.contiguous() for t in terms)
    weights, out, n = weights.expand(len(t1), -1), torch.empty_like(t1), t1.shape[-1]
    _combine_kernel[(triton.cdiv(n * n, CHUNK), len(t1))](
        weights,
        weights.stride(0),
        t1,
        t2,
        t3,
        t1 if minus is None else minus.contiguous(),
        out,
        n,
        MINUS=minus is not None,
        CHUNK=CHUNK,
    )
    return out
