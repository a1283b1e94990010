"""Linear classifiers on frozen features: many learning rates trained together, chosen on held-out training images."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastrdm.evaluation.features import FeatureSet
from fastrdm.evaluation.knn import top_hits
from fastrdm.evaluation.settings import FitConfig, LinearConfig
from fastrdm.loaders.engines.backpressure import moved
from fastrdm.loaders.order import epoch_order
from fastrdm.optim.optimizers import Role, build_optimizer, parameter_groups, set_learning_rates

Features = tuple[Tensor, Tensor, Tensor]  # (B, D), labels (B,), numbers of the images (B,)


class ProbeSweep:
    """S linear classifiers, one for each learning rate, whose weights are one tensor (S, C, D)."""

    def __init__(self, rates: Sequence[float], weight: Tensor, config: FitConfig) -> None:
        """All start from `weight` (C, D) and no bias, as in SimSiam's and SwAV's evaluation."""
        count, (classes, _) = len(rates), weight.shape
        self.weight, self.bias = weight.expand(count, -1, -1).clone(), weight.new_zeros(count, classes)
        self._weight_grad, self._bias_grad = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        roles = []
        for s, rate in enumerate(rates):  # the optimizer steps slices of the tensors, each at its own rate
            own = [("weight", nn.Parameter(self.weight[s])), ("bias", nn.Parameter(self.bias[s]))]
            for (_, parameter), grad in zip(own, (self._weight_grad[s], self._bias_grad[s]), strict=True):
                parameter.grad = grad
            roles.append(Role(f"rate {rate:g}", own, lr=rate))
        groups = parameter_groups(roles, config.optim())
        self.peaks = [group["base_lr"] for group in groups]
        self.optimizer = build_optimizer(groups, config.optim(), weight.device)

    def logits(self, features: Tensor) -> Tensor:
        """Logits (B, S, C) of features (B, D), by one matrix product for all classifiers."""
        flat = features.to(self.weight.dtype) @ self.weight.flatten(0, 1).T
        return flat.view(len(features), *self.bias.shape) + self.bias

    @torch.no_grad()
    def step(self, features: Tensor, labels: Tensor, seen: Tensor, factor: float) -> None:
        """One step on features (B, D) and labels (B,) at `factor` times the rates.

        Classifier s learns from rows with seen (B, S).
        """
        features = features.to(self.weight.dtype)
        error = self.logits(features).softmax(2)  # the gradient of cross-entropy: probabilities minus the one-hot label
        error[torch.arange(len(labels), device=labels.device), :, labels] -= 1
        error *= (seen / seen.sum(0).clamp(min=1))[..., None]
        torch.mm(error.flatten(1).T, features, out=self._weight_grad.view(-1, features.shape[1]))
        torch.sum(error, 0, out=self._bias_grad)
        set_learning_rates(self.optimizer, [peak * factor for peak in self.peaks])
        self.optimizer.step()

    @torch.no_grad()
    def hits(self, query: FeatureSet, tops: Sequence[int]) -> list[list[int]]:
        """Right answers of each classifier (S, len(tops)) on labeled rows."""
        total = torch.zeros(len(self.peaks), len(tops), dtype=torch.int64, device=self.weight.device)
        for features, labels in zip(query.features.split(1024), query.labels.split(1024), strict=True):
            scores = self.logits(features).unbind(1)
            total += torch.stack([top_hits(s, labels, tops) for s in scores])
        return total.tolist()


class Task(NamedTuple):
    """Training and test features of a linear probe. All rows have labels."""

    bank: FeatureSet  # center views of the training images (N, D)
    held_out: Tensor  # (N,) bool: the training images that choose among several rates
    query: FeatureSet  # center views of the test images
    epoch: Callable[[int], Iterable[Features]]  # batches to learn from in that epoch, numbered as in the bank
    batch_size: int

    @property
    def steps_per_epoch(self) -> int:
        return len(self.bank.labels) // self.batch_size


class Probed(NamedTuple):
    """Result of a linear probe: the chosen learning rate and its hits, and the accuracy at every rate."""

    hits: list[int]  # of the chosen rate, for each of `tops`
    rate: float  # the chosen one, at 256 images a step
    rates: list[dict[str, Any]]  # for each: rate, held_out_top1 (none without a choice), test_top1, diverged


def linear_probe(config: LinearConfig, task: Task, tops: Sequence[int], tell: Callable[[str], None]) -> Probed:
    """Train every rate on the task, choose one, and count its right answers on the test images.

    Of several rates each is trained twice at once: on all training images, which is what the test images judge, and
    without the held-out ones, which say what rate to take. The test images choose nothing.
    """
    count = len(config.rates)
    several = count > 1
    sweep = _trained(config, task, blind=count if several else 0, tell=tell)
    tested = sweep.hits(task.query, tops)
    sound = sweep.weight.flatten(1).isfinite().all(1).tolist()
    asked = FeatureSet(task.bank.features[task.held_out], task.bank.labels[task.held_out])
    withheld = [hits[0] / len(asked.labels) for hits in sweep.hits(asked, (1,))[count:]] if several else [None]
    usable = [all(sound[r::count]) for r in range(count)]
    if not any(usable):
        raise ValueError(f"linear.rates must hold one that does not diverge, got {list(config.rates)}: add lower ones")
    best = max(range(count), key=lambda r: (usable[r], withheld[r]))
    rates = [
        {"rate": rate, "held_out_top1": held, "test_top1": hits[0] / len(task.query.labels), "diverged": not fine}
        for rate, held, hits, fine in zip(config.rates, withheld, tested, usable, strict=False)
    ]
    return Probed(tested[best], config.rates[best], rates)


def _trained(config: LinearConfig, task: Task, blind: int, tell: Callable[[str], None]) -> ProbeSweep:
    """A sweep of all rates, and of the first `blind` ones again, which do not see the held-out images."""
    features, labels = task.bank
    classes = int(torch.maximum(labels.max(), task.query.labels.max())) + 1
    first = torch.randn(classes, features.shape[1], generator=torch.Generator().manual_seed(config.seed)) * 0.01
    rates = [rate * task.batch_size / 256 for rate in (*config.rates, *config.rates[:blind])]
    sweep = ProbeSweep(rates, first.to(features), config)
    sighted = torch.arange(len(rates), device=labels.device) < len(config.rates)
    step = 0
    for epoch in range(config.epochs):
        for x, y, index in task.epoch(epoch):
            seen = sighted | ~task.held_out[index][:, None]
            sweep.step(x, y, seen.to(sweep.weight.dtype), config.factor(step, task.steps_per_epoch))
            step += 1
        tell(f"linear probe, epoch {epoch + 1}/{config.epochs}")
    return sweep


def cached_batches(bank: FeatureSet, batch_size: int, seed: int, epoch: int) -> Iterable[Features]:
    """The rows of `bank` in the order of an epoch, whole batches only."""
    order = moved(torch.from_numpy(epoch_order(len(bank.labels), seed, epoch)), bank.labels.device)
    for index in order[: len(order) // batch_size * batch_size].view(-1, batch_size):
        yield bank.features[index], bank.labels[index], index
