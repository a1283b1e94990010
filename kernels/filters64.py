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


def _as_factors(basis: Tensor, weights: Tensor, dtype: torch.dtype) -> Factors:
    largest = weights.abs().amax(-1, keepdim=True)
    gain = torch.where(largest == 0, 1.0, largest).unsqueeze(-1)
    return Factors(basis.to(dtype), (weights.unsqueeze(-2) / gain).to(dtype), gain)


def _apply(scaled: Tensor, basis: Tensor, out: Tensor) -> Tensor:
    """float64 scaled @ basis in basis's dtype, without overflow before out's dtype asks for it."""
    unit = power_of_two(scaled)
    return (((scaled / unit).to(basis.dtype) @ basis) * unit).to(out.dtype)


def _project(x: Tensor, right: Tensor, weights: Tensor, function: Function) -> Tensor:
    """x V g(S), float64; the product in float64 where float32 rounding would be blown up."""
    dtype = torch.float64 if function.amplifies else work_dtype(x)
    return (x.to(dtype) @ right.to(dtype)) * weights.unsqueeze(-2).double()


def _wide(x: Tensor, source: Tensor, own: bool, function: Function, needs_grad: bool) -> tuple[Tensor, Factors]:
    """Fewer rows than columns: U from x x^T, V only where a gradient or other rows ask for it."""
    work = work_dtype(x)
    exact = source.double()
    values, left = _eigh(symmetric_gram(exact))
    s, weights = _weights(values, function)
    if own and not needs_grad:
        dtype = torch.float64 if function.amplifies else work
        unit = power_of_two(weights.unsqueeze(-2))
        matrix = (left * (weights.unsqueeze(-2) / unit)).to(dtype) @ left.mT.to(dtype)
        return ((matrix @ exact.to(dtype)) * unit).to(x.dtype), no_factors(x, work)
    right = (left / s.unsqueeze(-2)).mT @ exact
    factors = _as_factors(right, weights, work)
    scaled = left * (s * weights).unsqueeze(-2) if own else _project(x, right.mT, weights, function)
    return _apply(scaled, factors.basis, x), factors if needs_grad else no_factors(x, work)


def _tall(x: Tensor, gram: Tensor, function: Function, needs_grad: bool) -> tuple[Tensor, Factors]:
    """At least as many rows as columns, or only the Gram matrix: V from x^T x."""
    values, right = _eigh(gram)
    _, weights = _weights(values, function)
    factors = _as_factors(right.mT, weights, work_dtype(x))
    out = _apply(_project(x, right, weights, function), factors.basis, x)
    return out, factors if needs_grad else no_factors(x, work_dtype(x))


def filter64(
    x: Tensor, source: Tensor, is_gram: bool, own: bool, function: Function, needs_grad: bool
) -> tuple[Tensor, Factors]:
    """x W for x (V, B, D), from `source` (V, rows, D) or its Gram matrix (V, D, D); `own`: x is the source."""
    if is_gram:
        return _tall(x, source.double(), function, needs_grad)
    if source.shape[-2] < source.shape[-1]:
        return _wide(x, source, own, function, needs_grad)
    return _tall(x, symmetric_gram(source.double().mT), function, needs_grad)
