"""Spectral filters by a float64 eigendecomposition of the smaller Gram matrix: exact, the CPU path, the oracle."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

# Smallest singular value kept, as a share of the largest, by the dtype the features were last rounded to. Rounding puts
# up to 0.37 eps (measured on BatchNorm outputs) into an exactly null direction: the half types stand just above that;
# float32 leaves room for the arithmetic that made the features, float64 for that of the Gram matrix (1e-13 in s^2).
CUTOFF = {torch.float64: 3e-7, torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3}

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "log": torch.log,
    "log1p": torch.log1p,
    "log1p_sq": lambda s: torch.log1p(s * s),
}


def filter_values(s: Tensor, kind: str, power: float | None, keep: Tensor) -> Tensor:
    """g(s) where `keep`, 0 elsewhere; s of any shape and dtype."""
    s = torch.where(keep, s, 1.0)  # log and negative powers of a dropped 0 would make 0 * inf
    g = s**power if power is not None else FUNCTIONS[kind](s)
    return torch.where(keep, g, 0.0)


def eigh_of_gram(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (..., n), ascending, at least 0 (NaN if not finite), and eigenvectors of float64 Gram matrices."""
    fine = gram.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    values, vectors = torch.linalg.eigh(torch.where(fine, gram, 0.0))  # LAPACK raises or hangs on NaN
    return torch.where(fine[..., 0], values.clamp_min(0), math.nan), vectors


def right_basis(source: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values (..., n) and right singular vectors (..., D, n), n = min(B, D), of float64 (..., B, D)."""
    rows, columns = source.shape[-2:]
    if rows >= columns:
        values, vectors = eigh_of_gram(source.mT @ source)
        return values.sqrt(), vectors
    values, vectors = eigh_of_gram(source @ source.mT)
    s = values.sqrt()
    return s, source.mT @ (vectors / torch.where(s > 0, s, 1.0).unsqueeze(-2))


def filter_basis(
    source: Tensor | None, gram: Tensor | None, kind: str, power: float | None, cutoff: float, unit: float
) -> tuple[Tensor, Tensor]:
    """Vectors V (..., D, n) and weights (..., n), float64, with W = V diag(weights) V^T; g sees s / unit."""
    if gram is not None:
        values, vectors = eigh_of_gram(gram.double())
        s = values.sqrt()
    else:
        assert source is not None
        s, vectors = right_basis(source.double())
    keep = s > cutoff * s.amax(-1, keepdim=True)
    return vectors, filter_values(s / unit, kind, power, keep) + 0 * s  # NaN stays NaN
