"""Polar factor and square roots of a feature matrix by matrix products alone: minimax Newton-Schulz chains."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic

import torch
from torch import Tensor

from fastrdm.kernels.linalg.matmul import Combination, M, Precision, constant, power_of_two

Step = tuple[float, float, float]  # p(s) = a s + b s^3 + c s^5
CUSHION = 0.024  # no step aims lower: a steeper one would lose more to rounding than it gains
# Steps after which the Gram matrix is formed anew: longer chains on it tilt U where singular values are tiny. With 3 of
# them the error of s^-1 is at most 2e-5 (7e-6 with 2), and four products with the features give way to six small ones.
SEGMENT = 3


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


@dataclass(frozen=True)
class Scaled(Generic[M]):
    """A wide matrix divided by an upper bound on its largest singular value, at most n^(1/8) above it."""

    x: M
    """(K, n, d), of norm at most 1."""
    gram: M
    """x x^T (K, n, n), exactly symmetric."""
    bound: Tensor
    """(K, 1, 1) float64; 0 for a zero matrix."""


def scale(x: Tensor, precision: Precision[M], least: Tensor | None = None) -> Scaled[M]:
    """Divide x (K, n, d) by |G^2|_F^(1/4) >= s_max, G = x x^T: one product more, no power iteration and no host.

    `least` (K, 1, 1) float64: the divisor is at least that.
    """
    unit = power_of_two(x)
    x = x / unit
    gram = precision.dense(precision.square(precision.matrix(x)))
    tiny = torch.finfo(x.dtype).tiny
    size = torch.linalg.matrix_norm(gram, keepdim=True).clamp_min(tiny)
    unit_gram = precision.matrix(gram / size)
    square = precision.dense(precision.axpby(unit_gram, unit_gram))
    bound = 1.001 * (size * torch.linalg.matrix_norm(square, keepdim=True).sqrt()).sqrt()
    if least is not None:
        bound = torch.maximum(bound, (least / unit).to(bound.dtype))
    safe = bound.clamp_min(math.sqrt(tiny))
    return Scaled(precision.matrix(x / safe), precision.matrix(gram / safe**2), bound.double() * unit.double())


def _inverse_root_chain(r: M, steps: tuple[Step, ...], precision: Precision[M]) -> M:
    """The product of p_t(s) / s over `steps`, as a function of symmetric r with eigenvalues s^2."""
    if len(steps) == 1:
        a, b, c = steps[0]
        return precision.axpby(r, r, alpha=c, beta=b, add=r, gamma=a)
    dense = precision.dense(r)
    q: M | None = None
    before: tuple[float, M] | None = None
    for index, (a, b, c) in enumerate(steps):
        step = precision.axpby(r, r, alpha=c, beta=b, add=r)
        if index + 1 < len(steps):
            next_r = precision.axpby(r, step, beta=a, add=r)
            r = precision.axpby(step, next_r, beta=a, add=next_r)
        if q is not None:
            q = precision.axpby(q, step, beta=a, add=q)
        elif before is not None:
            # (first + a_1 I) (step + a I) multiplied out, so that no matrix is copied for its diagonal.
            first_a, first = before
            weights = constant((first_a * a, a, first_a, 0.0), dense.dtype, dense.device)
            q = precision.axpby(first, step, combined=Combination(weights, (first, step, step)))
        else:
            before = a, step
    assert q is not None
    return q


def polar(scaled: Scaled[M], low: float, precision: Precision[M]) -> M:
    """U q(S) V^T (K, n, d) of scaled.x = U S V^T, where q is 1 to 1e-5 on [low, 1] and falls like s^3 below.

    The last step, p(q) = (5 q^3 - 3 q^5) / 2, is flat at 1 and clears what the others raised from below `low`.
    """
    steps = minimax_steps(low)
    x, gram = scaled.x, scaled.gram
    for start in range(0, len(steps), SEGMENT):
        q = _inverse_root_chain(gram, steps[start : start + SEGMENT], precision)
        x = precision.bounded_product(q, x)
        gram = precision.square(x)
    return precision.bounded_product(precision.axpby(gram, gram, alpha=-1.5, beta=2.5, add=gram), x)


def square_root(h: M, low: float, precision: Precision[M]) -> M:
    """h^(1/2) of symmetric h (K, n, n), eigenvalues in (0, 1]: to 1e-4 above `low`, positive below."""
    return precision.axpby(h, _inverse_root_chain(h, minimax_steps(math.sqrt(low)), precision))


def roots(scaled: Scaled[M], q: M, low: float, depth: int, precision: Precision[M]) -> list[M]:
    """[H, H^(1/2), H^(1/4), ...] down to `depth` square roots of H = U S U^T, where scaled.x = U S V^T and q = U V^T.

    With `depth` above 0 the precision's root_shift is added to S.
    """
    levels = [precision.symmetric_product(scaled.x, q, precision.root_shift if depth else 0.0)]
    for level in range(depth):
        levels.append(square_root(levels[-1], low ** (0.5**level), precision))
    return levels
