"""Matrix products in a named precision, and the one symmetric step that every chain of products is made of."""

from importlib.util import find_spec

import torch
from torch import Tensor

# fp32 follows torch's own setting for TF32 on CUDA; fp16x3 does not. The name in -triton picks the kernels.
PRECISIONS = ("fp64", "fp32", "fp16x3", "fp16x3-triton")
HAS_TRITON = find_spec("triton") is not None  # found here: torch.compile cannot trace the question
BOUNDED_SCALE = 64.0  # of entries known to be below 512: rounding to float16 leaves small ones more digits
SPLIT = 2048.0  # the second half of a split carries the next 11 bits, shifted into the range of float16


def resolve(precision: str, x: Tensor) -> str:
    """The precision that `auto` stands for: that of the input on CPU, three products in float16 on CUDA."""
    if precision not in ("auto", *PRECISIONS):
        raise ValueError(f"precision must be one of auto, {', '.join(PRECISIONS)}, got {precision!r}")
    if precision != "auto":
        return precision
    if x.dtype == torch.float64:
        return "fp64"
    if not x.is_cuda:
        return "fp32"
    return "fp16x3-triton" if HAS_TRITON else "fp16x3"


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """x of magnitude below 65504 as high + low / 2048, both float16: 22 bits (Ootomo and Yokota 2022)."""
    high = x.half()
    return high, ((x - high.float()) * SPLIT).half()


def half_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of float16 matrices (K, m, k), (K, k, n), summed and returned in float32."""
    if a.is_cuda:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _split_product(a: Tensor, b: Tensor) -> Tensor:
    a_high, a_low = split(a)
    b_high, b_low = split(b)
    cross = half_product(torch.cat((a_low, a_high), -1), torch.cat((b_high, b_low), -2))
    return half_product(a_high, b_high) + cross / SPLIT


def power_of_two(x: Tensor) -> Tensor:
    """The power of two at or below the largest magnitude of each matrix, (..., 1, 1); 1 for a zero matrix."""
    largest = x.abs().amax((-2, -1), keepdim=True)
    return torch.exp2(torch.floor(torch.log2(torch.where(largest == 0, 1.0, largest))))


def scaled_by(x: Tensor, gain: Tensor) -> Tensor:
    """x gain, in place, for gain (V, 1, 1) float64, at least 0; overflows only where the result does."""
    # in two steps: a product of float32 by float64 takes forty times as long on a CPU
    root = gain.sqrt().clamp_max(torch.finfo(x.dtype).max).to(x.dtype)
    return x.mul_(root).mul_(root)


def product(a: Tensor, b: Tensor, precision: str, *, bounded: bool = False) -> Tensor:
    """a @ b of (K, m, k), (K, k, n) in their dtype; fp16x3 takes and returns float32.

    Of any scale, or `bounded`: entries below 512, the result's too, so that fp16x3 need not look for the largest.
    """
    if precision in ("fp64", "fp32"):
        return a @ b
    if precision == "fp16x3-triton":
        from fastrdm.kernels.linalg.fp16x3_triton import product_triton  # a CPU build of torch has no Triton

        out: Tensor = product_triton(a, b, bounded)
        return out
    if bounded:
        return _split_product(a * BOUNDED_SCALE, b * BOUNDED_SCALE) / BOUNDED_SCALE**2
    unit_a, unit_b = power_of_two(a), power_of_two(b)
    return _split_product(a / unit_a, b / unit_b) * unit_a * unit_b


def axpby(
    a: Tensor,
    b: Tensor,
    precision: str,
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
    add: Tensor | None = None,
    gamma: float = 0.0,
) -> Tensor:
    """alpha a b + beta add + gamma I for commuting symmetric (K, n, n) of entries below 65504; exactly symmetric."""
    if precision == "fp16x3-triton":
        from fastrdm.kernels.linalg.fp16x3_triton import axpby_triton  # a CPU build of torch has no Triton

        out: Tensor = axpby_triton(a, b, add, alpha, beta, gamma)
        return out
    c = a @ b if precision in ("fp64", "fp32") else _split_product(a, b)
    c = (0.5 * alpha) * (c + c.mT)  # rounding breaks the symmetry that keeps the chains stable
    if add is not None:
        c = c.add_(add, alpha=beta)
    if gamma:
        c.diagonal(dim1=-2, dim2=-1).add_(gamma)
    return c
