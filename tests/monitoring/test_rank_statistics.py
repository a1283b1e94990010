"""What moments say: known spectra, intervals that hold what they promise, RankMe, LiDAR, the filter."""

import math

import pytest
import torch
from torch import Tensor

from fastrdm.kernels.linalg.effective_rank import effective_rank
from fastrdm.monitoring import rank_statistics
from fastrdm.monitoring.moments import Moments, add, unit_rows, zeros
from fastrdm.monitoring.rank_statistics import eigen, influence, rank

CPU = torch.device("cpu")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(x: Tensor, groups: int = 1) -> Moments:
    """Of rows (N, D) or (V, N, D)."""
    out = zeros(x.shape[-1], groups, CPU)
    add(out, x if x.ndim == 3 else x[None])
    return out


def rows_with(spectrum: list[float]) -> Tensor:
    """Rows whose second moment has exactly these eigenvalues, in random directions, with mean 0."""
    width = len(spectrum)
    turn, _ = torch.linalg.qr(draw(width, width))
    half = torch.diag(torch.tensor(spectrum, dtype=torch.float64).sqrt()) @ turn * width**0.5
    return torch.cat([half, -half])


def test_known_spectra_give_known_ranks() -> None:
    flat = eigen(moments(rows_with([2.0] * 6)))
    assert rank(flat, "erank_l") == pytest.approx(6)
    assert rank(flat, "erank_s") == pytest.approx(6)
    two = eigen(moments(rows_with([0.75, 0.25, 0, 0])))
    assert rank(two, "erank_l") == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    share = 3**0.5 / (3**0.5 + 1)  # of singular values
    expected = math.exp(-share * math.log(share) - (1 - share) * math.log(1 - share))
    assert rank(two, "erank_s") == pytest.approx(expected, rel=1e-6)
    assert (two.values[2:] == 0).all(), "rounding made them"


def test_ranks_are_those_of_the_rows() -> None:
    x = draw(60, 7) * torch.arange(1, 8) + 3
    for center in (False, True):
        spectrum = eigen(moments(x, groups=5), center)
        for kind, convention in (("erank_l", "eigenvalues"), ("erank_s", "singular_values")):
            expected = effective_rank(x, convention=convention, center=center)  # type: ignore[arg-type]
            assert rank(spectrum, kind) == pytest.approx(expected.item())


@pytest.mark.parametrize("center", [False, True])
def test_influence_is_the_derivative_of_the_rank_with_respect_to_a_groups_weight(center: bool) -> None:
    x = unit_rows(draw(1, 80, 5) * torch.tensor([3.0, 2, 1, 1, 0.5]) + 0.3)
    whole = moments(x, groups=4)
    effects = influence(whole, eigen(whole, center), center)
    step = 1e-6

    def heavier(g: int) -> float:
        weights = torch.ones(4, dtype=torch.float64)
        weights[g] += step
        sums = whole.rows * weights, whole.first * weights[:, None], (whole.panels[0] * weights[:, None, None],)
        return rank(eigen(Moments(*sums), center), "erank_l")

    base = rank(eigen(whole, center), "erank_l")
    found = torch.tensor([(heavier(g) - base) / step for g in range(4)], dtype=torch.float64)
    expected = (effects - effects.mean()) / 4  # groups of one size: a share of 1/4 each
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def difference(a: Tensor, b: Tensor, center: bool = False) -> tuple[float, float, float]:
    pair = [(m, eigen(m, center)) for m in (moments(x, groups=8) for x in (a, b))]
    metrics = rank_statistics.difference(pair[0], pair[1], center, "d")
    return metrics["d"], metrics["d/low"], metrics["d/high"]


@pytest.mark.parametrize("center", [False, True])
def test_equal_populations_give_no_difference_within_the_interval(center: bool) -> None:
    scale = torch.linspace(2, 0.2, 12, dtype=torch.float64)
    held = 0
    for seed in range(40):
        a, b = (unit_rows(draw(2, 120, 12, seed=2 * seed + i) * scale + 0.2) for i in range(2))
        _, low, high = difference(a, b, center)
        held += low <= 0 <= high
    assert held >= 34  # of 40 intervals of 95 %


def test_another_spectrum_is_another_rank() -> None:
    x = draw(2, 400, 6)
    value, low, high = difference(unit_rows(x), unit_rows(x * torch.tensor([3.0, 1, 1, 1, 1, 1])))
    assert 0.5 < low < value < high


def test_what_both_populations_share_does_not_widen_the_interval() -> None:
    x = draw(2, 400, 6) * torch.tensor([3.0, 1, 1, 1, 1, 1])
    near = difference(unit_rows(x), unit_rows(x + 0.01 * draw(2, 400, 6, seed=1)))
    other = difference(unit_rows(x), unit_rows(draw(2, 400, 6, seed=1) * torch.tensor([3.0, 1, 1, 1, 1, 1])))
    assert near[2] - near[1] < 0.1 * (other[2] - other[1])


def test_the_half_width_is_students_t_times_the_standard_error() -> None:
    for groups, quantile in ((2, 12.7062), (4, 3.1824), (8, 2.3646), (32, 2.0395)):  # published tables, 97.5 %
        effects = torch.arange(groups, dtype=torch.float64)
        shares = torch.full((groups,), 1 / groups, dtype=torch.float64)
        half = quantile * effects.std().item() / groups**0.5
        assert rank_statistics.half_width(effects, shares) == pytest.approx(half, rel=1e-4)


def test_the_filters_negative_directions_are_counted() -> None:
    z = rows_with([4.0, 3.0, 2.0, 1.0])
    target = eigen(moments(z))
    weights = torch.tensor([1.0, 0.5, -0.1, 0.2], dtype=torch.float64)
    p = z @ (target.vectors * weights) @ target.vectors.mT
    cross = zeros(4, 1, CPU)
    add(cross, p[None], z[None])
    assert rank_statistics.negative_share(target, cross) == 0.25


def test_rankme_of_white_features_is_their_dimension() -> None:
    assert rank(eigen(moments(rows_with([1.0] * 16))), "erank_s") == pytest.approx(16)


def test_lidar_counts_directions_that_tell_images_apart() -> None:
    images = draw(4000, 6)
    noise = torch.full((6,), 0.1, dtype=torch.float64)
    images[:, 4:] *= 1e-3  # two directions hold noise alone
    a, b = (images + noise * draw(4000, 6, seed=s) for s in (1, 2))
    parts = moments((a + b) / 2), moments((a - b) / 2)
    assert rank_statistics.lidar(*parts) == pytest.approx(4, abs=0.2)
    within, between = parts[1].matrix() + 1e-4 * torch.eye(6), parts[0].matrix(center=True)
    values, vectors = torch.linalg.eigh(within)
    root = vectors @ torch.diag(values.rsqrt()) @ vectors.mT
    shares = torch.linalg.eigvalsh(root @ between @ root)
    shares = shares / shares.sum()
    assert rank_statistics.lidar(*parts) == pytest.approx(math.exp(-(shares * shares.log()).sum().item()))


def test_a_shown_spectrum_is_shares_of_the_whole() -> None:
    line = rank_statistics.spectrum_points(eigen(moments(rows_with([3.0, 2.0, 1.0]))))
    assert line["ranks"] == [1, 2, 3]
    assert line["eigenvalues"] == pytest.approx([0.5, 1 / 3, 1 / 6])
    wide = rank_statistics.spectrum_points(eigen(moments(draw(400, 300))))
    assert len(wide["ranks"]) <= 128 and wide["ranks"][0] == 1 and wide["ranks"][-1] == 300
    assert sum(wide["eigenvalues"]) < 1
