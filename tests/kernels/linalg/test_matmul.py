import math

import pytest
import torch
from torch import Tensor

from fastrdm.kernels.linalg.matmul import power_of_two, scaled_by, split
from fastrdm.kernels.linalg.precisions import precision_named, resolve


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_split_keeps_22_bits() -> None:
    x = (rand(1000) * 10 ** (rand(1000, seed=1) - 2)).float()
    high, low = split(x)
    assert high.dtype == low.dtype == torch.float16
    assert ((high.double() + low.double() / 2048 - x.double()).abs() <= 2.0**-22 * x.abs() + 2.0**-36).all()


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e15])
@pytest.mark.parametrize("shape", [(2, 7, 5, 3), (1, 1, 1, 1), (1, 40, 300, 40)])
def test_three_half_products_are_as_good_as_float32(shape: tuple[int, int, int, int], scale: float) -> None:
    k, m, d, n = shape
    a, b = (rand(k, m, d) * scale).float(), (rand(k, d, n, seed=1) / scale).float()
    exact = a.double() @ b.double()
    size = a.double().abs() @ b.double().abs()
    for precision in ("fp16x3", "fp32"):
        assert ((precision_named(precision).product(a, b).double() - exact).abs() / size).max() <= 5e-7, precision


def test_power_of_two() -> None:
    x = torch.tensor([[[3.0, -9.0]], [[0.0, 0.0]], [[0.25, 0.1]]])
    assert power_of_two(x)[:, 0, 0].tolist() == [8.0, 1.0, 0.25]


@pytest.mark.parametrize("gain, want", [(3.0, 6e-20), (1e45, 2e25), (1e-30, 0.0), (0.0, 0.0), (1e80, math.inf)])
def test_gains_beyond_float32_are_no_reason_to_overflow(gain: float, want: float) -> None:
    x = torch.tensor([[[2e-20, 0.0]]])
    got = scaled_by(x, torch.full((1, 1, 1), gain, dtype=torch.float64))
    assert got.dtype == torch.float32 and got[0, 0].tolist() == pytest.approx([want, 0.0], rel=2e-7, abs=1e-45)


@pytest.mark.parametrize("precision", ["fp64", "fp32", "fp16x3"])
def test_axpby_is_symmetric_and_right(precision: str) -> None:
    a = rand(2, 9, 9)
    a = a @ a.mT / 9
    a = (a + a.mT) / 2
    b = 0.3 * a @ a - a
    x, y = (a, b) if precision == "fp64" else (a.float(), b.float())
    got = precision_named(precision).axpby(x, y, alpha=1.5, beta=-0.5, add=x, gamma=2.0)
    assert torch.equal(got, got.mT)
    want = 1.5 * a @ b - 0.5 * a + 2 * torch.eye(9)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-12 if precision == "fp64" else 2e-5)


def test_auto_is_the_inputs_precision_on_cpu() -> None:
    assert resolve("auto", torch.zeros(1, dtype=torch.float64)) == "fp64"
    assert resolve("auto", torch.zeros(1, dtype=torch.bfloat16)) == "fp32"
    with pytest.raises(ValueError, match="precision must be one of auto, fp64"):
        resolve("tf32", torch.zeros(1))
