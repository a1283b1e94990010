import math

import pytest
import torch
from torch import Tensor

from fastrdm.kernels.linalg.precisions import precision_named
from fastrdm.kernels.spectral.polar import minimax_steps, polar, roots, scale


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("low, count", [(0.1, 4), (1e-2, 5), (1e-3, 7), (1e-4, 9)])
def test_steps_compose_to_one(low: float, count: int) -> None:
    steps = minimax_steps(low)
    assert len(steps) == count
    s = torch.logspace(math.log10(low), 0, 20001, dtype=torch.float64)
    below = torch.linspace(0, low, 1001, dtype=torch.float64)
    for a, b, c in steps:
        s, below = (a * x + b * x**3 + c * x**5 for x in (s, below))
    assert (s - 1).abs().max() <= 1e-4
    assert below[0] == 0 and below.max() <= 1 + 1e-4 and below.min() >= 0


@pytest.mark.parametrize("shape", [(2, 5, 40), (1, 1, 1), (3, 16, 16)])
def test_scale_bounds_the_largest_singular_value(shape: tuple[int, int, int]) -> None:
    x = rand(*shape) * torch.logspace(-8, 8, shape[0]).double()[:, None, None]
    scaled = scale(x, precision_named("fp64"))
    largest = torch.linalg.matrix_norm(x, 2)
    ratio = scaled.bound[:, 0, 0] / largest
    assert (ratio >= 1).all() and (ratio <= 1.002 * shape[1] ** (1 / 8)).all()
    torch.testing.assert_close(scaled.x * scaled.bound, x)
    torch.testing.assert_close(scaled.gram, scaled.x @ scaled.x.mT)


@pytest.mark.parametrize("precision, bar", [("fp64", 2e-4), ("fp32", 2e-4), ("fp16x3", 2e-4)])
def test_polar_factor_and_roots(precision: str, bar: float) -> None:
    u, v = torch.linalg.qr(rand(2, 20, 20))[0], torch.linalg.qr(rand(2, 50, 20, seed=1))[0]
    s = torch.logspace(0, -3.5, 20, dtype=torch.float64)
    x = (u * s) @ v.mT
    by = precision_named(precision)
    scaled = scale(x if precision == "fp64" else x.float(), by)
    q = polar(scaled, 1e-4, by)
    torch.testing.assert_close(q.double(), u @ v.mT, rtol=0, atol=bar)
    share = s / scaled.bound[:, 0]
    for level, root in enumerate(roots(scaled, q, 1e-4, 2, by)):
        want = (u * (share ** (0.5**level)).unsqueeze(-2)) @ u.mT
        assert torch.equal(root, root.mT)
        torch.testing.assert_close(root.double(), want, rtol=0, atol=2e-3)
