"""Parts that the Triton kernels of this folder share: the split into float16, and tiles stored with their mirrors."""

import triton
import triton.language as tl

from fastrdm.kernels.linalg import matmul

SPLIT = tl.constexpr(matmul.SPLIT)


@triton.jit
def split(x):  # type: ignore[no-untyped-def]
    """High and low float16 parts of a float32 tile, x = high + low / SPLIT."""
    high = x.to(tl.float16)
    return high, ((x - high.to(tl.float32)) * SPLIT).to(tl.float16)


@triton.jit
def store(ptr, tile, rows, columns, m, n, MIRROR: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store a tile of an (m, n) matrix and, where asked for, its mirror image."""
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    tl.store(ptr + rows[:, None] * n + columns[None, :], tile, mask=inside)
    if MIRROR:
        tl.store(ptr + columns[:, None] * n + rows[None, :], tl.trans(tile), mask=tl.trans(inside))
