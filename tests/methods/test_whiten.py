"""Whitened rows have the identity for a covariance; values and gradients equal formulas and lightly's code."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrdm.methods.transform import BranchContext, TransformContext
from fastrdm.methods.whiten import Whiten, WhitenConfig

NOTHING = BranchContext(None, None)
ROOTS = ("zca", "cholesky", "newton")
Place = Callable[..., TransformContext]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(x: Tensor, root: str, epsilon: float = 0.0, iterations: int = 5) -> Tensor:
    """Rows (n, D) whitened by the definition of each root."""
    c = torch.cov(x.mT) * (1 - epsilon) + epsilon * torch.eye(x.shape[1], dtype=x.dtype)
    x = x - x.mean(0)
    if root == "cholesky":
        return x @ torch.linalg.inv(torch.linalg.cholesky(c)).mT
    if root == "newton":
        p = torch.eye(len(c), dtype=x.dtype)
        for _ in range(iterations):
            p = 1.5 * p - 0.5 * torch.linalg.matrix_power(p, 3) @ c / c.trace()
        return x @ p / c.trace().sqrt()
    values, vectors = torch.linalg.eigh(c)
    return x @ vectors @ torch.diag(values.rsqrt()) @ vectors.mT


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("epsilon", [0.0, 0.2])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e3])
def test_value_and_gradient_equal_the_definition(place: Place, root: Any, epsilon: float, scale: float) -> None:
    x = (scale * (1 + draw(2, 12, 5) @ draw(5, 5, seed=1))).requires_grad_()
    g = draw(2, 12, 5, seed=2)
    ours = Whiten(WhitenConfig(root=root, epsilon=epsilon, iterations=7), place(batch_size=12))(x, NOTHING)
    theirs = torch.stack([by_hand(view, root, epsilon, 7) for view in x])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    mine, expected = (torch.autograd.grad(out, x, g)[0] for out in (ours, theirs))
    torch.testing.assert_close(mine, expected, rtol=0, atol=1e-8 * expected.abs().max().item())


@pytest.mark.parametrize("root", ["zca", "cholesky"])
def test_the_covariance_becomes_the_identity(place: Place, root: Any) -> None:
    out = Whiten(WhitenConfig(root=root), place(batch_size=12))(1 + draw(2, 12, 5), NOTHING)
    for view in out:
        torch.testing.assert_close(torch.cov(view.mT), torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_gradient_of_zca_is_finite_where_variances_are_equal_or_none(place: Place) -> None:
    x = torch.zeros(1, 8, 5, dtype=torch.float64)
    x[0, :4, :4], x[0, 4:, :4] = torch.eye(4), -torch.eye(4)  # four equal variances, and an empty direction
    x.requires_grad_()
    out = Whiten(WhitenConfig(), place(batch_size=8))(x, NOTHING)
    (grad,) = torch.autograd.grad(out, x, draw(1, 8, 5))
    assert out.isfinite().all() and grad.isfinite().all() and grad.abs().max() > 0.1
    torch.testing.assert_close(out[0, :, 4], torch.zeros(8, dtype=torch.float64))


def test_parts_are_random_disjoint_alike_for_views_and_of_the_step_alone(place: Place) -> None:
    x = 1 + draw(2, 12, 2)
    layer = Whiten(WhitenConfig(size=4), place(batch_size=12, width=2))
    seen = []
    for step in (1, 2, 1):
        layer.set_step(step)
        assert sorted(layer.order.tolist()) == list(range(12))
        out = layer(x, NOTHING)
        for part in layer.order.view(3, 4):
            for view in range(2):
                torch.testing.assert_close(out[view, part], by_hand(x[view, part], "zca"), rtol=0, atol=1e-10)
        seen.append(layer.order.clone())
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])
    assert not layer.state_dict()


def test_a_batch_within_the_size_is_whitened_whole(place: Place) -> None:
    x = draw(2, 8, 5)
    layer = Whiten(WhitenConfig(size=128), place(batch_size=8))
    layer.set_step(3)
    torch.testing.assert_close(layer(x, NOTHING), Whiten(WhitenConfig(), place(batch_size=8))(x, NOTHING))


@pytest.mark.parametrize(
    ("settings", "batch", "message"),
    [
        ({"size": 5}, 12, "whiten.size must be a divisor of the 12 images that a step sees at once, got 5"),
        ({"root": "cholesky", "size": 5}, 10, r"rows \(whiten.size=5, 10 images\) above the 5 dimensions, got 5"),
        ({"root": "cholesky"}, 4, "above the 5 dimensions, got 4"),
    ],
)
def test_too_few_rows_are_refused(place: Place, settings: Any, batch: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Whiten(WhitenConfig(**settings), place(batch_size=batch))
    if settings.get("root") == "cholesky":
        Whiten(WhitenConfig(**settings, epsilon=0.1), place(batch_size=batch))


def test_cholesky_equals_lightlys_whitening(place: Place) -> None:
    oracle = pytest.importorskip("lightly.loss.wmse_loss").Whitening2d(5, track_running_stats=False)
    x = (1 + draw(1, 12, 5)).float().requires_grad_()
    ours, theirs = Whiten(WhitenConfig(root="cholesky"), place(batch_size=12))(x, NOTHING)[0], oracle(x[0])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    mine, expected = (torch.autograd.grad(out.sin().sum(), x)[0] for out in (ours, theirs))
    torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-4)
