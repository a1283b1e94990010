"""Assignments equal the published iterations; the queue is a ring of unit features, used only once full and due."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fastrdm.methods.alignment import align
from fastrdm.methods.losses import CrossEntropyConfig, cross_entropy
from fastrdm.methods.sinkhorn import Sinkhorn, SinkhornConfig, sinkhorn_knopp
from fastrdm.methods.transform import BranchContext, TransformContext

B, D, K, RING = 4, 3, 6, 12


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosines(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1


def published(scores: Tensor, epsilon: float = 0.05, iterations: int = 3) -> NDArray[np.float64]:
    """SwAV's iterations of one view (B, K), prototypes as rows, each normalization where the authors have it."""
    q = np.exp(scores.numpy() / epsilon).T
    q = q / q.sum()
    prototypes, samples = q.shape
    for _ in range(iterations):
        q = q / q.sum(axis=1, keepdims=True) / prototypes
        q = q / q.sum(axis=0, keepdims=True) / samples
    return np.asarray((q * samples).T)


def test_assignments_equal_the_published_iterations() -> None:
    scores = cosines(2, 8, K)
    ours = sinkhorn_knopp(scores, 0.05, 3)
    for view in range(2):  # each view is a problem of its own
        np.testing.assert_allclose(ours[view].numpy(), published(scores[view]), rtol=1e-12)
    assert np.abs(ours[0].numpy() - published(scores[0], iterations=2)).max() > 1e-3
    assert np.abs(ours[0].numpy() - published(scores[0], epsilon=0.06)).max() > 1e-2


def test_samples_are_exact_and_prototypes_approximate() -> None:
    scores, share = 0.5 * cosines(1, 64, K) + torch.linspace(0, 0.3, K), 64 / K  # later prototypes are preferred
    three, many = sinkhorn_knopp(scores, 0.05, 3)[0], sinkhorn_knopp(scores, 0.05, 1000)[0]
    for q in (three, many):
        torch.testing.assert_close(q.sum(1), torch.ones(64, dtype=torch.float64), rtol=0, atol=1e-14)
    off = (three.sum(0) / share - 1).abs().max()
    assert 1e-3 < off < 0.2
    assert (many.sum(0) / share - 1).abs().max() < 1e-6
    before = (torch.softmax(scores[0] / 0.05, -1).sum(0) / share - 1).abs().max()
    assert off < before / 5


def test_scores_are_widened_to_float32_and_cannot_overflow() -> None:
    scores = cosines(1, 8, K)
    low = sinkhorn_knopp(scores.half(), 0.05, 3)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, sinkhorn_knopp(scores.half().double(), 0.05, 3).float(), rtol=1e-5, atol=1e-7)
    shifted = sinkhorn_knopp(scores + 1000, 0.05, 3)  # exp(20000) without the maximum taken off
    torch.testing.assert_close(shifted, sinkhorn_knopp(scores, 0.05, 3), rtol=1e-9, atol=1e-12)


def test_assignments_equal_lightlys() -> None:
    oracle = pytest.importorskip("lightly.loss.swav_loss").sinkhorn
    scores = cosines(2, 8, K)
    for view in range(2):
        torch.testing.assert_close(sinkhorn_knopp(scores, 0.05, 3)[view], oracle(scores[view]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("queued", [0, 8])
def test_the_loss_equals_lightlys(queued: int) -> None:
    oracle = pytest.importorskip("lightly.loss").SwaVLoss().double()
    scores, queue = cosines(4, 8, K), cosines(2, queued, K, seed=1)  # two global views and two crops
    scores.requires_grad_()
    joined = torch.cat([scores[:2].detach(), queue], dim=1)
    ours = align(scores, sinkhorn_knopp(joined, 0.05, 3)[:, :8], cross_entropy, CrossEntropyConfig())
    theirs = oracle(list(scores[:2]), list(scores[2:]), list(queue) if queued else None)
    torch.testing.assert_close(ours, theirs[0], rtol=1e-12, atol=0)
    grads = (torch.autograd.grad(value, scores)[0] for value in (ours, theirs[0]))
    torch.testing.assert_close(*grads, rtol=0, atol=1e-13)


class Ring:
    """A Sinkhorn transform fed step by step, beside a list of all that it was fed."""

    def __init__(self, place: Callable[..., TransformContext], start: str) -> None:
        self.prototypes = F.normalize(draw(K, D, seed=9), dim=-1)
        place_ = place("target", width=D, prototypes=K, batch_size=B)
        self.transform = Sinkhorn(SinkhornConfig(queue=RING, queue_start=start), place_).double()
        self.fed: list[Tensor] = []
        self.step = 0

    def score(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) @ self.prototypes.mT

    def feed(self) -> tuple[Tensor, Tensor]:
        """Assignments of the next step, and its scores."""
        x = draw(2, B, D, seed=self.step)
        branch = BranchContext(None, self.score, x, self.score(x))
        self.transform.set_step(self.step)
        out = self.transform(branch.scores, branch)
        self.step += 1
        self.fed.append(F.normalize(x, dim=-1))
        return out, self.score(x)


def test_the_queue_is_a_ring_of_unit_features(place: Callable[..., TransformContext]) -> None:
    ring = Ring(place, start="0st")
    queue = ring.transform.queue
    assert queue.shape == (2, RING, D)
    for steps in range(1, 8):  # twice around and one more
        ring.feed()
        slots = [max((s for s in range(steps) if s % 3 == slot), default=None) for slot in range(3)]
        expected = torch.cat([torch.zeros(2, B, D) if s is None else ring.fed[s] for s in slots], dim=1)
        torch.testing.assert_close(queue, expected.double(), rtol=0, atol=1e-15)
        assert ring.transform.pointer.item() == steps * B % RING
    assert set(ring.transform.state_dict()) == {"queue", "pointer"}


@pytest.mark.parametrize(("start", "first"), [("0st", 3), ("2st", 3), ("3st", 3), ("5st", 5), ("1ep", 5)])
def test_the_queue_joins_when_it_is_due_and_full(
    place: Callable[..., TransformContext], start: str, first: int
) -> None:
    ring = Ring(place, start)
    for step in range(8):
        earlier = ring.transform.queue.clone()
        ours, scores = ring.feed()
        if step >= first:  # the queue as it was before this step
            scores = torch.cat([scores, ring.score(earlier)], dim=1)
        expected = np.stack([published(scores[view])[:B] for view in range(2)])
        np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-12)


def test_the_queue_is_scored_by_the_prototypes_of_this_step(place: Callable[..., TransformContext]) -> None:
    ring = Ring(place, start="0st")
    for _ in range(3):
        ring.feed()
    ring.prototypes = F.normalize(draw(K, D, seed=17), dim=-1)
    earlier = ring.transform.queue.clone()
    ours, scores = ring.feed()
    expected = published(torch.cat([scores, ring.score(earlier)], dim=1)[1])[:B]
    np.testing.assert_allclose(ours[1].numpy(), expected, rtol=1e-12)


def test_evaluation_leaves_the_queue_alone(place: Callable[..., TransformContext]) -> None:
    ring = Ring(place, start="0st")
    ring.transform.eval()
    ring.feed()
    assert ring.transform.queue.count_nonzero() == 0 and ring.transform.pointer.item() == 0


@pytest.mark.parametrize("queue", [10, 2, 13])
def test_a_queue_that_batches_do_not_divide_is_refused(place: Callable[..., TransformContext], queue: int) -> None:
    with pytest.raises(ValueError, match=rf"sinkhorn.queue must be a multiple of loader.batch_size=4 .*, got {queue}"):
        Sinkhorn(SinkhornConfig(queue=queue), place("target", width=D, prototypes=K))


def test_a_queue_that_processes_do_not_divide_is_refused(
    place: Callable[..., TransformContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastrdm.methods.sinkhorn.process_count", lambda: 3)
    with pytest.raises(ValueError, match=r"sinkhorn.queue must be .* of the 3 processes, got 8"):
        Sinkhorn(SinkhornConfig(queue=8), place("target", width=D, prototypes=K))
