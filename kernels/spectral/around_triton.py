"""What surrounds a filter's products, in Triton kernels: the dominant direction, scaling, splitting and the last sum.

Every step has its definition in plain torch (dominant.py, polar.scale, Factors.apply). There each small operation is a
kernel of its own, some hundred and fifty for s^-1, beside 35 products. Sums are float64 and made in a fixed order.
"""

import triton
import triton.language as tl
from torch import Tensor, dtype, float32, float64

from fastrdm.kernels.linalg.fp16x3_triton import (
    CHUNK,
    Fp16x3Triton,
    Parts,
    SplitMatrix,
    empty_parts,
    lower_tiles,
    multiply,
    turned,
)
from fastrdm.kernels.linalg.matmul import BOUNDED_SCALE
from fastrdm.kernels.linalg.tiles_triton import split
from fastrdm.kernels.spectral.dominant import ALONE, ROUNDS, Dominant
from fastrdm.kernels.spectral.filter_factors import Function
from fastrdm.kernels.spectral.polar import Scaled

ROWS = 16  # rows of x that a program of the power iteration takes
BLOCK = 128  # columns that it takes at a time
WIDE = 1024  # columns that a program of one row takes at a time


@triton.jit
def _squares_kernel(x_ptr, square_ptr, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sum of squares of one row."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float64)
    for d0 in range(0, width, BLOCK):
        d = d0 + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * width + d, mask=d < width, other=0.0).to(tl.float64)
        total += x * x
    tl.store(square_ptr + row, tl.sum(total, axis=0))


@triton.jit
def _total(ptr, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sum of `count` float64 numbers."""
    total = tl.zeros((BLOCK,), tl.float64)
    for k0 in range(0, count, BLOCK):
        k = k0 + tl.arange(0, BLOCK)
        total += tl.load(ptr + k, mask=k < count, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _joined(part_ptr, parts, width, d, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Columns d of x^T left, which the programs of a round have left in parts (parts, width)."""
    total = tl.zeros_like(d).to(tl.float64)
    for p0 in range(0, parts, ROWS):
        p = p0 + tl.arange(0, ROWS)
        inside = (p < parts)[:, None] & (d < width)[None, :]
        total += tl.sum(tl.load(part_ptr + p[:, None] * width + d[None, :], mask=inside, other=0.0), axis=0)
    return total


@triton.jit
def _round_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    square_ptr,
    before_ptr,
    left_ptr,
    part_ptr,
    height,
    width,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One round of the power iteration: left = x v / |v| for some rows, and their part of x^T left.

    v is the longest row in the first round, and what the round before left in parts in the others.
    """
    batch, program, parts = tl.program_id(1).to(tl.int64), tl.program_id(0), tl.num_programs(0)
    x_ptr += batch * height * width
    rows = program * ROWS + tl.arange(0, ROWS)
    if FIRST:
        every = tl.arange(0, COUNT)
        lengths = tl.load(square_ptr + batch * height + every, mask=every < height, other=-1.0)
        longest = tl.minimum(tl.argmax(lengths, axis=0), height - 1)
    length = tl.zeros((BLOCK,), tl.float64)
    left = tl.zeros((ROWS,), tl.float64)
    for d0 in range(0, width, BLOCK):
        d = d0 + tl.arange(0, BLOCK)
        if FIRST:
            v = tl.load(x_ptr + longest * width + d, mask=d < width, other=0.0).to(tl.float64)
        else:
            v = _joined(before_ptr + batch * parts * width, parts, width, d, ROWS)
        inside = (rows < height)[:, None] & (d < width)[None, :]
        x = tl.load(x_ptr + rows[:, None] * width + d[None, :], mask=inside, other=0.0).to(tl.float64)
        left += tl.sum(x * v[None, :], axis=1)
        length += v * v
    norm = tl.sqrt(tl.sum(length, axis=0))
    left = left / tl.where(norm == 0.0, 1.0, norm)
    tl.store(left_ptr + batch * height + rows, left, mask=rows < height)
    for d0 in range(0, width, BLOCK):
        d = d0 + tl.arange(0, BLOCK)
        inside = (rows < height)[:, None] & (d < width)[None, :]
        x = tl.load(x_ptr + rows[:, None] * width + d[None, :], mask=inside, other=0.0).to(tl.float64)
        at = part_ptr + (batch * parts + program) * width + d
        tl.store(at, tl.sum(x * left[:, None], axis=0), mask=d < width)


@triton.jit
def _rest_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    square_ptr,
    part_ptr,
    left_ptr,
    rest_ptr,
    rest_square_ptr,
    out_left_ptr,
    size_ptr,
    right_ptr,
    height,
    width,
    ALONE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some rows without the dominant direction, and their sum of squares; the direction, zero where it is not alone."""
    batch, program, parts = tl.program_id(1).to(tl.int64), tl.program_id(0), tl.num_programs(0)
    part_ptr += batch * parts * width
    rows = program * ROWS + tl.arange(0, ROWS)
    left_square = tl.zeros((BLOCK,), tl.float64)
    for k0 in range(0, height, BLOCK):
        k = k0 + tl.arange(0, BLOCK)
        left = tl.load(left_ptr + batch * height + k, mask=k < height, other=0.0)
        left_square += left * left
    length = tl.sum(left_square, axis=0)
    along_square = tl.zeros((BLOCK,), tl.float64)
    for d0 in range(0, width, BLOCK):
        along = _joined(part_ptr, parts, width, d0 + tl.arange(0, BLOCK), ROWS)
        along_square += along * along
    along_length = tl.sum(along_square, axis=0)
    # x without left left^T x has the squares of x less those of left^T x.
    size_square = along_length / tl.where(length == 0.0, 1.0, length)
    energy = _total(square_ptr + batch * height, height, BLOCK)
    alone = (energy - size_square <= ALONE * ALONE * size_square) & (size_square > 0)
    left = tl.load(left_ptr + batch * height + rows, mask=rows < height, other=0.0)
    share = tl.where(alone, left / tl.where(length == 0.0, 1.0, length), 0.0)
    squares = tl.zeros((ROWS,), tl.float64)
    norm = tl.sqrt(tl.where(along_length == 0.0, 1.0, along_length))
    for d0 in range(0, width, BLOCK):
        d = d0 + tl.arange(0, BLOCK)
        along = _joined(part_ptr, parts, width, d, ROWS)
        inside = (rows < height)[:, None] & (d < width)[None, :]
        at = batch * height * width + rows[:, None] * width + d[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float64)
        x = tl.where(alone, x - share[:, None] * along[None, :], x)
        tl.store(rest_ptr + at, x.to(tl.float32), mask=inside)
        squares += tl.sum(x * x, axis=1)
        if program == 0:
            tl.store(right_ptr + batch * width + d, tl.where(alone, along / norm, 0.0), mask=d < width)
    tl.store(rest_square_ptr + batch * height + rows, squares, mask=rows < height)
    unit_left = tl.where(alone, left / tl.sqrt(tl.where(length == 0.0, 1.0, length)), 0.0)
    tl.store(out_left_ptr + batch * height + rows, unit_left, mask=rows < height)
    if program == 0:
        tl.store(size_ptr + batch, tl.where(alone, tl.sqrt(size_square), 0.0))


@triton.jit
def _divide(x_ptr, by, high_ptr, low_ptr, at, inside, scale):  # type: ignore[no-untyped-def]
    """Elements of a matrix divided, whose parts at `scale` are stored; by zero nothing is divided."""
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float64) * (1.0 / tl.where(by == 0.0, 1.0, by))
    x = x.to(tl.float32)
    high, low = split(x * scale)
    tl.store(high_ptr + at, high, mask=inside)
    tl.store(low_ptr + at, low, mask=inside)
    return x


@triton.jit
def _over_norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr, square_ptr, norm_ptr, high_ptr, low_ptr, elements, squares, scale, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    """Parts of a matrix over its Frobenius norm, and that; `square` holds its square in `squares` parts."""
    batch, place = tl.program_id(1).to(tl.int64), tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    norm = tl.sqrt(_total(square_ptr + batch * squares, squares, BLOCK))
    _divide(x_ptr, norm, high_ptr, low_ptr, batch * elements + place, place < elements, scale)
    if tl.program_id(0) == 0:
        tl.store(norm_ptr + batch, norm)


@triton.jit
def _over_bound_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    gram_ptr,
    square_ptr,
    gram_square_ptr,
    size_ptr,
    share,
    bound_ptr,
    x_out_ptr,
    x_high_ptr,
    x_low_ptr,
    gram_out_ptr,
    gram_high_ptr,
    gram_low_ptr,
    elements,
    gram_elements,
    chunks,
    squares,
    gram_squares,
    scale,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x and the Gram matrix G of x over its norm F, divided by the bound of polar.scale, and that bound.

    b = 1.001 |G^2|_F^(1/4), or `share` of a size over F where that is larger: x is divided by F b, G by b^2. The
    squares of both norms come in parts. The first `chunks` programs take x, the others G.
    """
    batch, program = tl.program_id(1).to(tl.int64), tl.program_id(0)
    norm = tl.sqrt(_total(square_ptr + batch * squares, squares, BLOCK))
    bound = 1.001 * tl.sqrt(tl.sqrt(tl.sqrt(_total(gram_square_ptr + batch * gram_squares, gram_squares, BLOCK))))
    least = tl.load(size_ptr + batch) * share / tl.where(norm == 0.0, 1.0, norm)
    # A comparison, so that NaN stays.
    bound = tl.where(least > bound, least, bound)
    if program == 0:
        tl.store(bound_ptr + batch, bound * norm)
    if program < chunks:
        place = program * CHUNK + tl.arange(0, CHUNK)
        inside, at = place < elements, batch * elements + place
        x = _divide(x_ptr, bound * norm, x_high_ptr, x_low_ptr, at, inside, scale)
        tl.store(x_out_ptr + at, x, mask=inside)
    else:
        place = (program - chunks) * CHUNK + tl.arange(0, CHUNK)
        inside, at = place < gram_elements, batch * gram_elements + place
        g = _divide(gram_ptr, bound * bound, gram_high_ptr, gram_low_ptr, at, inside, 1.0)
        tl.store(gram_out_ptr + at, g, mask=inside)


@triton.jit
def _rows_in_kernel(  # type: ignore[no-untyped-def]
    x_ptr, right_ptr, along_ptr, unit_ptr, high_ptr, low_ptr, height, width, scale, BLOCK: tl.constexpr
):
    """A row without the dominant direction, over a power of two near its largest entry, as parts at `scale`."""
    row, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = (batch * height + row) * width
    along = tl.zeros((BLOCK,), tl.float64)
    for d0 in range(0, width, BLOCK):
        d = d0 + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at + d, mask=d < width, other=0.0).to(tl.float64)
        along += x * tl.load(right_ptr + batch * width + d, mask=d < width, other=0.0)
    length = tl.sum(along, axis=0)
    largest = tl.zeros((BLOCK,), tl.float64)
    for d0 in range(0, width, BLOCK):
        d = d0 + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at + d, mask=d < width, other=0.0).to(tl.float64)
        x -= length * tl.load(right_ptr + batch * width + d, mask=d < width, other=0.0)
        largest = tl.maximum(largest, tl.abs(x))
    most = tl.max(largest, axis=0)
    unit = tl.exp2(tl.floor(tl.log2(tl.where(most == 0.0, 1.0, most))))
    for d0 in range(0, width, BLOCK):
        d = d0 + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at + d, mask=d < width, other=0.0).to(tl.float64)
        x -= length * tl.load(right_ptr + batch * width + d, mask=d < width, other=0.0)
        high, low = split((x / unit).to(tl.float32) * scale)
        tl.store(high_ptr + at + d, high, mask=d < width)
        tl.store(low_ptr + at + d, low, mask=d < width)
    tl.store(along_ptr + batch * height + row, length)
    tl.store(unit_ptr + batch * height + row, unit)


@triton.jit
def _rows_out_kernel(  # type: ignore[no-untyped-def]
    c_ptr,
    unit_ptr,
    gain_ptr,
    along_ptr,
    along_batch,
    weight_ptr,
    right_ptr,
    out_ptr,
    width,
    c_batch,
    c_row,
    c_column,
    exponent,
    factor,
    POWER: tl.constexpr,
    DOMINANT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row of the result: c times its gain, and the dominant direction with its weight.

    With POWER the gain is factor bound^exponent, and the direction's share left size^exponent times the factor.
    """
    row, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gain = tl.load(gain_ptr + batch)
    if POWER:
        gain = tl.where(gain > 0, tl.exp(exponent * tl.log(tl.where(gain > 0, gain, 1.0))) * factor, 0.0)
    else:
        gain = gain * factor
    if DOMINANT:
        weight = tl.load(weight_ptr + batch)
        if POWER:
            size = tl.where(weight > 0, weight, 1.0)
            weight = tl.where(weight > 0, tl.exp(exponent * tl.log(size)) * factor, 0.0)
        else:
            gain = gain * tl.load(unit_ptr + batch * tl.num_programs(0) + row)
    c = tl.load(c_ptr + batch * c_batch + row * c_row + d * c_column, mask=d < width, other=0.0).to(tl.float64) * gain
    if DOMINANT:
        along = tl.load(along_ptr + batch * along_batch + row) * weight
        c += along * tl.load(right_ptr + batch * width + d, mask=d < width, other=0.0)
    out = out_ptr + (batch * tl.num_programs(0) + row) * width + d
    tl.store(out, c.to(out_ptr.dtype.element_ty), mask=d < width)


def _squares(x: Tensor) -> Tensor:
    """Sums of squares (V, n) float64 of the rows of x (V, n, d)."""
    squares = x.new_empty(x.shape[:2], dtype=float64)
    _squares_kernel[(squares.numel(),)](x, squares, x.shape[-1], BLOCK=WIDE)
    return squares


def split_dominant(x: Tensor) -> tuple[Dominant, Tensor, Tensor]:
    """As dominant.split_dominant for x (V, n, d), contiguous, and the sums of squares (V, n) of what remains."""
    views, height, width = x.shape
    programs = triton.cdiv(height, ROWS)
    grid, tile = (programs, views), {"ROWS": ROWS, "BLOCK": BLOCK}
    squares = _squares(x)
    left, out_left, rest_squares = (x.new_empty((views, height, 1), dtype=float64) for _ in range(3))
    parts = [x.new_empty((views, programs, width), dtype=float64) for _ in range(2)]
    for turn in range(ROUNDS):
        before, after = parts[turn % 2], parts[(turn + 1) % 2]
        count = triton.next_power_of_2(height)
        _round_kernel[grid](x, squares, before, left, after, height, width, FIRST=turn == 0, COUNT=count, **tile)
    rest = x.new_empty(x.shape, dtype=float32)
    size, right = (x.new_empty((views, n, 1), dtype=float64) for n in (1, width))
    _rest_kernel[grid](
        x,
        squares,
        parts[ROUNDS % 2],
        left,
        rest,
        rest_squares,
        out_left,
        size,
        right,
        height,
        width,
        ALONE=ALONE,
        **tile,
    )
    return Dominant(out_left, size, right), rest, rest_squares[..., 0]


def _over_frobenius(x: Tensor, squares: Tensor) -> tuple[Parts, Tensor]:
    """Parts at BOUNDED_SCALE of x (V, n, d) over its Frobenius norm, and that (V,), from its rows' squares (V, n)."""
    parts, elements, norm = empty_parts(x), x[0].numel(), x.new_empty(len(x), dtype=float64)
    _over_norm_kernel[(triton.cdiv(elements, CHUNK), len(x))](
        x, squares, norm, parts.high, parts.low, elements, squares.shape[1], BOUNDED_SCALE, CHUNK=CHUNK, BLOCK=BLOCK
    )
    return parts, norm


def prepared(x: Tensor, share: float, precision: Fp16x3Triton) -> tuple[Dominant, Scaled[SplitMatrix]]:
    """The dominant direction of x (V, n, d), and the rest as polar.scale divides it: by `share` of its size or more."""
    x = x.contiguous()
    top, rest, squares = split_dominant(x)
    small, _ = _over_frobenius(rest, squares)
    gram = SplitMatrix(*multiply(small, turned(small), BOUNDED_SCALE, symmetric=True, keep=1.0))
    gram_squares = x.new_empty((len(x), lower_tiles(x.shape[1])), dtype=float64)
    parts = gram.parts(1.0)
    multiply(parts, parts, 1.0, symmetric=True, keep=None, squares=gram_squares)
    bound = x.new_empty((len(x), 1, 1), dtype=float64)
    scaled, scaled_gram = (
        SplitMatrix(y.new_empty(y.shape), empty_parts(y), scale)
        for y, scale in ((rest, BOUNDED_SCALE), (gram.dense, 1.0))
    )
    elements, gram_elements = rest[0].numel(), gram.dense[0].numel()
    chunks = triton.cdiv(elements, CHUNK)
    _over_bound_kernel[(chunks + triton.cdiv(gram_elements, CHUNK), len(x))](
        rest,
        gram.dense,
        squares,
        gram_squares,
        top.size,
        share,
        bound,
        scaled.dense,
        *scaled.parts(BOUNDED_SCALE)[:2],
        scaled_gram.dense,
        *scaled_gram.parts(1.0)[:2],
        elements,
        gram_elements,
        chunks,
        squares.shape[1],
        gram_squares.shape[1],
        BOUNDED_SCALE,
        CHUNK=CHUNK,
        BLOCK=BLOCK,
    )
    return top, Scaled(scaled, scaled_gram, bound)


def _rows_out(
    c: Tensor,
    gain: Tensor,
    factor: float,
    kind: dtype,
    *,
    exponent: float | None = None,
    unit: Tensor | None = None,
    dominant: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """c (V, B, D) times gain (V,) float64, and the share along (V, B) of the dominant direction: see the kernel."""
    views, height, width = c.shape
    out = c.new_empty(c.shape, dtype=kind)
    along, weight, right = (gain, gain, gain) if dominant is None else dominant
    _rows_out_kernel[(height, triton.cdiv(width, WIDE), views)](
        c,
        unit,
        gain,
        along,
        along.stride(0),
        weight,
        right,
        out,
        width,
        *c.stride(),
        exponent or 0.0,
        factor,
        POWER=exponent is not None,
        DOMINANT=dominant is not None,
        BLOCK=WIDE,
    )
    return out


def rows_of(
    c: Tensor, left: Tensor, right: Tensor, bound: Tensor, size: Tensor, function: Function, kind: dtype
) -> Tensor:
    """Rows U S^(1 + power) V^T (V, B, D) of dtype `kind`: c, those of the scaled matrix, and the dominant direction."""
    assert function.power is not None
    found, factor = (left, size, right.contiguous()), function.unit**-function.power
    return _rows_out(c, bound, factor, kind, exponent=1 + function.power, dominant=found)


def apply(
    x: Tensor, basis: SplitMatrix | None, core: SplitMatrix, gain: Tensor, right: Tensor, weight: Tensor
) -> Tensor:
    """x W (V, B, D) in x's dtype, as Factors.apply: entries of the basis are at most 1, those of the core below 512."""
    x = x.contiguous()
    views, height, width = x.shape
    right = right.contiguous()
    parts = empty_parts(x)
    along, unit = (x.new_empty((views, height), dtype=float64) for _ in range(2))
    _rows_in_kernel[(height, views)](
        x, right, along, unit, *parts[:2], height, width, BOUNDED_SCALE, BLOCK=min(WIDE, triton.next_power_of_2(width))
    )
    # Rows keep BOUNDED_SCALE as far as the core, whose result may be larger: its parts are kept as they are.
    center, scale = core.kept(1.0)
    mixed = (BOUNDED_SCALE * scale) ** 0.5
    if basis is None:
        c, _ = multiply(parts, center, mixed, symmetric=False, keep=None)
    else:
        across = basis.parts(BOUNDED_SCALE)
        _, inside = multiply(parts, turned(across), BOUNDED_SCALE, symmetric=False, keep=BOUNDED_SCALE)
        assert inside is not None
        _, weighted = multiply(inside, center, mixed, symmetric=False, keep=1.0)
        assert weighted is not None
        c, _ = multiply(weighted, across, BOUNDED_SCALE**0.5, symmetric=False, keep=None)
    return _rows_out(c, gain, 1.0, x.dtype, unit=unit, dominant=(along, weight, right))


def squared(x: Tensor, unit: float) -> Tensor:
    """x x^T x / unit^2 (V, n, d) in the dtype of x: the filter s^2 of a wide matrix."""
    x = x.contiguous()
    parts, norm = _over_frobenius(x, _squares(x))
    _, gram = multiply(parts, turned(parts), BOUNDED_SCALE, symmetric=True, keep=1.0)
    assert gram is not None
    c, _ = multiply(gram, parts, BOUNDED_SCALE**0.5, symmetric=False, keep=None)
    return _rows_out(c, norm, unit**-2, x.dtype, exponent=3.0)
