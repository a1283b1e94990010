"""The sweep equals classifiers trained one by one; the choice of a rate; what sklearn reaches on the same features."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrdm.evaluation.features import FeatureSet
from fastrdm.evaluation.linear_probe import (
    FitConfig,
    LinearConfig,
    Probed,
    ProbeSweep,
    Task,
    cached_batches,
    linear_probe,
)
from fastrdm.optim.optimizers import Role, build_optimizer, parameter_groups

RATES = (0.02, 0.5, 4.0)


def clusters(rows: int, seed: int, spread: float = 1.0, classes: int = 6, width: int = 12) -> FeatureSet:
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % classes
    centers = 2 * torch.randn(classes, width, generator=torch.Generator().manual_seed(9))
    return FeatureSet(centers[labels] + spread * torch.randn(rows, width, generator=g), labels)


def alone(rate: float, first: Tensor, config: FitConfig, batches: list[tuple[Tensor, Tensor, Tensor]]) -> nn.Linear:
    """A torch classifier trained by autograd on the rows that it sees; SGD is torch's own."""
    layer = nn.Linear(first.shape[1], len(first)).double()
    with torch.no_grad():
        layer.weight.copy_(first)
        layer.bias.zero_()
    settings = {"momentum": config.momentum, "weight_decay": config.weight_decay}
    groups = parameter_groups([Role("one", list(layer.named_parameters()), lr=rate)], config.optim())
    optimizer: Any = build_optimizer(groups, config.optim(), torch.device("cpu"))
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(layer.parameters(), lr=rate, **settings)
    for step, (x, y, seen) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(rate * config.factor(step, 4), dtype=torch.float32)
        optimizer.zero_grad()
        F.cross_entropy(layer(x[seen]), y[seen]).backward()
        optimizer.step()
    return layer


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_the_sweep_equals_separate_runs(optimizer: Any) -> None:
    config = FitConfig(optimizer=optimizer, weight_decay=1e-3, epochs=3)
    g = torch.Generator().manual_seed(0)
    first = torch.randn(5, 7, generator=g, dtype=torch.float64)
    batches = []
    for _ in range(12):
        seen = torch.rand(16, len(RATES), generator=g) < 0.7
        x = torch.randn(16, 7, generator=g, dtype=torch.float64)
        batches.append((x, torch.randint(5, (16,), generator=g), seen))
    sweep = ProbeSweep(RATES, first, config)
    for step, (x, y, seen) in enumerate(batches):
        sweep.step(x, y, seen.double(), config.factor(step, 4))
    for s, rate in enumerate(RATES):
        layer = alone(rate, first, config, [(x, y, seen[:, s]) for x, y, seen in batches])
        torch.testing.assert_close(sweep.weight[s], layer.weight.detach(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(sweep.bias[s], layer.bias.detach(), rtol=1e-10, atol=1e-12)
        assert not torch.allclose(sweep.weight[s], first, rtol=1e-3)


@pytest.mark.parametrize("by_epoch", [False, True])
def test_schedules_are_torchs(by_epoch: bool) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    unit = 5 if by_epoch else 1  # steps between two changes
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20 * 5 // unit)
    config = FitConfig(epochs=20, by_epoch=by_epoch)
    for step in range(100):
        if step and step % unit == 0:
            optimizer.step()
            cosine.step()
        assert config.factor(step, 5) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)


def test_steps_come_at_their_milestones() -> None:
    config = FitConfig(epochs=20, schedule="step", gamma=0.2, milestones=("60%", "16ep"))
    factors = [config.factor(step, 5) for step in range(100)]
    assert factors == pytest.approx([1.0] * 60 + [0.2] * 20 + [0.04] * 20)


def probed(config: LinearConfig, bank: FeatureSet, query: FeatureSet, size: int = 32) -> Probed:
    held_out = torch.zeros(len(bank.labels), dtype=torch.bool)
    held_out[::10] = True
    task = Task(bank, held_out, query, lambda epoch: cached_batches(bank, size, config.seed, epoch), size)
    return linear_probe(config, task, (1, 5), lambda _: None)


def test_linear_probe_reaches_what_sklearn_reaches() -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    bank, query = clusters(600, seed=0, spread=2.0), clusters(900, seed=1, spread=2.0)
    best = 0.0
    for c in (0.01, 0.1, 1.0, 10.0):
        model = linear.LogisticRegression(C=c, max_iter=2000).fit(bank.features.numpy(), bank.labels.numpy())
        best = max(best, float(model.score(query.features.numpy(), query.labels.numpy())))
    found = probed(LinearConfig(epochs=40), bank, query)
    assert 0.7 < best < 0.98
    assert found.hits[0] / 900 > best - 0.015
    assert found.hits[1] > found.hits[0]


def test_separable_features_are_separated() -> None:
    found = probed(LinearConfig(epochs=20), clusters(300, seed=0, spread=0.2), clusters(300, seed=1, spread=0.2))
    assert found.hits[0] == 300


def test_the_rate_is_chosen_without_the_test_images() -> None:
    bank, query = clusters(300, seed=0, spread=2.0), clusters(300, seed=1, spread=2.0)
    config = LinearConfig(epochs=3, rates=(1e-4, 0.01, 1.0))
    found = probed(config, bank, query)
    wrong = probed(config, bank, FeatureSet(query.features, query.labels.roll(1)))
    assert found.rate == wrong.rate
    held = [row["held_out_top1"] for row in found.rates]
    assert held == [row["held_out_top1"] for row in wrong.rates]
    assert found.rate == config.rates[held.index(max(held))]
    assert [row["test_top1"] for row in found.rates] != [row["test_top1"] for row in wrong.rates]
    assert found.hits[0] / 300 == next(row["test_top1"] for row in found.rates if row["rate"] == found.rate)


def test_held_out_images_are_not_learnt_for_the_choice_but_for_the_result() -> None:
    g = torch.Generator().manual_seed(0)
    noise = FeatureSet(torch.randn(200, 300, generator=g), torch.randint(4, (200,), generator=g))
    found = probed(LinearConfig(epochs=30, rates=(1.0, 3.0)), noise, noise)  # tested on its own training images
    assert found.hits[0] == 200
    assert all(row["held_out_top1"] < 0.6 for row in found.rates)


def test_one_rate_needs_no_choice() -> None:
    bank, query = clusters(120, seed=0), clusters(60, seed=1)
    found = probed(LinearConfig(epochs=3, rates=(0.5,)), bank, query)
    assert [row["held_out_top1"] for row in found.rates] == [None]
    assert found.rate == 0.5


def test_rates_that_diverge_are_marked_and_not_chosen() -> None:
    bank, query = clusters(120, seed=0), clusters(60, seed=1)
    config = LinearConfig(epochs=3, rates=(0.5, 1e38))
    found = probed(config, bank, query)
    assert [row["diverged"] for row in found.rates] == [False, True]
    assert found.rate == 0.5
    with pytest.raises(ValueError, match=r"linear\.rates must hold one that does not diverge, got \[1e\+38\]"):
        probed(LinearConfig(epochs=3, rates=(1e38,)), bank, query)


def test_cached_batches_hold_each_row_once() -> None:
    bank = clusters(50, seed=0)
    first, second = ([b for b in cached_batches(bank, 16, 0, epoch)] for epoch in (0, 1))
    for batches in (first, second):
        index = torch.cat([i for _, _, i in batches])
        assert len(index.unique()) == len(index) == 48
        assert all(torch.equal(x, bank.features[i]) and torch.equal(y, bank.labels[i]) for x, y, i in batches)
    assert not torch.equal(first[0][2], second[0][2])
