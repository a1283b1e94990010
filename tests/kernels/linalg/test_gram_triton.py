"""Gram matrices by Triton, on a CPU through its interpreter (conftest.py)."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fastrdm.kernels.linalg.effective_rank import effective_rank, effective_ranks, unit_grams
from fastrdm.kernels.linalg.gram import gram
from fastrdm.kernels.linalg.gram_triton import gram_triton
from fastrdm.kernels.spectral.spectral_filter import spectral_filter

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 70), (1, 67, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("center, normalize", [(False, False), (True, True)])
def test_gram(shape: tuple[int, int, int], dtype: torch.dtype, center: bool, normalize: bool) -> None:
    x = (3 * rand(*shape) + 1).to(dtype)
    exact = gram(x.double(), center=center, normalize=normalize)
    got = gram(x, center=center, normalize=normalize, precision="fp16x3-triton")
    definition = gram(x, center=center, normalize=normalize, precision="fp16x3")
    largest = exact.abs().max() + 1e-12
    assert torch.equal(got, got.mT) and got.dtype == torch.float32
    error, reference = ((y.double() - exact).abs().max() for y in (got, definition))
    assert error <= 2 * reference + 1e-6 * largest and error <= 1e-6 * largest


def test_sums_are_split_and_added_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    x = rand(1, 5, 200).float()
    whole = gram_triton(x, True, False)
    assert torch.equal(whole, gram_triton(x, True, False))
    for tiles in (1, 3):
        monkeypatch.setattr("fastrdm.kernels.linalg.gram_triton.TARGET_TILES", tiles)
        torch.testing.assert_close(gram_triton(x, True, False), whole, rtol=1e-5, atol=1e-4)


def test_rows_of_zeros_and_tiny_scales() -> None:
    for center, normalize in ((False, True), (False, False), (True, False)):
        x = rand(1, 6, 9).float() * (1e-9 if normalize else 1e-18)
        x[0, 2] = 0
        exact = gram(x.double(), center=center, normalize=normalize)
        got = gram(x, center=center, normalize=normalize, precision="fp16x3-triton")
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=2e-6 * exact.abs().max().item())


@pytest.mark.parametrize("noise", [1.0, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_ranks_of_rows_that_are_nearly_alike(noise: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the monitor takes them on CUDA: bfloat16 rows as they are, float32 ones in three float16 products."""
    common = torch.nn.functional.normalize(rand(96, seed=3), dim=0)
    x = (common + noise * rand(1, 24, 96) / 96**0.5).to(dtype)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    (grams,) = unit_grams([x], (False, True))
    assert all(matrix.dtype == torch.float64 for matrix in grams)
    monkeypatch.undo()
    for center, got in zip((False, True), effective_ranks(grams), strict=True):
        want = effective_rank(x.double(), center=center, normalize=True)
        torch.testing.assert_close(got, want, rtol=2e-3 if noise == 1e-4 else 1e-4, atol=0)


def test_refuses_what_it_has_no_kernel_for() -> None:
    with pytest.raises(ValueError, match="takes features of at most float32, got float64"):
        gram_triton(torch.zeros(1, 2, 2, dtype=torch.float64, device=DEVICE), False, False)


@pytest.mark.parametrize("shape", [(1, 7, 20), (2, 20, 7)])
@pytest.mark.parametrize("programs", [1, 2])
def test_newton_schulz_runs_on_the_kernels(
    shape: tuple[int, int, int], programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every symmetric product's tiles summed by one program, or shared by two."""
    monkeypatch.setattr("fastrdm.kernels.linalg.fp16x3_triton.PROGRAMS_A_TILE", programs)
    monkeypatch.setattr("fastrdm.kernels.linalg.fp16x3_triton.LONG_SUM", 0)
    x = rand(*shape).float()
    for kind, power, side in (("log1p", None, "online"), ("power", -0.5, "target"), ("power", -0.7, "target")):
        how = {"kind": kind, "power": power, "side": side}
        want = spectral_filter(x, solver="eigh", **how)  # type: ignore[arg-type]
        got = spectral_filter(x, solver="newton_schulz", precision="fp16x3-triton", **how)  # type: ignore[arg-type]
        torch.testing.assert_close(got, want, rtol=0, atol=1e-3 * want.abs().max().item())


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("n, d", [(512, 2048), (2048, 512), (129, 1000)])
def test_at_full_size(n: int, d: int) -> None:
    x = rand(2, n, d).float()
    exact = gram(x.double(), center=True, normalize=True)
    got = gram(x, center=True, normalize=True, precision="fp16x3-triton")
    # tensor cores drop what does not fit beside a sum: the 2,048 squares of the diagonal lose 3.5e-6 (seen on an H200)
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=5e-6 * exact.abs().max().item())
    assert torch.equal(got, got.mT)
    assert all(torch.equal(got, gram(x, center=True, normalize=True, precision="fp16x3-triton")) for _ in range(5)), (
        "no order of blocks is seen"
    )
