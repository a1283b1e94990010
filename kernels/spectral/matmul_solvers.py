"""Filters by matrix products alone: no factorisation, no host, fixed shapes, so that a CUDA graph can hold them."""

import torch
from torch import Tensor

from fastrdm.kernels.linalg.matmul import power_of_two, product, scaled_by
from fastrdm.kernels.spectral import chebyshev
from fastrdm.kernels.spectral.filter_factors import Factors, Function, is_even, no_factors, work_dtype
from fastrdm.kernels.spectral.polar import Scaled, polar, roots, scale, symmetric_product

RANGE = 1e-4  # singular values below this share of the largest fade out, whatever the cutoff
LOG_DEGREE = {"log": 23, "log1p": 23, "log1p_sq": 31}  # in s^(1/4): 4e-4 of the largest weight up to s_max = 3000
LOG_START = 1e-6  # share of s_max from which ln s is fitted: below any kept, so that what is dropped stays bounded too


def ladder_range(function: Function) -> float:
    """The share of the bound on the largest singular value above which the ladder is exact to 1e-3."""
    return max(function.cutoff, RANGE)


@torch.compiler.assume_constant_result  # a search on the host, nothing for torch.compile to trace
def newton_schulz_takes(power: float | None, rows_known: bool) -> bool:
    """Whether the ladder can represent g: s g(s) on whole rows, else g itself, must be a power from 0 up, or a log."""
    if power is None:
        return True
    exponent = power + 1 if rows_known else power
    return exponent in (0, 0.25, 0.5, 1, 2) or (exponent > 0 and chebyshev.plan(exponent) is not None)


def _matrix_power(scaled: Scaled, q: Tensor, exponent: float, low: float, precision: str) -> Tensor:
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
    b = chebyshev.blocks(lambda y: (y ** (exponent * 2**depth)).unsqueeze(0), degree, 0.0, q.device)
    return chebyshev.evaluate(b, levels[-1], levels[-2], 0.0, precision)


def _matrix_log(scaled: Scaled, q: Tensor, function: Function, low: float, precision: str) -> Tensor:
    """g(bound S) (V, n, n) of one of the logarithms, from H^(1/4)."""
    levels = roots(scaled, q, low, 2, precision)
    bound = torch.where(scaled.bound == 0, 1.0, scaled.bound)[..., 0]
    start = LOG_START**0.25 if function.kind == "log" else 0.0
    degree = LOG_DEGREE[function.kind]
    b = chebyshev.blocks(lambda y: function(bound * y**4), degree, start, q.device)
    return chebyshev.evaluate(b, levels[-1], levels[-2], start, precision)


def _rows(scaled: Scaled, q: Tensor, function: Function, low: float, precision: str) -> tuple[Tensor, Tensor]:
    """U S^(1 + power) V^T (V, n, d) of the scaled matrix, and the gain that restores its scale."""
    assert function.power is not None
    exponent = 1 + function.power
    power_of_h = None if exponent == 0 else _matrix_power(scaled, q, exponent, low, precision)
    out = q if power_of_h is None else product(power_of_h, q, precision, bounded=True)
    return out, scaled.bound**exponent * function.unit**-function.power


def _factors(scaled: Scaled, q: Tensor, function: Function, wide: bool, precision: str) -> Factors:
    low = ladder_range(function)
    gain = torch.ones_like(scaled.bound)
    if function.power is None:
        core = _matrix_log(scaled, q, function, low, precision)
    elif function.power == 0:
        core = torch.eye(q.shape[-2], dtype=q.dtype, device=q.device).expand(len(q), -1, -1).contiguous()
    else:
        core = _matrix_power(scaled, q, function.power, low, precision)
        gain = (scaled.bound / function.unit) ** function.power
    if not wide:  # a wide source's null directions vanish in the basis
        kept = symmetric_product(q, precision)
        core = product(product(kept, core, precision, bounded=True), kept, precision, bounded=True)
    gain = torch.where(scaled.bound == 0, 0.0, gain)
    return Factors(q if wide else q.new_empty((len(q), 0, q.shape[-2])), core, gain)


def filter_ladder(
    x: Tensor, source: Tensor, offset: int | None, function: Function, needs_grad: bool, precision: str
) -> tuple[Tensor, Factors]:
    """x W for x (V, B, D) and source (V, rows, D); an offset says that x is the rows of source from there on."""
    wide = source.shape[-2] <= source.shape[-1]
    work = work_dtype(x)
    scaled = scale((source if wide else source.mT).to(work), precision)
    q = polar(scaled, ladder_range(function), precision)
    if needs_grad or offset is None or function.power is None:
        factors = _factors(scaled, q, function, wide, precision)
        out = factors.apply(x, precision)
        return out, factors if needs_grad else no_factors(x, work)
    out, gain = _rows(scaled, q, function, ladder_range(function), precision)
    out = (out if wide else out.mT)[:, offset : offset + x.shape[1]]
    return scaled_by(out, gain).to(x.dtype), no_factors(x, work)


def filter_even(
    x: Tensor, source: Tensor, is_gram: bool, function: Function, needs_grad: bool, precision: str
) -> tuple[Tensor, Factors]:
    """x W for an even power: W = (X^T X)^(power / 2), no decomposition and no cutoff."""
    assert is_even(function.power) and function.power is not None
    wide = not is_gram and source.shape[-2] <= source.shape[-1]
    unit = power_of_two(source)
    source = source.to(work_dtype(x)) / unit
    gain = unit.double() ** (function.power / (2 if is_gram else 1)) * function.unit**-function.power
    gram = source if is_gram else None
    core = source.new_ones((len(source), 1, source.shape[-2]))
    for step in range(round(function.power / 2) - wide):
        gram = gram if gram is not None else symmetric_product(source if wide else source.mT, precision)
        core = gram if step == 0 else product(core, gram, precision)
    factors = Factors(source if wide else source.new_empty((len(source), 0, source.shape[-1])), core, gain)
    return factors.apply(x, precision), factors if needs_grad else no_factors(x, work_dtype(x))
