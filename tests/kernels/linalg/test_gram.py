import pytest
import torch
from torch import Tensor

from fastrdm.kernels.linalg.gram import gram, symmetric_gram, upper_gram


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(x: Tensor, center: bool, normalize: bool) -> Tensor:
    x = x.double()
    if normalize:
        x = x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    if center:
        x = x - x.mean(-2, keepdim=True)
    return x @ x.mT if x.shape[-2] <= x.shape[-1] else x.mT @ x


@pytest.mark.parametrize("n", [1, 127, 128, 129, 300])
def test_every_pair_once_is_the_whole_product(n: int) -> None:
    for x in (rand(2, n, 7), rand(2, 7, n).mT):
        torch.testing.assert_close(symmetric_gram(x), x @ x.mT)
        torch.testing.assert_close(upper_gram(x).triu(), (x @ x.mT).triu())


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (3, 5, 9), (1, 1), (2, 200, 31)])
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_gram_is_the_definition(shape: tuple[int, ...], center: bool, normalize: bool) -> None:
    x = 3 * rand(*shape) + 1
    bars = {"auto": 1e-12, "fp64": 1e-12, "fp32": 1e-6, "fp16x3": 1e-6, "half": 2e-3}
    want = by_hand(x, center, normalize)
    for precision, bar in bars.items():
        got = gram(
            x if precision in ("auto", "fp64") else x.float(), center=center, normalize=normalize, precision=precision
        )
        assert got.dtype == (torch.float64 if precision in ("auto", "fp64") else torch.float32)
        scale = by_hand(x, False, normalize).abs().max()  # what rounding before the means are taken is relative to
        assert (got.double() - want).abs().max() <= bar * scale, precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_pass_over_half_features_is_exact_to_float32(dtype: torch.dtype) -> None:
    x = rand(20, 300).to(dtype)
    for precision in ("auto", "half"):
        torch.testing.assert_close(gram(x, precision=precision).double(), by_hand(x, False, False), rtol=0, atol=1e-4)


def test_ragged_features_are_padded_with_zeros() -> None:
    parts = [rand(6, 9), rand(6, 4), rand(6, 20)]
    got = gram(parts)
    assert got.shape == (3, 6, 6)
    for part, matrix in zip(parts, got, strict=True):
        n = min(part.shape)
        torch.testing.assert_close(matrix[:n, :n], by_hand(part, False, False))
        assert not matrix[n:].any() and not matrix[:, n:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("precision, bar", [("auto", 1e-6), ("fp16x3", 1e-6), ("half", 1e-3)])
def test_ragged_features_of_each_dtype_centered_and_normalized(dtype: torch.dtype, precision: str, bar: float) -> None:
    parts = [(3 * rand(*shape, seed=i) + 1).to(dtype) for i, shape in enumerate([(70, 90), (70, 33), (70, 140)])]
    got = gram(parts, center=True, normalize=True, precision=precision)
    assert got.shape == (3, 70, 70) and got.dtype == torch.float32
    for part, matrix in zip(parts, got, strict=True):
        n = min(part.shape)
        want = by_hand(part, True, True)
        assert (matrix[:n, :n].double() - want).abs().max() <= bar * by_hand(part, False, True).abs().max()
        assert not matrix[n:].any() and not matrix[:, n:].any()


def test_gram_has_no_gradient_and_repeats_itself() -> None:
    x = rand(70, 40).float().requires_grad_()
    first = gram(x, center=True)
    assert not first.requires_grad and torch.equal(first, gram(x, center=True))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(first, gram(x, center=True)), "autocast does not lower the precision"


def test_refuses() -> None:
    with pytest.raises(ValueError, match=r"takes floats of shape .* got \(3,\) torch.float32"):
        gram(torch.zeros(3))
    with pytest.raises(ValueError, match="takes floats"):
        gram(torch.zeros(3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="precision must be one of auto, fp64"):
        gram(torch.zeros(3, 3), precision="tf32")
    with pytest.raises(ValueError, match="a list of at least one"):
        gram([])
