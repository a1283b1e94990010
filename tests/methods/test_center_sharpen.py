"""Centering and sharpening equal DINO's formulas; the center moves after it was used."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastrdm.methods.alignment import align
from fastrdm.methods.center_sharpen import CenterSharpen, CenterSharpenConfig
from fastrdm.methods.losses import CrossEntropyConfig, cross_entropy
from fastrdm.methods.transform import BranchContext, TransformContext
from fastrdm.schema import Horizon

K = 5
NOTHING = BranchContext(None, None)
HORIZON = Horizon(steps_per_epoch=5, total=20)


def draw(seed: int) -> Tensor:
    return torch.randn(2, 6, K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def sharpen(place: Callable[..., TransformContext]) -> Callable[..., CenterSharpen]:
    def build(horizon: Horizon = HORIZON, **config: object) -> CenterSharpen:
        where = place("target", prototypes=K, horizon=horizon)
        return CenterSharpen(CenterSharpenConfig(**config), where).double()  # type: ignore[arg-type]

    return build


def softmax_by_hand(x: Tensor) -> Tensor:
    return x.exp() / x.exp().sum(-1, keepdim=True)


def test_probabilities_and_center_equal_their_formulas(sharpen: Callable[..., CenterSharpen]) -> None:
    transform, center = sharpen(momentum=0.8, temperature=0.2, warmup_temperature=0.2), torch.zeros(K).double()
    for step in range(4):
        scores = draw(step)
        transform.set_step(step)
        out = transform(scores.requires_grad_(), NOTHING)
        assert not out.requires_grad
        expected = softmax_by_hand((scores.detach() - center) / 0.2)  # the center of the steps before
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)
        mean = sum(scores[view, row] for view in range(2) for row in range(6)) / 12
        center = 0.8 * center + 0.2 * mean.detach()  # type: ignore[union-attr]
        torch.testing.assert_close(transform.center, center, rtol=0, atol=1e-14)
    assert set(transform.state_dict()) == {"center"}


def test_centering_evens_out_what_all_rows_share(sharpen: Callable[..., CenterSharpen]) -> None:
    transform, scores = sharpen(momentum=0.0), draw(0)
    scores[..., 2] += 3
    transform(scores, NOTHING)
    moved = transform(scores, NOTHING)
    plain = torch.softmax(scores / transform.temperature, -1)
    assert plain[..., 2].mean() > 0.8 > 0.4 > moved[..., 2].mean()
    torch.testing.assert_close(transform.center, scores.mean((0, 1)), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("warmup", "total", "expected"),
    [
        ("2ep", 20, {0: 0.04, 5: 0.055, 10: 0.07, 11: 0.07, 19: 0.07}),  # of 5 steps each
        ("50ep", 20, {0: 0.04, 10: 0.055, 19: 0.0685}),  # longer than the run: the ramp takes the whole run
        ("0ep", 20, {0: 0.07, 19: 0.07}),
        ("50%", 40, {0: 0.04, 10: 0.055, 20: 0.07, 39: 0.07}),
    ],
)
def test_the_temperature_warms_up(
    sharpen: Callable[..., CenterSharpen], warmup: str, total: int, expected: dict[int, float]
) -> None:
    transform = sharpen(Horizon(5, total), warmup=warmup)
    for step, temperature in expected.items():
        transform.set_step(step)
        assert transform.temperature.item() == pytest.approx(temperature, abs=1e-12)


def test_evaluation_leaves_the_center_alone(sharpen: Callable[..., CenterSharpen]) -> None:
    transform = sharpen().eval()
    transform(draw(0), NOTHING)
    assert transform.center.count_nonzero() == 0


def test_three_steps_equal_lightlys_loss(sharpen: Callable[..., CenterSharpen]) -> None:
    lightly = pytest.importorskip("lightly.loss")
    oracle = lightly.DINOLoss(K, teacher_temp=0.05, warmup_teacher_temp_epochs=1, warmup_teacher_temp=0.05).double()
    transform = sharpen(temperature=0.05, warmup_temperature=0.05, momentum=0.9)
    transform.set_step(0)
    for step in range(3):
        teacher = draw(step)
        student = torch.cat([draw(10 + step), draw(20 + step)[:1]]).requires_grad_()  # two global views and a crop
        ours = align(student, transform(teacher, NOTHING), cross_entropy, CrossEntropyConfig())
        theirs = oracle(list(teacher), list(student), teacher_temp=0.05)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)  # its temperature is a float32 tensor
        grads = (torch.autograd.grad(value, student)[0] for value in (ours, theirs))
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(transform.center, oracle.center[0, 0], rtol=0, atol=1e-14)
