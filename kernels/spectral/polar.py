"""Polar factor and square roots of a feature matrix by matrix products alone: minimax Newton-Schulz chains."""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fastrdm.kernels.linalg.matmul import axpby, power_of_two, product

Step = tuple[float, float, float]  # p(s) = a s + b s^3 + c s^5
CUSHION = 0.024  # no step aims lower: a steeper one would lose more to rounding than it gains
SEGMENT = (
    2  # steps after which the Gram matrix is formed anew: longer chains on it tilt U where singular values are tiny
)
# Added to the eigenvalues of H before its root is taken: more than rounding takes away (measured: 5e-7 in fp16x3).
SHIFT = {"fp64": 1e-12, "fp32": 1e-6, "fp16x3": 2e-6, "fp16x3-triton": 2e-6}


def _minimax(low: float, high: float) -> Step:
    """The odd quintic nearest to 1 on [low, high], by Remez exchange (Amsel et al., arXiv 2505.16932)."""
    if low > high * (1 - 5e-6):
        return 15 / 8 / high, -10 / 8 / high**3, 3 / 8 / high**5
    inner = [(3 * low + high) / 4, (low + 3 * high) / 4]
    error, previous = math.inf, math.nan
    a = b = c = 0.0
    while not abs(error - previous) < 1e-14:
        previous = error
        points = (low, *inner, high)
        rows = [[s, s**3, s**5, (-1.0) ** i] for i, s in enumerate(points)]
        a, b, c, error = torch.linalg.solve(torch.tensor(rows, dtype=torch.float64), torch.ones(4).double()).tolist()
        root = math.sqrt(max(9 * b * b - 20 * a * c, 0))
        inner = [math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))]
    return a, b, c


@lru_cache
def minimax_steps(low: float, tolerance: float = 1e-4) -> tuple[Step, ...]:
    """Odd quintics whose composition maps [low, 1] to within `tolerance` of 1: 9 for 1e-4, 7 for 1e-3."""
    steps, high = [], 1.0
    while 1 - low >= tolerance:
        aim = max(low, CUSHION * high)
        a, b, c = _minimax(aim, high)
        ends = [a * s + b * s**3 + c * s**5 for s in (aim, high)]
        a, b, c = (2 / sum(ends) * k for k in (a, b, c))
        steps.append((a, b, c))
        low = a * low + b * low**3 + c * low**5
        high = 2 - low
    return tuple(steps)


class Scaled(NamedTuple):
    """A wide matrix divided by an upper bound on its largest singular value, at most n^(1/8) above it."""

    x: Tensor  # (K, n, d), norm at most 1
    gram: Tensor  # x x^T (K, n, n), exactly symmetric
    bound: Tensor  # (K, 1, 1) float64; 0 for a zero matrix


def symmetric_product(x: Tensor, precision: str) -> Tensor:
    """x x^T of (K, n, d) of entries below 512, exactly symmetric."""
    if precision == "fp16x3-triton":
        from fastrdm.kernels.linalg.fp16x3_triton import square_triton  # a CPU build of torch has no Triton

        out: Tensor = square_triton(x)
        return out
    gram = product(x, x.mT, precision, bounded=True)
    return 0.5 * (gram + gram.mT)


def scale(x: Tensor, precision: str) -> Scaled:
    """Scale by |G^2|_F^(1/4) >= s_max, G = x x^T: one product more, no power iteration and no host."""
    unit = power_of_two(x)
    x = x / unit
    gram = symmetric_product(x, precision)
    tiny = torch.finfo(x.dtype).tiny
    size = torch.linalg.matrix_norm(gram, keepdim=True).clamp_min(tiny)
    unit_gram = gram / size
    square = axpby(unit_gram, unit_gram, precision)
    bound = 1.001 * (size * torch.linalg.matrix_norm(square, keepdim=True).sqrt()).sqrt()
    safe = bound.clamp_min(math.sqrt(tiny))
    return Scaled(x / safe, gram / safe**2, bound.double() * unit.double())


def _inverse_root_chain(r: Tensor, steps: tuple[Step, ...], precision: str) -> Tensor:
    """The product of p_t(s) / s over `steps`, as a function of symmetric r with eigenvalues s^2."""
    q: Tensor | None = None
    for index, (a, b, c) in enumerate(steps):
        step = axpby(r, r, precision, alpha=c, beta=b, add=r)
        if index + 1 < len(steps):
            next_r = axpby(r, step, precision, beta=a, add=r)
            r = axpby(step, next_r, precision, beta=a, add=next_r)
        if q is None:
            q = step.clone()
            q.diagonal(dim1=-2, dim2=-1).add_(a)
        else:
            q = axpby(q, step, precision, beta=a, add=q)
    assert q is not None
    return q


def polar(scaled: Scaled, low: float, precision: str) -> Tensor:
    """U q(S) V^T for scaled.x = U S V^T (K, n, d): q = 1 to 1e-5 on [low, 1] and falls like s^3 below.

    The last step, p(q) = (5 q^3 - 3 q^5) / 2, is flat at 1 and clears what the others raised from below `low`.
    """
    steps = minimax_steps(low)
    x, gram = scaled.x, scaled.gram
    for start in range(0, len(steps), SEGMENT):
        q = _inverse_root_chain(gram, steps[start : start + SEGMENT], precision)
        x = product(q, x, precision, bounded=True)
        gram = symmetric_product(x, precision)
    return product(axpby(gram, gram, precision, alpha=-1.5, beta=2.5, add=gram), x, precision, bounded=True)


def square_root(h: Tensor, low: float, precision: str) -> Tensor:
    """h^(1/2) of symmetric h (K, n, n), eigenvalues in (0, 1]: to 1e-4 above `low`, positive below."""
    return axpby(h, _inverse_root_chain(h, minimax_steps(math.sqrt(low)), precision), precision)


def roots(scaled: Scaled, q: Tensor, low: float, depth: int, precision: str) -> list[Tensor]:
    """[H, H^(1/2), H^(1/4), ...] down to `depth` square roots, H = U S U^T of scaled.x, S in [0, 1], or S + SHIFT."""
    h = product(scaled.x, q.mT, precision, bounded=True)
    levels = [0.5 * (h + h.mT)]
    if depth:
        levels[0].diagonal(dim1=-2, dim2=-1).add_(SHIFT[precision])
    for level in range(depth):
        levels.append(square_root(levels[-1], low ** (0.5**level), precision))
    return levels
