"""A function of a symmetric matrix as one Chebyshev polynomial in a root of it, its coefficients made on the device."""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from fastrdm.kernels.linalg.matmul import axpby

WIDTH = 4  # T_1 .. T_4 are formed, higher ones reached by Clenshaw's recurrence in T_4 (Paterson and Stockmeyer)
DEGREES = (3, 7, 11, 15, 19, 23, 31)  # one less than a multiple of WIDTH


def nodes(degree: int, low: float) -> list[float]:
    """Chebyshev points of [low, 1]."""
    count = degree + 1
    return [low + (1 - low) * (1 + math.cos(math.pi * (j + 0.5) / count)) / 2 for j in range(count)]


def _chebyshev_matrix(degree: int) -> Tensor:
    """Coefficients of the interpolant from its values at the nodes, (degree + 1, degree + 1) float64."""
    count = degree + 1
    j = torch.arange(count, dtype=torch.float64)
    matrix = torch.cos(math.pi * j[:, None] * (j + 0.5) / count) * (2 / count)
    matrix[0] /= 2
    return matrix


def _blocks_matrix(degree: int) -> Tensor:
    """Blocks b[j, i], WIDTH a block, with sum c_n T_n = b_0 + sum_j T_{4j} b_j, b_j = sum_i b[j, i] T_i.

    From 2 T_i T_m = T_{m+i} + T_{m-i}, applied from the highest term down.
    """
    count = degree + 1
    rows = torch.eye(count, dtype=torch.float64)  # row n: what stands before T_n, in terms of c
    out = torch.zeros(count, count, dtype=torch.float64)
    for n in range(degree, -1, -1):
        block, i = divmod(n, WIDTH)
        if block and i:
            out[n] = 2 * rows[n]
            rows[block * WIDTH - i] -= rows[n]
        else:
            out[n] = rows[n]
    return out


@lru_cache
def _constants(degree: int, low: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Nodes (degree + 1,) and the map from values there to blocks, float64; copied once, before any capture."""
    matrix = _blocks_matrix(degree) @ _chebyshev_matrix(degree)
    return torch.tensor(nodes(degree, low), dtype=torch.float64, device=device), matrix.to(device)


def blocks(function: Callable[[Tensor], Tensor], degree: int, low: float, device: torch.device) -> Tensor:
    """Blocks (K, m, WIDTH) of the interpolant on [low, 1] of a function that maps (degree + 1,) to (K, degree + 1)."""
    points, matrix = _constants(degree, low, device)
    values = function(points) @ matrix.mT
    return values.reshape(len(values), -1, WIDTH)


def evaluate(b: Tensor, y: Tensor, y_squared: Tensor, low: float, precision: str) -> Tensor:
    """The polynomial with blocks b (K, m, WIDTH) at symmetric y (K, n, n), eigenvalues in [low, 1]; m + 1 products."""
    slope, shift = 2 / (1 - low), -(1 + low) / (1 - low)
    eye = torch.eye(y.shape[-1], dtype=y.dtype, device=y.device)
    t1 = slope * y + shift * eye
    t2 = 2 * slope**2 * y_squared + 4 * slope * shift * y + (2 * shift**2 - 1) * eye
    t3 = axpby(t1, t2, precision, alpha=2, beta=-1, add=t1)
    t4 = axpby(t2, t2, precision, alpha=2, gamma=-1)
    weights, count = b.to(y.dtype).unbind(1), b.shape[1]
    terms = t1, t2, t3
    u, previous = _block(weights[-1], terms, None, precision), None
    for j in range(count - 2, 0, -1):
        u, previous = axpby(t4, u, precision, alpha=2, beta=1, add=_block(weights[j], terms, previous, precision)), u
    if count == 1:
        return u
    return axpby(t4, u, precision, beta=1, add=_block(weights[0], terms, previous, precision))


def _block(w: Tensor, terms: tuple[Tensor, Tensor, Tensor], minus: Tensor | None, precision: str) -> Tensor:
    """w_0 I + w_1 T_1 + w_2 T_2 + w_3 T_3 - minus, of weights (K, WIDTH)."""
    if precision == "fp16x3-triton":
        from fastrdm.kernels.linalg.fp16x3_triton import combine_triton  # a CPU build of torch has no Triton

        out: Tensor = combine_triton(w, terms, minus)
        return out
    first, second, third = (w[:, i, None, None] * t for i, t in enumerate(terms, start=1))
    sums = first + second + third
    sums = sums if minus is None else sums - minus
    sums.diagonal(dim1=-2, dim2=-1).add_(w[:, :1])
    return sums


@lru_cache
def plan(exponent: float, tolerance: float = 3e-4) -> tuple[int, int] | None:
    """Square roots and degree with which s^exponent is a polynomial on [0, 1] to within `tolerance`; None: too many."""
    y = torch.linspace(0, 1, 4001, dtype=torch.float64)
    best: tuple[int, int, int] | None = None
    for depth in (1, 2):
        target = y ** (exponent * 2**depth)
        for degree in DEGREES:
            values = torch.tensor(nodes(degree, 0.0), dtype=torch.float64) ** (exponent * 2**depth)
            c = _chebyshev_matrix(degree) @ values
            angle = torch.arccos((2 * y - 1).clamp(-1, 1))
            fit = torch.cos(torch.arange(degree + 1, dtype=torch.float64) * angle[:, None]) @ c
            cost = 20 * depth + degree // WIDTH
            if (fit - target).abs().max() <= tolerance and (best is None or cost < best[0]):
                best = (cost, depth, degree)
                break
    return None if best is None else best[1:]
