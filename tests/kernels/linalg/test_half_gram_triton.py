"""Gram matrices of half rows by Triton, on a CPU through its interpreter (conftest.py)."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fastrdm.kernels.linalg.effective_rank import effective_rank, effective_ranks, unit_grams
from fastrdm.kernels.linalg.gram import choose, gram
from fastrdm.kernels.linalg.half_gram_triton import half_grams

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
HALVES = [torch.bfloat16, torch.float16]
BAR = 5e-6 if CUDA else 2e-6  # of the largest entry; tensor cores drop what does not fit beside a sum
Make = Callable[[int, int, int], Tensor]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


def off_center(deviations: float) -> Make:
    """Rows whose mean is as many of their standard deviations away from zero, in every column alike."""
    return lambda k, n, d: rand(k, n, d) + deviations


def nearly_alike(noise: float) -> Make:
    """Rows that share a direction of length 1, with noise of this length around it."""
    return lambda k, n, d: torch.nn.functional.normalize(rand(k, 1, d, seed=1), dim=-1) + noise * rand(k, n, d) / d**0.5


def collapsed_but_one(k: int, n: int, d: int) -> Tensor:
    """Rows that are nearly alike, and one that points the other way: no column can be shifted."""
    x = nearly_alike(1e-3)(k, n, d)
    x[:, -1] = -x[:, -1]
    return x


def of_low_rank(k: int, n: int, d: int) -> Tensor:
    """Rows after a ReLU, in three dimensions before it."""
    return (rand(k, n, 3) @ rand(k, 3, d, seed=1)).relu()


INPUTS: dict[str, Make] = {
    "random": rand,
    "of any length": lambda k, n, d: rand(k, n, d) * torch.logspace(-3, 1, n, dtype=torch.float64).to(DEVICE)[:, None],
    "of low rank": of_low_rank,
    "collapsed but one": collapsed_but_one,
    **{f"mean of {m} deviations": off_center(m) for m in (1, 10, -100)},
    **{f"noise of {s}": nearly_alike(s) for s in (1.0, 1e-1, 1e-2, 1e-3, 1e-4)},
}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", INPUTS)
def test_is_the_definition_to_the_stated_bound(name: str, dtype: torch.dtype) -> None:
    inputs = [INPUTS[name](1, 70, width).to(dtype) for width in (70, 150)]
    for normalize in (True, False):
        got = half_grams(inputs, (False, True), normalize, torch.float64)
        for x, matrices in zip(inputs, got, strict=True):
            for center, matrix in zip((False, True), matrices, strict=True):
                assert torch.equal(matrix, matrix.mT)
                exact = gram(x.double(), center=center, normalize=normalize)
                torch.testing.assert_close(matrix, exact, rtol=0, atol=BAR * exact.abs().max().item())


def test_the_bound_needs_the_shift() -> None:
    """What centering the float32 Gram matrix of the raw rows loses, so that the bound above says something."""
    x = nearly_alike(1e-3)(1, 70, 150).bfloat16()
    exact = gram(x.double(), center=True, normalize=True)
    raw = (x.float() @ x.float().mT).double()
    lengths = raw.diagonal(dim1=-2, dim2=-1).sqrt()
    raw = raw / lengths[:, :, None] / lengths[:, None, :]
    centered = raw - raw.mean(1, keepdim=True) - raw.mean(2, keepdim=True) + raw.mean((1, 2), keepdim=True)
    assert (centered - exact).abs().max() > 1e-3 * exact.abs().max()


@pytest.mark.parametrize("dtype", HALVES)
def test_rows_that_are_all_alike(dtype: torch.dtype) -> None:
    x = rand(1, 1, 70).to(dtype).expand(1, 9, 70)
    plain, centered = half_grams([x], (False, True), True, torch.float64)[0]
    torch.testing.assert_close(plain, torch.ones_like(plain), rtol=0, atol=1e-6)
    assert centered.abs().max() < 1e-30
    assert not half_grams([x], [True], False, torch.float64)[0][0].any()


@pytest.mark.parametrize("dtype", HALVES)
def test_zeros_stay_zeros_and_what_is_not_finite_stays_so(dtype: torch.dtype) -> None:
    x = rand(4, 9, 20).to(dtype)
    x[0, 3], x[1], x[2, 4, 5], x[3, 4, 5] = 0, 0, float("nan"), float("inf")
    plain, centered = half_grams([x], (False, True), True, torch.float64)[0]
    torch.testing.assert_close(plain[0], gram(x[0].double(), normalize=True), rtol=0, atol=BAR)
    assert not plain[0, 3].any() and not plain[1].any() and not centered[1].any()
    assert not plain[2:, 4].isfinite().any() and not centered[2:].isfinite().any()


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 3), (3, 65, 65), (2, 128, 64 * 3)])
@pytest.mark.parametrize("centers", [(False,), (True,), (True, False)])
def test_any_shape_and_any_choice_of_centers(shape: tuple[int, int, int], centers: tuple[bool, ...]) -> None:
    x = (rand(*shape) + 0.5).half()
    got = half_grams([x], centers, True, torch.float32)[0]
    for center, matrix in zip(centers, got, strict=True):
        assert matrix.dtype == torch.float32 and matrix.is_contiguous()
        exact = gram(x.double(), center=center, normalize=True)
        torch.testing.assert_close(matrix.double(), exact, rtol=0, atol=BAR * exact.abs().max().item() + 1e-30)
        assert torch.equal(matrix, half_grams([x], [center], True, torch.float32)[0][0])


def test_rows_may_lie_apart_in_memory() -> None:
    x = (rand(9, 2, 20) + 1).bfloat16().transpose(0, 1)
    exact = gram(x.double(), center=True)
    torch.testing.assert_close(
        gram(x, center=True, precision="half-triton").double(), exact, rtol=0, atol=BAR * exact.abs().max().item()
    )


def test_refuses() -> None:
    for x in (torch.zeros(1, 4, 9), torch.zeros(1, 9, 4).half(), torch.zeros(1, 0, 4).half()):
        with pytest.raises(ValueError, match=r"half-triton takes float16 or bfloat16 rows, .* got \(1, "):
            gram(x, precision="half-triton")
    with pytest.raises(ValueError, match=r"got \(1, 4, 9\) torch.float16, \(1, 5, 9\) torch.float16"):
        half_grams([torch.zeros(1, 4, 9).half(), torch.zeros(1, 5, 9).half()], [True], True, torch.float32)


def test_auto_takes_the_kernels_for_half_rows_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    wide, tall = torch.zeros(1, 4, 9), torch.zeros(1, 9, 4)
    assert choose("auto", wide.half()) == "fp32", "on a CPU"
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert choose("auto", wide.half()) == choose("auto", wide.bfloat16()) == "half-triton"
    assert choose("auto", tall.half()) == choose("auto", wide) == "fp16x3-triton"
    assert choose("auto", wide.double()) == "fp64"


def test_half_taps_of_a_log_line_are_four_launches_together(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = pytest.importorskip("benchmarks.kernels.launches").launches
    inputs = [torch.zeros(2, 16, width, dtype=torch.bfloat16, device=DEVICE) for width in (64, 96, 128, 64)]
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    names = ["_columns_kernel", "_product_kernel", "_means_kernel", "_result_kernel"]
    assert launches(lambda: unit_grams(inputs, (False, True))) == names
    # As in a training in bfloat16, where the output of both branches is float32.
    mixed = [x.float() for x in inputs[:2]] + inputs[2:]
    found = launches(lambda: unit_grams(mixed, (False, True)))
    assert len(found) <= 30 and [name for name in found if name in names] == names


def test_ranks_of_a_mixture_of_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half rows, wide and tall, of two heights and types, beside float32: each its rank, in the order given."""
    inputs = [rand(2, 20, 30, seed=1).bfloat16(), rand(2, 20, 40, seed=2).float(), rand(2, 20, 50, seed=3).bfloat16()]
    inputs += [rand(2, 20, 7, seed=4).half(), rand(1, 12, 30, seed=5).half(), rand(2, 20, 30, seed=6).half() + 1]
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    grams = unit_grams(inputs, (False, True))
    monkeypatch.undo()
    for x, matrices in zip(inputs, grams, strict=True):
        for center, got in zip((False, True), effective_ranks(matrices), strict=True):
            torch.testing.assert_close(got, effective_rank(x, center=center, normalize=True), rtol=1e-5, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", INPUTS)
def test_at_full_size(name: str, dtype: torch.dtype) -> None:
    inputs = [INPUTS[name](2, 512, width).to(dtype) for width in (2048, 512)]
    for x, matrices in zip(inputs, half_grams(inputs, (False, True), True, torch.float64), strict=True):
        for center, matrix in zip((False, True), matrices, strict=True):
            exact = gram(x.double(), center=center, normalize=True)
            torch.testing.assert_close(matrix, exact, rtol=0, atol=BAR * exact.abs().max().item())
