"""Products of float32 matrices as three float16 products by Triton kernels.

An operand is split into its two float16 parts once, not once a tile, and a product stores its result's parts beside
the result, so that chains of products never split again. Of symmetric results only lower tiles are computed, and
stored with their mirror images.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastrdm.kernels.linalg.matmul import BOUNDED_SCALE, Combination, Precision
from fastrdm.kernels.linalg.tiles_triton import SPLIT, split, store

CHUNK = 2048  # elements that a program splits or combines
# Programs that share the sum of a tile where `programs_a_tile` sees room for them. More than one has not been timed:
# a row of benchmarks/kernels/products.py decides.
PROGRAMS_A_TILE = 1
LONG_SUM = 1024  # terms from which on a tile is shared
# Whether products that are not symmetric load their operands by tensor descriptors where `described` can. It has not
# been timed either: a row of the same benchmark decides.
WIDE_BY_DESCRIPTORS = False


@triton.jit
def _unit(largest):  # type: ignore[no-untyped-def]
    """The power of two at or below `largest`, 1 for 0, as matmul.power_of_two."""
    return tl.exp2(tl.floor(tl.log2(tl.where(largest == 0.0, 1.0, largest))))


@triton.jit
def _split_kernel(x_ptr, largest_ptr, high_ptr, low_ptr, size, scale, UNITS: tl.constexpr, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    batch, place = tl.program_id(1).to(tl.int64), tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    inside, at = place < size, batch * size + place
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) * scale
    if UNITS:
        x = x / _unit(tl.load(largest_ptr + batch))
    high, low = split(x)
    tl.store(high_ptr + at, high, mask=inside)
    tl.store(low_ptr + at, low, mask=inside)


@triton.jit
def _with_terms(c, w, t1_ptr, t2_ptr, t3_ptr, at, inside):  # type: ignore[no-untyped-def]
    """c + w_1 t_1 + w_2 t_2 + w_3 t_3."""
    c += tl.load(w + 1) * tl.load(t1_ptr + at, mask=inside, other=0.0)
    c += tl.load(w + 2) * tl.load(t2_ptr + at, mask=inside, other=0.0)
    return c + tl.load(w + 3) * tl.load(t3_ptr + at, mask=inside, other=0.0)


@triton.jit
def _store_squares(ptr, c, batch, row_tile, column_tile, tiles):  # type: ignore[no-untyped-def]
    """The sum of squares of a lower tile, which counts for its mirror image too where it has one."""
    total = tl.sum(tl.sum((c * c).to(tl.float64), axis=1), axis=0)
    place = batch * (tiles * (tiles + 1) // 2) + row_tile * (row_tile + 1) // 2 + column_tile
    tl.store(ptr + place, total * tl.where(row_tile == column_tile, 1.0, 2.0))


@triton.jit
def _sum_of_terms(  # type: ignore[no-untyped-def]
    a_high_ptr,
    a_low_ptr,
    b_high_ptr,
    b_low_ptr,
    batch,
    row_tile,
    column_tile,
    first,
    last,
    m,
    n,
    depth,
    a_row,
    a_column,
    b_row,
    b_column,
    ALIGNED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    TURNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A tile of a b summed over its terms from `first` up to `last`.

    With DESCRIPTORS the operands are not pointers but descriptors of blocks. That of b is of (K, depth, n), or of
    (K, n, depth) where it is TURNED.
    """
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = first + tl.arange(0, DEPTH)
    a_at = batch * m * depth + rows[:, None] * a_row + k[None, :] * a_column
    b_at = batch * n * depth + k[:, None] * b_row + columns[None, :] * b_column
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    cross = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(first, last, DEPTH):
        if DESCRIPTORS:
            a_place = [batch.to(tl.int32), row_tile * BLOCK_M, k0]
            a_high = a_high_ptr.load(a_place).reshape(BLOCK_M, DEPTH)
            a_low = a_low_ptr.load(a_place).reshape(BLOCK_M, DEPTH)
            if TURNED:
                b_place = [batch.to(tl.int32), column_tile * BLOCK_N, k0]
                b_high = tl.trans(b_high_ptr.load(b_place).reshape(BLOCK_N, DEPTH))
                b_low = tl.trans(b_low_ptr.load(b_place).reshape(BLOCK_N, DEPTH))
            else:
                b_place = [batch.to(tl.int32), k0, column_tile * BLOCK_N]
                b_high = b_high_ptr.load(b_place).reshape(DEPTH, BLOCK_N)
                b_low = b_low_ptr.load(b_place).reshape(DEPTH, BLOCK_N)
        elif ALIGNED:
            a_high, a_low = tl.load(a_high_ptr + a_at), tl.load(a_low_ptr + a_at)
            b_high, b_low = tl.load(b_high_ptr + b_at), tl.load(b_low_ptr + b_at)
        else:
            inside = k0 + tl.arange(0, DEPTH) < depth
            a_inside, b_inside = (rows < m)[:, None] & inside[None, :], inside[:, None] & (columns < n)[None, :]
            a_high = tl.load(a_high_ptr + a_at, mask=a_inside, other=0.0)
            a_low = tl.load(a_low_ptr + a_at, mask=a_inside, other=0.0)
            b_high = tl.load(b_high_ptr + b_at, mask=b_inside, other=0.0)
            b_low = tl.load(b_low_ptr + b_at, mask=b_inside, other=0.0)
        total = tl.dot(a_high, b_high, total)
        cross = tl.dot(a_low, b_high, cross)
        cross = tl.dot(a_high, b_low, cross)
        a_at += DEPTH * a_column
        b_at += DEPTH * b_row
    return total + cross / SPLIT


@triton.jit
def _share_kernel(  # type: ignore[no-untyped-def]
    a_high_ptr,
    a_low_ptr,
    b_high_ptr,
    b_low_ptr,
    share_ptr,
    m,
    n,
    depth,
    share,
    a_row,
    a_column,
    b_row,
    b_column,
    SYMMETRIC: tl.constexpr,
    ALIGNED: tl.constexpr,
    SHARES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """`share` terms of one tile of a b, into a workspace (K, SHARES, tiles down, tiles across) of whole tiles."""
    row_tile, column_tile, program = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if SYMMETRIC and column_tile > row_tile:
        return
    first = program % SHARES * share
    c = _sum_of_terms(
        a_high_ptr,
        a_low_ptr,
        b_high_ptr,
        b_low_ptr,
        (program // SHARES).to(tl.int64),
        row_tile,
        column_tile,
        first,
        tl.minimum(first + share, depth),
        m,
        n,
        depth,
        a_row,
        a_column,
        b_row,
        b_column,
        ALIGNED,
        False,
        False,
        BLOCK_M,
        BLOCK_N,
        DEPTH,
    )
    place = (program * tl.num_programs(0) + row_tile).to(tl.int64) * tl.num_programs(1) + column_tile
    inner = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    tl.store(share_ptr + place * BLOCK_M * BLOCK_N + inner, c)


@triton.jit
def _product_kernel(  # type: ignore[no-untyped-def]  # noqa: C901
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
    weight_ptr,
    weight_stride,
    t1_ptr,
    t2_ptr,
    t3_ptr,
    square_ptr,
    share_ptr,
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
    COMBINED: tl.constexpr,
    SQUARES: tl.constexpr,
    KEEP_PARTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    SHARES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    TURNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One tile of alpha a b + beta add + gamma I + combined, its two parts at `scale`, and its sum of squares.

    With several SHARES, a b comes from the workspace that `_share_kernel` filled, added in the order of the terms.
    """
    row_tile, column_tile = tl.program_id(0), tl.program_id(1)
    if SYMMETRIC and column_tile > row_tile:
        return
    batch = tl.program_id(2).to(tl.int64)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    if SHARES == 1:
        c = _sum_of_terms(
            a_high_ptr,
            a_low_ptr,
            b_high_ptr,
            b_low_ptr,
            batch,
            row_tile,
            column_tile,
            0,
            depth,
            m,
            n,
            depth,
            a_row,
            a_column,
            b_row,
            b_column,
            ALIGNED,
            DESCRIPTORS,
            TURNED,
            BLOCK_M,
            BLOCK_N,
            DEPTH,
        )
    else:
        tiles = tl.num_programs(0) * tl.num_programs(1)
        place = batch * SHARES * tiles + row_tile * tl.num_programs(1) + column_tile
        inner = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        c = tl.load(share_ptr + place * BLOCK_M * BLOCK_N + inner)
        for i in tl.static_range(1, SHARES):
            c += tl.load(share_ptr + (place + i * tiles) * BLOCK_M * BLOCK_N + inner)
    c = alpha * c
    if UNITS:
        c = c * _unit(tl.load(a_largest_ptr + batch)) * _unit(tl.load(b_largest_ptr + batch))
    if SYMMETRIC and row_tile == column_tile:
        c = 0.5 * (c + tl.trans(c))
    start = batch * m * n
    if ADD:
        inside = (rows < m)[:, None] & (columns < n)[None, :]
        c += beta * tl.load(add_ptr + start + rows[:, None] * n + columns[None, :], mask=inside, other=0.0)
    if COMBINED:
        inside = (rows < m)[:, None] & (columns < n)[None, :]
        at, w = start + rows[:, None] * n + columns[None, :], weight_ptr + batch * weight_stride
        gamma += tl.load(w)
        c = _with_terms(c, w, t1_ptr, t2_ptr, t3_ptr, at, inside)
    if SYMMETRIC:
        c += tl.where(rows[:, None] == columns[None, :], gamma, 0.0)
    if SQUARES:
        _store_squares(square_ptr, c, batch, row_tile, column_tile, tl.num_programs(0))
    store(out_ptr + start, c, rows, columns, m, n, SYMMETRIC)
    if KEEP_PARTS:
        high, low = split(c * scale)
        store(high_ptr + start, high, rows, columns, m, n, SYMMETRIC)
        store(low_ptr + start, low, rows, columns, m, n, SYMMETRIC)


@triton.jit
def _combine_kernel(  # type: ignore[no-untyped-def]
    weight_ptr, weight_stride, t1_ptr, t2_ptr, t3_ptr, out_ptr, high_ptr, low_ptr, n, CHUNK: tl.constexpr
):
    batch, place = tl.program_id(1).to(tl.int64), tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    inside, at = place < n * n, batch * n * n + place
    w = weight_ptr + batch * weight_stride
    c = tl.where(place // n == place % n, tl.load(w), 0.0)
    c = _with_terms(c, w, t1_ptr, t2_ptr, t3_ptr, at, inside)
    tl.store(out_ptr + at, c, mask=inside)
    high, low = split(c)
    tl.store(high_ptr + at, high, mask=inside)
    tl.store(low_ptr + at, low, mask=inside)


class Parts(NamedTuple):
    """A matrix times its scale as high + low / SPLIT, each part laid out in memory as the matrix is."""

    high: Tensor
    """float16."""
    low: Tensor
    """float16."""
    largest: Tensor | None
    """(K,) float32, the largest magnitude, where each matrix was divided by the power of two at it; else None."""


def empty_parts(x: Tensor) -> Parts:
    """Parts of the shape of x, to be filled."""
    return Parts(torch.empty_like(x, dtype=torch.float16), torch.empty_like(x, dtype=torch.float16), None)


def turned(parts: Parts) -> Parts:
    """The parts of the transposed matrix, the same memory; for parts at one scale."""
    return Parts(parts.high.mT, parts.low.mT, None)


def split_dense(x: Tensor, scale: float | None) -> Parts:
    """Parts of a dense (K, m, k) times `scale`. None divides each matrix by the power of two at its largest entry."""
    largest = torch.linalg.vector_norm(x, torch.inf, (-2, -1)).float() if scale is None else None
    high, low = (torch.empty_like(x, dtype=torch.float16) for _ in range(2))
    size = x[0].numel()
    _split_kernel[(triton.cdiv(size, CHUNK), len(x))](
        x, largest, high, low, size, scale or 1.0, UNITS=scale is None, CHUNK=CHUNK
    )
    return Parts(high, low, largest)


class SplitMatrix:
    """A float32 matrix (K, m, k) and its parts at the scale that was asked for last."""

    def __init__(self, dense: Tensor, parts: Parts | None = None, scale: float = 1.0) -> None:
        """`parts` at `scale` where the product that made `dense` stored them; made when first needed otherwise."""
        self.dense = dense if dense.is_contiguous() or dense.mT.is_contiguous() else dense.contiguous()
        self._parts, self._scale = parts, scale

    def parts(self, scale: float) -> Parts:
        """The parts of `scale` times the matrix."""
        if self._parts is None or self._scale != scale:
            self._parts, self._scale = split_dense(self.dense, scale), scale
        return self._parts

    def kept(self, scale: float) -> tuple[Parts, float]:
        """The parts at the scale at which there are any, else at `scale`, and that scale."""
        return (self.parts(scale), scale) if self._parts is None else (self._parts, self._scale)


class Tile(NamedTuple):
    """How a product is cut."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


@cache
def has_wgmma(device: torch.device) -> bool:
    """Whether tensor cores read operands from shared memory, as on sm_90 and sm_100; elsewhere registers hold them.

    True where there is no such device to ask: kernels that are only counted or interpreted are those of sm_90.
    """
    asked = device.type == "cuda" and torch.cuda.is_available()
    return not asked or torch.cuda.get_device_capability(device)[0] in (9, 10)


def tile_of(symmetric: bool, m: int, n: int, wgmma: bool = True) -> Tile:
    """The fastest of benchmarks/results/products_h200.csv for a result (m, n): small ones where tiles are few.

    Without `wgmma` the large tiles of other shapes are half as deep: at full depth they spill registers on sm_80.
    """
    if symmetric:
        return Tile(32, 32, 64, 2, 4) if m <= 256 else Tile(64, 64, 64, 4, 3)
    if m <= 128 or n <= 512:
        return Tile(64, 64, 64, 4, 4)
    depth = 64 if wgmma else 32
    return Tile(64, 128, depth, 4, 3) if m <= 256 else Tile(128, 128, depth, 8, 3)


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a device; 132, as an H100 and an H200 have, where there is no such device to ask."""
    asked = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_properties(device).multi_processor_count if asked else 132


def programs_a_tile(symmetric: bool, count: int, n: int, depth: int, device: torch.device) -> int:
    """How many programs share the sum of one tile of `count` symmetric results (n, n): PROGRAMS_A_TILE, or 1.

    Sums are shared where they are long and the tiles leave multiprocessors idle. A square of two views of 512 x 2048
    has 72 tiles for 132 of them and took 17.7 us, a product with sums of 512 terms 8.1
    (benchmarks/results/products_h200.csv). Sharing costs a launch and a workspace.
    """
    few = symmetric and count * lower_tiles(n) < multiprocessors(device)
    return PROGRAMS_A_TILE if few and depth >= LONG_SUM else 1


def described(a: Parts, b: Parts, tile: Tile) -> list[TensorDescriptor] | None:
    """Descriptors of the blocks of a and b that a product loads, b's as it lies in memory, for the hardware's copies.

    None where memory does not allow it: rows must lie together, as multiples of 16 bytes. The descriptors are made on
    the host and travel as arguments, so that no allocator is needed and a CUDA graph holds them.
    """
    a_block, b_block = [1, tile.rows, tile.depth], [1, tile.depth, tile.columns]
    if b.high.stride(-1) != 1:
        b, b_block = turned(b), [1, tile.columns, tile.depth]
    operands = [(a.high, a_block), (a.low, a_block), (b.high, b_block), (b.low, b_block)]
    if any(x.stride(-1) != 1 or x.stride(0) % 8 or x.stride(1) % 8 or x.data_ptr() % 16 for x, _ in operands):
        return None
    return [TensorDescriptor.from_tensor(x, block) for x, block in operands]


def multiply(
    a: Parts,
    b: Parts,
    scale: float | None,
    *,
    symmetric: bool,
    keep: float | None,
    alpha: float = 1.0,
    beta: float = 0.0,
    add: Tensor | None = None,
    gamma: float = 0.0,
    combined: Combination[SplitMatrix] | None = None,
    squares: Tensor | None = None,
) -> tuple[Tensor, Parts | None]:
    """alpha a b + beta add + gamma I + combined of operands split at `scale`, and the result's parts at `keep`.

    Operands split at different scales: `scale` is the root of their product. `squares` (K, lower tiles) float64 gets
    the sum of squares of each tile of a symmetric result, mirror image included.
    """
    count, m, depth = a.high.shape
    n = b.high.shape[-1]
    tile = tile_of(symmetric, m, n, has_wgmma(a.high.device))
    down, across = triton.cdiv(m, tile.rows), triton.cdiv(n, tile.columns)
    shares = programs_a_tile(symmetric, count, n, depth, a.high.device)
    by_descriptors = WIDE_BY_DESCRIPTORS and not symmetric and has_wgmma(a.high.device)
    descriptors = described(a, b, tile) if by_descriptors else None
    how: dict[str, int] = {
        "SYMMETRIC": symmetric,
        "ALIGNED": not (m % tile.rows or n % tile.columns or depth % tile.depth),
    }
    how |= {"SHARES": shares, "BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "DEPTH": tile.depth}
    how |= {"num_warps": tile.warps, "num_stages": tile.stages}
    strides = (*a.high.stride()[1:], *b.high.stride()[1:])
    operands: Sequence[Any] = (a.high, a.low, b.high, b.low)
    shared = None
    if shares > 1:
        shared = a.high.new_empty((count, shares, down, across, tile.rows, tile.columns), dtype=torch.float32)
        share = triton.cdiv(triton.cdiv(depth, tile.depth), shares) * tile.depth
        _share_kernel[(down, across, count * shares)](*operands, shared, m, n, depth, share, *strides, **how)
    out = a.high.new_empty((count, m, n), dtype=torch.float32)
    high, low = (torch.empty_like(out, dtype=torch.float16) if keep else out for _ in range(2))
    weights, terms = (out, (out, out, out)) if combined is None else _dense_combination(combined, count)
    _product_kernel[(down, across, count)](
        *(descriptors or operands),
        a.largest,
        b.largest,
        out if add is None else add.contiguous(),
        out,
        high,
        low,
        weights,
        weights.stride(0),
        *terms,
        squares,
        shared,
        m,
        n,
        depth,
        *strides,
        alpha / (scale or 1.0) ** 2,
        beta,
        gamma,
        keep or 1.0,
        UNITS=scale is None,
        ADD=add is not None,
        COMBINED=combined is not None,
        SQUARES=squares is not None,
        KEEP_PARTS=keep is not None,
        DESCRIPTORS=descriptors is not None,
        TURNED=b.high.stride(-1) != 1,
        **how,
    )
    return out, Parts(high, low, None) if keep else None


def _dense_combination(combined: Combination[SplitMatrix], count: int) -> tuple[Tensor, list[Tensor]]:
    """Weights (K, 4) and terms as the kernels read them."""
    return combined.weights.expand(count, -1), [term.dense.contiguous() for term in combined.terms]


def lower_tiles(n: int) -> int:
    """Number of tiles that a symmetric result (n, n) is computed in."""
    tiles: int = triton.cdiv(n, tile_of(True, n, n).rows)
    return tiles * (tiles + 1) // 2


class Fp16x3Triton(Precision[SplitMatrix]):
    """Three float16 products by the kernels of this file."""

    root_shift = 2e-6  # measured: rounding takes 5e-7
    fused = True

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        first, second = (split_dense(SplitMatrix(x).dense, None) for x in (a, b))
        return multiply(first, second, None, symmetric=False, keep=None)[0]

    def matrix(self, dense: Tensor) -> SplitMatrix:
        return SplitMatrix(dense)

    def dense(self, matrix: SplitMatrix) -> Tensor:
        return matrix.dense

    def bounded_product(self, a: SplitMatrix, b: SplitMatrix) -> SplitMatrix:
        (first, one), (second, other) = a.kept(BOUNDED_SCALE), b.kept(BOUNDED_SCALE)
        out, parts = multiply(first, second, (one * other) ** 0.5, symmetric=False, keep=BOUNDED_SCALE)
        return SplitMatrix(out, parts, BOUNDED_SCALE)

    def symmetric_product(self, a: SplitMatrix, b: SplitMatrix, gamma: float = 0.0) -> SplitMatrix:
        (first, one), (second, other) = a.kept(BOUNDED_SCALE), b.kept(BOUNDED_SCALE)
        scale = (one * other) ** 0.5
        return SplitMatrix(*multiply(first, turned(second), scale, symmetric=True, keep=1.0, gamma=gamma))

    def axpby(
        self,
        a: SplitMatrix,
        b: SplitMatrix,
        *,
        alpha: float = 1.0,
        beta: float = 0.0,
        add: SplitMatrix | None = None,
        gamma: float = 0.0,
        combined: Combination[SplitMatrix] | None = None,
    ) -> SplitMatrix:
        added = None if add is None else add.dense
        first, second = a.parts(1.0), b.parts(1.0)
        made = multiply(
            first,
            second,
            1.0,
            symmetric=True,
            keep=1.0,
            alpha=alpha,
            beta=beta,
            add=added,
            gamma=gamma,
            combined=combined,
        )
        return SplitMatrix(*made)

    def combine(self, combination: Combination[SplitMatrix]) -> SplitMatrix:
        count, n, _ = combination.terms[0].dense.shape
        weights, terms = _dense_combination(combination, count)
        out = torch.empty_like(terms[0])
        parts = empty_parts(out)
        _combine_kernel[(triton.cdiv(n * n, CHUNK), count)](
            weights, weights.stride(0), *terms, out, parts.high, parts.low, n, CHUNK=CHUNK
        )
        return SplitMatrix(out, parts)
