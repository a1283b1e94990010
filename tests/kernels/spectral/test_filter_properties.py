"""What holds for spectral filters whatever the input: edge inputs, symmetries, algebra."""

import math

import pytest
import torch
from torch import Tensor

from fastrdm.kernels.spectral.spectral_filter import spectral_filter

KINDS: list[tuple[str, float | None, str]] = [
    *[("power", p, "target") for p in (-1.0, -0.7, -0.5, 1.0, 2.0)],
    *[("power", p, "online") for p in (0.0, 1.0, 2.0, 4.0)],
    *[(kind, None, "online") for kind in ("log", "log1p", "log1p_sq")],
]
SOLVERS = [("eigh", "auto", 1e-9), ("newton_schulz", "fp64", 1e-3), ("newton_schulz", "fp16x3", 1e-3)]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(n: int, seed: int) -> Tensor:
    q: Tensor = torch.linalg.qr(rand(n, n, seed=seed))[0]
    return q


def run(x: Tensor, kind: str, power: float | None, side: str, solver: str, precision: str) -> tuple[Tensor, Tensor]:
    """Output and gradient of its sum; zeros where there is none."""
    x = x.clone().requires_grad_(side == "online")
    name = "gram_power" if power in (2, 4) else solver
    out = spectral_filter(x, kind, power, side=side, solver=name, precision=precision)  # type: ignore[arg-type]
    if side == "online":
        out.sum().backward()
    return out.detach(), x.grad if x.grad is not None else torch.zeros_like(x)


@pytest.mark.parametrize(
    "solver, precision", [("eigh", "auto"), ("newton_schulz", "fp32"), ("newton_schulz", "fp16x3")]
)
@pytest.mark.parametrize("kind, power, side", KINDS)
def test_edge_inputs(kind: str, power: float | None, side: str, solver: str, precision: str) -> None:
    for shape in ((6, 10), (10, 6), (1, 9), (9, 1), (1, 1), (5, 5)):
        out, grad = run(torch.zeros(shape), kind, power, side, solver, precision)
        assert not out.any() and not grad.any(), "nothing stays nothing"
        for x in (torch.ones(shape), 3 * rand(shape[0], 1).float() @ rand(1, shape[1], seed=1).float()):
            out, grad = run(x, kind, power, side, solver, precision)
            assert out.isfinite().all() and grad.isfinite().all()
            s = x.double().norm()  # rank one: the only singular value
            weight = s**power if power is not None else {"log": s, "log1p": 1 + s, "log1p_sq": 1 + s * s}[kind].log()
            torch.testing.assert_close(out.double(), weight * x.double(), rtol=2e-3, atol=1e-3 * s.item())
        for bad in (math.nan, math.inf):
            x = torch.ones(shape)
            x[-1, -1] = bad
            out, grad = run(x, kind, power, side, solver, precision)
            assert out.isnan().all(), "what is not a number is not hidden"
            assert side == "target" or grad.isnan().all()


@pytest.mark.parametrize(
    "solver, precision", [("eigh", "auto"), ("newton_schulz", "fp32"), ("newton_schulz", "fp16x3")]
)
@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_extreme_scales(scale: float, solver: str, precision: str) -> None:
    x = rand(8, 12).float()
    for power, side in ((-1.0, "target"), (-0.5, "target"), (0.0, "online"), (2.0, "online")):
        plain, _ = run(x, "power", power, side, solver, precision)
        out, grad = run(x * scale, "power", power, side, solver, precision)
        want = plain.double() * scale ** (1 + power)
        assert not out.isnan().any() and not grad.isnan().any()
        torch.testing.assert_close(out, want.float(), rtol=1e-3, atol=1e-4 * want.abs().max().item())
    for kind in ("log", "log1p", "log1p_sq"):
        out, grad = run(x * scale, kind, None, "online", solver, precision)
        assert out.isfinite().all() and grad.isfinite().all()


@pytest.mark.parametrize("solver, precision, bar", SOLVERS)
def test_turning_the_input_turns_the_output(solver: str, precision: str, bar: float) -> None:
    x, left, right = rand(7, 12), rotation(7, 1), rotation(12, 2)
    for kind, power, side in KINDS:
        turned, _ = run(left @ x @ right, kind, power, side, solver, precision)
        plain, _ = run(x, kind, power, side, solver, precision)
        torch.testing.assert_close(turned, left @ plain @ right, rtol=0, atol=bar * plain.abs().max().item())


@pytest.mark.parametrize("solver, precision, bar", SOLVERS)
def test_transposed_input_gives_the_transposed_output(solver: str, precision: str, bar: float) -> None:
    x = rand(7, 12)
    for kind, power, side in KINDS:
        plain, _ = run(x, kind, power, side, solver, precision)
        turned, _ = run(x.mT.contiguous(), kind, power, side, solver, precision)
        torch.testing.assert_close(turned.mT, plain, rtol=0, atol=bar * plain.abs().max().item())


@pytest.mark.parametrize("solver, precision, bar", SOLVERS)
def test_powers_are_homogeneous_and_logarithms_are_not(solver: str, precision: str, bar: float) -> None:
    x = rand(7, 12)
    for kind, power, side in KINDS:
        once, _ = run(x, kind, power, side, solver, precision)
        scaled, _ = run(100 * x, kind, power, side, solver, precision)
        want = 100 ** (1 + power) * once if power is not None else 100 * once
        away = (scaled - want).abs().max() / want.abs().max()
        assert away <= bar if power is not None else away > 0.3


@pytest.mark.parametrize("solver, precision, bar", SOLVERS)
def test_filters_of_filters_multiply_exponents(solver: str, precision: str, bar: float) -> None:
    x = rand(7, 12)
    first, _ = run(x, "power", -0.5, "target", solver, precision)  # s^0.5
    second, _ = run(first, "power", 1.0, "target", solver, precision)  # (s^0.5)^2
    torch.testing.assert_close(second, x, rtol=0, atol=4 * bar * x.abs().max().item())
    white, _ = run(x, "power", -1.0, "target", solver, precision)
    torch.testing.assert_close(white @ white.mT, torch.eye(7).double(), rtol=0, atol=4 * bar)


@pytest.mark.parametrize("solver, precision, bar", SOLVERS)
def test_w_is_symmetric_and_positive_where_g_is(solver: str, precision: str, bar: float) -> None:
    x, eye = rand(7, 12), torch.eye(12).double()
    for kind, power, side in KINDS:
        if side == "online":
            name = "gram_power" if power in (2, 4) else solver
            w = spectral_filter(eye, kind, power, basis=x, solver=name, precision=precision)  # type: ignore[arg-type]
            largest = w.abs().max().item()
            torch.testing.assert_close(w, w.mT, rtol=0, atol=bar * largest)
            assert kind == "log" or torch.linalg.eigvalsh(w)[0] >= -bar * largest


@pytest.mark.parametrize("solver, precision, bar", SOLVERS)
def test_rows_and_columns_of_zeros_change_nothing(solver: str, precision: str, bar: float) -> None:
    x = rand(7, 12)
    padded = torch.nn.functional.pad(x, (0, 3, 0, 2))
    for kind, power, side in KINDS:
        plain, grad = run(x, kind, power, side, solver, precision)
        wide, wide_grad = run(padded, kind, power, side, solver, precision)
        torch.testing.assert_close(wide[:7, :12], plain, rtol=0, atol=3 * bar * plain.abs().max().item())
        assert wide[7:].abs().max() <= 1e-6 and wide[:, 12:].abs().max() <= 1e-6
        torch.testing.assert_close(wide_grad[:7, :12], grad, rtol=0, atol=3 * bar * grad.abs().max().item() + 1e-12)


@pytest.mark.parametrize("solver, precision, bar", SOLVERS)
def test_two_runs_are_bitwise_equal(solver: str, precision: str, bar: float) -> None:
    x = rand(7, 12).float()
    first, again = (run(x, "log1p", None, "online", solver, "auto" if precision == "fp64" else precision) for _ in "ab")
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_null_directions_get_no_weight_in_the_gradient() -> None:
    x = rand(40, 6)
    x[:, -1] = x[:, 0]  # one null direction of the columns: (1, 0, .., -1)
    null = torch.zeros(1, 6).double()
    null[0, 0], null[0, -1] = 1.0, -1.0
    for solver in ("eigh", "newton_schulz"):
        for kind, power in (("log", None), ("power", 0.0), ("log1p", None)):
            w_null = spectral_filter(null, kind, power, basis=x, solver=solver)  # type: ignore[arg-type]
            assert w_null.abs().max() <= 1e-6, f"{solver} {kind}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind, power, side", KINDS)
def test_on_cuda_without_waiting_and_in_a_graph(kind: str, power: float | None, side: str) -> None:
    x = rand(2, 64, 256).float().cuda().requires_grad_(side == "online")
    name = "gram_power" if power in (2, 4) else "newton_schulz"
    want, want_grad = run(x.detach().cpu(), kind, power, side, "eigh", "auto")

    def step() -> Tensor:
        out = spectral_filter(x, kind, power, side=side, solver=name)  # type: ignore[arg-type]
        if side == "online":
            x.grad = torch.autograd.grad(out.sum(), x)[0]
        return out

    side_stream = torch.cuda.Stream()
    with torch.cuda.stream(side_stream):
        step()  # fills the caches that a capture must not fill
        torch.cuda.set_sync_debug_mode("error")
        try:
            eager = step().clone()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    side_stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, eager)
    torch.testing.assert_close(captured.cpu(), want, rtol=0, atol=1e-3 * want.abs().max().item())
    if side == "online":
        assert x.grad is not None
        torch.testing.assert_close(x.grad.cpu(), want_grad, rtol=0, atol=1e-3 * want_grad.abs().max().item())
