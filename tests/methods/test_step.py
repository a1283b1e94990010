"""One optimizer step around a method: rates by step, the target after the step, frozen prototypes, accumulation."""

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrdm.config import run_config
from fastrdm.loaders.spec import Batch
from fastrdm.trainer import Trainer

SCORES = {"name": "prototypes", "count": 20, "freeze": "2st"}
STEPS, WARMUP = 16, 4


def small(preset: str, method: dict[str, Any] | None = None, **train: Any) -> Trainer:
    """A run of 16 steps, five an epoch, in float64."""
    heads = {"projector": {"hidden": 16, "out": 12}, **(method or {})}
    return Trainer(
        run_config.resolve(
            {
                "preset": preset,
                "train": {"length": f"{STEPS}st", "precision": "fp64", **train},
                "method": heads,
                "encoder": {"name": "resnet_small", "stem": "cifar", "width": 4},
                "loader": {"source": "digits", "subset": 80, "batch_size": 16, "views": {"*": {"size": 8}}},
                "optim": {"warmup": f"{WARMUP}st", "min_lr": 0.01},
            }
        )
    )


def steps(trainer: Trainer) -> list[Batch]:
    """The batches of the run's first epochs."""
    batches = []
    for epoch in itertools.count():
        trainer.loader.set_epoch(epoch)
        batches += list(trainer.loader)
        if len(batches) >= STEPS:
            return batches[:STEPS]
    raise AssertionError


def by_hand(step: int, base: float) -> float:
    """Linear from 3e-5 to the base rate in the warm-up's last step, then half a cosine to 0.01."""
    if step < WARMUP:
        return 3e-5 + (base - 3e-5) * step / (WARMUP - 1)
    return 0.01 + (base - 0.01) * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))) / 2


def test_rates_follow_the_step_and_simsiams_predictor_keeps_its_own() -> None:
    trainer = small("simsiam")
    rates = []
    trainer.optimizer.register_step_pre_hook(
        lambda optimizer, *_: rates.append([group["lr"].item() for group in optimizer.param_groups])
    )
    for batch in steps(trainer):
        trainer.train_step(batch)
        trainer.step += 1
    network, predictor, probe = zip(*rates, strict=True)
    base = 0.5 * 16 / 256
    assert network == pytest.approx([by_hand(step, base) for step in range(STEPS)], rel=1e-6)
    assert predictor == pytest.approx([base] * STEPS)
    assert probe == pytest.approx([by_hand(step, 0.1 * 16 / 256) for step in range(STEPS)], rel=1e-6)


def test_the_target_follows_what_the_step_made() -> None:
    trainer = small("byol", {"online": {"0": {"hidden": 16}}, "ema": {"momentum": 0.9, "final": 1.0}})
    method = trainer.method
    assert method.target is not None
    for step, batch in zip(range(3), steps(trainer), strict=False):
        old = {name: p.clone() for name, p in method.target.named_parameters()}
        before = copy.deepcopy(dict(method.online.named_parameters()))
        trainer.train_step(batch)
        trainer.step += 1
        momentum = 1 - 0.1 * (1 + math.cos(math.pi * step / STEPS)) / 2
        moved = 0.0
        for name, p in method.online.named_parameters():
            expected = momentum * old[name] + (1 - momentum) * p
            torch.testing.assert_close(dict(method.target.named_parameters())[name], expected, rtol=0, atol=1e-14)
            moved = max(moved, (p - before[name]).abs().max().item())
        assert moved > 1e-7


def test_prototypes_are_frozen_for_as_long_as_told() -> None:
    trainer = small("swav", {"online": [SCORES], "target": [SCORES, "sinkhorn"]})
    layer = trainer.method.online.prototypes
    assert layer is not None
    start, moved = layer.weight.detach().clone(), []
    for batch in steps(trainer)[:4]:
        trainer.train_step(batch)
        trainer.step += 1
        moved.append(not torch.equal(layer.weight, start))
    assert moved == [False, False, True, True]


def test_accumulation_averages_the_gradients_of_the_parts() -> None:
    trainer = small("simsiam", accumulate=2)
    learner, batch = copy.deepcopy(trainer.learner), steps(trainer)[0]
    seen: list[Tensor] = []
    trainer.optimizer.register_step_pre_hook(
        lambda *_: seen.extend(p.grad.clone() for p in trainer.learner.parameters() if p.grad is not None)
    )
    trainer.train_step(batch)
    for part in (slice(0, 8), slice(8, 16)):
        loss, _ = learner(tuple(view[part] for view in batch.views), batch.label[part])
        (loss / 2).backward()
    torch.testing.assert_close(seen, [p.grad for p in learner.parameters()], rtol=0, atol=1e-14)
