"""Predictor, filter, prototypes and stop equal their formulas in value and gradient."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from fastrdm.methods.predictor import Predictor, PredictorConfig
from fastrdm.methods.prototypes import PrototypeLayer
from fastrdm.methods.spectral_filter import FilterConfig, SpectralFilter
from fastrdm.methods.stop import Stop, StopConfig
from fastrdm.methods.transform import BranchContext, TransformContext

NOTHING = BranchContext(None, None)
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "power": lambda s: s**1.5,
    "log": torch.log,
    "log1p": lambda s: torch.log(1 + s),
    "log1p_sq": lambda s: torch.log(1 + s * s),
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filters(kind: str, **other: Any) -> FilterConfig:
    return FilterConfig(kind=kind, power=1.5 if kind == "power" else None, **other)  # type: ignore[arg-type]


def weights_of(x: Tensor, kind: str, scale: float = 1.0) -> Tensor:
    """W = V g(S) V^T of one view by the definition."""
    _, s, vh = torch.linalg.svd(x.detach(), full_matrices=False)
    return vh.mT @ torch.diag(FUNCTIONS[kind](s / scale)) @ vh


@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize("rows", [3, 9])
@pytest.mark.parametrize("scale", ["raw", "rms"])
def test_the_online_filter_is_x_w_with_gradient_g_w(
    place: Callable[..., TransformContext], kind: str, rows: int, scale: str
) -> None:
    x, g = draw(2, rows, 5).requires_grad_(), draw(2, rows, 5, seed=1)
    out = SpectralFilter(filters(kind, scale=scale), place("online"))(x, NOTHING)
    (grad,) = torch.autograd.grad(out, x, g)
    for view in range(2):
        w = weights_of(x[view], kind, rows**0.5 if scale == "rms" else 1.0)
        torch.testing.assert_close(out[view], x[view] @ w, rtol=0, atol=1e-12)
        torch.testing.assert_close(grad[view], g[view] @ w, rtol=0, atol=1e-12)


def test_a_filter_from_the_left_would_have_another_gradient(place: Callable[..., TransformContext]) -> None:
    x, g = draw(1, 3, 5).requires_grad_(), draw(1, 3, 5, seed=1)
    u, s, _ = torch.linalg.svd(x[0].detach(), full_matrices=False)
    left = u @ torch.diag(FUNCTIONS["log1p"](s)) @ u.mT
    out = SpectralFilter(filters("log1p"), place("online"))(x, NOTHING)
    torch.testing.assert_close(out[0], left @ x[0], rtol=0, atol=1e-12)  # the same value
    (grad,) = torch.autograd.grad(out, x, g)
    assert (grad[0] - left.mT @ g[0]).abs().max() > 0.1
    vh = torch.linalg.svd(x[0].detach(), full_matrices=False)[2]
    torch.testing.assert_close(grad[0], grad[0] @ vh.mT @ vh, rtol=0, atol=1e-12)  # ours stays in the rows' span


@pytest.mark.parametrize(
    "more", [{"epsilon": 0.1}, {"epsilon": 0.1, "momentum": 0.5}, {"basis": "other"}, {"basis": "cross"}]
)
def test_no_target_filter_has_a_gradient(place: Callable[..., TransformContext], more: dict[str, Any]) -> None:
    x = draw(2, 6, 5).requires_grad_()
    branch = BranchContext(draw(2, 6, 5, seed=1), None)
    assert not SpectralFilter(FilterConfig(power=-0.5, **more), place("target"))(x, branch).requires_grad


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_the_target_filter_has_the_value_and_no_gradient(place: Callable[..., TransformContext], kind: str) -> None:
    x = draw(2, 4, 5).requires_grad_()
    out = SpectralFilter(filters(kind), place("target"))(x, NOTHING)
    assert not out.requires_grad
    for view in range(2):
        torch.testing.assert_close(out[view], x[view].detach() @ weights_of(x[view], kind), rtol=0, atol=1e-12)


@pytest.mark.parametrize("power", [-0.3, -0.5, -0.7, -1.0, 1.0, 2.0])
def test_power_is_the_exponent_of_the_multiplier(place: Callable[..., TransformContext], power: float) -> None:
    x = draw(1, 4, 6)
    u, s, vh = torch.linalg.svd(x[0], full_matrices=False)
    for side in ("online", "target"):
        out = SpectralFilter(FilterConfig(power=power), place(side))(x, NOTHING)
        torch.testing.assert_close(out[0], u @ torch.diag(s ** (1 + power)) @ vh, rtol=0, atol=1e-12)


def test_the_other_branchs_basis(place: Callable[..., TransformContext]) -> None:
    x, other, g = draw(2, 9, 5).requires_grad_(), draw(2, 9, 5, seed=1), draw(2, 9, 5, seed=2)
    for side in ("online", "target"):
        config = FilterConfig(power=1.5, basis="other")
        out = SpectralFilter(config, place(side))(x, BranchContext(other, None))
        for view in range(2):
            torch.testing.assert_close(out[view], x[view] @ weights_of(other[view], "power"), rtol=0, atol=1e-12)
        if side == "online":
            (grad,) = torch.autograd.grad(out, x, g)
            torch.testing.assert_close(grad[1], g[1] @ weights_of(other[1], "power"), rtol=0, atol=1e-12)


def test_null_directions_get_weight_zero(place: Callable[..., TransformContext]) -> None:
    x = draw(1, 4, 6)
    x = x - x.mean(1, keepdim=True)  # rank 3 of 4 rows, as behind a BatchNorm
    u, s, vh = torch.linalg.svd(x[0], full_matrices=False)
    assert s[3] < 1e-14
    out = SpectralFilter(FilterConfig(power=-1.0), place("target"))(x, NOTHING)
    torch.testing.assert_close(out[0], u[:, :3] @ vh[:3], rtol=0, atol=1e-12)
    kept = SpectralFilter(FilterConfig(power=-1.0, cutoff=0.9 * (s[1] / s[0]).item()), place("target"))(x, NOTHING)
    torch.testing.assert_close(kept[0], u[:, :2] @ vh[:2], rtol=0, atol=1e-12)


def plain_predictor(ours: Predictor) -> nn.Sequential:
    first, _, _, last = ours.head
    assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
    hidden = first.out_features
    bias = first.bias is not None
    plain = nn.Sequential(nn.Linear(5, hidden, bias), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, 5)).double()
    plain.load_state_dict(ours.head.state_dict())
    return plain


@pytest.mark.parametrize(
    ("config", "hidden", "bias"),
    [({}, 1, False), ({"hidden": 6, "bias": True}, 6, True), ({"hidden": 3}, 3, False)],
)
def test_predictor_is_linear_norm_relu_linear(
    place: Callable[..., TransformContext], config: dict[str, Any], hidden: int, bias: bool
) -> None:
    ours = Predictor(PredictorConfig(**config), place()).double()
    plain = plain_predictor(ours)
    assert plain[0].out_features == hidden and (plain[0].bias is not None) == bias  # type: ignore[comparison-overlap]
    x = draw(1, 8, 5)
    torch.testing.assert_close(ours(x, NOTHING)[0], plain(x[0]), rtol=0, atol=1e-14)


@pytest.mark.parametrize("constant", [True, False])
def test_predictor_says_whether_its_rate_is_constant(place: Callable[..., TransformContext], constant: bool) -> None:
    assert Predictor(PredictorConfig(constant_lr=constant), place()).constant_lr is constant


def test_prototypes_are_cosines_and_differentiate_like_weight_norm() -> None:
    layer = PrototypeLayer(5, 4).double()
    oracle = weight_norm(nn.Linear(5, 4, bias=False).double(), dim=0)
    oracle.parametrizations.weight.original0.data.fill_(1)
    oracle.parametrizations.weight.original1.data.copy_(layer.weight)
    x, g = (3 * draw(2, 6, 5)).requires_grad_(), draw(2, 6, 4, seed=1)
    out = layer(x)
    for v, i, k in ((0, 0, 0), (1, 5, 3), (0, 3, 2)):
        cosine = x[v, i] @ layer.weight[k] / (x[v, i].norm() * layer.weight[k].norm())
        torch.testing.assert_close(out[v, i, k], cosine, rtol=0, atol=1e-14)
    expected = oracle(x / x.norm(dim=-1, keepdim=True))
    ours = torch.autograd.grad(out, (x, layer.weight), g)
    theirs = torch.autograd.grad(expected, (x, oracle.parametrizations.weight.original1), g)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


def test_stop_ends_the_gradient(place: Callable[..., TransformContext]) -> None:
    x = draw(2, 3, 5).requires_grad_()
    out = Stop(StopConfig(), place("target"))(x, NOTHING)
    assert not out.requires_grad and torch.equal(out, x)
