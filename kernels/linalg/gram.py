"""Gram matrices of feature matrices on their smaller side, centering and row normalization included."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize as unit_rows

from fastrdm.kernels.linalg.matmul import HAS_TRITON, PRECISIONS, half_product, power_of_two, product

LEAF = 128  # rows of the left side of one product
PRECISIONS_OF_GRAM = (
    *PRECISIONS,
    "half",
    "half-triton",
)  # half: one product of operands rounded to float16


def upper_gram(x: Tensor) -> Tensor:
    """The upper triangle of x x^T (V, n, n), for x (V, n, d) in its dtype; what lies below it is not to be read."""
    n = x.shape[-2]
    if x.is_cuda or n <= LEAF:
        return x @ x.mT
    out = x.new_zeros((len(x), n, n))
    for view, gram_of_view in zip(x, out, strict=True):
        for start in range(0, n, LEAF):
            panel = slice(start, start + LEAF)
            # above the diagonal block, or right of it: MKL is up to a fifth faster with one or the other
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


def _choose(precision: str, x: Tensor) -> str:
    if precision not in ("auto", *PRECISIONS_OF_GRAM):
        raise ValueError(f"precision must be one of auto, {', '.join(PRECISIONS_OF_GRAM)}, got {precision!r}")
    if precision != "auto":
        return precision
    if x.dtype == torch.float64:
        return "fp64"
    if not x.is_cuda:
        return "fp32"
    name = "fp16x3" if x.dtype == torch.float32 else "half"
    return f"{name}-triton" if HAS_TRITON else name


def _one(x: Tensor, center: bool, normalize: bool, precision: str, upper: bool) -> Tensor:
    """The definition, for x (K, B, D): rows to length 1, column means subtracted, product on the smaller side."""
    if precision.endswith("-triton"):
        from fastrdm.kernels.linalg.gram_triton import gram_triton  # a CPU build of torch has no Triton

        out: Tensor = gram_triton(x, center, normalize, precision.removesuffix("-triton"))
        return out
    x = x.double() if precision == "fp64" else x.float()
    x = unit_rows(x, dim=-1) if normalize else x
    x = x - x.mean(-2, keepdim=True) if center else x
    x = x if x.shape[-2] <= x.shape[-1] else x.mT
    if precision == "half":
        unit = power_of_two(x)
        high = (x / unit).half()
        return half_product(high, high.mT) * unit**2
    if precision not in ("fp64", "fp32"):
        return product(x, x.mT, precision)
    return upper_gram(x) if upper else symmetric_gram(x)


@torch.no_grad()
def gram_of_one(x: Tensor, center: bool, normalize: bool, precision: str, *, upper: bool = False) -> Tensor:
    """`gram` of one tensor; `upper`: what lies below its diagonal may be zeros, for solvers that do not read it."""
    if x.ndim not in (2, 3) or not x.is_floating_point():
        raise ValueError(
            f"gram takes floats of shape (B, D) or (K, B, D), or a list of (B, D), got {tuple(x.shape)} {x.dtype}"
        )
    with torch.autocast(x.device.type, enabled=False):
        views = x if x.ndim == 3 else x.unsqueeze(0)
        out = _one(views, center, normalize, _choose(precision, x), upper)
    return out if x.ndim == 3 else out[0]


def gram(
    features: Tensor | Sequence[Tensor], *, center: bool = False, normalize: bool = False, precision: str = "auto"
) -> Tensor:
    """x x^T or x^T x, the smaller, of (B, D) -> (n, n) or (K, B, D) -> (K, n, n), n = min(B, D), without gradient.

    A list of K (B_k, D_k) gives (K, n, n) with n the largest, zero-padded: padding adds exact zeros to the spectrum.
    float32 for every precision but fp64. Rows are normalized first, then columns centerd. Two runs are bitwise equal.
    """
    if isinstance(features, Tensor):
        return gram_of_one(features, center, normalize, precision)
    parts = [gram_of_one(x, center, normalize, precision) for x in features]
    if not parts or any(part.ndim != 2 for part in parts):
        raise ValueError(f"gram takes a list of at least one (B, D), got {[tuple(x.shape) for x in features]}")
    size = max(len(part) for part in parts)
    pads = [size - len(part) for part in parts]
    return torch.stack([torch.nn.functional.pad(part, (0, pad, 0, pad)) for part, pad in zip(parts, pads, strict=True)])
