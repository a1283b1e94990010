"""The filter as a torch operator: opaque to torch.compile, with shapes known ahead and the gradient g W."""

from typing import Any

import torch
from torch import Tensor

from fastrdm.kernels.linalg.precisions import precision_named
from fastrdm.kernels.spectral.eigh_solver import filter_eigh
from fastrdm.kernels.spectral.filter_factors import Factors, Function, no_factors, work_dtype
from fastrdm.kernels.spectral.matmul_solvers import filter_gram_power, filter_newton_schulz


@torch.library.custom_op("fastrdm::spectral_filter", mutates_args=())
def filter_op(
    x: Tensor,
    source: Tensor | None,
    is_gram: bool,
    offset: int | None,
    kind: str,
    power: float | None,
    cutoff: float,
    unit: float,
    needs_grad: bool,
    solver: str,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x W (V, B, D) and, where `needs_grad`, the factors of W; without a source x is its own."""
    function = Function(kind, power, cutoff, unit)
    whole = x if source is None else source
    start = 0 if source is None else offset
    with torch.autocast(x.device.type, enabled=False):
        if solver == "eigh":
            out, factors = filter_eigh(x, whole, is_gram, source is None, function, needs_grad)
        elif solver == "gram_power":
            out, factors = filter_gram_power(x, whole, is_gram, function, needs_grad, precision_named(precision))
        else:
            out, factors = filter_newton_schulz(x, whole, start, function, needs_grad, precision_named(precision))
    # A product of transposed matrices may come out transposed; the shapes promised below are row by row.
    outputs = (out, factors.basis, factors.core, factors.gain, *_dominant(x, factors))
    a, b, c, d, e, f = (output.contiguous() for output in outputs)
    return a, b, c, d, e, f


def _dominant(x: Tensor, factors: Factors) -> tuple[Tensor, Tensor]:
    """Direction and weight of the factors, empty where they have none: an operator's outputs are tensors."""
    if factors.right is None or factors.weight is None:
        right, weight = (x.new_empty(shape, dtype=torch.float64) for shape in ((len(x), 0, 1), (0, 1, 1)))
        return right, weight
    return factors.right, factors.weight


@filter_op.register_fake
def _(
    x: Tensor,
    source: Tensor | None,
    is_gram: bool,
    offset: int | None,
    kind: str,
    power: float | None,
    cutoff: float,
    unit: float,
    needs_grad: bool,
    solver: str,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    work = work_dtype(x)
    if not needs_grad:
        nothing = no_factors(x, work)
        return out, nothing.basis, nothing.core, nothing.gain, *_dominant(x, nothing)
    views, _, width = x.shape
    rows = width if is_gram else (x if source is None else source).shape[1]
    wide = rows <= width and not is_gram
    n = min(rows, width)
    diagonal = wide and (solver == "eigh" or (solver == "gram_power" and power == 2))
    basis = x.new_empty((views, n if wide else 0, width), dtype=work)
    core = x.new_empty((views, 1 if diagonal else n, n), dtype=work)
    gain = x.new_empty((views, 1, 1), dtype=torch.float64)
    found = solver == "newton_schulz"
    right = x.new_empty((views, width if found else 0, 1), dtype=torch.float64)
    return out, basis, core, gain, right, x.new_empty((views if found else 0, 1, 1), dtype=torch.float64)


@torch.library.custom_op("fastrdm::apply_factors", mutates_args=())
def _apply_op(
    x: Tensor, basis: Tensor, core: Tensor, gain: Tensor, right: Tensor, weight: Tensor, precision: str
) -> Tensor:
    """x W (V, B, D) for the W with these factors."""
    factors = Factors(basis, core, gain, *((right, weight) if right.shape[1] else ()))
    with torch.autocast(x.device.type, enabled=False):
        return factors.apply(x, precision_named(precision)).contiguous()


@_apply_op.register_fake
def _(x: Tensor, basis: Tensor, core: Tensor, gain: Tensor, right: Tensor, weight: Tensor, precision: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # Else a backward pass starts with zeros as large as the factors.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])
    ctx.precision = inputs[-1]


def _backward(ctx: Any, grad: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    """W is constant and symmetric: g W. (A filter applied from the left would keep parts of g outside its span.)"""
    return _apply_op(grad, *ctx.saved_tensors, ctx.precision), *[None] * 10


filter_op.register_autograd(_backward, setup_context=_keep)
