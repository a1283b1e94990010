"""Products of halves by Triton, on a CPU through its interpreter (conftest.py)."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fastrdm.kernels.linalg import fp16x3_triton
from fastrdm.kernels.linalg.fp16x3_triton import (
    axpby_reference,
    axpby_triton,
    combine_triton,
    product_triton,
    square_triton,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


def close(got: Tensor, exact: Tensor, bar: float = 1e-6) -> None:
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=bar * exact.abs().max().item())


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (1, 64), (2, 65)])
@pytest.mark.parametrize("with_add", [True, False])
def test_axpby(shape: tuple[int, int], with_add: bool) -> None:
    count, n = shape
    a = rand(count, n, n)
    a = (a @ a.mT / n).float().double()
    b = (a @ a - 0.5 * a).float().double()
    add = a if with_add else None
    exact = axpby_reference(a, b, add, 0.7, -0.3, 2.0)
    a32, b32 = a.float(), b.float()
    got = axpby_triton(a32, b32, None if add is None else a32, 0.7, -0.3, 2.0)
    torchs = axpby_reference(a32, b32, None if add is None else a32, 0.7, -0.3, 2.0)
    assert torch.equal(got, got.mT)
    bar = 2 * (torchs.double() - exact).abs().max() + 1e-6 * exact.abs().max()
    assert (got.double() - exact).abs().max() <= bar
    assert torch.equal(got, axpby_triton(a32, b32, None if add is None else a32, 0.7, -0.3, 2.0))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 70, 5), (1, 130, 64, 128), (2, 64, 65, 600)])
@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("turned", [False, True])
def test_product(shape: tuple[int, int, int, int], bounded: bool, turned: bool) -> None:
    """Of any scale, or as it comes; the second operand may lie in memory the other way round."""
    count, m, k, n = shape
    a, b = rand(count, m, k).float(), rand(count, k, n, seed=1).float()
    if not bounded:
        a, b = a * 1e-18, b * 1e15
    b = b.mT.contiguous().mT if turned else b
    got = product_triton(a, b, bounded)
    assert got.shape == (count, m, n) and got.dtype == torch.float32
    close(got, a.double() @ b.double(), 2e-6)
    assert torch.equal(got, product_triton(a, b, bounded))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 70), (1, 67, 40)])
def test_square(shape: tuple[int, int, int]) -> None:
    x = rand(*shape).float()
    got = square_triton(x)
    assert torch.equal(got, got.mT)
    close(got, x.double() @ x.double().mT, 2e-6)
    turned = x.mT.contiguous().mT  # a tall matrix, seen as a wide one
    close(square_triton(turned), x.double() @ x.double().mT, 2e-6)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("with_minus", [True, False])
def test_combine(rows: int, with_minus: bool) -> None:
    terms = tuple(rand(2, 50, 50, seed=i) for i in range(3))
    weights, minus = rand(rows, 3, 4)[:, 1], rand(2, 50, 50, seed=9) if with_minus else None
    w = weights[..., None, None]
    exact = w[:, 0] * torch.eye(50, dtype=torch.float64, device=DEVICE) + sum(
        w[:, i + 1] * t for i, t in enumerate(terms)
    )
    exact = exact if minus is None else exact - minus
    t1, t2, t3 = (t.float() for t in terms)
    close(combine_triton(weights.float(), (t1, t2, t3), None if minus is None else minus.float()), exact)


def test_halves_are_kept_until_the_matrix_changes() -> None:
    a = rand(1, 20, 20)
    a = (a + a.mT).float() / 20
    out = axpby_triton(a, a, a, 1.0, 0.5, 0.0)
    kept = fp16x3_triton.halves(out, 1.0)
    assert kept is fp16x3_triton.halves(out, 1.0)
    close(kept.high.double() + kept.low.double() / 2048, out.double(), 5e-7)
    out.diagonal(dim1=-2, dim2=-1).add_(1.0)
    again = fp16x3_triton.halves(out, 1.0)
    assert again is not kept
    close(again.high.double() + again.low.double() / 2048, out.double(), 5e-7)
    scaled = fp16x3_triton.halves(out, 64.0)
    close((scaled.high.double() + scaled.low.double() / 2048) / 64, out.double(), 5e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    x = rand(1, 6, 9).float()
    x[0, 2, 3] = bad
    for got in (
        product_triton(x, x.mT.contiguous(), False),
        product_triton(x, x.mT.contiguous(), True),
        square_triton(x),
    ):
        assert not torch.isfinite(got[0, 2]).any()


def test_zeros_give_zeros() -> None:
    x = torch.zeros(2, 5, 8, device=DEVICE)
    assert not product_triton(x, x.mT.contiguous(), False).any() and not square_triton(x).any()
