"""Products in three float16 products by Triton, on a CPU through its interpreter (conftest.py)."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fastrdm.kernels.linalg import fp16x3_triton
from fastrdm.kernels.linalg.fp16x3_triton import (
    Fp16x3Triton,
    Parts,
    SplitMatrix,
    lower_tiles,
    multiply,
    programs_a_tile,
    split_dense,
)
from fastrdm.kernels.linalg.matmul import SPLIT, Combination

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


def combination(weights: Tensor, terms: tuple[Tensor, ...]) -> Combination[SplitMatrix]:
    t1, t2, t3 = (SplitMatrix(t) for t in terms)
    return Combination(weights, (t1, t2, t3))


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
@pytest.mark.parametrize("n", [50, 70])
def test_combine_alone_and_as_part_of_a_product(rows: int, n: int) -> None:
    terms = [rand(2, n, n, seed=i) for i in range(3)]
    terms = [(t + t.mT).float().double() for t in terms]
    weights = rand(rows, 3, 4)[:, 1].float().double()
    w = weights[..., None, None]
    eye = torch.eye(n, dtype=torch.float64, device=DEVICE)
    exact = w[:, 0] * eye + sum(w[:, i + 1] * t for i, t in enumerate(terms))
    given = combination(weights.float(), tuple(t.float() for t in terms))
    alone = TRITON.combine(given)
    close(alone.dense, exact)
    close(joined(alone.parts(1.0)), alone.dense.double(), 5e-7)
    y = terms[0] / 20
    first, second = SplitMatrix(y.float()), SplitMatrix(y.float())
    got = TRITON.axpby(first, second, alpha=2, beta=-1, add=SplitMatrix(y.float()), gamma=0.5, combined=given).dense
    close(got, 2 * y @ y - y + 0.5 * eye + exact, 2e-6)
    assert torch.equal(got, got.mT)


def test_a_product_known_to_be_symmetric() -> None:
    left, right = torch.linalg.qr(rand(2, 70, 70))[0], torch.linalg.qr(rand(2, 100, 70, seed=1))[0]
    s = torch.linspace(0.1, 1, 70, dtype=torch.float64, device=DEVICE)
    a, b = SplitMatrix(((left * s) @ right.mT).float()), SplitMatrix((left @ right.mT).float())
    got = TRITON.symmetric_product(a, b, gamma=0.25).dense
    assert torch.equal(got, got.mT)
    eye = torch.eye(70, dtype=torch.float64, device=DEVICE)
    close(got, (left * s) @ left.mT + 0.25 * eye, 2e-6)


def test_a_product_adds_up_the_squares_of_its_tiles() -> None:
    a = rand(2, 70, 70)
    parts = SplitMatrix((a + a.mT).float()).parts(1.0)
    squares = torch.empty(2, lower_tiles(70), dtype=torch.float64, device=DEVICE)
    out, _ = multiply(parts, parts, 1.0, symmetric=True, keep=None, squares=squares)
    torch.testing.assert_close(squares.sum(-1), out.double().square().sum((1, 2)), rtol=1e-6, atol=0)


def shared_by(monkeypatch: pytest.MonkeyPatch, programs: int) -> None:
    """Tiles of symmetric products are shared by so many programs, however short their sums are."""
    monkeypatch.setattr(fp16x3_triton, "PROGRAMS_A_TILE", programs)
    monkeypatch.setattr(fp16x3_triton, "LONG_SUM", 0)


@pytest.mark.parametrize("programs", [2, 3])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 40, 256), (1, 70, 100), (1, 64, 65)])
def test_programs_share_a_sum_in_a_fixed_order(
    programs: int, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a program is left with a part of its share, or with none."""
    x = rand(*shape).float()
    whole = square_triton(x)
    shared_by(monkeypatch, programs)
    got = square_triton(x)
    exact = x.double() @ x.double().mT
    assert torch.equal(got, got.mT) and torch.equal(got, square_triton(x))
    close(got, exact, 2e-6)
    close(got, whole.double(), 5e-7)


def test_a_shared_sum_ends_as_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a multiple of another matrix and of the identity, a combination, squares and the result's parts."""
    terms = [rand(1, 70, 70, seed=i) for i in range(3)]
    given = combination(torch.full((1, 4), 0.5, device=DEVICE), tuple((t + t.mT).float() for t in terms))
    symmetric = (terms[0] + terms[0].mT).float() / 20
    parts = SplitMatrix(symmetric).parts(1.0)

    def everything() -> tuple[Tensor, Tensor, Tensor]:
        squares = torch.empty(1, lower_tiles(70), dtype=torch.float64, device=DEVICE)
        how: dict[str, Any] = {"alpha": 2.0, "beta": 0.5, "add": symmetric, "gamma": 0.1, "combined": given}
        out, kept = multiply(parts, parts, 1.0, symmetric=True, keep=1.0, squares=squares, **how)
        assert kept is not None
        return out, joined(kept), squares

    whole = everything()
    shared_by(monkeypatch, 2)
    for got, expected in zip(everything(), whole, strict=True):
        close(got, expected.double(), 5e-7)


def test_sums_are_shared_where_they_are_long_and_tiles_few(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert programs_a_tile(True, 2, 512, 2048, cpu) == 1, "until a row of the benchmark says that more pays"
    monkeypatch.setattr(fp16x3_triton, "PROGRAMS_A_TILE", 2)
    assert programs_a_tile(True, 2, 512, 2048, cpu) == 2, "72 tiles"
    assert programs_a_tile(True, 2, 512, 512, cpu) == 1, "short sums"
    assert programs_a_tile(True, 4, 512, 2048, cpu) == 1, "144 tiles for 132 multiprocessors"
    assert programs_a_tile(False, 2, 512, 2048, cpu) == 1


def test_a_shared_sum_is_one_launch_more(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = pytest.importorskip("benchmarks.kernels.launches").launches
    x = SplitMatrix(torch.zeros(2, 64, 1024, device=DEVICE))
    x.parts(64.0)
    assert launches(lambda: TRITON.square(x)) == ["_product_kernel"]
    monkeypatch.setattr(fp16x3_triton, "PROGRAMS_A_TILE", 2)
    assert launches(lambda: TRITON.square(x)) == ["_share_kernel", "_product_kernel"]


@pytest.mark.parametrize("shape", [(1, 8, 8, 8), (2, 24, 72, 40), (1, 130, 64, 136), (2, 64, 72, 600)])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("bounded", [False, True])
def test_operands_by_descriptors_give_the_same_bits(
    shape: tuple[int, int, int, int], turned: bool, bounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, m, k, n = shape
    a, b = rand(count, m, k).float(), rand(count, k, n, seed=1).float()
    b = b.mT.contiguous().mT if turned else b
    want = product_triton(a, b, bounded)
    monkeypatch.setattr(fp16x3_triton, "WIDE_BY_DESCRIPTORS", True)
    monkeypatch.setattr(fp16x3_triton, "described", counted := Counted(fp16x3_triton.described))
    assert torch.equal(product_triton(a, b, bounded), want)
    assert len(counted.results) == 1 and counted.results[0] is not None


class Counted:
    """A function that keeps what it returned."""

    def __init__(self, function: Any) -> None:
        self.function, self.results = function, list[Any]()

    def __call__(self, *arguments: Any) -> Any:
        self.results.append(self.function(*arguments))
        return self.results[-1]


@pytest.mark.parametrize("m, k, n", [(8, 12, 16), (8, 16, 12), (7, 20, 9)])
def test_rows_of_odd_lengths_are_loaded_by_pointers(m: int, k: int, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A descriptor's rows are multiples of 16 bytes."""
    monkeypatch.setattr(fp16x3_triton, "WIDE_BY_DESCRIPTORS", True)
    monkeypatch.setattr(fp16x3_triton, "described", counted := Counted(fp16x3_triton.described))
    a, b = rand(2, m, k).float(), rand(2, k, n, seed=1).float()
    close(product_triton(a, b, True), a.double() @ b.double(), 2e-6)
    assert counted.results == [None]


def test_nothing_is_described_until_a_benchmark_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor on a GPU without the hardware for it, where the kernel would spill, nor for symmetric products."""
    monkeypatch.setattr(fp16x3_triton, "described", None)
    a = rand(1, 16, 16).float()
    product_triton(a, a, True)
    monkeypatch.setattr(fp16x3_triton, "WIDE_BY_DESCRIPTORS", True)
    square_triton(a)
    monkeypatch.setattr(fp16x3_triton, "has_wgmma", lambda device: False)
    product_triton(a, a, True)


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
