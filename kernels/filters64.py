"""Filters by a float64 eigendecomposition of the smaller Gram matrix: exact, the path on CPU and the tests' oracle."""

import math

import torch
from torch import Tensor

from fastrdm.kernels.factors import Factors, Function, no_factors, work_dtype
from fastrdm.kernels.gram import symmetric_gram
from fastrdm.kernels.matmul import power_of_two


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


def _unit(weights: Tensor) -> Tensor:
    """Largest magnitude of weights (V, n) as (V, 1, 1), 1 where all are 0: taken out before anything leaves float64."""
    largest = weights.abs().amax(-1)[:, None, None]
    return torch.where(largest == 0, 1.0, largest)


def _matrix(vectors: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """vectors diag(weights) vectors^T (V, n, n)."""
    return (vectors * weights.unsqueeze(-2)).to(dtype) @ vectors.mT.to(dtype)


def _wide(x: Tensor, source: Tensor, own: bool, function: Function, needs_grad: bool) -> tuple[Tensor, Factors]:
    """No more rows than columns: U from x x^T, V only where a gradient or other rows ask for it."""
    work = work_dtype(x)
    dtype = torch.float64 if function.amplifies else work
    exact = source.double()
    values, left = _eigh(symmetric_gram(exact))
    s, weights = _weights(values, function)
    unit = _unit(weights)
    weights = weights / unit[..., 0]
    if own and not needs_grad:
        return ((_matrix(left, weights, dtype) @ exact.to(dtype)) * unit).to(x.dtype), no_factors(x, work)
    right = (left / s.unsqueeze(-2)).mT @ exact
    factors = Factors(right.to(work), weights.unsqueeze(-2).to(work), unit)
    # x V is U S where x is the source; else float64 where float32 rounding of small parts would be blown up
    scaled = left * s.unsqueeze(-2) if own else (x.to(dtype) @ right.mT.to(dtype)).double()
    scaled = scaled * weights.unsqueeze(-2)
    size = power_of_two(scaled)
    out = ((scaled / size).to(work) @ factors.basis) * (size * unit)
    return out.to(x.dtype), factors if needs_grad else no_factors(x, work)


def _tall(x: Tensor, gram: Tensor, function: Function, needs_grad: bool) -> tuple[Tensor, Factors]:
    """More rows than columns, or only the Gram matrix: V from x^T x, and W itself."""
    work = work_dtype(x)
    dtype = torch.float64 if function.amplifies else work
    values, right = _eigh(gram)
    _, weights = _weights(values, function)
    unit = _unit(weights)
    core = _matrix(right, weights / unit[..., 0], dtype)
    out = ((x.to(dtype) @ core) * unit).to(x.dtype)
    if not needs_grad:
        return out, no_factors(x, work)
    return out, Factors(x.new_empty((len(x), 0, x.shape[-1]), dtype=work), core.to(work), unit)


def filter64(
    x: Tensor, source: Tensor, is_gram: bool, own: bool, function: Function, needs_grad: bool
) -> tuple[Tensor, Factors]:
    """x W for x (V, B, D), from `source` (V, rows, D) or its Gram matrix (V, D, D); `own`: x is the source."""
    if is_gram:
        return _tall(x, source.double(), function, needs_grad)
    if source.shape[-2] <= source.shape[-1]:
        return _wide(x, source, own, function, needs_grad)
    return _tall(x, symmetric_gram(source.double().mT), function, needs_grad)
