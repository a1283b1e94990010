import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrdm.kernels.spectral import eigh_solver
from fastrdm.kernels.spectral.dominant import split_dominant
from fastrdm.kernels.spectral.filter_factors import CUTOFF
from fastrdm.kernels.spectral.matmul_solvers import RANGE
from fastrdm.kernels.spectral.polar import minimax_steps
from fastrdm.kernels.spectral.spectral_filter import spectral_filter

SHAPES = [(24, 72), (72, 24), (32, 32)]
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "log": torch.log,
    "log1p": torch.log1p,
    "log1p_sq": lambda s: torch.log1p(s * s),
}
FILTERS: list[tuple[str, float | None, str]] = [
    *[("power", p, "target") for p in (-1.0, -0.7, -0.5, -0.3, 0.0, 1.0, 2.0)],
    *[("power", p, "online") for p in (0.0, 0.3, 0.5, 1.0, 1.5, 2.0, 4.0)],
    *[(kind, None, side) for kind in FUNCTIONS for side in ("online", "target")],
]
SPECTRA = ["pow0.5", "pow1", "pow2", "dominant", "drawn0", "relu", "centered"]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def features(name: str, b: int, d: int, seed: int = 0) -> Tensor:
    """(b, d) float64 of mean square 1: exact eigenvalues, or Gaussian draws (`drawnX`; `drawn0` is white)."""
    x: Tensor
    n = min(b, d)
    index = torch.arange(1, n + 1, dtype=torch.float64)
    left, right = torch.linalg.qr(rand(b, n, seed=seed))[0], torch.linalg.qr(rand(d, n, seed=seed + 1))[0]
    if name.startswith("pow"):
        x = (left * index ** (-float(name[3:]) / 2)) @ right.mT
    elif name == "dominant":  # one eigenvalue 1e4 times each other
        x = (left * torch.where(index == 1, 100.0, 1.0)) @ right.mT
    elif name == "centered":  # as after BatchNorm: a null direction where b <= d
        x = features("pow1", b, d, seed)
        x = x - x.mean(0)
    elif name == "relu":
        x = torch.relu(rand(b, 2 * d, seed=seed) @ rand(2 * d, d, seed=seed + 1) / math.sqrt(d)) + 0.1
    else:  # drawnX: Gaussian rows whose covariance has a power law
        x = rand(b, d, seed=seed) * torch.arange(1, d + 1) ** (-float(name.removeprefix("drawn")) / 2)
    x = x * (math.sqrt(b * d) / torch.linalg.vector_norm(x))
    return x


def g(kind: str, power: float | None, s: Tensor) -> Tensor:
    return s**power if power is not None else FUNCTIONS[kind](s)


def oracle(x: Tensor, kind: str, power: float | None, cutoff: float) -> Tensor:
    """W (D, D) by the definition, from a float64 SVD."""
    s: Tensor
    vh: Tensor
    _, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    keep = s > cutoff * s[0]
    return (vh.mT * torch.where(keep, g(kind, power, torch.where(keep, s, 1.0)), 0.0)) @ vh


def error(got: Tensor, want: Tensor) -> float:
    """The larger of the rms difference of row directions and of relative row norms."""
    got, want = got.detach().double(), want.double()
    lengths = got.norm(dim=-1, keepdim=True), want.norm(dim=-1, keepdim=True)
    assert (lengths[1] > 0).all()
    direction = (got / lengths[0] - want / lengths[1]).norm(dim=-1)
    size = (lengths[0] / lengths[1] - 1).squeeze(-1)
    return torch.stack((direction, size)).square().mean(-1).sqrt().max().item()


def value_and_gradient(x: Tensor, side: str, **how: object) -> tuple[Tensor, Tensor | None, Tensor]:
    """The filter's output, the gradient of <output, probe>, and the probe."""
    x = x.clone().requires_grad_(side == "online")
    probe = rand(*x.shape, seed=5).to(x)
    out = spectral_filter(x, side=side, **how)  # type: ignore[arg-type]
    assert out.dtype == x.dtype and out.shape == x.shape and out.requires_grad == (side == "online")
    if side == "online":
        (out * probe).sum().backward()
    return out, x.grad, probe


def worst(x: Tensor, kind: str, power: float | None, side: str, floor: float, **how: object) -> float:
    """Largest error in value and gradient over the views of x (V, B, D), the definition's cutoff being `floor`."""
    out, grad, probe = value_and_gradient(x, side, kind=kind, power=power, **how)
    errors = []
    for view in range(len(x)):
        w = oracle(x[view], kind, power, floor)
        errors.append(error(out[view], x[view].double() @ w))
        if grad is not None:
            errors.append(error(grad[view], probe[view].double() @ w))
    return max(errors)


@pytest.mark.parametrize("b, d", SHAPES)
@pytest.mark.parametrize("kind, power, side", FILTERS)
def test_eigh_is_the_definition(kind: str, power: float | None, side: str, b: int, d: int) -> None:
    for dtype, bar in ((torch.float32, 1e-6), (torch.float64, 1e-7)):
        x = torch.stack([features(name, b, d) for name in [*SPECTRA, "drawn0.5", "drawn1", "drawn2"]]).to(dtype)
        solver = "gram_power" if power in (2, 4) else "eigh"
        assert worst(x, kind, power, side, CUTOFF[dtype], solver=solver) <= bar


@pytest.mark.parametrize("precision", ["fp32", "fp16x3"])
@pytest.mark.parametrize("b, d", SHAPES)
@pytest.mark.parametrize("kind, power, side", FILTERS)
def test_newton_schulz_is_within_1e3(kind: str, power: float | None, side: str, b: int, d: int, precision: str) -> None:
    names = ["pow0.5", "pow1", "pow2", "dominant", "centered"]
    if b != d:  # square draws reach below the range: next test
        names += ["relu", "drawn0", "drawn0.5", "drawn1", "drawn2"]
    x = torch.stack([features(name, b, d) for name in names]).float()
    solver = "gram_power" if power in (2, 4) else "newton_schulz"
    assert worst(x, kind, power, side, RANGE, solver=solver, precision=precision) <= 1e-3


@pytest.mark.parametrize("solver, bar", [("eigh", 1e-6), ("newton_schulz", 1e-3)])
@pytest.mark.parametrize("views", [1, 2, 8])
@pytest.mark.parametrize("b, d", SHAPES)
def test_each_of_any_number_of_views_is_the_definition(b: int, d: int, views: int, solver: str, bar: float) -> None:
    x = torch.stack([features("pow1", b, d, seed=2 * i) * 10.0**i for i in range(views)]).float()
    for kind, power, side in (("power", -0.7, "target"), ("power", 1.0, "online"), ("log1p_sq", None, "online")):
        assert worst(x, kind, power, side, RANGE, solver=solver) <= bar


def faded(x: Tensor, kind: str, power: float | None, low: float) -> Tensor:
    """W of newton_schulz as documented, wide x: g(s) q(s)^2, for whole rows of a negative power g(s) q(s).

    q composes the minimax steps at s over the bound of polar.scale: 1 down to `low`, then falling to 0.
    """
    s: Tensor
    vh: Tensor
    _, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    q = s / (1.001 * s.pow(8).sum() ** (1 / 8))
    for a, b, c in minimax_steps(low):
        q = a * q + b * q**3 + c * q**5
    q = (5 * q**3 - 3 * q**5) / 2
    return (vh.mT * (g(kind, power, s) * q ** (1 if power is not None and power < 0 else 2))) @ vh


@pytest.mark.parametrize(
    "kind, power, side", [("power", -1.0, "target"), ("log1p", None, "online"), ("power", 1.0, "online")]
)
def test_below_its_range_newton_schulz_fades_as_documented(
    kind: str, power: float | None, side: str, record_property: Callable[[str, object], None]
) -> None:
    n = 32
    s = torch.cat((torch.logspace(0, -3, n - 4, dtype=torch.float64), torch.tensor([6e-5, 3e-5, 1e-5, 1e-6]).double()))
    left, right = torch.linalg.qr(rand(n, n))[0], torch.linalg.qr(rand(2 * n, n))[0]
    x = ((left * s) @ right.mT).unsqueeze(0)
    record_property("energy below the range", ((s < RANGE) * s**2).sum().item() / (s**2).sum().item())
    w = faded(x[0], kind, power, RANGE)
    out, grad, probe = value_and_gradient(x, side, kind=kind, power=power, solver="newton_schulz", precision="fp64")
    assert error(out[0], x[0] @ w) <= 1e-3
    assert grad is None or error(grad[0], probe[0] @ w) <= 1e-3


@pytest.mark.parametrize("precision", ["fp32", "fp16x3"])
@pytest.mark.parametrize("name", ["drawn0", "drawn1", "drawn2", "relu"])
def test_square_draws_reach_below_the_range_and_fade_there(
    name: str, precision: str, record_property: Callable[[str, object], None]
) -> None:
    x = features(name, 96, 96).float()
    s = torch.linalg.svdvals(x.double())
    assert s[-1] < RANGE * s[0]
    record_property("energy below the range", ((s < RANGE * s[0]) * s**2).sum().item() / (s**2).sum().item())
    for kind, power, side in (
        ("power", -1.0, "target"),
        ("power", -0.5, "target"),
        ("power", 1.0, "online"),
        ("log1p", None, "online"),
        ("log1p_sq", None, "online"),
    ):
        w = faded(x, kind, power, RANGE)
        out, grad, probe = value_and_gradient(
            x, side, kind=kind, power=power, solver="newton_schulz", precision=precision
        )
        assert error(out, x.double() @ w) <= 1e-3
        assert grad is None or error(grad, probe.double() @ w) <= 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp16x3", "fp16x3-triton"])
@pytest.mark.parametrize("shape", [(2, 512, 2048), (1, 2048, 512), (8, 256, 1024)])
def test_newton_schulz_on_cuda_at_full_size(shape: tuple[int, int, int], precision: str) -> None:
    x = torch.stack([features("drawn1", *shape[1:], seed=i) for i in range(shape[0])]).float().cuda()
    for kind, power, side in FILTERS:
        solver = "gram_power" if power in (2, 4) else "newton_schulz"
        how: dict[str, Any] = {"kind": kind, "power": power}
        out, grad, _ = value_and_gradient(x, side, solver=solver, precision=precision, **how)
        want, want_grad, _ = value_and_gradient(x, side, solver="eigh", cutoff=RANGE, **how)
        assert error(out, want) <= 1e-3, how
        assert grad is None or want_grad is None or error(grad, want_grad) <= 1e-3, how


@pytest.mark.parametrize("precision", ["fp32", "fp16x3"])
def test_null_directions_are_cleared(precision: str) -> None:
    x = features("centered", 32, 96).float()
    left, s, right = torch.linalg.svd(x.double(), full_matrices=False)
    assert s[-1] < 1e-7 * s[0]
    out = spectral_filter(x, "power", -1.0, side="target", solver="newton_schulz", precision=precision)
    assert (left[:, -1] @ out.double() @ right[-1]).abs() <= 1e-6
    assert (out - left[:, :-1] @ right[:-1]).norm() / out.norm() <= 1e-4


@pytest.mark.parametrize("precision", ["fp32", "fp16x3"])
@pytest.mark.parametrize("b, d", [(24, 72), (72, 24), (32, 32)])
def test_features_of_low_rank(b: int, d: int, precision: str) -> None:
    """Many null directions at once: what rounding raises there must not turn a root negative."""
    for rank in (1, 2, 9, 20):
        plain = rand(b, rank) @ rand(rank, d, seed=1)
        plain = (plain / plain.square().mean().sqrt()).float()
        for x in (plain, plain - plain.mean(0), torch.cat((plain[: b // 2], plain[: b // 2]))):
            for kind, power, side in (("log1p", None, "online"), ("log", None, "online"), ("power", -0.7, "target")):
                how = {"kind": kind, "power": power, "solver": "newton_schulz", "precision": precision}
                out, grad, probe = value_and_gradient(x, side, **how)
                w = oracle(x, kind, power, RANGE)
                for got, start in ((out, x), (grad, probe)):
                    if got is not None:
                        want = start.double() @ w
                        assert (got - want).norm() <= 1e-3 * want.norm(), f"{kind} of rank {rank}"


@pytest.mark.parametrize("b, d", [(24, 96), (96, 24), (32, 32)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("solver, bar", [("eigh", 1e-6), ("newton_schulz", 1e-3)])
@pytest.mark.parametrize(
    "kind, power, side", [("power", -0.5, "target"), ("log", None, "online"), ("log1p", None, "online")]
)
def test_rounded_features_with_the_cutoff_of_their_dtype(
    kind: str, power: float | None, side: str, solver: str, bar: float, dtype: torch.dtype, b: int, d: int
) -> None:
    cutoff = CUTOFF[dtype]
    names = ["pow1", "centered"]  # wide ones of the latter have a direction that only rounding fills
    for name in names if b == d else [*names, "drawn0", "drawn1"]:
        x = features(name, b, d).to(dtype).float()
        out, grad, probe = value_and_gradient(x, side, kind=kind, power=power, solver=solver, cutoff=cutoff)
        w, kept = oracle(x, kind, power, cutoff), oracle(x, "power", 0.0, cutoff)
        for got, start in ((out, x), (grad, probe)):
            if got is not None:
                got, want = got.detach().double(), start.double() @ w
                assert error(got @ kept, want) <= bar
                assert (got - got @ kept).norm() <= (0.4 if solver == "newton_schulz" else bar) * want.norm(), (
                    "fades slowly"
                )
        low = spectral_filter(x.to(dtype), kind, power, side="target", solver=solver)  # type: ignore[arg-type]
        assert error(low.double() @ kept, x.double() @ w) <= torch.finfo(dtype).eps, "the default is that of the dtype"


STEEP = {  # singular values of 64 directions
    "geometric": torch.logspace(0, -4, 64, dtype=torch.float64),
    "two levels": torch.cat((torch.full((4,), 1e4), torch.ones(60))).double(),
    "half and half": torch.cat((torch.full((32,), 1e3), torch.ones(32))).double(),
}


@pytest.mark.parametrize("scale", [2.0**-66, 1.0, 2.0**66])  # x itself is not rounded anew
@pytest.mark.parametrize("spectrum", STEEP)
def test_eigh_loses_nothing_where_small_singular_values_get_large_weights(spectrum: str, scale: float) -> None:
    left, right = torch.linalg.qr(rand(64, 64))[0], torch.linalg.qr(rand(200, 64, seed=1))[0]
    x = ((left * STEEP[spectrum]) @ right.mT).float()
    for power in (-1.0, -0.5):
        w = oracle(x, "power", power, CUTOFF[torch.float32])
        for y, by in ((x, w), (x.mT.contiguous(), oracle(x.mT, "power", power, CUTOFF[torch.float32]))):
            got = spectral_filter(y * scale, "power", power, side="target", solver="eigh")
            assert error(got.double() / scale ** (1 + power), y.double() @ by) <= 1e-6
        rows = spectral_filter(x[5:30], "power", power, x_all=x, side="target", solver="eigh")
        assert error(rows, x[5:30].double() @ w) <= 1e-6
    out, grad, probe = value_and_gradient(x, "online", kind="log1p", solver="eigh")
    w = oracle(x, "log1p", None, CUTOFF[torch.float32])
    for got, start in ((out, x), (grad, probe)):
        assert got is not None and error(got, start.double() @ w) <= 1e-6


@pytest.mark.parametrize("spectrum, dtypes", [("geometric", {torch.float64}), ("two levels", {torch.float32})])
def test_few_large_singular_values_are_lowered_and_many_go_through_float64(
    spectrum: str, dtypes: set[torch.dtype]
) -> None:
    s = STEEP[spectrum].flip(-1)[None]
    dtype, low = eigh_solver._split(s, 1 / s, torch.float32)
    assert {dtype} == dtypes and low == (60 if dtype == torch.float32 else 64)
    assert eigh_solver._split(s, 1 / s, torch.float64) == (torch.float64, 64)
    assert eigh_solver._split(s, s, torch.float32) == (torch.float32, 64), "nothing is blown up: all as they are"


@pytest.mark.parametrize("solver", ["eigh", "newton_schulz"])
def test_basis_of_the_other_branch(solver: str) -> None:
    x, other = features("drawn1", 12, 20), features("pow1", 15, 20, seed=3)
    for kind, power in (("log", None), ("power", 0.5), *([("power", -0.5)] if solver == "eigh" else [])):
        got = spectral_filter(x, kind, power, x_all=x, basis=other, side="target", solver=solver)  # type: ignore[arg-type]
        assert error(got, x @ oracle(other, kind, power, RANGE)) <= (1e-6 if solver == "eigh" else 1e-3)


@pytest.mark.parametrize("solver", ["eigh", "newton_schulz", "gram_power"])
def test_rms_divides_the_singular_values_and_not_x(solver: str) -> None:
    x = features("drawn1", 9, 25)
    for kind, power in (("power", 2.0),) if solver == "gram_power" else (("log1p", None), ("power", 0.5)):
        got = spectral_filter(x, kind, power, scale="rms", solver=solver)  # type: ignore[arg-type]
        assert error(got, x @ oracle(x / 3, kind, power, RANGE)) <= 1e-3


def nearly_collapsed(noise: float, b: int, d: int, seed: int = 0) -> Tensor:
    """Rows (b, d) that share one direction, of length 1, with noise of that length around it."""
    common = torch.nn.functional.normalize(rand(d, seed=seed), dim=0)
    return common + noise * rand(b, d, seed=seed + 1) / math.sqrt(d)


COLLAPSED = [(kind, power, side) for kind, power, side in FILTERS if power not in (4.0,)]


@pytest.mark.parametrize("noise", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("b, d", [(48, 100), (100, 48)])
@pytest.mark.parametrize("precision", ["fp32", "fp16x3"])
def test_near_collapse_the_gradient_of_a_target_filter_is_right(noise: float, b: int, d: int, precision: str) -> None:
    """All singular values but one lie below the range. What the gradient of the loss is made of are the small ones."""
    x = nearly_collapsed(noise, b, d).float()
    for power in (-1.0, -0.7, -0.5, -0.3):

        def gradient(y: Tensor) -> Tensor:
            online = x.double().roll(1, 0).requires_grad_()
            loss = -torch.nn.functional.cosine_similarity(online, y.double(), dim=-1).mean()
            return torch.autograd.grad(loss, online)[0]

        exact = gradient(x.double() @ oracle(x, "power", power, 1e-7))
        got = gradient(spectral_filter(x, "power", power, side="target", solver="newton_schulz", precision=precision))
        assert torch.linalg.norm(got - exact) <= 2e-2 * torch.linalg.norm(exact), power


@pytest.mark.parametrize("noise", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("b, d", [(24, 72), (72, 24)])
@pytest.mark.parametrize("kind, power, side", COLLAPSED)
def test_near_collapse_values_and_gradients_are_within_1e3(
    kind: str, power: float | None, side: str, b: int, d: int, noise: float
) -> None:
    x = torch.stack([nearly_collapsed(noise, b, d, seed) for seed in (0, 5)]).float()
    solver = "gram_power" if power == 2 else "newton_schulz"
    bar = 1e-3
    assert worst(x, kind, power, side, 1e-7, solver=solver, precision="fp32") <= bar


def test_rows_that_are_all_alike_have_one_direction_and_no_noise_is_raised() -> None:
    x = nearly_collapsed(0, 24, 72).float() * torch.linspace(0.5, 2, 24)[:, None]
    for kind, power in (("power", -0.5), ("log", None), ("power", 0.0)):
        out = spectral_filter(x, kind, power, side="target", solver="newton_schulz", precision="fp32")  # type: ignore[arg-type]
        size = torch.linalg.svdvals(x.double())[0]
        torch.testing.assert_close(out.double(), x.double() * g(kind, power, size), rtol=1e-5, atol=1e-5)


def test_the_dominant_direction() -> None:
    alone, even, none = nearly_collapsed(1e-3, 24, 72), features("pow1", 24, 72), torch.zeros(24, 72).double()
    broken = alone.clone()
    broken[3, 4] = math.nan
    x = torch.stack([alone, even, none, broken]).float()
    top, rest = split_dominant(x)
    left, s, right = torch.linalg.svd(x[0].double())
    assert top.size[0].item() == pytest.approx(s[0].item(), rel=1e-12)
    assert abs((top.left[0, :, 0] @ left[:, 0]).item()) == pytest.approx(1, abs=1e-12)
    assert abs((top.right[0, :, 0] @ right[0]).item()) == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(torch.linalg.svdvals(rest[0].double())[:-1], s[1:], rtol=1e-5, atol=0)
    assert (top.size[1:] == 0).all() and torch.equal(rest[1:3], x[1:3]) and rest[3].isnan().any()
    huge, tiny = (split_dominant(x[:1].double() * size)[0].size.item() for size in (1e200, 1e-200))
    assert (huge / 1e200, tiny / 1e-200) == pytest.approx((s[0].item(),) * 2, rel=1e-9)
