"""Two branches compared: planted filters, equal populations, intervals and chance levels, on rows drawn here."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastrdm.analysis.branch_comparison import (
    Interval,
    alignment_between,
    rank_differences,
    resamples,
    second_moment,
    spearman_with_order,
    spectral_filter_between,
    white_bound,
)
from fastrdm.kernels.linalg.effective_rank import effective_rank, entropy_rank
from fastrdm.monitoring.moments import unit_rows

D = 32
DECAY = torch.arange(1, D + 1, dtype=torch.float64) ** -1.0  # eigenvalues


def rotation(seed: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64))[0]


def drawn(eigenvalues: Tensor, images: int, seed: int, basis: Tensor | None = None) -> Tensor:
    """Gaussian rows (2, N, D) of that population."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2, images, len(eigenvalues), generator=generator, dtype=torch.float64)
    return rows * eigenvalues.sqrt() @ (rotation() if basis is None else basis).T


def population_rank(eigenvalues: Tensor) -> float:
    """Of unit rows of that Gaussian population, from very many of them."""
    x = drawn(eigenvalues, 100_000, 99, torch.eye(D, dtype=torch.float64))
    return float(entropy_rank(second_moment(unit_rows(x)).diagonal(dim1=1, dim2=2).mean(0)))


def naive_spearman(directions: Tensor, online: Tensor, target: Tensor) -> float:
    """Of ratio and order along eigenvectors (D, D), the ordinary way: variances over the rows (N, D) given."""
    o, t = ((unit_rows(x) @ directions).square().mean(0) for x in (online, target))
    return float(spearman_with_order((o / t).log()))


def eigenvectors(x: Tensor) -> Tensor:
    return torch.linalg.eigh(second_moment(unit_rows(x)))[1].flip(1)


def test_eigenvectors_of_the_same_images_make_equal_branches_look_filtered_and_cross_fitting_does_not() -> None:
    online, target = drawn(DECAY**0.2, 10 * D, 1), drawn(DECAY**0.2, 10 * D, 2)
    same = naive_spearman(eigenvectors(target[0]), online[0], target[0])
    half = 5 * D
    crossed = naive_spearman(eigenvectors(target[0, :half]), online[0, half:], target[0, half:])
    assert same < -0.8  # a false high-pass filter
    assert abs(crossed) < 0.4
    assert spectral_filter_between(online, target, replicates=100).body.sign == 0


def test_variances_are_those_of_the_images_that_the_directions_do_not_come_from() -> None:
    """One half steep, the other white: along directions of the one the other is flat, both ways round."""
    x = torch.cat([drawn(DECAY**2, 20 * D, 1), drawn(torch.ones(D), 20 * D, 2)], dim=1)
    found = spectral_filter_between(x, x, replicates=10)
    own = torch.linalg.eigvalsh(second_moment(unit_rows(x))).flip(-1)[0]
    assert float(own[0]) > 0.2
    assert float(found.target.max()) < 0.15


def test_equal_populations_show_neither_filter_nor_difference() -> None:
    """95 % intervals leave 0 outside in about one of twenty draws."""
    outside = {"filter": 0, "difference": 0, "null": 0}
    for seed in range(30):
        online, target = drawn(DECAY, 10 * D, 2 * seed), drawn(DECAY, 10 * D, 2 * seed + 1)
        found = rank_differences(online, target, center=False, replicates=40)
        outside["filter"] += spectral_filter_between(online, target, replicates=40).body.sign != 0
        outside["difference"] += found["difference"].sign != 0
        outside["null"] += found["null/online"].sign != 0
    assert max(outside.values()) <= 6, outside


@pytest.mark.parametrize("power", [1.0, 0.5, -0.3, -0.5])
def test_planted_power_laws_are_recovered(power: float) -> None:
    """x W with W = V s^power V^T: the ratio of eigenvalues is lambda^power, its root s^power."""
    basis = rotation()
    target = drawn(DECAY, 100 * D, 3)
    online = drawn(DECAY, 100 * D, 4) @ (basis * DECAY ** (power / 2)) @ basis.T
    found = spectral_filter_between(online, target, replicates=50)
    slope = torch.linalg.lstsq(
        torch.stack([DECAY.log(), torch.ones(D)], dim=1)[: len(found.ratio)], found.ratio.log()[:, None]
    ).solution[0, 0]
    assert abs(float(slope) - power) < 0.12, slope  # rows of unit length bend a power law a little
    assert found.body.sign == math.copysign(1, power)
    assert abs(found.body.value) > 0.9
    assert (found.tilt > 1.3) == (power > 0)


def test_a_whitened_target_still_shows_the_low_pass_online_branch() -> None:
    """Its own eigenvectors are arbitrary: the directions must come from both branches."""
    online, target = drawn(DECAY, 20 * D, 5), drawn(torch.ones(D), 20 * D, 6)
    assert abs(naive_spearman(eigenvectors(target[0, : 10 * D]), online[0, 10 * D :], target[0, 10 * D :])) < 0.5
    assert spectral_filter_between(online, target, replicates=50).body.low > 0.8


def test_one_tensor_on_both_branches_has_no_filter_at_all() -> None:
    x = drawn(DECAY, 10 * D, 1)
    found = spectral_filter_between(x, x + 1e-9 * x.roll(1, dims=1), replicates=20)
    assert found.body == Interval(0, 0, 0)
    assert found.tilt == pytest.approx(1, abs=1e-6)


def test_rounding_and_order_of_spearman() -> None:
    values = torch.tensor([[5.0, 3.0, 3.0, 1.0], [1.0, 2.0, 3.0, 4.0], [2.0, 2.0, 2.0, 2.0]])
    # ranks 4, 2.5, 2.5, 1 against 4, 3, 2, 1: Pearson's of them
    expected = 4.5 / math.sqrt(4.5 * 5)
    assert spearman_with_order(values).tolist() == pytest.approx([expected, -1, 0])


def test_the_tail_is_told_apart_from_the_body() -> None:
    """A branch that damps small variances but adds a little everywhere: low-pass where 99 % of the variance is."""
    few = torch.cat([2.0 ** -torch.arange(10, dtype=torch.float64), torch.logspace(-3.5, -4.5, D - 10).double()])
    online = drawn(few**2 + 3e-6, 200 * D, 1)
    found = spectral_filter_between(online, drawn(few, 200 * D, 2), replicates=50)
    assert found.body.sign == 1
    assert found.tail.sign == -1
    shares = (few / few.sum()).cumsum(0)  # 99 % of the variance lie in the first eight or so
    assert abs(found.directions - int((shares < 0.99).sum()) - 1) <= 2


@pytest.mark.parametrize("center", [False, True])
def test_rank_difference_equals_that_of_the_joined_rows(center: bool) -> None:
    online, target = drawn(DECAY, 333, 1) + 0.3, drawn(DECAY**0.5, 333, 2) - 0.2
    found = rank_differences(online, target, center=center, replicates=10)
    o, t = (effective_rank(x, center=center, normalize=True) for x in (online, target))
    assert found["difference"].value == pytest.approx(float((t - o).mean()), rel=1e-9)
    assert found["null/online"].value == pytest.approx(float(o[1] - o[0]), rel=1e-9)
    assert found["null/target"].value == pytest.approx(float(t[1] - t[0]), rel=1e-9)


def test_the_interval_holds_the_difference_of_infinitely_many_images() -> None:
    """Few images read low, more so for the flatter branch; the bootstrap sees that and takes it off."""
    flat, steep = DECAY**0.3, DECAY
    truth = population_rank(flat) - population_rank(steep)
    inside, values = 0, []
    for seed in range(20):
        found = rank_differences(
            drawn(steep, 10 * D, seed), drawn(flat, 10 * D, 50 + seed), center=False, replicates=40
        )
        inside += found["difference"].low < truth < found["difference"].high
        values.append(found["difference"].value)
    assert inside >= 16, inside
    assert truth - sum(values) / 20 > 0.3  # and the plain figure is biased


def test_the_deviation_is_that_of_new_images() -> None:
    """Against many independent draws, and hence against the bootstrap's own assumption that groups are alike."""
    found = [
        rank_differences(drawn(DECAY, 500, s), drawn(DECAY, 500, 99), center=False, replicates=100) for s in range(30)
    ]
    spread = torch.tensor([f["null/online"].value for f in found]).std()
    half = torch.tensor([f["null/online"].high - f["null/online"].low for f in found]).mean() / (2 * 1.96)
    assert 0.7 < float(half / spread) < 1.4


def test_resamples_draw_as_many_as_there_are() -> None:
    weights = resamples(20, 500, torch.device("cpu"))
    assert weights.shape == (500, 20)
    assert (weights.sum(1) == 20).all()
    assert weights.std() == pytest.approx(math.sqrt(19 / 20), rel=0.03)  # binomial


@pytest.mark.parametrize(("images", "published"), [(512, 310), (5120, 487)])
def test_white_rows_read_what_pages_formula_says(images: int, published: int) -> None:
    assert round(white_bound(images, 512)) == pytest.approx(published, abs=1)
    x = torch.randn(8 * images // 64, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert float(effective_rank(x)) == pytest.approx(white_bound(len(x), D), rel=0.02)
    assert white_bound(D, 100) == white_bound(100, D)  # fewer images than dimensions


@pytest.mark.parametrize("decay", [0.3, 1.0, 2.0])
def test_no_spectrum_loses_a_larger_share_than_a_white_one(decay: float) -> None:
    spectrum = DECAY**decay
    seen = float(effective_rank(drawn(spectrum, 4 * D, 3)).mean())
    assert seen / float(entropy_rank(spectrum)) > 0.99 * white_bound(4 * D, D) / D


def test_alignment_of_shared_and_of_unrelated_eigenspaces() -> None:
    target, shared = drawn(DECAY, 60 * D, 1), drawn(DECAY**1.3, 60 * D, 2)
    other = drawn(DECAY**1.3, 60 * D, 3, rotation(8))
    near, far = (alignment_between(x, target) for x in (shared, other))
    assert near.value > 0.93 and near.crossed > 0.9 and near.ceiling == pytest.approx(near.crossed, abs=0.03)
    assert far.value == pytest.approx(far.chance, abs=0.12)
    assert near.chance < 0.65
    assert alignment_between(target, target).published == pytest.approx(1)


def test_the_chance_level_of_a_flat_spectrum_is_high() -> None:
    """Every direction is an eigenvector of the identity: alignment alone proves nothing."""
    white: Callable[[int], Tensor] = lambda seed: drawn(torch.ones(D), 60 * D, seed)  # noqa: E731
    found = alignment_between(white(1), white(2))
    assert found.value > 0.95 and found.chance > 0.95
