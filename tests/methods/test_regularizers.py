"""Regularizers equal their papers' formulas, and lightly's code, in value and gradient, on inputs of every state."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastrdm.kernels.linalg.effective_rank import effective_rank
from fastrdm.methods.alignment import align
from fastrdm.methods.dual_branch import DualBranch
from fastrdm.methods.losses import AlignmentConfig, CrossCorrelationConfig, cross_correlation, mse
from fastrdm.methods.regularizer import Regularizer, RegularizerConfig, RegularizerContext, find_regularizer
from fastrdm.methods.regularizer_settings import REGULARIZERS, RegularizerRow, regularizer_settings
from fastrdm.methods.regularizers import Sliced

Build = Callable[..., DualBranch]
Draw = Callable[..., list[Tensor]]
TALL, WIDE = (3, 12, 5), (2, 5, 12)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


STATES: dict[str, Callable[[Tensor], Tensor]] = {
    "random": lambda x: x,
    "shifted": lambda x: x + 3,
    "collapsed": lambda x: 1 + 1e-3 * x,
    "large": lambda x: 1e3 * x,
    "small": lambda x: 1e-3 * x,
    "one direction": lambda x: x[..., :1] * torch.linspace(1, 2, x.shape[-1], dtype=x.dtype) + 1e-3 * x,
}


def make(name: str, shape: tuple[int, ...] = TALL, **settings: Any) -> Regularizer:
    config = regularizer_settings(name)(name=name, **settings)
    return find_regularizer(name)(config, RegularizerContext(shape[2], shape[1])).double()


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt()


def variance(x: Tensor, module: Regularizer) -> Tensor:
    return sum((1 - (column.var() + 1e-4).sqrt()).clamp_min(0) for column in x.mT) / x.shape[1]  # type: ignore[return-value]


def covariance(x: Tensor, module: Regularizer) -> Tensor:
    c = torch.cov(x.mT)
    return (c - c * torch.eye(len(c), dtype=c.dtype)).square().sum() / len(c)


def coding_rate(x: Tensor, module: Regularizer) -> Tensor:
    n, width = x.shape
    s = torch.linalg.svdvals(unit(x))
    return -(n + width) / (n * width) * torch.log1p(width / (n * 0.5) * s.square()).sum() / 2


def frobenius(x: Tensor, module: Regularizer) -> Tensor:
    s = torch.linalg.svdvals(x / x.square().sum(0).sqrt()).square()
    return (s / s.sum()).square().sum().log()


def koleo(x: Tensor, module: Regularizer) -> Tensor:
    z = unit(x)
    total = x.new_zeros(())
    for i in range(len(z)):
        others = [(z[i] - z[j] + 1e-8).square().sum().sqrt() for j in range(len(z)) if j != i]
        total = total - (min(others) + 1e-8).log() / len(z)
    return total


def sigreg(x: Tensor, module: Regularizer) -> Tensor:
    assert isinstance(module, Sliced)
    t = torch.linspace(0, 3, 17, dtype=x.dtype)
    phi = torch.exp(1j * (x @ module.slices)[:, :, None] * t).mean(0)
    error = (phi - torch.exp(-t * t / 2)).abs().square() * torch.exp(-t * t / 2)
    return 2 * len(x) * torch.trapezoid(error, t).mean()


def visreg(x: Tensor, module: Regularizer) -> Tensor:
    assert isinstance(module, Sliced)
    mean, deviation = x.mean(0), x.std(0, correction=0)
    along = ((x - mean) / (deviation.detach() + 1e-4) @ module.slices).sort(0).values
    normal = torch.distributions.Normal(0, 1).icdf(torch.arange(1, len(x) + 1).double() / (len(x) + 1))
    return mean.square().mean() + (1 - deviation).square().mean() + (along - normal[:, None]).square().mean()


PLAIN: dict[str, Callable[[Tensor, Regularizer], Tensor]] = {
    "variance": variance,
    "covariance": covariance,
    "coding_rate": coding_rate,
    "frobenius": frobenius,
    "koleo": koleo,
    "sigreg": sigreg,
    "visreg": visreg,
}


def same(ours: Tensor, theirs: Tensor, x: Tensor, tolerance: float = 1e-9) -> None:
    """Value and gradient of two losses of x agree, relative to their sizes."""
    torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=tolerance, atol=tolerance)
    mine, other = (torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in (ours, theirs))
    assert other.isfinite().all()
    torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance * max(other.abs().max().item(), 1e-3))


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("shape", [TALL, WIDE])
@pytest.mark.parametrize("name", PLAIN)
def test_value_and_gradient_equal_the_formula(name: str, shape: tuple[int, ...], state: str) -> None:
    x = STATES[state](draw(*shape)).requires_grad_()
    module = make(name, shape)
    module.set_step(3)
    expected = torch.stack([PLAIN[name](view, module) for view in x]).mean()
    same(module(x), expected, x)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("shape", [TALL, WIDE])
def test_the_nuclear_norm_is_that_of_the_mean_of_unit_views(shape: tuple[int, ...], state: str) -> None:
    x = STATES[state](draw(*shape)).requires_grad_()
    module = make("nuclear", shape)
    same(module(x), -torch.linalg.svdvals(unit(x).mean(0)).sum(), x, 1e-7)


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_the_moving_matrix_of_tico(momentum: float) -> None:
    module = make("tico", momentum=momentum)
    moment = torch.zeros(5, 5, dtype=torch.float64)
    for step in range(3):
        x = draw(*TALL, seed=step).requires_grad_()
        z = unit(x)
        batch = sum(torch.outer(row, row) for row in z.detach().flatten(0, 1)) / 36  # type: ignore[misc]
        moment = momentum * moment + (1 - momentum) * batch
        same(module(x), torch.stack([row @ moment @ row for row in z.flatten(0, 1)]).mean(), x)
        torch.testing.assert_close(module.moment, moment, rtol=0, atol=1e-15)  # type: ignore[arg-type]
    assert [*module.state_dict()] == ["moment"], "goes on after a resume"
    kept = module.moment.clone()  # type: ignore[operator]
    module.eval()
    module(x)
    assert torch.equal(module.moment, kept)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["sigreg", "visreg"])
def test_slices_are_unit_vectors_that_depend_on_the_step_alone(name: str) -> None:
    module, other = make(name), make(name)
    assert isinstance(module, Sliced) and isinstance(other, Sliced)
    seen = []
    for step in (7, 8, 7):
        module.set_step(step)
        seen.append(module.slices.clone())
        torch.testing.assert_close(module.slices.norm(dim=0), torch.ones_like(module.slices[0]))
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])
    other.set_step(7)
    assert torch.equal(other.slices, seen[0]) and not module.state_dict()


@pytest.mark.parametrize("name", REGULARIZERS)
@pytest.mark.parametrize("state", ["zero", "one point", "huge"])
def test_gradients_are_finite_where_all_rows_are_one_and_where_they_are_huge(name: str, state: str) -> None:
    start = {"zero": torch.zeros(TALL), "one point": torch.ones(TALL), "huge": 1e6 * draw(*TALL).float()}[state]
    x = start.requires_grad_()
    module = make(name).float()
    (grad,) = torch.autograd.grad(module(x), x)
    assert grad.isfinite().all()


def lightly() -> Any:
    return pytest.importorskip("lightly.loss")


@pytest.mark.parametrize("state", STATES)
def test_vicreg_equals_lightlys(state: str) -> None:
    x = STATES[state](draw(2, 12, 5)).requires_grad_()
    oracle = lightly().VICRegLoss()
    ours = align(x, x, mse, AlignmentConfig(name="mse", weight=25.0), once=True)
    ours = ours + 25 * make("variance")(x) + 2 * make("covariance")(x)
    same(ours, oracle(x[0], x[1]), x)


@pytest.mark.parametrize("state", STATES)
def test_barlow_twins_equals_lightlys(state: str) -> None:
    x = STATES[state](draw(2, 12, 5)).requires_grad_()
    oracle = lightly().BarlowTwinsLoss(lambda_param=0.0051)
    ours = align(x, x, cross_correlation, CrossCorrelationConfig(weight=0.1), once=True)
    same(ours, 0.1 * oracle(x[0], x[1]), x)


@pytest.mark.parametrize("state", STATES)
def test_koleo_equals_lightlys(state: str) -> None:
    x = STATES[state](draw(*TALL)).requires_grad_()
    oracle = lightly().KoLeoLoss()
    same(make("koleo")(x), torch.stack([oracle(view) for view in x]).mean(), x)


def test_tico_equals_lightlys() -> None:
    module, oracle = make("tico"), lightly().TiCoLoss()
    for step in range(3):
        x, target = draw(1, 12, 5, seed=step).requires_grad_(), draw(12, 5, seed=9)
        ours = 1 - torch.cosine_similarity(x[0], target).mean() + 8 * module(x)
        same(ours, oracle(x[0], target), x)


@pytest.mark.parametrize("state", STATES)
def test_lejepa_equals_lightlys(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = STATES[state](draw(4, 12, 5)).requires_grad_()
    module = make("sigreg")
    assert isinstance(module, Sliced)
    oracle = pytest.importorskip("lightly.loss.lejepa_loss").LeJEPALoss().double()
    monkeypatch.setattr(oracle.sigreg, "_generate_unit_vectors", lambda *_: module.slices)
    ours = align(x, x[:2], mse, AlignmentConfig(name="mse", weight=0.95, targets="center")) + 0.05 * module(x)
    same(ours, oracle(local_proj=x[2:], global_proj=x[:2]), x, 1e-6)  # its knots are float32


def test_visreg_equals_lightlys(monkeypatch: pytest.MonkeyPatch) -> None:
    x = draw(4, 12, 5).requires_grad_()
    module = make("visreg")
    assert isinstance(module, Sliced)
    oracle = pytest.importorskip("lightly.loss.visreg_loss").VISRegLoss()
    monkeypatch.setattr(torch, "randn", lambda *_, **__: module.slices)
    ours = align(x, x[:2], mse, AlignmentConfig(name="mse", weight=0.1, targets="center")) + 0.9 * module(x)
    same(ours, oracle(local_proj=x[2:], global_proj=x[:2]), x, 1e-5)  # its quantiles are float32


def test_mmcr_and_frossl_equal_lightlys() -> None:
    x = draw(2, 12, 5).requires_grad_()
    z = unit(x)
    same(make("nuclear")(x), lightly().MMCRLoss(lmda=0)(z[:1].transpose(0, 1), z[1:].transpose(0, 1)), x)
    oracle = pytest.importorskip("lightly.loss.frossl_loss").FroSSLLoss(invariance_weight=0.0)
    same(make("frobenius")(x), oracle([*x]) / 2, x)


METHOD = {"online": [], "target": [], "alignment": {"name": "mse"}}


def test_terms_are_weighted_shares_of_the_loss_of_the_rows_that_were_asked_for(branch: Build, views: Draw) -> None:
    rows = [
        {"name": "variance", "weight": 2.0, "of": "features", "views": "global"},
        {"name": "variance", "weight": 3.0, "of": "projection"},
        {"name": "covariance", "weight": 0.5, "of": "output"},
    ]
    method = branch({**METHOD, "regularize": rows, "online": [{"name": "filter", "power": 1.0}], "target": ["stop"]})
    images = views(8, 8, 4)
    out, projection = method(images), method.online(images, None).projection
    shape = (3, 8, 5)
    assert out.terms["variance"].item() == pytest.approx(2 * make("variance")(out.features[:2]).item(), abs=1e-12)
    assert out.terms["variance 2"].item() == pytest.approx(3 * make("variance", shape)(projection).item(), abs=1e-12)
    assert out.terms["covariance"].item() == pytest.approx(make("covariance", shape)(out.online).item() / 2, abs=1e-12)
    assert [*out.terms] == ["mse", "variance", "variance 2", "covariance"]
    assert out.loss.item() == pytest.approx(sum(term.item() for term in out.terms.values()), abs=1e-12)
    assert not any(term.requires_grad for term in out.terms.values())


def test_the_gradient_of_a_regularizer_reaches_encoder_and_projector(branch: Build, views: Draw) -> None:
    plain, regular = (branch({**METHOD, "regularize": r}) for r in ([], [{"name": "coding_rate", "weight": 3.0}]))
    for method in (plain, regular):
        method(views()).loss.backward()
    apart = branch({**METHOD, "regularize": []})
    (3 * make("coding_rate", (2, 8, 5))(apart.online(views(), None).projection)).backward()
    for (name, p), (_, q), (_, r) in zip(*(m.named_parameters() for m in (plain, regular, apart)), strict=True):
        assert p.grad is not None and q.grad is not None and r.grad is not None
        torch.testing.assert_close(q.grad, p.grad + r.grad, rtol=0, atol=1e-12, msg=name)


class Learned(Regularizer):
    """A regularizer of one's own with a parameter."""

    def __init__(self, config: RegularizerConfig, context: RegularizerContext) -> None:
        super().__init__(config, context)
        self.scale = nn.Parameter(torch.ones(context.width))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scale).square().mean()


def test_parameters_of_a_regularizer_are_trained(branch: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REGULARIZERS, "learned", RegularizerRow(f"{__name__}:Learned", RegularizerConfig))
    method = branch({**METHOD, "regularize": ["learned"]})
    (role,) = [role for role in method.roles() if role.name == "learned"]
    assert [name for name, _ in role.parameters] == ["regularizers.0.scale"]
    assert {id(p) for role in method.roles() for _, p in role.parameters} == {id(p) for p in method.parameters()}


def test_a_loss_without_regularizers_has_no_terms(branch: Build, views: Draw) -> None:
    assert branch({})(views()).terms == {}


def test_the_coding_rate_counts_directions() -> None:
    """n rows along k axes alike: k (n + D) / (2 n D) * ln(1 + D / (k epsilon))."""
    for k in (1, 2, 4):
        x = torch.eye(4, dtype=torch.float64)[torch.arange(8) % k].unsqueeze(0)
        expected = k * (8 + 4) / (2 * 8 * 4) * math.log(1 + 4 / (k * 0.5))
        assert make("coding_rate", (1, 8, 4))(x).item() == pytest.approx(-expected, abs=1e-12)


# Effective rank of unit rows about their mean after 30 steps down each penalty alone, from 5.16 of 16: docs/theory.md.
RAISED = {
    "variance": (14.2, 6.1),
    "covariance": (5.4, 8.0),
    "coding_rate": (15.9, 15.9),
    "frobenius": (7.5, 12.9),
    "nuclear": (15.9, 15.9),
    "koleo": (11.9, 11.9),
    "sigreg": (11.5, 11.5),
    "visreg": (7.2, 13.4),
    "tico": (14.6, 14.6),
}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", REGULARIZERS)
def test_each_regularizer_alone_raises_the_rank_of_its_rows(name: str, turned: bool) -> None:
    """Variances along the dimensions from 1 to 1e-4, or along directions that are no dimensions (`turned`)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 64, 16, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, 16).double()
    if turned:
        x = x @ torch.linalg.qr(torch.randn(16, 16, generator=generator, dtype=torch.float64))[0]
    module = make(name, (1, 64, 16))
    ranks = [effective_rank(x[0], normalize=True, center=True).item()]
    for step in range(30):
        module.set_step(step)
        x = x.requires_grad_()
        (grad,) = torch.autograd.grad(module(x), x)
        x = (x - 0.05 * x.norm() / grad.norm().clamp_min(1e-12) * grad).detach()
        ranks.append(effective_rank(x[0], normalize=True, center=True).item())
    assert ranks[0] == pytest.approx(5.16, abs=0.01) and ranks[1] > ranks[0]
    assert ranks[-1] == pytest.approx(RAISED[name][turned], abs=0.1)
