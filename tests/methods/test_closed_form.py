"""Filters with a floor, a moving second moment, the cross-correlation's basis, a flattening and a moving exponent."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrdm.config import run_config
from fastrdm.methods.losses import AlignmentConfig, byol
from fastrdm.methods.sinkhorn import Sinkhorn, SinkhornConfig, sinkhorn_knopp
from fastrdm.methods.spectral_filter import FilterConfig, SpectralFilter
from fastrdm.methods.transform import BranchContext, TransformContext
from fastrdm.schema import Horizon

NOTHING = BranchContext(None, None)
Place = Callable[..., TransformContext]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def low_rank(views: int, rows: int, seed: int = 0) -> Tensor:
    """(V, rows, 5) along three directions of different size."""
    return draw(views, rows, 3, seed=seed) * torch.tensor([3.0, 1.0, 0.3]) @ draw(3, 5, seed=8)


def predictor(moment: Tensor, power: float, epsilon: float) -> Tensor:
    """W of DirectPred and DirectCopy, as their authors have it: U ((s / s_max)^(power / 2) + epsilon) U^T."""
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp_min(0) / values.max()
    return vectors @ torch.diag(values ** (power / 2) + epsilon) @ vectors.mT


@pytest.mark.parametrize(
    ("power", "epsilon", "momentum"),
    [(1.0, 0.1, 0.3), (2.0, 0.3, 0.5), (1.0, 0.1, 0.0), (3.0, 0.3, 0.5), (4.0, 0.3, 0.5)],  # DirectSet(power / 2)
)
def test_directpred_and_directcopy_are_filters(place: Place, power: float, epsilon: float, momentum: float) -> None:
    layer = SpectralFilter(FilterConfig(power=power, epsilon=epsilon, momentum=momentum), place()).double()
    moment = torch.zeros(5, 5, dtype=torch.float64)
    for step in range(3):
        x, g = low_rank(2, 9, seed=step).requires_grad_(), draw(2, 9, 5, seed=7)
        rows = x.detach().flatten(0, 1)
        batch = rows.mT @ rows / 18
        moment = momentum * moment + (1 - momentum) * batch if step else batch
        w = predictor(moment, power, epsilon)
        out = layer(x, NOTHING)
        torch.testing.assert_close(out, x @ w, rtol=0, atol=1e-7)
        torch.testing.assert_close(torch.autograd.grad(out, x, g)[0], g @ w, rtol=0, atol=1e-7)
        torch.testing.assert_close(layer.moment, moment, rtol=0, atol=1e-13)
    assert {*layer.state_dict()} == {"moment", "steps"} and layer.steps == 3
    copy = SpectralFilter(FilterConfig(power=power, epsilon=epsilon, momentum=momentum), place()).double()
    copy.load_state_dict(layer.state_dict())
    assert torch.equal(copy(low_rank(2, 9, seed=5), NOTHING), layer(low_rank(2, 9, seed=5), NOTHING)), "after a resume"
    layer.eval()
    layer(x, NOTHING)
    assert layer.steps == 4


def test_a_floor_alone_keeps_each_views_own_spectrum(place: Place) -> None:
    x = low_rank(2, 9)
    out = SpectralFilter(FilterConfig(power=1.0, epsilon=0.2), place())(x, NOTHING)
    for view in range(2):
        w = predictor(x[view].mT @ x[view], 1.0, 0.2)
        torch.testing.assert_close(out[view], x[view] @ w, rtol=0, atol=1e-7)


def test_a_moving_moment_of_a_target_drops_what_rounding_left(place: Place) -> None:
    """In float32, whitening by a second moment must not blow up directions that hold nothing but rounding."""
    x = low_rank(2, 64).float()
    layer = SpectralFilter(FilterConfig(power=-1.0, momentum=0.5), place("target"))
    out = layer(x, NOTHING)
    assert not out.requires_grad
    s = torch.linalg.svdvals(out.flatten(0, 1).double()) / 2**0.5  # of two views, each of which counts as a batch
    torch.testing.assert_close(s[:3], torch.ones(3, dtype=torch.float64), rtol=1e-3, atol=0)
    assert s[3:].max() < 1e-5


def isoloss(moment: Tensor, z: Tensor, target: Tensor) -> Tensor:
    """IsoLoss of rows z (B, D) and targets (B, D) as its authors have it, a cosine's, predictor of power 1 / 2."""
    values, vectors = torch.linalg.eigh(moment)
    values = (values.clamp_min(0) / values.max()).sqrt()
    p, root = z @ vectors @ torch.diag(values) @ vectors.mT, z @ vectors @ torch.diag(values.sqrt()) @ vectors.mT
    lengths, size = p.norm(dim=1).detach(), target.norm(dim=1)
    first = (z * target).sum(1) / (lengths * size)
    second = ((p * target).sum(1) / (lengths**3 * size)).detach() * root.square().sum(1) / 2
    return -2 * (first - second).mean()


@pytest.mark.parametrize("momentum", [None, 0.998])
def test_an_isotropic_gradient_is_isoloss(place: Place, momentum: float | None) -> None:
    config = FilterConfig(power=1.0, momentum=momentum, gradient="isotropic")
    plain = SpectralFilter(FilterConfig(power=1.0, momentum=momentum), place()).double()
    layer = SpectralFilter(config, place()).double()
    x, target = draw(1, 9, 5).requires_grad_(), draw(9, 5, seed=1)
    out = layer(x, NOTHING)
    largest = torch.linalg.svdvals(x.detach()[0])[0]
    torch.testing.assert_close(out, plain(x, NOTHING) / largest, rtol=0, atol=1e-12)
    loss = byol(out[0], target, AlignmentConfig())
    expected = isoloss(x.detach()[0].mT @ x.detach()[0] / 9, x[0], target)
    found, wanted = (torch.autograd.grad(value, x)[0] for value in (loss, expected))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    # The Euclidean loss: |z - (t + z - p)|^2, all but the first z without gradient.
    (direct,) = torch.autograd.grad((layer(x, NOTHING)[0] - target).square().sum(1).mean(), x)
    goal = target + x.detach()[0] - out.detach()[0]
    torch.testing.assert_close(direct, torch.autograd.grad((x[0] - goal).square().sum(1).mean(), x)[0])


def test_the_isotropic_gradient_of_a_crossed_basis(place: Place) -> None:
    layer = SpectralFilter(FilterConfig(power=1.0, basis="cross", gradient="isotropic"), place())
    x, other, g = draw(2, 9, 5).requires_grad_(), draw(2, 9, 5, seed=1), draw(2, 9, 5, seed=2)
    out = layer(x, BranchContext(other, None))
    both = x.detach().flatten(0, 1).mT @ other.flatten(0, 1)
    torch.testing.assert_close(out, x @ both / torch.linalg.svdvals(both)[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(torch.autograd.grad(out, x, g)[0], g, rtol=0, atol=1e-12)


@pytest.mark.parametrize("power", [0.0, 1.0, 0.5])
def test_the_cross_correlations_basis(place: Place, power: float) -> None:
    x, other, g = draw(2, 9, 5).requires_grad_(), draw(2, 9, 5, seed=1), draw(2, 9, 5, seed=2)
    layer = SpectralFilter(FilterConfig(power=power, basis="cross"), place())
    out = layer(x, BranchContext(other, None))
    u, s, vh = torch.linalg.svd(x.detach().flatten(0, 1).mT @ other.flatten(0, 1) / 18)
    w = u @ torch.diag(s**power) @ vh
    torch.testing.assert_close(out, x @ w, rtol=0, atol=1e-10)
    torch.testing.assert_close(torch.autograd.grad(out, x, g)[0], g @ w.mT, rtol=0, atol=1e-10)
    if power == 0:  # the best orthogonal map of one branch onto the other
        rows = x.detach().flatten(0, 1)
        best = (rows @ w - other.flatten(0, 1)).square().sum()
        for seed in range(20):
            q = torch.linalg.qr(w + 0.3 * draw(5, 5, seed=seed + 20))[0]
            q = q * (q * w).sum(0).sign()
            assert (rows @ q - other.flatten(0, 1)).square().sum() >= best - 1e-9


def test_a_moving_cross_correlation_with_a_floor(place: Place) -> None:
    layer = SpectralFilter(FilterConfig(power=1.0, basis="cross", momentum=0.5, epsilon=0.1), place()).double()
    both = torch.zeros(5, 5, dtype=torch.float64)
    for step in range(3):
        x, other = draw(2, 9, 5, seed=step), draw(2, 9, 5, seed=step + 9)
        batch = x.flatten(0, 1).mT @ other.flatten(0, 1) / 18
        both = 0.5 * both + 0.5 * batch if step else batch
        expected = x @ both / torch.linalg.svdvals(both)[0] + 0.1 * x
        torch.testing.assert_close(layer(x, BranchContext(other, None)), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("strength", [0.25, 1.0])
@pytest.mark.parametrize("side", ["online", "target"])
def test_whiten_brings_the_spectrum_towards_a_flat_one(place: Place, strength: float, side: str) -> None:
    x = draw(1, 9, 5)
    out = SpectralFilter(FilterConfig(kind="whiten", strength=strength), place(side))(x, NOTHING)
    before, after = torch.linalg.svdvals(x[0]), torch.linalg.svdvals(out[0])
    torch.testing.assert_close(after, (1 - strength) * before + strength * before[0], rtol=1e-10, atol=0)


def test_the_exponent_moves_along_a_line(place: Place) -> None:
    x = draw(1, 9, 5)
    config = FilterConfig(power=-1.0, power_end=-0.2, anneal="50%")
    layer = SpectralFilter(config, place("target", horizon=Horizon(5, 20)))
    for step, power in ((0, -1.0), (5, -0.6), (10, -0.2), (19, -0.2)):
        layer.set_step(step)
        expected = SpectralFilter(FilterConfig(power=power), place("target"))(x, NOTHING)
        torch.testing.assert_close(layer(x, NOTHING), expected, rtol=0, atol=1e-12)
    assert [*layer.ramps()] == [(10, "filter: power reaches -0.2")]


def test_sinkhorns_epsilon_moves_along_a_line(place: Place) -> None:
    x = torch.nn.functional.normalize(draw(2, 8, 6), dim=-1)
    config = SinkhornConfig(epsilon=0.07, warmup_epsilon=0.04, warmup="10st")
    layer = Sinkhorn(config, place("target", prototypes=6)).double()
    for step, epsilon in ((0, 0.04), (5, 0.055), (10, 0.07), (15, 0.07)):
        layer.set_step(step)
        torch.testing.assert_close(layer(x, NOTHING), sinkhorn_knopp(x, epsilon, 3), rtol=1e-12, atol=0)
    assert [*layer.ramps()] == [(10, "sinkhorn: epsilon reaches 0.07")] and layer.unfinished("warmup")
    assert Sinkhorn(SinkhornConfig(), place("target", prototypes=6)).unfinished("warmup") is None


CROSS = {"name": "filter", "power": 0, "basis": "cross"}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "floor below 0": (
        {"online": [{"name": "filter", "power": 1, "epsilon": -0.1}]},
        "method.online.0.epsilon: input should be greater than or equal to 0, got -0.1",
    ),
    "whole momentum": (
        {"online": [{"name": "filter", "power": 1, "momentum": 1.0}]},
        "method.online.0.momentum: input should be less than 1, got 1.0",
    ),
    "no strength": (
        {"target": [{"name": "filter", "kind": "whiten"}]},
        "method.target.0.strength must be a number for kind=whiten, got None",
    ),
    "strength of a power": (
        {"target": [{"name": "filter", "power": 1, "strength": 0.5}]},
        "method.target.0.strength must be left out for kind=power, got 0.5",
    ),
    "too strong": (
        {"target": [{"name": "filter", "kind": "whiten", "strength": 1.5}]},
        "method.target.0.strength: input should be less than or equal to 1, got 1.5",
    ),
    "end of a logarithm": (
        {"online": [{"name": "filter", "kind": "log1p", "power_end": 1.0}]},
        "method.online.0.power_end must be left out for kind=log1p, got 1.0",
    ),
    "crossed logarithm": (
        {"online": [{"name": "filter", "kind": "log1p", "basis": "cross"}]},
        "method.online.0.basis must be self or other, but for a kind=power",
    ),
    "products of a floor": (
        {"online": [{"name": "filter", "power": 1, "epsilon": 0.1, "solver": "newton_schulz"}]},
        "method.online.0.solver must be auto or eigh with strength, power_end, epsilon, momentum or gradient=isotropic",
    ),
    "products of an isotropic gradient": (
        {"online": [{"name": "filter", "power": 1, "gradient": "isotropic", "solver": "newton_schulz"}]},
        "method.online.0.solver must be auto or eigh with strength",
    ),
    "regularizer of nothing": (
        {"regularize": ["variances"]},
        "method.regularize.0 must be a regularizer, got 'variances': did you mean 'variance'?",
    ),
    "no weight": (
        {"regularize": [{"name": "variance", "weight": 0}]},
        "method.regularize.0.weight: input should be greater than 0, got 0",
    ),
    "momentum of a covariance": (
        {"regularize": [{"name": "covariance", "momentum": 0.9}]},
        "unknown configuration key 'method.regularize.0.momentum'",
    ),
    "epsilon out of range": (
        {"regularize": [{"name": "variance", "epsilon": 0}]},
        "method.regularize.0.epsilon: input should be greater than 0, got 0",
    ),
    "mse of scores": (
        {"online": [{"name": "prototypes", "count": 5}], "alignment": "mse"},
        "method.online: alignment mse takes features here, but prototypes gives scores",
    ),
    "a mean of one": (
        {"alignment": {"name": "negative_cosine", "targets": "mean"}},
        "method.alignment.targets must be pairs with two views, got 'mean'",
    ),
    "more targets than views": (
        {"target_views": 3},
        "method.target_views must be at most the 2 views of loader.views, got 3",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    method, message = REFUSED[case]
    with pytest.raises(ValueError) as refusal:
        run_config.resolve({"preset": "simsiam", "method": method})
    assert message in str(refusal.value)


def test_a_target_has_no_isotropic_gradient(place: Place) -> None:
    with pytest.raises(ValueError, match=r"filter\.gradient must be filtered on the target, got 'isotropic'"):
        SpectralFilter(FilterConfig(power=1.0, gradient="isotropic"), place("target"))


def test_scores_are_not_regularized() -> None:
    with pytest.raises(ValueError, match="of must be projection or features where prototypes ends the online branch"):
        run_config.resolve({"preset": "dino", "method": {"regularize": [{"name": "koleo", "of": "output"}]}})


def test_the_crossed_basis_takes_two_views() -> None:
    layers = {"method": {"online": [CROSS]}, "loader": {"views": [{"size": 8}] * 3}}
    with pytest.raises(ValueError, match=r"filter\.basis=cross takes two views, got 3"):
        run_config.resolve({"preset": "byol", **layers})


def test_one_image_has_no_variance() -> None:
    layers = {"train": {"accumulate": 4}, "loader": {"batch_size": 4}}
    with pytest.raises(ValueError, match=r"method\.regularize needs at least 2 images in a part of a batch, got 1"):
        run_config.resolve({"preset": "vicreg", **layers})
