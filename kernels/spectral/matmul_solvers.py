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
from fastrdm.kernels.triton_support import triton_module

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
    """g(bound S) (V, n, n) of a function with a Chebyshev fit, from H^(1 / 2^depth)."""
    fit = function.fit
    assert fit is not None, "newton_schulz_takes comes first"
    levels = roots(scaled, q, low, fit.depth, precision)
    # A zero matrix has the bound 0: what g is there does not matter, as long as it is finite.
    bound, root = scaled.bound[..., 0].clamp_min(1e-300), 2**fit.depth
    start = fit.start ** (1 / root)
    b = chebyshev.blocks(lambda y: function(bound * y**root), fit.degree, start, scaled.bound.device)
    return chebyshev.evaluate(b, levels[-1], levels[-2], start, precision)


def _power_rows(scaled: Scaled[M], q: M, function: Function, low: float, precision: Precision[M]) -> M:
    """U S^(1 + power) V^T (V, n, d) of the scaled matrix."""
    assert function.power is not None
    exponent = 1 + function.power
    if exponent == 0:
        return q
    return precision.bounded_product(_matrix_power(scaled, q, exponent, low, precision), q)


def _factors(
    scaled: Scaled[M], q: M, function: Function, wide: bool, precision: Precision[M]
) -> tuple[M | None, M, Tensor]:
    """Basis, core and gain of Factors for the scaled matrix's polar factor q (V, n, D or rows).

    A tall source has no basis.
    """
    low = exact_range(function)
    gain = torch.ones_like(scaled.bound)
    if function.power is None:
        core = _fitted(scaled, q, function, low, precision)
    elif function.power == 0:
        dense = precision.dense(q)
        eye = torch.eye(dense.shape[-2], dtype=dense.dtype, device=dense.device)
        core = precision.matrix(eye.expand(len(dense), -1, -1).contiguous())
    else:
        core = _matrix_power(scaled, q, function.power, low, precision)
        gain = (torch.where(scaled.bound == 0, 1.0, scaled.bound) / function.unit) ** function.power
    if wide:
        return q, core, gain
    # A wide source's null directions vanish in the basis; here they are taken out of the core.
    kept = precision.square(q)
    return None, precision.bounded_product(precision.bounded_product(kept, core), kept), gain


def _prepared(x: Tensor, share: float, precision: Precision[M]) -> tuple[Dominant, Scaled[M]]:
    """The dominant direction of x (V, n, d), and x without it, divided by a bound on what is left.

    The bound is at least `share` of the dominant singular value.
    """
    if precision.fused:
        found: tuple[Dominant, Scaled[M]] = triton_module("spectral.around_triton").prepared(x, share, precision)
        return found
    top, rest = split_dominant(x)
    return top, scale(rest, precision, least=top.size * share)


def filter_newton_schulz(
    x: Tensor, source: Tensor, offset: int | None, function: Function, needs_grad: bool, precision: Precision[M]
) -> tuple[Tensor, Factors]:
    """x W for x (V, B, D) and source (V, rows, D); an offset says that x is the rows of source from there on."""
    wide = source.shape[-2] <= source.shape[-1]
    low, work = exact_range(function), work_dtype(x)
    # Without the dominant direction the range reaches as far below what remains, but not below the cutoff.
    top, scaled = _prepared((source if wide else source.mT).to(work), function.cutoff / low, precision)
    q = polar(scaled, low, precision)
    left, right = (top.left, top.right) if wide else (top.right, top.left)
    if needs_grad or offset is None or function.power is None:
        basis, core, gain = _factors(scaled, q, function, wide, precision)
        # Where no direction stands alone, `right` is zero and the weight any finite number.
        weight = function(top.size.clamp_min(1e-100))
        empty = x.new_empty((len(x), 0, x.shape[-1]), dtype=work)
        dense = empty if basis is None else precision.dense(basis)
        factors = Factors(dense, precision.dense(core), gain, right, weight)
        if precision.fused:
            out: Tensor = triton_module("spectral.around_triton").apply(x, basis, core, gain, right, weight)
        else:
            out = factors.apply(x, precision)
        return out, factors if needs_grad else no_factors(x, work)
    rows = slice(offset, offset + x.shape[1])
    if precision.fused:
        h = _power_rows(scaled, q, function, low, precision)
        dense = precision.dense(h) if wide else precision.dense(h).mT
        out = triton_module("spectral.around_triton").rows_of(
            dense[:, rows], left[:, rows], right, scaled.bound, top.size, function, x.dtype
        )
        return out, no_factors(x, work)
    out = precision.dense(_power_rows(scaled, q, function, low, precision))
    gain = scaled.bound ** (1 + function.power) * function.unit**-function.power
    out = scaled_by((out if wide else out.mT)[:, rows], gain)
    weight = torch.where(top.size > 0, top.size * function(top.size.clamp_min(1e-100)), 0.0)
    out = torch.baddbmm(out.double(), left[:, rows] * weight, right.mT)
    return out.to(x.dtype), no_factors(x, work)


def filter_gram_power(
    x: Tensor, source: Tensor, is_gram: bool, function: Function, needs_grad: bool, precision: Precision[M]
) -> tuple[Tensor, Factors]:
    """x W for an even power: W = (X^T X)^(power / 2), no decomposition and no cutoff."""
    square = x is source and function.power == 2 and x.shape[-2] <= x.shape[-1] and not is_gram
    if square and precision.fused:
        out: Tensor = triton_module("spectral.around_triton").squared(x, function.unit)
        return out, _gram_factors(x, source, is_gram, function, precision) if needs_grad else no_factors(
            x, work_dtype(x)
        )
    factors = _gram_factors(x, source, is_gram, function, precision)
    return factors.apply(x, precision), factors if needs_grad else no_factors(x, work_dtype(x))


def _gram_factors(x: Tensor, source: Tensor, is_gram: bool, function: Function, precision: Precision[M]) -> Factors:
    """W = (X^T X)^(power / 2) of a source (V, rows, D), or of its Gram matrix."""
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
    return Factors(source if wide else source.new_empty((len(source), 0, source.shape[-1])), core, gain)
