"""Filters by a float64 eigendecomposition of the smaller Gram matrix: exact, the path on CPU and the tests' oracle."""

import math

import torch
from torch import Tensor

from fastrdm.kernels.factors import Factors, Function, no_factors, work_dtype
from fastrdm.kernels.gram import symmetric_gram


def _eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (V, n), ascending and at least 0, NaN if gram is not finite, and eigenvectors, float64."""
    fine = gram.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    values, vectors = torch.linalg.eigh(torch.where(fine, gram, 0.0))  # LAPACK raises or hangs on NaN
    return torch.where(fine[..., 0], values.clamp_min(0), math.nan), vectors


def _weights(values: Tensor, function: Function) -> tuple[Tensor, Tensor]:
    """Singular values (V, n), 1 where dropped, and g of them, 0 where dropped."""
    s = values.sqrt()
    keep = s > function.cutoff * s.amax(-1, keepdim=True)
    s = torch.where(keep, s, 1.0 + 0 * s)  # log and negative powers of a dropped 0 would make 0 * inf; NaN stays
    return s, torch.where(keep, function(s), 0 * s)


def _as_factors(basis: Tensor, weights: Tensor, dtype: torch.dtype) -> Factors:
    largest = weights.abs().amax(-1, keepdim=True)
    gain = torch.where(largest == 0, 1.0, largest).unsqueeze(-1)
    return Factors(basis.to(dtype).contiguous(), (weights.unsqueeze(-2) / gain).to(dtype), gain)


def _wide(x: Tensor, source: Tensor, own: bool, function: Function, needs_grad: bool) -> tuple[Tensor, Factors]:
    """Fewer rows than columns: U from x x^T, V only where a gradient or other rows ask for it."""
    work = work_dtype(x)
    exact = source.double()
    values, left = _eigh(symmetric_gram(exact))
    s, weights = _weights(values, function)
    if own and not needs_grad:
        matrix = (left * weights.unsqueeze(-2)) @ left.mT
        dtype = torch.float64 if function.amplifies else work
        return (matrix.to(dtype) @ exact.to(dtype)).to(x.dtype), no_factors(x, work)
    right = (left / s.unsqueeze(-2)).mT @ exact
    factors = _as_factors(right, weights, work)
    if own:
        return ((left * (s * weights).unsqueeze(-2)).to(work) @ factors.basis).to(x.dtype), factors
    dtype = torch.float64 if function.amplifies else work
    scaled = (x.to(dtype) @ right.mT.to(dtype)) * weights.unsqueeze(-2)
    return (scaled.to(work) @ factors.basis).to(x.dtype), factors


def _tall(x: Tensor, gram: Tensor, function: Function) -> tuple[Tensor, Factors]:
    values, right = _eigh(gram)
    _, weights = _weights(values, function)
    factors = _as_factors(right.mT, weights, work_dtype(x))
    dtype = torch.float64 if function.amplifies else work_dtype(x)
    scaled = (x.to(dtype) @ right.to(dtype)) * weights.unsqueeze(-2)
    return (scaled.to(factors.basis.dtype) @ factors.basis).to(x.dtype), factors


def filter64(
    x: Tensor, source: Tensor, is_gram: bool, own: bool, function: Function, needs_grad: bool
) -> tuple[Tensor, Factors]:
    """x W for x (V, B, D), from `source` (V, rows, D) or its Gram matrix (V, D, D); `own`: x is the source."""
    if is_gram:
        return _tall(x, source.double(), function)
    if source.shape[-2] < source.shape[-1]:
        return _wide(x, source, own, function, needs_grad)
    return _tall(x, symmetric_gram(source.double().mT), function)
