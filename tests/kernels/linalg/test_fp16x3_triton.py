"""Products in three float16 products by Triton, on a CPU through its interpreter (conftest.py)."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fastrdm.kernels.linalg.fp16x3_triton import Fp16x3Triton, Parts, SplitMatrix, split_dense
from fastrdm.kernels.linalg.matmul import SPLIT

TRITON = Fp16x3Triton()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


def close(got: Tensor, exact: Tensor, bar: float = 1e-6) -> None:
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=bar * exact.abs().max().item())


def axpby_triton(a: Tensor, b: Tensor, add: Tensor | None, alpha: float, beta: float, gamma: float) -> Tensor:
    added = None if add is None else SplitMatrix(add)
    return TRITON.axpby(SplitMatrix(a), SplitMatrix(b), alpha=alpha, beta=beta, add=added, gamma=gamma).dense


def axpby_reference(a: Tensor, b: Tensor, add: Tensor | None, alpha: float, beta: float, gamma: float) -> Tensor:
    """alpha a b + beta add + gamma I for commuting symmetric matrices (K, n, n), by the definition."""
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    return alpha * (a @ b) + (0 if add is None else beta * add) + gamma * eye


def product_triton(a: Tensor, b: Tensor, bounded: bool) -> Tensor:
    return TRITON.bounded_product(SplitMatrix(a), SplitMatrix(b)).dense if bounded else TRITON.product(a, b)


def square_triton(x: Tensor) -> Tensor:
    return TRITON.square(SplitMatrix(x)).dense


def combine_triton(weights: Tensor, terms: tuple[Tensor, Tensor, Tensor], minus: Tensor | None) -> Tensor:
    t1, t2, t3 = (SplitMatrix(t) for t in terms)
    return TRITON.combine(weights, (t1, t2, t3), None if minus is None else SplitMatrix(minus)).dense


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


def joined(parts: Parts) -> Tensor:
    return parts.high.double() + parts.low.double() / SPLIT


def test_a_product_leaves_the_parts_of_its_result_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    a, x = rand(1, 20, 20), SplitMatrix(rand(1, 20, 30).float())
    symmetric = SplitMatrix((a + a.mT).float() / 20)
    made = {
        1.0: (TRITON.axpby(symmetric, symmetric, add=symmetric), TRITON.square(x)),
        64.0: (TRITON.bounded_product(symmetric, x),),
    }
    monkeypatch.setattr("fastrdm.kernels.linalg.fp16x3_triton.split_dense", None)
    for scale, results in made.items():
        for result in results:
            close(joined(result.parts(scale)) / scale, result.dense.double(), 5e-7)


def test_a_matrix_is_split_once_for_a_scale_and_anew_for_another() -> None:
    matrix = SplitMatrix(rand(2, 7, 30).float())
    first = matrix.parts(1.0)
    assert matrix.parts(1.0) is first
    scaled = matrix.parts(64.0)
    close(joined(scaled) / 64, matrix.dense.double(), 5e-7)
    close(joined(first), matrix.dense.double(), 5e-7)


def test_a_split_over_its_own_unit_keeps_any_scale() -> None:
    x = (rand(2, 7, 30) * torch.tensor([1e-20, 1e20], dtype=torch.float64, device=DEVICE)[:, None, None]).float()
    parts = split_dense(x, None)
    assert parts.largest is not None
    unit = torch.exp2(torch.floor(torch.log2(parts.largest.double())))[:, None, None]
    for view, exact in zip(joined(parts) * unit, x.double(), strict=True):
        close(view, exact, 5e-7)


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
