"""Losses equal their papers' formulas in value and gradient; views are paired with other views only."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrdm.methods.alignment import align
from fastrdm.methods.losses import (
    AlignmentConfig,
    CrossEntropyConfig,
    byol,
    cross_entropy,
    find_loss,
    loss_settings,
    negative_cosine,
)

T = 0.1
COSINE = AlignmentConfig()
SCORES = CrossEntropyConfig(temperature=T)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def probabilities(*shape: int, seed: int = 1) -> Tensor:
    return torch.softmax(3 * draw(*shape, seed=seed), -1)


def cosine_by_hand(p: Tensor, z: Tensor) -> tuple[float, Tensor]:
    """Mean cosine of the rows, and its gradient to p: (z^ - cos p^) / (B |p|)."""
    total, grad = 0.0, torch.zeros_like(p)
    for i, (a, b) in enumerate(zip(p, z, strict=True)):
        unit_a, unit_b = a / a.square().sum().sqrt(), b / b.square().sum().sqrt()
        cosine = (unit_a * unit_b).sum()
        total += cosine.item() / len(p)
        grad[i] = (unit_b - cosine * unit_a) / a.square().sum().sqrt() / len(p)
    return total, grad


def cross_entropy_by_hand(s: Tensor, q: Tensor) -> tuple[float, Tensor]:
    """Mean of -sum_k q_k ln p_k for p = softmax(s / T), and its gradient to s: (p - q) / (T B)."""
    total, grad = 0.0, torch.zeros_like(s)
    for i, row in enumerate(s):
        exponentials = [math.exp(v / T) for v in row.tolist()]
        p = torch.tensor([e / sum(exponentials) for e in exponentials], dtype=torch.float64)
        total -= sum(a * math.log(b) for a, b in zip(q[i].tolist(), p.tolist(), strict=True)) / len(s)
        grad[i] = (p - q[i]) / T / len(s)
    return total, grad


def test_negative_cosine_and_byol_equal_their_formulas() -> None:
    p, z = draw(6, 5).requires_grad_(), 4 * draw(6, 5, seed=1)
    cosine, grad = cosine_by_hand(p.detach(), z)
    for loss, value, factor in ((negative_cosine, -cosine, -1), (byol, 2 - 2 * cosine, -2)):
        out = loss(p, z, COSINE)
        torch.testing.assert_close(out.item(), value, rtol=0, atol=1e-14)
        torch.testing.assert_close(*torch.autograd.grad(out, p), factor * grad, rtol=0, atol=1e-14)
    apart = (p / p.norm(dim=1, keepdim=True) - z / z.norm(dim=1, keepdim=True)).square().sum(1).mean()
    torch.testing.assert_close(byol(p, z, COSINE), apart, rtol=0, atol=1e-14)  # BYOL, equation 2


def test_cross_entropy_equals_its_formula() -> None:
    s, q = draw(6, 5).requires_grad_(), probabilities(6, 5)
    value, grad = cross_entropy_by_hand(s.detach(), q)
    out = cross_entropy(s, q, SCORES)
    torch.testing.assert_close(out.item(), value, rtol=1e-14, atol=0)
    torch.testing.assert_close(*torch.autograd.grad(out, s), grad, rtol=0, atol=1e-13)


def test_losses_stay_finite_where_a_row_is_zero_or_scores_are_huge() -> None:
    p = torch.zeros(2, 3, requires_grad=True)
    assert negative_cosine(p, torch.ones(2, 3), COSINE).item() == 0
    s = torch.tensor([[1e4, -1e4]], requires_grad=True)
    out = cross_entropy(s, torch.tensor([[0.5, 0.5]]), SCORES)
    assert out.item() == pytest.approx(1e5)
    assert torch.autograd.grad(out, s)[0].isfinite().all()


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("name", ["negative_cosine", "byol", "cross_entropy"])
@pytest.mark.parametrize("directions", ["mean", "sum"])
def test_each_global_target_meets_every_other_view(count: int, name: str, directions: Any) -> None:
    online, target = draw(count, 6, 5).requires_grad_(), probabilities(2, 6, 5)
    loss, config = find_loss(name).formula, loss_settings(name)(name=name, directions=directions)
    pairs = [(v, t) for v, t in itertools.product(range(count), range(2)) if v != t]
    assert len(pairs) == 2 * (count - 1)
    expected = sum((loss(online[v], target[t], config) for v, t in pairs), torch.zeros(()))
    expected = expected / len(pairs) if directions == "mean" else expected
    ours = align(online, target, loss, config)
    torch.testing.assert_close(ours, expected, rtol=1e-14, atol=0)
    grads = (torch.autograd.grad(value, online)[0] for value in (ours, expected))
    torch.testing.assert_close(*grads, rtol=0, atol=1e-14)


def test_a_view_is_never_paired_with_itself() -> None:
    a, b = torch.eye(4, dtype=torch.float64)[:2].unsqueeze(1).expand(2, 3, 4)  # orthogonal views
    assert align(torch.stack([a, b]), torch.stack([a, b]), negative_cosine, COSINE).item() == 0
    assert align(torch.stack([a, b]), torch.stack([b, a]), negative_cosine, COSINE).item() == -1


def test_cosine_equals_lightlys() -> None:
    lightly = pytest.importorskip("lightly.loss")
    online, target = draw(2, 6, 5), draw(2, 6, 5, seed=1)
    oracle = lightly.NegativeCosineSimilarity()
    expected = (oracle(online[0], target[1]) + oracle(online[1], target[0])) / 2
    torch.testing.assert_close(align(online, target, negative_cosine, COSINE), expected, rtol=0, atol=1e-15)
