"""Filters by a float64 eigendecomposition of the smaller Gram matrix: exact, and what a CPU uses."""

import math

import torch
from torch import Tensor

from fastrdm.kernels.linalg.gram import upper_gram
from fastrdm.kernels.linalg.matmul import power_of_two, scaled_by
from fastrdm.kernels.spectral.filter_factors import Factors, Function, no_factors, work_dtype

HEADROOM = 2.0  # times that float32's rounding error may grow before products go through float64
# Share of the directions that it pays to take apart; with more of them all goes through float64.
MAX_APART = 1 / 4


def _eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (V, n), ascending and at least 0, NaN if gram is not finite, and eigenvectors, float64.

    Only the upper triangle is read: on an AMD EPYC MKL takes it some 5 % sooner than the lower one.
    """
    fine = gram.abs().amax((-2, -1), keepdim=True).isfinite()
    # LAPACK raises or hangs on NaN.
    values, vectors = torch.linalg.eigh(torch.where(fine, gram, 0.0), UPLO="U")
    return torch.where(fine[..., 0], values.clamp_min(0), math.nan), vectors


def _weights(values: Tensor, function: Function) -> tuple[Tensor, Tensor]:
    """Singular values (V, n), the smallest kept where dropped, and g of them, 0 where dropped."""
    s = values.sqrt()
    keep = s > function.cutoff * s.amax(-1, keepdim=True)
    least = torch.where(keep, s, math.inf).amin(-1, keepdim=True)
    # Logarithms and negative powers of a dropped 0 would make 0 * inf; NaN stays.
    s = torch.where(keep, s, torch.where(least == math.inf, 1.0, least) + 0 * s)
    return s, torch.where(keep, function(s), 0 * s)


def _unit(weights: Tensor) -> Tensor:
    """Largest magnitude of weights (V, n) as (V, 1, 1), 1 where all are 0: taken out before anything leaves float64."""
    largest = weights.abs().amax(-1)[:, None, None]
    return torch.where(largest == 0, 1.0, largest)


def _matrix(vectors: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """vectors diag(weights) vectors^T (V, n, n)."""
    return (vectors * weights.unsqueeze(-2)).to(dtype) @ vectors.mT.to(dtype)


def _split(s: Tensor, weights: Tensor, work: torch.dtype) -> tuple[torch.dtype, int]:
    """The dtype of a product that weights x's directions, and how many of s (V, n), ascending, it takes as they are.

    Rounding U^T x leaves eps |s| / sqrt(n) in each row, weighted eps |s| |weights| / sqrt(n) in all, which may be
    HEADROOM eps |s weights|. Where the weights fall with s it is more; the norms then leave the largest s out.
    """
    n = s.shape[-1]
    s = torch.where(weights == 0, 0.0, s)
    noise = s.square().cumsum(-1) * weights.square().cumsum(-1)
    bar = HEADROOM**2 * n * (s * weights).square().sum(-1, keepdim=True)
    low = int((noise <= bar).sum(-1).min())
    return (work, low) if work != torch.float64 and low >= (1 - MAX_APART) * n else (torch.float64, n)


def _capped(vectors: Tensor, s: Tensor, weights: Tensor, x: Tensor, work: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x (V, n, d) = vectors diag(s) V^T with its largest s lowered to the others' rms in float64, then rounded.

    Returns it with the lowered s (V, n) and, in float64, the coordinates (V, m, d) of x along the vectors whose s was
    lowered.
    """
    dtype, low = _split(s, weights, work)
    if low == s.shape[-1]:
        return x.to(dtype), s, x[..., :0, :]
    x = x.double()
    cap = s[..., :low].square().mean(-1, keepdim=True).sqrt()
    capped = torch.cat((s[..., :low], cap.expand_as(s[..., low:])), -1)
    large = vectors[..., low:]
    along = large.mT @ x
    excess = large * (1 - capped / s)[..., None, low:]
    return torch.baddbmm(x, excess, along, alpha=-1).to(dtype), capped, along


def _weighting(vectors: Tensor, s: Tensor, weights: Tensor, x: Tensor, work: torch.dtype) -> tuple[Tensor, Tensor]:
    """Symmetric m (V, n, n) and y (V, n, d) with m y = vectors diag(weights) vectors^T x; x = vectors diag(s) V^T."""
    x, capped, _ = _capped(vectors, s, weights, x, work)
    return _matrix(vectors, weights * s / capped, x.dtype), x


def _right(left: Tensor, s: Tensor, weights: Tensor, x: Tensor, work: torch.dtype) -> Tensor:
    """V^T (V, n, d) of x = left diag(s) V^T, each row with weights to its own accuracy."""
    x, capped, along = _capped(left, s, torch.where(weights == 0, 0.0, 1 / s), x, work)
    right = ((left / capped.unsqueeze(-2)).mT.to(x.dtype) @ x).to(work)
    low = s.shape[-1] - along.shape[-2]
    right[..., low:, :] = along / s[..., low:].unsqueeze(-1)
    return right


def _wide(x: Tensor, source: Tensor, own: bool, function: Function, needs_grad: bool) -> tuple[Tensor, Factors]:
    """x W for a source with no more rows than columns: U from x x^T, V only where a gradient or other rows need it."""
    work = work_dtype(x)
    values, left = _eigh(upper_gram(source.double()))
    s, weights = _weights(values, function)
    unit = _unit(weights)
    weights = weights / unit[..., 0]
    if own and not needs_grad:
        matrix, rows = _weighting(left, s, weights, source, work)
        return scaled_by((matrix @ rows).to(work), unit).to(x.dtype), no_factors(x, work)
    # x V is U S. For other rows it is made in float64 where rounding of small parts would be blown up.
    dtype = torch.float64 if function.amplifies and not own else work
    right = _right(left, s, weights, source, dtype)
    factors = Factors(right.to(work), weights.unsqueeze(-2).to(work), unit)
    along, by = (left, s * weights) if own else ((x.to(dtype) @ right.mT).double(), weights)
    size = power_of_two(by.unsqueeze(-2))
    out = scaled_by((along * (by.unsqueeze(-2) / size)).to(work) @ factors.basis, size * unit)
    return out.to(x.dtype), factors if needs_grad else no_factors(x, work)


def _tall(x: Tensor, own: bool, gram: Tensor, function: Function, needs_grad: bool) -> tuple[Tensor, Factors]:
    """x W from a Gram matrix (V, D, D), by way of W itself. `own` says that it is x^T x."""
    work = work_dtype(x)
    values, right = _eigh(gram)
    s, weights = _weights(values, function)
    unit = _unit(weights)
    weights = weights / unit[..., 0]
    if own:
        matrix, columns = _weighting(right, s, weights, x.mT, work)
        out = columns.mT @ matrix
    else:
        dtype = torch.float64 if function.amplifies else work
        out = x.to(dtype) @ _matrix(right, weights, dtype)
    out = scaled_by(out.to(work), unit).to(x.dtype)
    if not needs_grad:
        return out, no_factors(x, work)
    core = _matrix(right, weights, work)
    return out, Factors(x.new_empty((len(x), 0, x.shape[-1]), dtype=work), core, unit)


def filter_eigh(
    x: Tensor, source: Tensor, is_gram: bool, own: bool, function: Function, needs_grad: bool
) -> tuple[Tensor, Factors]:
    """x W for x (V, B, D), from `source` (V, rows, D) or its Gram matrix (V, D, D); `own`: x is the source."""
    if is_gram:
        return _tall(x, False, source.double(), function, needs_grad)
    if source.shape[-2] <= source.shape[-1]:
        return _wide(x, source, own, function, needs_grad)
    return _tall(x, own, upper_gram(source.double().mT), function, needs_grad)
