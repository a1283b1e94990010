"""The paper's theorems as tests: what they assume, what follows, and what happens where the assumption fails.

T1 to T4 as numbered in docs/theory.md.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from fastrdm.analysis.spectral_analysis import collect
from fastrdm.kernels.linalg.effective_rank import effective_rank, entropy_rank
from fastrdm.kernels.spectral.spectral_filter import spectral_filter
from fastrdm.loaders.build import build_loader
from fastrdm.loaders.sources.open import open_source
from fastrdm.loaders.spec import LoaderConfig, ViewSpec
from fastrdm.methods.dual_branch import DualBranch, MethodConfig
from fastrdm.methods.spectral_filter import FilterConfig
from fastrdm.methods.transform import TransformConfig
from fastrdm.models.heads import HeadConfig
from fastrdm.schema import Horizon

G: dict[str, Callable[[Tensor], Tensor]] = {
    "s": lambda s: s,
    "s^2": lambda s: s**2,
    "log1p": torch.log1p,
    "log1p_sq": lambda s: torch.log1p(s**2),
}


def filtered(spectrum: Tensor, g: Callable[[Tensor], Tensor]) -> Tensor:
    """Eigenvalues lambda g(s)^2 of a branch filtered by g on singular values s = sqrt(lambda)."""
    return spectrum * g(spectrum.sqrt()) ** 2


# --- T3: low-pass online, or high-pass target, makes the online rank the smaller one


def test_fifty_eigenvalues_through_every_filter() -> None:
    """Quantiles of an exponential distribution, each rank by the definition written out in plain Python."""
    spectrum = [-math.log((i + 0.5) / 50) for i in range(50)]
    plain: dict[str, Callable[[float], float]] = {"s": lambda s: s, "log1p": math.log1p, "none": lambda s: 1.0}
    plain |= {f"s^{a}": lambda s, a=a: s**a for a in (-0.5, -1.0)}
    ranks = {}
    for name, g in plain.items():
        values = [x * g(math.sqrt(x)) ** 2 for x in spectrum]
        total = math.fsum(values)
        ranks[name] = math.exp(-math.fsum(v / total * math.log(v / total) for v in values))
    assert {name: round(rank, 1) for name, rank in ranks.items()} == {
        "s": 17.1,
        "log1p": 21.2,
        "none": 33.1,
        "s^-0.5": 43.6,
        "s^-1.0": 50.0,
    }
    x = torch.tensor(spectrum, dtype=torch.float64)
    assert float(entropy_rank(x)) == pytest.approx(ranks["none"], rel=1e-12)
    assert float(entropy_rank(filtered(x, torch.log1p))) == pytest.approx(ranks["log1p"], rel=1e-12)


@pytest.mark.parametrize("decay", [0.5, 0.8])
def test_a_geometric_spectrum_has_the_rank_of_the_formula(decay: float) -> None:
    """Entropy of a geometric distribution: (-(1 - r) ln (1 - r) - r ln r) / (1 - r); online s squares r."""
    r = torch.tensor(decay, dtype=torch.float64)
    spectrum = r ** torch.arange(300, dtype=torch.float64)

    def rank(r: float) -> float:
        return math.exp((-(1 - r) * math.log(1 - r) - r * math.log(r)) / (1 - r))

    assert float(entropy_rank(spectrum)) == pytest.approx(rank(decay), rel=1e-9)
    assert float(entropy_rank(filtered(spectrum, G["s"]))) == pytest.approx(rank(decay**2), rel=1e-9)
    assert float(entropy_rank(filtered(spectrum, lambda s: s**-0.5))) == pytest.approx(rank(decay**0.5), rel=1e-9)


def spectra(count: int) -> Tensor:
    """(count, 40) random spectra, sorted, from flat to steep."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(count, 40, generator=generator, dtype=torch.float64)
    return (drawn * torch.linspace(0.05, 3, count)[:, None]).exp().sort(dim=1, descending=True).values


@pytest.mark.parametrize("name", G)
def test_a_low_pass_filter_majorises_and_lowers_the_rank(name: str) -> None:
    """Partial sums of the sorted shares: those of the filtered spectrum lie above, so its entropy is smaller."""
    target = spectra(300)
    online = filtered(target, G[name])
    shares = [(x / x.sum(1, keepdim=True)).cumsum(1) for x in (online, target)]
    assert (shares[0] >= shares[1] - 1e-12).all()
    assert (entropy_rank(online) < entropy_rank(target)).all()


@pytest.mark.parametrize("power", [-0.3, -0.5, -0.7, -1.0])
def test_a_high_pass_target_raises_the_rank(power: float) -> None:
    online = spectra(300)
    assert (entropy_rank(filtered(online, lambda s: s**power)) > entropy_rank(online)).all()


def test_the_logarithm_is_low_pass_only_above_one() -> None:
    """ln s is negative below s = 1 and its square rises again: the paper's online log needs large singular values."""
    spectrum = torch.tensor([1.6, 0.8, 0.1], dtype=torch.float64)
    assert float(entropy_rank(filtered(1000 * spectrum, torch.log))) < float(entropy_rank(spectrum))
    assert float(entropy_rank(filtered(spectrum, torch.log))) > float(entropy_rank(spectrum))


@pytest.mark.parametrize(("kind", "power"), [("power", 1.0), ("log1p", None), ("log1p_sq", None)])
def test_the_filters_of_training_keep_the_eigenvectors_and_lower_the_rank(kind: str, power: float | None) -> None:
    """T2 for the filters: C of the online and of the target rows commute, which a learned predictor only approaches."""
    x = torch.randn(90, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * torch.logspace(0, -1, 12)
    y = spectral_filter(x, kind, power, side="online")  # type: ignore[arg-type]
    a, b = x.T @ x, y.T @ y
    assert torch.allclose(a @ b, b @ a, atol=1e-9 * float((a @ b).norm()))
    assert float(effective_rank(y)) < float(effective_rank(x))


# --- T4: the rank difference drives the dynamics. z = W x, x of mean 0 and covariance I, views of covariance e added:
# loss = E |G W x1 - sg(H W x2)|^2 / 2 = (1 + e) |G W|^2 / 2 - <G W, sg(H W)> + constant

NOISE = 0.2  # e


def matrix_function(w: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """U f(s) U^T of W = U s V^T, without gradient."""
    u, s, _ = torch.linalg.svd(w.detach(), full_matrices=False)
    return (u * f(s)) @ u.T


def after_step(
    w: Tensor, online: Callable[[Tensor], Tensor], target: Callable[[Tensor], Tensor], rate: float = 0.05
) -> Tensor:
    """W after one gradient step on the population loss."""
    w = w.detach().requires_grad_()
    out = matrix_function(w, online) @ w
    loss = (1 + NOISE) / 2 * out.square().sum() - (out * (matrix_function(w, target) @ w).detach()).sum()
    (gradient,) = torch.autograd.grad(loss, w)
    return (w - rate * gradient).detach()


def start(decay: float = 0.35) -> Tensor:
    """W (8, 20) with singular values exp(-decay i)."""
    generator = torch.Generator().manual_seed(0)
    u, _, vt = torch.linalg.svd(torch.randn(8, 20, generator=generator, dtype=torch.float64), full_matrices=False)
    return (u * torch.exp(-decay * torch.arange(8, dtype=torch.float64))) @ vt


def feature_rank(w: Tensor) -> float:
    """Of E[z z^T], proportional to W W^T."""
    return float(effective_rank(w.T))


def ridge(weight_decay: float) -> Callable[[Tensor], Tensor]:
    """The linear predictor that is best on this loss with weight decay: C12 (C11 + decay)^-1, low-pass."""
    return lambda s: s**2 / ((1 + NOISE) * s**2 + weight_decay)


def test_the_learned_predictor_is_the_best_one_and_low_pass() -> None:
    """T2 and the premise of T3: gradient 0 of E|P z1 - z2|^2 / 2 + decay |P|^2 / 2 at `ridge`, which rises with s."""
    w, decay = start(), 0.005
    p = matrix_function(w, ridge(decay)).requires_grad_()
    moment = w @ w.T
    loss = (1 + NOISE) / 2 * (p @ moment @ p.T).trace() - (p @ moment).trace() + decay / 2 * p.square().sum()
    (gradient,) = torch.autograd.grad(loss, p)
    assert float(gradient.norm()) < 1e-12
    assert torch.allclose(p @ moment, moment @ p)
    values = ridge(decay)(torch.linalg.svdvals(w))
    assert (values.diff() < 0).all()


def one(s: Tensor) -> Tensor:
    return torch.ones_like(s)


DRIVERS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "learned predictor": (ridge(0.005), one),
    "target s^-0.5": (one, lambda s: s**-0.5),
    "target s^-1": (one, lambda s: 1 / s),
    "low-pass online, scaled into the assumption": (lambda s: 0.5 + 0.3 * s / s.max(), one),
}


@pytest.mark.parametrize("name", DRIVERS)
def test_each_step_raises_the_rank_of_the_features(name: str) -> None:
    w, (online, target) = start(), DRIVERS[name]
    ranks = [feature_rank(w)]
    for _ in range(200):
        w = after_step(w, online, target)
        ranks.append(feature_rank(w))
    assert all(after > before for before, after in pairwise(ranks))
    assert ranks[-1] > ranks[0] + 0.3


@pytest.mark.parametrize("name", DRIVERS)
def test_a_step_multiplies_each_singular_value_by_the_formula(name: str) -> None:
    """s -> s (1 + rate p (h - (1 + e) p)): the whole of the linear dynamics."""
    online, target = DRIVERS[name]
    before = torch.linalg.svdvals(start())
    p, h = online(before), target(before)
    expected = before * (1 + 0.05 * p * (h - (1 + NOISE) * p))
    assert torch.allclose(torch.linalg.svdvals(after_step(start(), online, target)), expected, rtol=1e-10)


def test_without_asymmetry_the_rank_stays() -> None:
    w = start()
    for _ in range(200):
        w = after_step(w, one, one)
    assert feature_rank(w) == pytest.approx(feature_rank(start()), abs=1e-9)


@pytest.mark.parametrize(
    ("online", "target"), [(one, lambda s: s), (lambda s: 0.5 + 0.3 * s.min() / s, one)], ids=["target s", "online 1/s"]
)
def test_the_opposite_filters_lower_it(online: Callable[[Tensor], Tensor], target: Callable[[Tensor], Tensor]) -> None:
    w = start()
    ranks = [feature_rank(w)]
    for _ in range(50):
        w = after_step(w, online, target)
        ranks.append(feature_rank(w))
    assert all(after < before for before, after in pairwise(ranks))


def test_the_assumption_is_needed() -> None:
    """A low-pass filter with values under 1 / 2(1 + e) lets the large directions grow faster: the rank falls."""
    w = start()
    assert feature_rank(after_step(w, lambda s: 0.3 * s / s.max(), one)) < feature_rank(w)
    assert feature_rank(after_step(w, ridge(1.0), one)) < feature_rank(w)


WEAK: dict[str, Callable[[Tensor], Tensor]] = {"0.3 s": lambda s: 0.3 * s / s.max(), "ridge": ridge(1.0)}


@pytest.mark.parametrize("name", WEAK)
def test_an_isotropic_gradient_needs_no_assumption(name: str) -> None:
    """IsoLoss hands the output's gradient to the features: s -> s (1 + rate (h - (1 + e) p)), for weak predictors."""
    w, online = start(), WEAK[name]
    ranks = [feature_rank(w)]
    for _ in range(50):
        features = w.requires_grad_()
        before = torch.linalg.svdvals(w.detach())
        plain = matrix_function(w, online) @ w.detach()
        out = plain + (features - features.detach())
        loss = (1 + NOISE) / 2 * out.square().sum() - (out * w.detach()).sum()
        w = (w - 0.05 * torch.autograd.grad(loss, features)[0]).detach()
        expected = before * (1 + 0.05 * (1 - (1 + NOISE) * online(before)))
        assert torch.allclose(torch.linalg.svdvals(w), expected, rtol=1e-10)
        ranks.append(feature_rank(w))
    assert all(after > before for before, after in pairwise(ranks))


# --- T1: without asymmetry no complete collapse, but fewer and fewer dimensions


class Flat(nn.Flatten):
    """Pixels as features: with one linear layer behind it, the linear model of the theory."""

    features = 192


def trained(target: tuple[TransformConfig, ...], epochs: int) -> tuple[list[float], float]:
    """Rank of the target rows of all images after each part of a run on digits, and the rows' spread at its end.

    The spread is the mean deviation of unit rows' entries times sqrt(D): 1 is healthy, 0 complete collapse.
    """
    torch.manual_seed(0)
    view = ViewSpec(size=8, scale=(0.5, 1.0), flip=0, jitter=0, grayscale=0)
    data = LoaderConfig(source="digits", batch_size=256, views=(view, view))
    loader = build_loader(data, open_source(data, "train"), seed=0)
    head = HeadConfig(layers=1, out=32, last_norm="plain")
    method = DualBranch(MethodConfig(projector=head, online=(), target=target), Flat(), Horizon(5, 100), batch_size=256)
    optimizer = torch.optim.SGD(method.parameters(), lr=1.0, momentum=0.9)
    ranks, spread = [], 0.0
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        if epoch % (epochs // 4) == 0 or epoch == epochs - 1:
            rows = collect(method, (b.views for b in loader), batch_size=256)["outputs"].online[0]
            ranks.append(float(effective_rank(rows, normalize=True)))
            spread = float(nn.functional.normalize(rows, dim=1).std(0).mean()) * math.sqrt(rows.shape[1])
        for batch in loader:
            method(batch.views).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return ranks, spread


def test_symsimsiam_does_not_collapse_to_a_point_but_loses_rank() -> None:
    ranks, spread = trained((), 40)
    assert spread > 0.8
    assert ranks[-1] < 0.3 * ranks[0]


def test_a_high_pass_target_on_the_same_run_keeps_more() -> None:
    symmetric, _ = trained((), 40)
    driven, _ = trained((FilterConfig(power=-1.0),), 40)
    assert driven[-1] > 3 * symmetric[-1]
