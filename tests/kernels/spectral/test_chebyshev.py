import pytest
import torch
from torch import Tensor

from fastrdm.kernels.linalg.precisions import precision_named
from fastrdm.kernels.spectral.chebyshev import DEGREES, blocks, evaluate, plan

FP64 = precision_named("fp64")


def symmetric(n: int, low: float) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix (1, n, n) with eigenvalues between low and 1, its eigenvalues, its eigenvectors."""
    values = torch.linspace(low, 1, n, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    return ((vectors * values) @ vectors.mT).unsqueeze(0), values, vectors


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("low", [0.0, 0.1])
def test_polynomials_up_to_the_degree_are_exact(degree: int, low: float) -> None:
    y, values, vectors = symmetric(9, low)
    c = torch.linspace(-1, 1, degree + 1, dtype=torch.float64)

    def polynomial(x: Tensor) -> Tensor:
        return (c * x.unsqueeze(-1) ** torch.arange(degree + 1)).sum(-1)

    b = blocks(lambda x: polynomial(x).unsqueeze(0), degree, low, y.device)
    assert b.shape == (1, (degree + 1) // 4, 4)
    got = evaluate(b, y, y @ y, low, FP64)[0]
    torch.testing.assert_close(got, (vectors * polynomial(values)) @ vectors.mT, rtol=0, atol=1e-11)


def test_coefficients_follow_a_device_scalar() -> None:
    y, values, vectors = symmetric(9, 0.0)
    bound = torch.tensor([[3.0], [1000.0]], dtype=torch.float64)
    b = blocks(lambda x: torch.log1p(bound * x**4), 23, 0.0, y.device)
    got = evaluate(b, y.expand(2, -1, -1), (y @ y).expand(2, -1, -1), 0.0, FP64)
    for view, scale in enumerate(bound[:, 0]):
        want = (vectors * torch.log1p(scale * values**4)) @ vectors.mT
        torch.testing.assert_close(got[view], want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("exponent", [0.3, 0.6, 0.7, 1.5, 3.0, 6.0])
def test_plan_keeps_its_tolerance(exponent: float) -> None:
    found = plan(exponent)
    assert found is not None
    depth, degree = found
    y, values, vectors = symmetric(40, 0.0)
    b = blocks(lambda x: (x ** (exponent * 2**depth)).unsqueeze(0), degree, 0.0, y.device)
    want = (vectors * values ** (exponent * 2**depth)) @ vectors.mT
    assert torch.linalg.matrix_norm(evaluate(b, y, y @ y, 0.0, FP64)[0] - want, 2) <= 3e-4


def test_plan_knows_what_it_cannot_do() -> None:
    assert plan(0.05) is None and plan(500.0) is None
