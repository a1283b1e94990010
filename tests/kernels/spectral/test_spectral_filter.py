"""The filter as it is called: processes, gradients, refusals, torch.compile."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrdm.kernels.spectral.custom_op import filter_op
from fastrdm.kernels.spectral.filter_factors import Function
from fastrdm.kernels.spectral.filter_functions import FILTER_FUNCTIONS, FilterFunction
from fastrdm.kernels.spectral.spectral_filter import _check_solver, _choose, spectral_filter


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def features(b: int, d: int, seed: int = 0) -> Tensor:
    """(b, d) Gaussian rows whose covariance has eigenvalues 1/k."""
    return rand(b, d, seed=seed) * torch.arange(1, d + 1) ** -0.5


@pytest.mark.parametrize("solver", ["eigh", "newton_schulz"])
@pytest.mark.parametrize("views", [1, 2, 8])
def test_views_are_independent(views: int, solver: str) -> None:
    x = torch.stack([features(12, 20, seed=i) * 10.0**i for i in range(views)]).float()
    together = spectral_filter(x, "log1p", solver=solver)
    alone = torch.stack([spectral_filter(view, "log1p", solver=solver) for view in x])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=0)


@pytest.mark.parametrize("solver", ["eigh", "newton_schulz"])
@pytest.mark.parametrize(
    "kind, power",
    [("log", None), ("log1p", None), ("log1p_sq", None), *[("power", p) for p in (0.0, 0.5, 1.0, 2.0)]],
)
def test_finite_differences_with_w_frozen(kind: str, power: float | None, solver: str) -> None:
    x, step, probe = features(6, 9), rand(6, 9, seed=1), rand(6, 9, seed=2)
    solver = "gram_power" if power == 2 else solver

    def frozen(at: Tensor) -> Tensor:
        return (spectral_filter(at, kind, power, basis=x, solver=solver) * probe).sum()  # type: ignore[arg-type]

    leaf = x.clone().requires_grad_()
    (spectral_filter(leaf, kind, power, solver=solver) * probe).sum().backward()  # type: ignore[arg-type]
    assert leaf.grad is not None
    difference = (frozen(x + 1e-3 * step) - frozen(x - 1e-3 * step)) / 2e-3
    torch.testing.assert_close(
        (leaf.grad * step).sum(), difference, rtol=1e-7 if solver != "newton_schulz" else 1e-3, atol=0
    )


@pytest.mark.parametrize("solver", ["eigh", "newton_schulz"])
@pytest.mark.parametrize("rows", [10, 40])
def test_each_process_filters_its_own_rows(rows: int, solver: str) -> None:
    whole = features(rows, 20).float()
    for kind, power, side in (("log1p", None, "online"), ("power", -0.5, "target"), ("power", 0.5, "target")):
        leaf, probe = whole.clone().requires_grad_(side == "online"), rand(rows, 20, seed=5).float()
        every = spectral_filter(leaf, kind, power, x_all=whole, side=side, solver=solver)  # type: ignore[arg-type]
        mine = whole[4:9].clone().requires_grad_(side == "online")
        part = spectral_filter(mine, kind, power, x_all=whole, offset=4, side=side, solver=solver)  # type: ignore[arg-type]
        torch.testing.assert_close(part, every[4:9], rtol=1e-4, atol=1e-5)
        if side == "online":
            (grad,) = torch.autograd.grad((every * probe).sum(), leaf)
            (mine_grad,) = torch.autograd.grad((part * probe[4:9]).sum(), mine)
            torch.testing.assert_close(mine_grad, grad[4:9], rtol=1e-4, atol=1e-4)


def test_gram_of_all_processes_serves_as_well_as_their_rows() -> None:
    whole = features(50, 12)
    for kind, power in (("log1p", None), ("power", -1.0), ("power", 2.0)):
        want = spectral_filter(whole[:9], kind, power, x_all=whole, scale="rms")  # type: ignore[arg-type]
        got = spectral_filter(whole[:9], kind, power, gram=whole.mT @ whole, rows=50, scale="rms")  # type: ignore[arg-type]
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "power, shape, capturing, solver",
    [
        (-0.5, (2, 512, 2048), False, "newton_schulz"),
        (-0.5, (2, 400, 512), False, "eigh"),
        (-0.5, (2, 768, 512), False, "eigh"),
        (-0.5, (2, 800, 512), False, "newton_schulz"),
        (-0.5, (2, 1024, 1024), False, "newton_schulz"),
        (-0.5, (2, 400, 512), True, "newton_schulz"),
        (2.0, (2, 400, 512), False, "gram_power"),
        (-1.5, (2, 512, 2048), False, "eigh"),
    ],
)
def test_auto_on_cuda(
    power: float, shape: tuple[int, ...], capturing: bool, solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: capturing)
    x = SimpleNamespace(is_cuda=True, shape=torch.Size(shape))
    assert _choose(x, None, False, True, Function("power", power, 1e-6, 1.0)) == solver  # type: ignore[arg-type]


@pytest.mark.parametrize("capturing", [True, False])
def test_auto_on_cuda_takes_a_solver_that_can_do_the_function(capturing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: capturing)
    monkeypatch.setitem(FILTER_FUNCTIONS, "saturate", FilterFunction(saturate))
    x: Any = SimpleNamespace(is_cuda=True, shape=torch.Size((2, 512, 2048)))
    for kind, solver in (("saturate", "eigh"), ("log1p", "newton_schulz")):
        assert _choose(x, None, False, True, Function(kind, None, 1e-6, 1.0)) == solver


def test_a_row_without_a_fit_is_refused_by_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FILTER_FUNCTIONS, "saturate", FilterFunction(saturate))
    message = "^solver='newton_schulz' cannot do kind saturate, which has no Chebyshev fit; use solver='auto'"
    with pytest.raises(ValueError, match=message):
        _check_solver("newton_schulz", Function("saturate", None, 1e-6, 1.0), False, True)


@pytest.mark.parametrize("kind", [kind for kind, row in FILTER_FUNCTIONS.items() if row.fit])
@pytest.mark.parametrize("scale", [1.0, 3000.0])
@pytest.mark.parametrize("shape", [(24, 60), (60, 24)])
def test_every_row_with_a_fit_is_the_same_by_products(kind: str, scale: float, shape: tuple[int, int]) -> None:
    x = features(*shape)
    x = (x * scale / torch.linalg.matrix_norm(x, 2)).float()
    exact, got = (spectral_filter(x, kind, solver=solver) for solver in ("eigh", "newton_schulz"))
    assert (got - exact).norm() <= 1e-3 * exact.norm()


def saturate(s: Tensor) -> Tensor:
    """A function that is no row: s / (1 + s)."""
    return s / (1 + s)


@pytest.mark.parametrize("shape", [(1, 6, 9), (2, 9, 6), (2, 7, 7)])
@pytest.mark.parametrize("g", [saturate, lambda s: 1 / s, torch.tanh])
def test_a_function_of_the_caller(g: Any, shape: tuple[int, ...]) -> None:
    x, probe = rand(*shape).requires_grad_(), rand(*shape, seed=1)
    out = spectral_filter(x, g)
    (grad,) = torch.autograd.grad((out * probe).sum(), x)
    for view in range(len(x)):
        _, s, vh = torch.linalg.svd(x[view].detach(), full_matrices=False)
        w = (vh.mT * g(s)) @ vh
        torch.testing.assert_close(out[view], x[view].detach() @ w)
        torch.testing.assert_close(grad[view], probe[view] @ w)


def test_a_function_of_the_caller_takes_what_the_rows_take() -> None:
    whole = features(30, 12).float()
    for how in ({}, {"scale": "rms"}, {"cutoff": 0.3}, {"side": "target"}, {"basis": features(20, 12, seed=2).float()}):
        want = spectral_filter(whole[3:9], "log1p", x_all=whole, solver="eigh", **how)  # type: ignore[arg-type]
        got = spectral_filter(whole[3:9], torch.log1p, x_all=whole, **how)  # type: ignore[arg-type]
        torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-6)
    want = spectral_filter(whole, "log1p", gram=whole.mT @ whole, rows=30, scale="rms")
    torch.testing.assert_close(spectral_filter(whole, torch.log1p, gram=whole.mT @ whole, rows=30, scale="rms"), want)


def test_two_functions_of_one_name_stay_apart() -> None:
    x = features(6, 9)
    by = [lambda s: s, lambda s: s * s]
    assert len({g.__qualname__ for g in by}) == 1
    for power, g in enumerate(by, start=1):
        torch.testing.assert_close(spectral_filter(x, g), spectral_filter(x, "power", float(power), solver="eigh"))


def test_a_function_of_the_caller_is_refused_by_name() -> None:
    x = features(6, 9)
    with pytest.raises(ValueError, match=r"cannot do kind .*:saturate, which has no Chebyshev fit; use solver='auto'"):
        spectral_filter(x, saturate, solver="newton_schulz")
    with pytest.raises(ValueError, match=r":.*summed must map singular values to weights of their shape \(1, 6\), got"):
        spectral_filter(x, summed)
    with pytest.raises(ValueError, match="power belongs to kind='power' alone"):
        spectral_filter(x, saturate, 2.0)


def summed(s: Tensor) -> Tensor:
    """What is no weight a direction."""
    return s.sum()


def test_a_function_of_the_caller_compiles_to_one_graph() -> None:
    def loss(x: Tensor) -> Tensor:
        return (spectral_filter(2 * x, saturate) * x).sum()

    torch.compiler.reset()
    eager, compiled = (rand(4, 6).float().requires_grad_() for _ in range(2))
    loss(eager).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(compiled).backward()
    assert eager.grad is not None and torch.equal(compiled.grad, eager.grad)  # type: ignore[arg-type]


REFUSED: list[tuple[dict[str, object], str]] = [
    ({"kind": "power"}, "power must be a finite number for kind='power', got None"),
    ({"kind": "power", "power": math.nan}, "power must be a finite number"),
    ({"kind": "power", "power": -math.inf}, "power must be a finite number"),
    ({"kind": "log", "power": 1.0}, "power belongs to kind='power' alone"),
    ({"kind": "sqrt"}, r"kind must be one of power, log, .*, got 'sqrt'"),
    ({"kind": "log", "side": "both"}, "side must be one of"),
    ({"kind": "log", "scale": "unit"}, "scale must be one of"),
    ({"kind": "log", "solver": "svd"}, "solver must be one of"),
    ({"kind": "log", "precision": "bf16"}, "precision must be one of"),
    ({"kind": "log", "cutoff": 1.0}, r"cutoff must be in \[0, 1\)"),
    ({"kind": "log", "solver": "gram_power"}, "solver='gram_power' needs an even power above 0, got None"),
    (
        {"kind": "power", "power": -0.5, "solver": "newton_schulz"},
        "cannot do power -0.5 with a gradient, a basis or an unknown",
    ),
    ({"kind": "power", "power": -1.5, "side": "target", "solver": "newton_schulz"}, "cannot do power -1.5; use"),
    (
        {"kind": "log", "x_all": torch.zeros(3, 7)},
        r"x_all must match x of shape \(4, 6\) in all but rows, got \(3, 7\)",
    ),
    ({"kind": "log", "gram": torch.zeros(4, 6)}, "gram must match x"),
    ({"kind": "log", "gram": torch.eye(6), "scale": "rms"}, "scale='rms' needs rows"),
    ({"kind": "log", "gram": torch.eye(6), "solver": "newton_schulz"}, "solver='newton_schulz' needs the features"),
]


@pytest.mark.parametrize("how, message", REFUSED)
def test_refuses(how: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spectral_filter(torch.randn(4, 6, requires_grad=True), **how)  # type: ignore[arg-type]


def test_refuses_images_and_integers() -> None:
    for x in (torch.zeros(2, 3, 8, 8), torch.zeros(4, 6, dtype=torch.int64)):
        with pytest.raises(ValueError, match="takes floats of shape"):
            spectral_filter(x, "log")


@pytest.mark.parametrize("solver", ["eigh", "newton_schulz"])
@pytest.mark.parametrize("needs_grad", [True, False])
@pytest.mark.parametrize("shape, rows", [((2, 4, 6), None), ((1, 6, 4), None), ((2, 4, 6), 3), ((1, 4, 6), 9)])
def test_operator_keeps_its_promises(
    shape: tuple[int, int, int], rows: int | None, needs_grad: bool, solver: str
) -> None:
    x = rand(*shape).float().requires_grad_(needs_grad)
    source = None if rows is None else rand(shape[0], rows, shape[2]).float()
    for kind, power in (("log1p", None), ("power", 2.0), ("power", 4.0)):
        name = "gram_power" if power else solver
        arguments = (x, source, False, None, kind, power, 1e-6, 1.0, needs_grad, name, "fp32")
        checks = ["test_schema", "test_faketensor"]
        checks += ["test_autograd_registration", "test_aot_dispatch_static"] if needs_grad else []
        torch.library.opcheck(filter_op, arguments, test_utils=checks)


@pytest.mark.parametrize("solver", ["auto", "eigh", "newton_schulz"])
@pytest.mark.parametrize("kind, power, side", [("log1p", None, "online"), ("power", -0.7, "target")])
def test_compiles_to_one_graph(kind: str, power: float | None, side: str, solver: str) -> None:
    def loss(x: Tensor) -> Tensor:
        filtered = spectral_filter(2 * x, kind, power, side=side, solver=solver)  # type: ignore[arg-type]
        return (filtered * x).sum()

    torch.compiler.reset()
    eager, compiled = (rand(4, 6).float().requires_grad_() for _ in range(2))
    loss(eager).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(compiled).backward()
    assert eager.grad is not None and torch.equal(compiled.grad, eager.grad)  # type: ignore[arg-type]


def test_autocast_does_not_lower_the_precision() -> None:
    x = features(12, 20).float()
    for solver in ("eigh", "newton_schulz"):
        with torch.autocast("cpu", torch.bfloat16):
            inside = spectral_filter(x, "log1p", solver=solver)
        assert inside.dtype == torch.float32 and torch.equal(inside, spectral_filter(x, "log1p", solver=solver))
