"""What surrounds the products, by Triton, against its definition in torch; through the interpreter without a GPU."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fastrdm.kernels.linalg.precisions import precision_named
from fastrdm.kernels.spectral import around_triton
from fastrdm.kernels.spectral.dominant import split_dominant
from fastrdm.kernels.spectral.filter_factors import CUTOFF, Factors, Function
from fastrdm.kernels.spectral.matmul_solvers import filter_gram_power, filter_newton_schulz
from fastrdm.kernels.spectral.polar import scale
from fastrdm.kernels.spectral.spectral_filter import spectral_filter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = precision_named("fp16x3-triton")


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


def nearly_collapsed(noise: float, b: int, d: int, seed: int = 0) -> Tensor:
    """Rows (b, d) that share one direction, of length 1, with noise of that length around it."""
    return torch.nn.functional.normalize(rand(d, seed=seed), dim=0) + noise * rand(b, d, seed=seed + 1) / math.sqrt(d)


def inputs(b: int, d: int) -> Tensor:
    """A collapsed matrix, a white one, zeros, and one with NaN, at scales far apart."""
    broken = rand(b, d, seed=4)
    broken[1, 2] = math.nan
    return torch.stack([nearly_collapsed(1e-3, b, d) * 1e12, rand(b, d) * 1e-12, torch.zeros_like(broken), broken])


@pytest.mark.parametrize("b, d", [(9, 30), (40, 150)])
def test_the_dominant_direction_and_the_scale(b: int, d: int) -> None:
    x = inputs(b, d).float()
    top, rest = split_dominant(x)
    got, got_rest, squares = around_triton.split_dominant(x)
    torch.testing.assert_close(got.size, top.size, rtol=1e-9, atol=0)
    for mine, theirs in ((got.left, top.left), (got.right, top.right)):
        torch.testing.assert_close(mine.abs(), theirs.abs(), rtol=0, atol=1e-9)
    torch.testing.assert_close(got_rest[0], rest[0], rtol=0, atol=1e-6 * rest[0].abs().max().item())
    assert torch.equal(got_rest[1:3], x[1:3]) and got_rest[3].isnan().any()
    torch.testing.assert_close(squares[:3], got_rest[:3].double().square().sum(-1), rtol=1e-5, atol=0)

    _, scaled = around_triton.prepared(x, 1e-3, TRITON)
    by = precision_named("fp64")
    want = scale(rest.double(), by, least=top.size * 1e-3)
    torch.testing.assert_close(scaled.bound[:3], want.bound[:3], rtol=2e-5, atol=1e-30)
    torch.testing.assert_close(scaled.x.dense[:3].double(), want.x[:3], rtol=0, atol=3e-5)
    torch.testing.assert_close(scaled.gram.dense[:3].double(), want.gram[:3], rtol=0, atol=3e-5)
    assert scaled.x.dense[3].isnan().all() and scaled.bound[3].isnan().all()


@pytest.mark.parametrize("wide", [True, False])
def test_factors_are_applied_as_in_torch(wide: bool) -> None:
    n, d = (12, 40) if wide else (40, 40)
    basis = torch.linalg.qr(rand(2, d, 12))[0].mT if wide else rand(2, 0, d)
    core = rand(2, n, n, seed=1)
    core = core + core.mT
    right = torch.linalg.qr(rand(2, d, 1, seed=2))[0]
    right[1] = 0
    weight, gain = torch.tensor([1e4, 3.0], device=DEVICE).double(), torch.tensor([2.0, 1e-5], device=DEVICE).double()
    x = (rand(2, 7, d, seed=3) * torch.logspace(-9, 9, 7, device=DEVICE)[:, None]).float()
    x[0, 3] += 1e3 * right[0, :, 0].float()
    factors = Factors(basis, core, gain[:, None, None], right, weight[:, None, None])
    want = factors.apply(x.double(), precision_named("fp64"))
    small = factors._replace(basis=basis.float(), core=core.float())
    got = small.apply(x, TRITON)
    assert got.dtype == torch.float32
    errors = (got.double() - want).norm(dim=-1) / want.norm(dim=-1)
    assert errors.max() <= 2e-6, errors


FILTERS = [("power", -0.5), ("log1p", None)]


@pytest.mark.parametrize("noise, b, d", [(1e-3, 12, 40), (1e-4, 12, 40), (1e-4, 40, 12)])
def test_near_collapse_values_and_gradients_are_within_1e3(noise: float, b: int, d: int) -> None:
    x = torch.stack([nearly_collapsed(noise, b, d, seed) for seed in (0, 5)]).float()
    for kind, power in FILTERS:
        y = x.clone().requires_grad_(kind == "log1p")
        how: dict[str, Any] = {"side": "online" if kind == "log1p" else "target", "cutoff": 1e-7}
        out = spectral_filter(y, kind, power, solver="newton_schulz", precision="fp16x3-triton", **how)
        z = x.double().requires_grad_(kind == "log1p")
        want = spectral_filter(z, kind, power, solver="eigh", **how)
        pairs = [(out, want)]
        if kind == "log1p":
            probe = rand(*x.shape, seed=9)
            pairs.append(
                (*torch.autograd.grad((out * probe.float()).sum(), y), *torch.autograd.grad((want * probe).sum(), z))
            )
        for got, exact in pairs:
            error = (got.double() - exact).norm(dim=-1) / exact.norm(dim=-1)
            assert error.square().mean().sqrt() <= 1e-3, (kind, power, error.max())


@pytest.mark.parametrize("scale_by", [1e-9, 1.0, 1e9])
def test_the_square(scale_by: float) -> None:
    x = (torch.stack([rand(12, 40), nearly_collapsed(1e-3, 12, 40)]) * scale_by).float()
    got = spectral_filter(x, "power", 2.0, side="target", solver="gram_power", precision="fp16x3-triton", scale="rms")
    want = x.double() @ x.double().mT @ x.double() / 12
    error = (got.double() - want).norm(dim=-1) / want.norm(dim=-1)
    assert error.max() <= 2e-6, error
    zero = spectral_filter(torch.zeros_like(x), "power", 2.0, solver="gram_power", precision="fp16x3-triton")
    assert not zero.any()


def count(kind: str, power: float | None, needs_grad: bool) -> int:
    """Kernels of a filter of two views, and of its backward pass where it needs one."""
    launches = pytest.importorskip("benchmarks.kernels.launches").launches
    x = torch.zeros(2, 16, 64, device=DEVICE)
    function = Function(kind, power, CUTOFF[x.dtype], 1.0)

    def call() -> None:
        if power == 2:
            filter_gram_power(x, x, False, function, needs_grad, TRITON)
            return
        _, factors = filter_newton_schulz(x, x, 0, function, needs_grad, TRITON)
        if needs_grad:
            factors.apply(x, TRITON)

    # The first call makes the constants that stay on the device.
    launches(call)
    return len(launches(call))


@pytest.mark.parametrize(
    "kind, power, needs_grad, most",
    [
        ("power", -1.0, False, 45),
        ("power", -0.5, False, 65),
        ("power", -0.7, False, 90),
        ("log1p", None, True, 100),
        ("power", 2.0, False, 6),
    ],
)
def test_a_filter_is_few_launches(
    kind: str, power: float | None, needs_grad: bool, most: int, record_property: Any
) -> None:
    found = count(kind, power, needs_grad)
    record_property("launches", found)
    assert found <= most
