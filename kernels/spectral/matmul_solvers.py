"""Filters by matrix products alone: no factorization, no host, fixed shapes, so that a CUDA graph can hold them."""

import torch
from torch import Tensor

from fastrdm.kernels.linalg.matmul import M, Precision, power_of_two, scaled_by
from fastrdm.kernels.spectral import chebyshev
from fastrdm.kernels.spectral.dominant import Dominant, split_dominant
from fastrdm.kernels.spectral.filter_factors import (
    Factors,
    Function,
    filter_function,
    is_even,
    no_factors,
    work_dtype,
)
from fastrdm.kernels.spectral.polar import Scaled, polar, roots, scale

RANGE = 1e-4  # singular values below this share of the largest fade out, whatever the cutoff


def exact_range(function: Function) -> float:
    """The share of the bound on the largest singular value above which newton_schulz is exact to 1e-3."""
    return max(function.cutoff, RANGE)


# A search on the host: there is nothing for torch.compile to trace.
@torch.compiler.assume_constant_result
def newton_schulz_takes(kind: str, power: float | None, rows_known: bool) -> bool:
    """True if matrix products can evaluate g, which must have a Chebyshev fit or be a power.

    With the source's rows at hand they evaluate s g(s), else g(s): that must be a power from 0 up.
    """
    if power is None:
        return filter_function(kind).fit is not None
    exponent = power + 1 if rows_known else power
    return exponent in (0, 0.25, 0.5, 1, 2) or (exponent > 0 and chebyshev.plan(exponent) is not None)


def _matrix_power(scaled: Scaled[M], q: M, exponent: float, low: float, precision: Precision[M]) -> M:
    """H^exponent (V, n, n), H = U S U^T with S in [0, 1]."""
    if exponent in (0.25, 0.5, 1):
        depth = {1: 0, 0.5: 1, 0.25: 2}[exponent]
        return roots(scaled, q, low, depth, precision)[-1]
    if exponent == 2:
        return scaled.gram
    found = chebyshev.plan(exponent)
    assert found is not None, "newton_schulz_takes comes first"
    depth, degree = found
    levels = roots(scaled, q, low, depth, precision)
    device = scaled.bound.device
    b = chebyshev.blocks(lambda y: (y ** (exponent * 2**depth)).unsqueeze(0), degree, 0.0, device)
    return chebyshev.evaluate(b, levels[-1], levels[-2], 0.0, precision)


def _fitted(scaled: Scaled[M], q: M, function: Function, low: float, precision: Precision[M]) -> M:
    """g(bound S) (V, n, n) of a function with a Chebyshev fit, from H^(1/4)."""
    fit = function.fit
    assert fit is not None, "newton_schulz_takes comes first"
    levels = roots(scaled, q, low, 2, precision)
    bound = torch.where(scaled.bound == 0, 1.0, scaled.bound)[..., 0]
    start = fit.start**0.25
    b = chebyshev.blocks(lambda y: function(bound * y**4), fit.degree, start, scaled.bound.device)
    return chebyshev.evaluate(b, levels[-1], levels[-2], start, precision)


def _rows(scaled: Scaled[M], q: M, function: Function, low: float, precision: Precision[M]) -> tuple[Tensor, Tensor]:
    """U S^(1 + power) V^T (V, n, d) of the scaled matrix, and the gain that restores its scale."""
    assert function.power is not None
    exponent = 1 + function.power
    out = q
    if exponent != 0:
        out = precision.bounded_product(_matrix_power(scaled, q, exponent, low, precision), q)
    return precision.dense(out), scaled.bound**exponent * function.unit**-function.power


def _factors(scaled: Scaled[M], q: M, function: Function, wide: bool, precision: Precision[M]) -> Factors:
    """W of the scaled matrix's polar factor q: (V, n, D) where the source is wide, else (V, n, rows)."""
    low = exact_range(function)
    gain = torch.ones_like(scaled.bound)
    bound = torch.where(scaled.bound == 0, 1.0, scaled.bound)
    basis = precision.dense(q)
    if function.power is None:
        core = _fitted(scaled, q, function, low, precision)
    elif function.power == 0:
        eye = torch.eye(basis.shape[-2], dtype=basis.dtype, device=basis.device)
        core = precision.matrix(eye.expand(len(basis), -1, -1).contiguous())
    else:
        core = _matrix_power(scaled, q, function.power, low, precision)
        gain = (bound / function.unit) ** function.power
    if not wide:
        # A wide source's null directions vanish in the basis; here they are taken out of the core.
        kept = precision.square(q)
        core = precision.bounded_product(precision.bounded_product(kept, core), kept)
        basis = basis.new_empty((len(basis), 0, basis.shape[-2]))
    return Factors(basis, precision.dense(core), gain)


def filter_newton_schulz(
    x: Tensor, source: Tensor, offset: int | None, function: Function, needs_grad: bool, precision: Precision[M]
) -> tuple[Tensor, Factors]:
    """x W for x (V, B, D) and source (V, rows, D); an offset says that x is the rows of source from there on."""
    wide = source.shape[-2] <= source.shape[-1]
    low = exact_range(function)
    top, rest = split_dominant((source if wide else source.mT).to(work_dtype(x)))
    # Without the dominant direction the range reaches as far below what remains, but not below the cutoff.
    scaled = scale(rest, precision, least=top.size * (function.cutoff / low))
    q = polar(scaled, low, precision)
    weight = torch.where(top.size > 0, function(torch.where(top.size > 0, top.size, 1.0)), 0.0)
    left, right = (top.left, top.right) if wide else (top.right, top.left)
    if needs_grad or offset is None or function.power is None:
        factors = _factors(scaled, q, function, wide, precision)
        along = x.double() @ right
        without = torch.baddbmm(x.double(), along, right.mT, alpha=-1).to(rest.dtype)
        out = factors.apply(without, precision)
        factors = _with_dominant(factors, top, weight) if needs_grad else no_factors(x, rest.dtype)
    else:
        out, gain = _rows(scaled, q, function, low, precision)
        rows = slice(offset, offset + x.shape[1])
        out = scaled_by((out if wide else out.mT)[:, rows], gain)
        along, factors = left[:, rows] * top.size, no_factors(x, rest.dtype)
    return torch.baddbmm(out.double(), along * weight, right.mT).to(x.dtype), factors


def _with_dominant(factors: Factors, top: Dominant, weight: Tensor) -> Factors:
    """W with the dominant direction in it, of factors of the matrix without it."""
    basis, core, gain = factors
    work, left = core.dtype, top.left
    # What rounding left in basis and core along the direction gives way to its own vector and weight.
    if basis.shape[1]:
        there = basis.double().mT @ left
        basis = torch.baddbmm(basis.double(), left, (top.right - there).mT * (top.size > 0)).to(work)
    there = core.double() @ left
    half = (weight / gain + left.mT @ there) * left / 2 - there
    core = torch.baddbmm(core.double(), torch.cat((left, half), -1), torch.cat((half, left), -1).mT).to(work)
    return Factors(basis, core, gain)


def filter_gram_power(
    x: Tensor, source: Tensor, is_gram: bool, function: Function, needs_grad: bool, precision: Precision[M]
) -> tuple[Tensor, Factors]:
    """x W for an even power: W = (X^T X)^(power / 2), no decomposition and no cutoff."""
    assert is_even(function.power) and function.power is not None
    wide = not is_gram and source.shape[-2] <= source.shape[-1]
    unit = power_of_two(source)
    source = source.to(work_dtype(x)) / unit
    gain = unit.double() ** (function.power / (2 if is_gram else 1)) * function.unit**-function.power
    core = source.new_ones((len(source), 1, source.shape[-2]))
    steps = round(function.power / 2) - wide
    if steps:
        smaller = source if wide else source.mT
        gram = source if is_gram else precision.dense(precision.square(precision.matrix(smaller)))
        core = gram
        for _ in range(steps - 1):
            core = precision.product(core, gram)
    factors = Factors(source if wide else source.new_empty((len(source), 0, source.shape[-1])), core, gain)
    return factors.apply(x, precision), factors if needs_grad else no_factors(x, work_dtype(x))
