"""How good the features are: k-NN accuracy, and a linear probe trained beside the encoder on detached features."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastrdm.distributed import gather_rows, max_over_processes, sum_over_processes
from fastrdm.kernels.collectives import process_count, process_rank
from fastrdm.loaders.spec import STRICT
from fastrdm.schedules import Duration


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluateConfig:
    """k-NN on unit-norm features of the centre view, and the online linear probe."""

    every: Duration = "10%"  # between two evaluations
    k: int | None = Field(default=None, ge=1)  # neighbours; null: 200, and 20 for a bank below 10,000 images
    bank: int | None = Field(default=None, ge=1)  # training images among them, balanced over classes; null: all
    temperature: float = Field(default=0.07, gt=0)  # a neighbour's vote weighs exp(cosine / temperature)
    baselines: bool = True  # raw pixels and the random encoder, before training
    probe: bool = True  # train a linear classifier beside the encoder; it does not touch the encoder
    probe_lr: float = Field(default=0.1, gt=0)  # at 256 images a step, as in the authors' scripts
    batch_size: int = Field(default=256, ge=1)  # images a pass of one process


class FeatureSet(NamedTuple):
    """Features of a whole set in the order of its source, equal on all processes."""

    features: Tensor  # (N, D) float32
    labels: Tensor  # (N,) int64, -1 where unknown

    def labelled(self) -> "FeatureSet":
        """The rows whose label is known."""
        known = self.labels >= 0
        return FeatureSet(self.features[known], self.labels[known])


@torch.no_grad()
def feature_set(encode: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor, Tensor]]) -> FeatureSet:
    """`encode` of (images, index, label) batches of this process, joined with those of the others."""
    rows = [(encode(images).float(), label, index) for images, index, label in batches]
    features, labels, index = (torch.cat(parts) for parts in zip(*rows, strict=True))
    features, labels, index = _join(features), _join(labels), _join(index, padding=-1)
    order = index.argsort()[int((index < 0).sum()) :]
    return FeatureSet(features[order], labels[order])


def _join(x: Tensor, padding: int = 0) -> Tensor:
    """Rows of all processes, whose numbers may differ by some: short ones are padded."""
    longest = int(max_over_processes(torch.tensor([len(x)], device=x.device)).item())
    pad = x.new_full((longest - len(x), *x.shape[1:]), padding)
    return gather_rows(torch.cat([x, pad]))


@torch.no_grad()
def knn_accuracy(bank: FeatureSet, query: FeatureSet, k: int | None, temperature: float) -> float:
    """Share of queries that a weighted vote of the k nearest bank rows by cosine gets right (Wu et al. 2018).

    Each process answers its share of the queries; rows without label take no part, nan if none is left on either side.
    k=None: 200, and 20 for a bank below 10,000 rows.
    """
    bank, query = bank.labelled(), query.labelled()
    if not len(bank.labels) or not len(query.labels):
        return float("nan")
    count = min(k or (200 if len(bank.labels) >= 10_000 else 20), len(bank.labels))
    known = F.normalize(bank.features, dim=1).T
    asked = F.normalize(query.features[process_rank() :: process_count()], dim=1)
    labels = query.labels[process_rank() :: process_count()]
    classes = int(bank.labels.max()) + 1
    right = torch.zeros((), dtype=torch.int64, device=known.device)
    for features, answers in zip(asked.split(1024), labels.split(1024), strict=True):
        cosine, neighbour = (features @ known).topk(count, dim=1)
        weights = ((cosine - cosine[:, :1]) / temperature).exp()  # over the nearest one's: never all zero
        votes = weights.new_zeros(len(features), classes).scatter_add_(1, bank.labels[neighbour], weights)
        right += (votes.argmax(1) == answers).sum()
    return int(sum_over_processes(right)) / len(query.labels)


class LinearProbe(nn.Module):
    """A linear classifier on features that pass it no gradient."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, classes)

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of (V, B, D) features with (B,) labels, mean over views and labelled rows; 0-d."""
        logits = self.linear(features.detach().flatten(0, 1).to(self.linear.weight.dtype))
        target = labels.repeat(len(features))
        total = F.cross_entropy(logits, target, ignore_index=-1, reduction="sum")
        return total / (target >= 0).sum().clamp(min=1)

    @torch.no_grad()
    def accuracy(self, query: FeatureSet) -> float:
        """Share of the labelled rows that it gets right; nan if there is none."""
        query = query.labelled()
        answer = self.linear(query.features.to(self.linear.weight.dtype)).argmax(1)
        return int((answer == query.labels).sum()) / len(answer) if len(answer) else float("nan")
