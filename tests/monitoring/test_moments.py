"""Sums of rows: what they hold whatever the groups, and what is kept of two views."""

import pytest
import torch

from fastrdm.monitoring.moments import Moments, add, join_views, pooled, unit_rows, zeros
from fastrdm.monitoring.rank_statistics import Eigen, eigen, rank

CPU = torch.device("cpu")


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(found: Moments, expected: Moments) -> None:
    torch.testing.assert_close([*found[:2], found.second()], [*expected[:2], expected.second()])


@pytest.mark.parametrize("block", [None, 2])
def test_one_triangle_in_panels_is_the_whole_matrix(block: int | None) -> None:
    x, moments = rows(2, 7, 5), zeros(5, 3, CPU, block=block)
    add(moments, x)
    whole = zeros(5, 3, CPU)
    add(whole, x)
    same(moments, whole)
    torch.testing.assert_close(moments.matrix().trace() * 8 * torch.finfo(torch.float64).eps, moments.noise)
    assert sum(panel.numel() for panel in moments.panels) == (3 * 25 if block is None else 3 * (10 + 6 + 1))


def test_sums_in_float32_are_good_to_a_millionth_of_the_largest() -> None:
    """The bound that Moments states, on rows with a mean far larger than their deviation, over 40 batches."""
    wide, narrow = zeros(300, 1, CPU), zeros(300, 1, CPU, torch.float32, block=128)
    for step in range(40):
        x = torch.nn.functional.normalize(rows(2, 64, 300, seed=step) * 0.1 + 1, dim=-1).float()
        add(wide, x)
        add(narrow, x)
    exact = wide.matrix()
    assert (narrow.matrix() - exact).abs().max() < 1e-6 * exact.diagonal().max()
    values = [eigen(m, center=True).values for m in (wide, narrow)]
    torch.testing.assert_close(values[1], values[0], rtol=0, atol=float(narrow.noise))
    assert rank(Eigen(values[1], values[1]), "erank_l") == pytest.approx(
        rank(Eigen(values[0], values[0]), "erank_l"), rel=1e-3
    )


@pytest.mark.parametrize(("images", "groups"), [(8, 1), (8, 8), (13, 4), (3, 8)])
def test_moments_are_those_of_all_rows_whatever_the_groups(images: int, groups: int) -> None:
    x = torch.stack([rows(2, images, 5, seed=s) for s in range(3)])
    moments = zeros(5, groups, CPU)
    for part in x:
        add(moments, part)
    flat = x.flatten(0, 2)
    assert moments.rows.sum() == len(flat)
    torch.testing.assert_close(moments.mean, flat.mean(0))
    torch.testing.assert_close(moments.matrix(), flat.mT @ flat / len(flat))
    torch.testing.assert_close(moments.matrix(center=True), flat.mT.cov(correction=0))


def test_a_group_holds_the_same_images_of_every_view() -> None:
    x, moments = rows(2, 7, 3), zeros(3, 4, CPU)
    add(moments, x)
    for g in range(4):
        own = x[:, g::4].flatten(0, 1)
        assert moments.rows[g] == len(own)
        torch.testing.assert_close(moments.first[g], own.sum(0))
        torch.testing.assert_close(moments.second(g), own.mT @ own)


def test_whole_batches_take_turns() -> None:
    x, moments = rows(5, 2, 4, 3), zeros(3, 3, CPU)
    for turn, batch in enumerate(x):
        add(moments, batch, turn=turn)
    assert moments.rows.tolist() == [16, 16, 8]
    for g in range(3):
        own = x[g::3].flatten(0, 2)
        torch.testing.assert_close(moments.first[g], own.sum(0))
        torch.testing.assert_close(moments.second(g), own.mT @ own)


def test_two_kinds_of_rows_give_their_cross_moment() -> None:
    x, y, moments = rows(2, 6, 4), rows(2, 6, 4, seed=1), zeros(4, 1, CPU)
    add(moments, x, y)
    torch.testing.assert_close(moments.matrix(), x.flatten(0, 1).mT @ y.flatten(0, 1) / 12)


def test_half_sums_and_half_differences_hold_both_views() -> None:
    x, parts = rows(2, 9, 4), [zeros(4, 1, CPU) for _ in range(2)]
    add(parts[0], (x[:1] + x[1:]) / 2)
    add(parts[1], (x[:1] - x[1:]) / 2)
    whole = zeros(4, 1, CPU)
    add(whole, x)
    same(join_views(*parts), whole)


def test_pooled_moments_are_those_of_both() -> None:
    a, b, both = zeros(3, 2, CPU), zeros(3, 2, CPU), zeros(3, 2, CPU)
    x = rows(2, 6, 3)
    add(a, x[:1])
    add(b, x[1:])
    add(both, x)
    same(pooled(a, b), both)


def test_rows_of_any_precision_are_summed_in_float64() -> None:
    moments = zeros(2, 1, CPU)
    add(moments, torch.tensor([[[1.0, 2.0], [3.0, 4.0]]], dtype=torch.bfloat16))
    assert moments.panels[0].dtype == torch.float64
    assert moments.second(0).tolist() == [[10.0, 14.0], [14.0, 20.0]]
    assert unit_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist() == [[0.6, 0.8], [0.0, 0.0]]
