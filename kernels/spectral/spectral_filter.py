"""Spectral filters of a feature matrix: x W with W = V g(S) V^T, S and V the gathered batch's, without an SVD."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from fastrdm.kernels.linalg.precisions import resolve
from fastrdm.kernels.spectral.custom_op import filter_op
from fastrdm.kernels.spectral.filter_factors import CUTOFF, Function, is_even, own_function
from fastrdm.kernels.spectral.filter_functions import KINDS, SOLVERS
from fastrdm.kernels.spectral.matmul_solvers import newton_schulz_takes

NEGLIGIBLE = 1e-5  # weight, relative to the largest, that `gram_power` may leave in directions below the cutoff
# Rows over columns between which sampled features reach below the range of newton_schulz.
NEAR_SQUARE = (2 / 3, 3 / 2)
SMALL = 512  # largest Gram matrix whose batched eigh is faster than chains of products that would have to go deeper


def _choose(x: Tensor, source: Tensor | None, is_gram: bool, rows_known: bool, function: Function) -> str:
    """The solver that `auto` stands for.

    gram_power where it applies; eigh on a CPU and for what newton_schulz cannot do; else newton_schulz.
    """
    if is_even(function.power) and function.cutoff**2 <= NEGLIGIBLE:
        return "gram_power"
    if not x.is_cuda or is_gram or not newton_schulz_takes(function.kind, function.power, rows_known):
        # Not inside a capture: a library eigensolver waits for the device.
        return "eigh"
    if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return "newton_schulz"
    rows, width = (x if source is None else source).shape[1:]
    square = NEAR_SQUARE[0] <= rows / width <= NEAR_SQUARE[1]
    return "eigh" if square and min(rows, width) <= SMALL else "newton_schulz"


def _check(
    x: Tensor,
    kind: object,
    power: float | None,
    cutoff: float | None,
    choices: dict[str, tuple[str, Any]],
) -> None:
    for name, (value, known) in choices.items():
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if x.ndim not in (2, 3) or not x.is_floating_point():
        raise ValueError(f"spectral_filter takes floats of shape (B, D) or (V, B, D), got {tuple(x.shape)} {x.dtype}")
    if kind == "power" and (power is None or not math.isfinite(power)):
        raise ValueError(f"power must be a finite number for kind='power', got {power!r}")
    if kind != "power" and power is not None:
        raise ValueError(f"power belongs to kind='power' alone; leave it out for kind={kind!r}, got {power!r}")
    if cutoff is not None and not 0 <= cutoff < 1:
        raise ValueError(f"cutoff must be in [0, 1), a share of the largest singular value, got {cutoff!r}")


def _check_source(x: Tensor, name: str, source: Tensor) -> None:
    same = source.ndim == x.ndim and source.shape[:-2] == x.shape[:-2] and source.shape[-1] == x.shape[-1]
    if not same or (name == "gram" and source.shape[-2] != source.shape[-1]):
        raise ValueError(f"{name} must match x of shape {tuple(x.shape)} in all but rows, got {tuple(source.shape)}")


def _batched(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.ndim == 3 else x.unsqueeze(0)


def spectral_filter(
    x: Tensor,
    kind: str | Callable[[Tensor], Tensor] = "power",
    power: float | None = None,
    *,
    x_all: Tensor | None = None,
    offset: int | None = None,
    side: Literal["online", "target"] = "online",
    basis: Tensor | None = None,
    gram: Tensor | None = None,
    rows: int | None = None,
    cutoff: float | None = None,
    scale: Literal["raw", "rms"] = "raw",
    precision: str = "auto",
    solver: str = "auto",
) -> Tensor:
    """x W in x's dtype, for x (B, D) or (V, B, D), each view with its own W = V g(S) V^T. W counts as constant.

    `kind` names a row of filter_functions.FILTER_FUNCTIONS, or is `power` for g(s) = s^power, or is a function g: it
    gets float64 singular values (V, n), all above 0, and returns weights of that shape (solver eigh only).

    S and V are those of x itself; of `x_all`, the rows of all processes, x among them from `offset` on (which only
    newton_schulz needs); of `basis`, another tensor (the authors' ImageNet code); or of `gram` = X^T X (D, D) for an X
    of `rows` rows. g sees S (`scale` raw) or S / sqrt(rows) (rms); x stays as is.

    Directions whose singular value is at most `cutoff` times the largest get weight 0, also where g is infinite there
    (default by dtype: filter_factors.CUTOFF). Power 0 projects on those kept. Zeros give zeros; NaN or inf gives NaN.

    The gradient of side online is the output's gradient times W; side target has none. Solvers and precisions:
    docs/spectra.md. ValueError, naming the argument, for what cannot be done.
    """
    choices: dict[str, tuple[str, Any]] = {} if callable(kind) else {"kind": (kind, KINDS)}
    choices |= {
        "side": (side, ("online", "target")),
        "scale": (scale, ("raw", "rms")),
        "solver": (solver, SOLVERS),
    }
    _check(x, kind, power, cutoff, choices)
    if x_all is not None and x_all.shape == x.shape:
        # Gathered from one process: x itself.
        x_all = None
    name, source = ("gram", gram) if gram is not None else ("basis", basis) if basis is not None else ("x_all", x_all)
    if source is not None:
        _check_source(x, name, source)
    is_gram = gram is not None
    whole = x if source is None else source
    count = rows if is_gram else whole.shape[-2]
    if scale == "rms" and not count:
        raise ValueError("scale='rms' needs rows, the number of rows behind gram")
    name_of_g = own_function(kind) if callable(kind) else kind
    floor = CUTOFF[x.dtype if is_gram else whole.dtype] if cutoff is None else cutoff
    function = Function(name_of_g, power, floor, math.sqrt(count) if scale == "rms" and count else 1.0)
    needs_grad = side == "online" and x.requires_grad and torch.is_grad_enabled()
    x = x if side == "online" else x.detach()
    rows_known = source is None or (name == "x_all" and offset is not None)
    start = offset if name == "x_all" else None
    on_rows = rows_known and not needs_grad
    if solver == "auto":
        solver = _choose(x, source, is_gram, on_rows, function)
    _check_solver(solver, function, is_gram, on_rows)
    own = None if source is None else _batched(source.detach())
    views = x if x.ndim == 3 else x.unsqueeze(0)
    out: Tensor = filter_op(
        views, own, is_gram, start, name_of_g, power, floor, function.unit, needs_grad, solver, resolve(precision, x)
    )[0]
    return out if x.ndim == 3 else out[0]


def _check_solver(solver: str, function: Function, is_gram: bool, rows_known: bool) -> None:
    """Refuse what a solver named by the user cannot do."""
    if solver == "gram_power" and not is_even(function.power):
        raise ValueError(f"solver='gram_power' needs an even power above 0, got {function.power!r}; use solver='auto'")
    if solver == "newton_schulz" and is_gram:
        raise ValueError("solver='newton_schulz' needs the features, not their gram; use solver='auto'")
    if solver == "newton_schulz" and not newton_schulz_takes(function.kind, function.power, rows_known):
        if function.power is None:
            what = f"kind {function.name}, which has no Chebyshev fit"
        else:
            what = f"power {function.power:g}" + (
                "" if rows_known else " with a gradient, a basis or an unknown offset"
            )
        raise ValueError(f"solver='newton_schulz' cannot do {what}; use solver='auto' or 'eigh'")
