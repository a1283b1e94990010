"""Losses over several targets: means of other views, the center of all, and both directions at once."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrdm.methods.alignment import align
from fastrdm.methods.dual_branch import DualBranch, MethodConfig
from fastrdm.methods.losses import (
    ALIGNMENTS,
    AlignmentConfig,
    CrossCorrelationConfig,
    cross_correlation,
    find_loss,
    loss_settings,
    mse,
    negative_cosine,
)
from fastrdm.monitoring.alarms import loss_range


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_mse_and_cross_correlation_equal_their_formulas() -> None:
    p, z = (2 + 3 * draw(7, 4)).requires_grad_(), draw(7, 4, seed=1)
    by_hand = sum((a - b) ** 2 for a, b in zip(p.flatten(), z.flatten(), strict=True)) / 28
    torch.testing.assert_close(mse(p, z, AlignmentConfig()), by_hand, rtol=1e-14, atol=0)
    config = CrossCorrelationConfig(redundancy=0.3, epsilon=1e-3)
    a, b = ((x - x.mean(0)) / (x.var(0, correction=0) + 1e-3).sqrt() for x in (p, z))
    expected = p.new_zeros(())
    for i, j in itertools.product(range(4), range(4)):
        c = (a[:, i] * b[:, j]).mean()
        expected = expected + ((1 - c) ** 2 if i == j else 0.3 * c**2)
    ours = cross_correlation(p, z, config)
    torch.testing.assert_close(ours, expected, rtol=1e-13, atol=0)
    mine, theirs = (torch.autograd.grad(loss, p)[0] for loss in (ours, expected))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-13)


@pytest.mark.parametrize("directions", ["mean", "sum"])
@pytest.mark.parametrize(("views", "targets"), [(4, 4), (5, 3), (4, 2)])
def test_a_view_meets_the_mean_of_the_other_targets(views: int, targets: int, directions: Any) -> None:
    online, target = draw(views, 6, 5).requires_grad_(), draw(targets, 6, 5, seed=1)
    expected = online.new_zeros(())
    for v in range(views):
        others = [target[t] for t in range(targets) if t != v]
        expected = expected + negative_cosine(online[v], sum(others) / len(others), AlignmentConfig())  # type: ignore[arg-type]
    config = AlignmentConfig(targets="mean", directions=directions, weight=3.0)
    expected = 3 * (expected / views if directions == "mean" else expected)
    torch.testing.assert_close(align(online, target, negative_cosine, config), expected, rtol=1e-14, atol=0)


def test_a_view_meets_the_center_of_all_targets_and_gradient_flows_through_it() -> None:
    x = draw(4, 6, 5).requires_grad_()
    config = AlignmentConfig(name="mse", targets="center")
    expected = (x[:2].mean(0) - x).square().mean()
    ours = align(x, x[:2], mse, config)
    torch.testing.assert_close(ours, expected, rtol=1e-14, atol=0)
    mine, theirs = (torch.autograd.grad(loss, x)[0] for loss in (ours, expected))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-14)


@pytest.mark.parametrize("directions", ["mean", "sum"])
@pytest.mark.parametrize("name", [name for name in ALIGNMENTS if find_loss(name).symmetric])
@pytest.mark.parametrize(("views", "targets"), [(2, 2), (4, 2), (4, 3)])
def test_directions_that_are_the_same_number_are_computed_once(
    name: str, views: int, targets: int, directions: Any
) -> None:
    x = (1 + draw(views, 9, 4)).requires_grad_()
    config, calls = loss_settings(name)(name=name, directions=directions), 0

    def counted(online: Tensor, target: Tensor, config: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return find_loss(name).formula(online, target, config)

    once = align(x, x[:targets], counted, config, once=True)
    assert calls == targets * (targets - 1) // 2 + (views - targets) * targets
    both = align(x, x[:targets], counted, config)
    torch.testing.assert_close(once, both, rtol=1e-13, atol=0)
    mine, theirs = (torch.autograd.grad(loss, x)[0] for loss in (once, both))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-13)


WHITEN = [{"name": "whiten"}]


@pytest.mark.parametrize(
    ("settings", "alike", "once"),
    [
        ({"alignment": "mse"}, True, True),
        ({"alignment": "mse", "online": WHITEN, "target": WHITEN}, True, True),
        ({"alignment": {"name": "mse", "targets": "center"}}, True, False),
        ({"alignment": "negative_cosine"}, True, False),
        ({"alignment": "mse", "ema": {}}, False, False),
        ({"alignment": "mse", "target": ["stop"]}, False, False),
        ({"alignment": "mse", "online": WHITEN}, False, False),
        ({"alignment": "mse", "online": [{"name": "filter", "power": 1.0}] * 1, "target": ["stop"]}, False, False),
    ],
)
def test_branches_that_are_alike_run_once(branch: Any, views: Any, settings: Any, alike: bool, once: bool) -> None:
    method: DualBranch = branch({"online": [], "target": [], **settings})
    assert (method.alike, method.once) == (alike, once)
    out = method(views())
    if alike:
        assert torch.equal(out.online, out.target)
    method.alike = method.once = False  # both lists, both directions
    images = views()
    named = [p for p in method.parameters() if p.requires_grad]
    apart = torch.autograd.grad(method(images).loss, named)
    method.alike, method.once = alike, once
    torch.testing.assert_close(torch.autograd.grad(method(images).loss, named), apart, rtol=0, atol=1e-12)


def test_more_than_two_targets_reach_the_loss_and_sinkhorns_queue(branch: Any, views: Any) -> None:
    scores = {"name": "prototypes", "count": 4}
    method: DualBranch = branch(
        {
            "online": [scores],
            "target": [scores, {"name": "sinkhorn", "queue": 16, "queue_start": "0st"}],
            "alignment": {"name": "cross_entropy", "targets": "mean"},
            "target_views": 3,
        }
    )
    for step in range(3):
        method.set_step(step)
        out = method(views(8, 8, 8, 4, seed=step))
    assert out.target.shape == (3, 8, 4) and out.online.shape == (4, 8, 4)
    assert method.target_transforms[1].queue.shape == (3, 16, 5) and method.target_transforms[1].phase


@pytest.mark.parametrize(
    ("alignment", "more", "expected"),
    [
        ({"name": "byol", "directions": "sum", "weight": 3.0}, {}, (0.0, 3 * 2 * 2.0)),
        ({"name": "byol", "directions": "sum", "targets": "mean"}, {"target_views": 4}, (0.0, 4 * 2.0)),
        ({"name": "byol", "directions": "sum"}, {"target_views": 4}, (0.0, 12 * 2.0)),
        ({"name": "cross_correlation", "weight": 0.1}, {}, (0.0, 0.1 * 2048)),
        ({"name": "mse"}, {}, None),
        ({"name": "negative_cosine"}, {"regularize": [{"name": "koleo"}]}, None),
    ],
)
def test_the_alarm_of_the_floor_knows_weights_targets_and_regularizers(
    alignment: Any, more: Any, expected: tuple[float, float] | None
) -> None:
    config = MethodConfig(alignment=alignment, online=(), **more)
    found = loss_range(config, more.get("target_views", 2))
    assert found is None if expected is None else found == pytest.approx(expected)
