"""A function of a symmetric matrix as one Chebyshev polynomial in a root of it, its coefficients made on the device."""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from fastrdm.kernels.linalg.matmul import Combination, M, Precision, constant

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
    # Row n: the coefficient of T_n in terms of c.
    rows = torch.eye(count, dtype=torch.float64)
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
    """Nodes (degree + 1,) and the map from values there to blocks, float64, copied to the device once."""
    matrix = _blocks_matrix(degree) @ _chebyshev_matrix(degree)
    return torch.tensor(nodes(degree, low), dtype=torch.float64, device=device), matrix.to(device)


def blocks(function: Callable[[Tensor], Tensor], degree: int, low: float, device: torch.device) -> Tensor:
    """Blocks (K, m, WIDTH) of the interpolant on [low, 1] of a function that maps (degree + 1,) to (K, degree + 1)."""
    points, matrix = _constants(degree, low, device)
    values = function(points) @ matrix.mT
    return values.reshape(len(values), -1, WIDTH)


def evaluate(b: Tensor, y: M, y_squared: M, low: float, precision: Precision[M]) -> M:
    """The polynomial with blocks b (K, m, WIDTH) at symmetric y (K, n, n), eigenvalues in [low, 1]; m + 1 products."""
    slope, shift = 2 / (1 - low), -(1 + low) / (1 - low)
    weights = b.to(precision.dense(y).dtype).unbind(1)
    dtype, device = weights[0].dtype, weights[0].device
    powers = (y, y_squared, y_squared)
    t1 = precision.combine(Combination(constant((shift, slope, 0.0, 0.0), dtype, device), powers))
    second = (2 * shift**2 - 1, 4 * slope * shift, 2 * slope**2, 0.0)
    t2 = precision.combine(Combination(constant(second, dtype, device), powers))
    t3 = precision.axpby(t1, t2, alpha=2, beta=-1, add=t1)
    t4 = precision.axpby(t2, t2, alpha=2, gamma=-1)
    terms = (t1, t2, t3)
    u, previous = precision.combine(Combination(weights[-1], terms)), None
    # Clenshaw's recurrence in T_4, from the highest block down; the lowest is added without the factor 2.
    for index in range(len(weights) - 2, -1, -1):
        combined, alpha = Combination(weights[index], terms), 2 if index else 1
        u, previous = precision.axpby(t4, u, alpha=alpha, beta=-1, add=previous, combined=combined), u
    return u


@lru_cache
def plan(exponent: float, tolerance: float = 3e-4) -> tuple[int, int] | None:
    """Number of square roots and degree with which s^exponent is a polynomial on [0, 1] to within `tolerance`.

    None where no plan with at most two square roots and the highest of DEGREES keeps the tolerance.
    """
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
