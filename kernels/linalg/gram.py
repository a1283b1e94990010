"""Gram matrices of feature matrices on their smaller side, centering and row normalization included."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastrdm.kernels.linalg.matmul import Fp16x3, half_product, power_of_two
from fastrdm.kernels.triton_support import HAS_TRITON, triton_module

LEAF = 128  # rows of the left side of one product


def upper_gram(x: Tensor) -> Tensor:
    """The upper triangle of x x^T (V, n, n), for x (V, n, d) in its dtype. Nothing below it may be read."""
    n = x.shape[-2]
    if x.is_cuda or n <= LEAF:
        return x @ x.mT
    out = x.new_zeros((len(x), n, n))
    for view, gram_of_view in zip(x, out, strict=True):
        for start in range(0, n, LEAF):
            panel = slice(start, start + LEAF)
            # Above the diagonal block, or right of it: MKL is up to a fifth faster with one or the other.
            rows, columns = (slice(panel.stop), panel) if x.is_contiguous() else (panel, slice(start, None))
            torch.mm(view[rows], view[columns].mT, out=gram_of_view[rows, columns])
    return out


def symmetric_gram(x: Tensor) -> Tensor:
    """x x^T (V, n, n) of (V, n, d) in x's dtype, each pair of rows multiplied once (on CUDA the library's product)."""
    out = upper_gram(x)
    for start in range(0, 0 if x.is_cuda else x.shape[-2], LEAF):
        rows, rest = slice(start, start + LEAF), slice(start + LEAF, None)
        out[..., rest, rows] = out[..., rows, rest].mT
    return out


def _exact(x: Tensor, upper: bool) -> Tensor:
    """x x^T in x's dtype."""
    return upper_gram(x) if upper else symmetric_gram(x)


def _fp16x3(x: Tensor, upper: bool) -> Tensor:
    """x x^T in three float16 products."""
    return Fp16x3().product(x, x.mT)


def _half(x: Tensor, upper: bool) -> Tensor:
    """x x^T of x rounded to float16, summed in float32."""
    unit = power_of_two(x)
    high = (x / unit).half()
    return half_product(high, high.mT) * unit**2


def unit_rows(x: Tensor) -> Tensor:
    """Rows of x (..., D) at length 1, in its dtype; zero rows stay zero, and no row is too short or too long.

    A power of two is taken out of each row first: torch's normalize leaves rows below 1e-12 as short as they are, and
    squares overflow or vanish. Where neither happens the bits are those of normalize.
    """
    return torch.nn.functional.normalize(x / power_of_two(x.unsqueeze(-2)).squeeze(-2), dim=-1)


# Gram matrices of features (K, B, D), told whether to center, to normalize, and whether the upper triangle is enough.
_Gram = Callable[[Tensor, bool, bool, bool], Tensor]


def _by_torch(dtype: torch.dtype, product: Callable[[Tensor, bool], Tensor]) -> _Gram:
    """The definition: rows to length 1, column means subtracted, and the product on the smaller side, in `dtype`."""

    def gram_of(x: Tensor, center: bool, normalize: bool, upper: bool) -> Tensor:
        x = x.to(dtype)
        x = unit_rows(x) if normalize else x
        x = x - x.mean(-2, keepdim=True) if center else x
        return product(x if x.shape[-2] <= x.shape[-1] else x.mT, upper)

    return gram_of


def _fp16x3_triton(x: Tensor, center: bool, normalize: bool, upper: bool) -> Tensor:
    """Rows are centered and normalized in float32, then multiplied in three float16 products."""
    out: Tensor = triton_module("linalg.gram_triton").gram_triton(x, center, normalize)
    return out


def _half_triton(x: Tensor, center: bool, normalize: bool, upper: bool) -> Tensor:
    """Half rows are multiplied as they are; centering and normalization follow in float64."""
    half_grams = triton_module("linalg.half_gram_triton").half_grams
    out: Tensor = half_grams([x], [center], normalize, torch.float32)[0][0]
    return out


_GRAMS: dict[str, _Gram] = {
    "fp64": _by_torch(torch.float64, _exact),
    "fp32": _by_torch(torch.float32, _exact),
    "fp16x3": _by_torch(torch.float32, _fp16x3),
    "fp16x3-triton": _fp16x3_triton,
    "half": _by_torch(torch.float32, _half),
    "half-triton": _half_triton,
}


def choose(precision: str, x: Tensor) -> str:
    """The name that `auto` stands for: the input's own precision on a CPU, float16 products on CUDA.

    There float32 takes three of them, and so do half features with more rows than columns where Triton is installed.
    """
    if precision not in ("auto", *_GRAMS):
        raise ValueError(f"precision must be one of auto, {', '.join(_GRAMS)}, got {precision!r}")
    if precision != "auto":
        return precision
    if x.dtype == torch.float64:
        return "fp64"
    if not x.is_cuda:
        return "fp32"
    if not HAS_TRITON:
        return "fp16x3" if x.dtype == torch.float32 else "half"
    return "half-triton" if triton_module("linalg.half_gram_triton").takes(x) else "fp16x3-triton"


@torch.no_grad()
def gram_of_one(x: Tensor, center: bool, normalize: bool, precision: str, *, upper: bool = False) -> Tensor:
    """Gram matrices as `gram` makes them, of one tensor.

    `upper` leaves anything below the diagonal, for a solver that does not read it.
    """
    if x.ndim not in (2, 3) or not x.is_floating_point():
        raise ValueError(
            f"gram takes floats of shape (B, D) or (K, B, D), or a list of (B, D), got {tuple(x.shape)} {x.dtype}"
        )
    with torch.autocast(x.device.type, enabled=False):
        views = x if x.ndim == 3 else x.unsqueeze(0)
        out = _GRAMS[choose(precision, x)](views, center, normalize, upper)
    return out if x.ndim == 3 else out[0]


def gram(
    features: Tensor | Sequence[Tensor], *, center: bool = False, normalize: bool = False, precision: str = "auto"
) -> Tensor:
    """x x^T or x^T x, the smaller, of (B, D) -> (n, n) or (K, B, D) -> (K, n, n), n = min(B, D), without gradient.

    A list of K (B_k, D_k) gives (K, n, n) with n the largest, zero-padded: padding adds exact zeros to the spectrum.
    float32 for every precision but fp64. Rows are normalized first, then columns centered. Two runs are bitwise equal.
    """
    if isinstance(features, Tensor):
        return gram_of_one(features, center, normalize, precision)
    parts = [gram_of_one(x, center, normalize, precision) for x in features]
    if not parts or any(part.ndim != 2 for part in parts):
        raise ValueError(f"gram takes a list of at least one (B, D), got {[tuple(x.shape) for x in features]}")
    size = max(len(part) for part in parts)
    pads = [size - len(part) for part in parts]
    return torch.stack([torch.nn.functional.pad(part, (0, pad, 0, pad)) for part, pad in zip(parts, pads, strict=True)])
