"""Spectral filters of a feature matrix: x W with W = V g(S) V^T, S and V of the gathered batch's singular values."""

import math
from typing import Literal

import torch
from torch import Tensor

from fastrdm.kernels.filters64 import CUTOFF, filter_basis

Kind = Literal["power", "log", "log1p", "log1p_sq"]


def _check(
    x: Tensor, kind: str, power: float | None, side: str, scale: str, cutoff: float | None, solver: str, precision: str
) -> None:
    choices = {
        "kind": (kind, ("power", "log", "log1p", "log1p_sq")),
        "side": (side, ("online", "target")),
        "scale": (scale, ("raw", "rms")),
        "solver": (solver, ("auto", "eigh64")),
        "precision": (precision, ("auto",)),
    }
    for name, (value, known) in choices.items():
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if x.ndim not in (2, 3) or not x.is_floating_point():
        raise ValueError(f"spectral_filter takes floats of shape (B, D) or (V, B, D), got {tuple(x.shape)} {x.dtype}")
    if kind == "power" and (power is None or not math.isfinite(power)):
        raise ValueError(f"power must be a finite number for kind='power', got {power!r}")
    if kind != "power" and power is not None:
        raise ValueError(f"power belongs to kind='power' only; leave it out for kind={kind!r}, got {power!r}")
    if cutoff is not None and not 0 <= cutoff < 1:
        raise ValueError(f"cutoff must be in [0, 1), a share of the largest singular value, got {cutoff!r}")


def _source(x: Tensor, x_all: Tensor | None, basis: Tensor | None, gram: Tensor | None) -> Tensor | None:
    """The one tensor W is built from, or None where its Gram matrix is given."""
    given = {"x_all": x_all, "basis": basis, "gram": gram}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(f"W is built from one of x_all, basis and gram, got {' and '.join(names)}")
    for name in names:
        shape = given[name].shape  # type: ignore[union-attr]
        rows_free = shape[:-2] == x.shape[:-2] and shape[-1] == x.shape[-1]
        if len(shape) != x.ndim or not rows_free or (name == "gram" and shape[-2] != shape[-1]):
            raise ValueError(f"{name} must match x of shape {tuple(x.shape)} in all but rows, got {tuple(shape)}")
    if gram is not None:
        return None
    return basis if basis is not None else x_all if x_all is not None else x


def spectral_filter(
    x: Tensor,
    kind: Kind = "power",
    power: float | None = None,
    *,
    x_all: Tensor | None = None,
    side: Literal["online", "target"] = "online",
    basis: Tensor | None = None,
    gram: Tensor | None = None,
    rows: int | None = None,
    cutoff: float | None = None,
    scale: Literal["raw", "rms"] = "raw",
    precision: str = "auto",
    solver: str = "auto",
) -> Tensor:
    """x W in x's dtype, for x (B, D) or (V, B, D); W constant: the gradient is g W (online) or none (target)."""
    _check(x, kind, power, side, scale, cutoff, solver, precision)
    source = _source(x, x_all, basis, gram)
    if scale == "rms" and source is None and rows is None:
        raise ValueError("scale='rms' needs rows, the number of gathered rows behind gram")
    count = source.shape[-2] if source is not None else rows
    unit = math.sqrt(count) if scale == "rms" and count else 1.0
    floor = cutoff if cutoff is not None else CUTOFF[x.dtype if source is None else source.dtype]
    if side == "target":
        x = x.detach()
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        vectors, weights = filter_basis(source, gram, kind, power, floor, unit)
    with torch.autocast(x.device.type, enabled=False):
        # float64 up to the weights: a negative power would blow up the rounding of a float32 projection
        scaled = (x.double() @ vectors) * weights.unsqueeze(-2)
        work = torch.float64 if x.dtype == torch.float64 else torch.float32
        return (scaled.to(work) @ vectors.mT.to(work)).to(x.dtype)
