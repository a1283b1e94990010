"""A linear classifier trained beside the encoder, on features that pass it no gradient."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrdm.evaluation.features import FeatureSet


class OnlineProbe(nn.Module):
    """A linear classifier on features that pass it no gradient."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, classes)

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of (V, B, D) features with (B,) labels, mean over views and labeled rows; 0-d."""
        logits = self.linear(features.detach().flatten(0, 1).to(self.linear.weight.dtype))
        target = labels.repeat(len(features))
        total = F.cross_entropy(logits, target, ignore_index=-1, reduction="sum")
        return total / (target >= 0).sum().clamp(min=1)

    @torch.no_grad()
    def accuracy(self, query: FeatureSet) -> float:
        """Share of the labeled rows that it gets right; nan if there is none."""
        query = query.labeled()
        answer = self.linear(query.features.to(self.linear.weight.dtype)).argmax(1)
        return int((answer == query.labels).sum()) / len(answer) if len(answer) else float("nan")
