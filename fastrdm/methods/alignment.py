"""What is minimised: agreement of the online output of one view with the target output of another."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastrdm.methods.transform import Kind
from fastrdm.schema import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AlignmentConfig:
    """The loss of one pair of views, and how pairs are joined."""

    name: Literal["negative_cosine", "byol", "cross_entropy"] = "negative_cosine"
    """Loss of one online view against the target of another: negative_cosine (SimSiam), byol (squared distance of unit
    vectors) or cross_entropy (SwAV, DINO).
    """

    directions: Literal["mean", "sum"] = "mean"
    """Whether the losses of all pairs of views are averaged or summed. SimSiam, SwAV and DINO average, BYOL sums."""

    temperature: float = Field(default=0.1, gt=0)
    """Temperature of the online scores in cross_entropy; other losses have none. SwAV and DINO use 0.1."""


def negative_cosine(online: Tensor, target: Tensor, temperature: float) -> Tensor:
    """-cos(p, z), mean over rows (SimSiam, equation 1)."""
    return -F.cosine_similarity(online, target, dim=-1).mean()


def byol(online: Tensor, target: Tensor, temperature: float) -> Tensor:
    """|p/|p| - z/|z||^2 = 2 - 2 cos(p, z), mean over rows (BYOL, equation 2)."""
    return 2 - 2 * F.cosine_similarity(online, target, dim=-1).mean()


def cross_entropy(online: Tensor, target: Tensor, temperature: float) -> Tensor:
    """-sum_k q_k ln softmax(s / temperature)_k, mean over rows (SwAV, equation 2; DINO, equation 2)."""
    return -(target * F.log_softmax(online / temperature, dim=-1)).sum(-1).mean()


Loss = Callable[[Tensor, Tensor, float], Tensor]
ALIGNMENTS: dict[str, tuple[Loss, Kind, Kind]] = {  # loss, kind of the online output, kind of the target output
    "negative_cosine": (negative_cosine, "features", "features"),
    "byol": (byol, "features", "features"),
    "cross_entropy": (cross_entropy, "scores", "probabilities"),
}


def align(online: Tensor, target: Tensor, config: AlignmentConfig) -> Tensor:
    """The loss over all pairs of an online view (V, B, D) with another view's target (2, B, D); 0-d, at least float32.

    Two global views give the two directions of the papers; local crops join on the online side only.
    """
    loss = ALIGNMENTS[config.name][0]
    pairs = [(v, t) for v in range(len(online)) for t in range(len(target)) if v != t]
    total = torch.stack([loss(online[v], target[t], config.temperature) for v, t in pairs]).sum()
    return total / len(pairs) if config.directions == "mean" else total
