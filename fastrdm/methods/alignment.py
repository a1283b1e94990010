"""Losses: agreement of the online output of one view with the target output of another, one row of a table each."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastrdm import parts
from fastrdm.methods.transform import Kind
from fastrdm.schema import STRICT, nearest


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AlignmentConfig:
    """Which loss compares two views, and how pairs of views are joined; a loss with settings has a subclass of this."""

    name: str = "negative_cosine"
    """Loss of one online view against the target of another: negative_cosine (SimSiam), byol (squared distance of unit
    vectors), cross_entropy (SwAV, DINO), or package.module:NAME for one of your own.
    """

    directions: Literal["mean", "sum"] = "mean"
    """Whether the losses of all pairs of views are averaged or summed. SimSiam, SwAV and DINO average, BYOL sums."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CrossEntropyConfig(AlignmentConfig):
    """Cross-entropy between the target's probabilities and the softmax of the online scores (SwAV, DINO)."""

    name: Literal["cross_entropy"] = "cross_entropy"

    temperature: float = Field(default=0.1, gt=0)
    """Temperature by which the online scores are divided before the softmax. SwAV and DINO use 0.1."""


class LossRange(NamedTuple):
    """Range of a loss, by which the alarms judge a run's loss."""

    floor: float  # the lowest value there is
    unrelated: float  # of unrelated views: orthogonal features, or a uniform distribution over the prototypes


class Loss(NamedTuple):
    """A row of the table of losses.

    `formula` takes the online output (B, K) of one view, the target output (B, K) of another and the loss's settings,
    and gives the loss, 0-d; its parameter `config` is annotated with the settings. It may see the rows of other
    processes through `runtime.distributed.gather_rows_with_gradient` and `sum_with_gradient`.
    """

    formula: Callable[[Tensor, Tensor, Any], Tensor]
    online: Kind = "features"  # kind of the online output
    target: Kind = "features"  # kind of the target output
    range: Callable[[Any, int], LossRange] | None = None  # of settings and K; None: no alarm watches the floor
    monitored: Callable[[Tensor, Any], Tensor] | None = None  # online output as the monitor reads it; None: as it is


def negative_cosine(online: Tensor, target: Tensor, config: AlignmentConfig) -> Tensor:
    """-cos(p, z), mean over rows (SimSiam, equation 1)."""
    return -F.cosine_similarity(online, target, dim=-1).mean()


def byol(online: Tensor, target: Tensor, config: AlignmentConfig) -> Tensor:
    """|p/|p| - z/|z||^2 = 2 - 2 cos(p, z), mean over rows (BYOL, equation 2)."""
    return 2 - 2 * F.cosine_similarity(online, target, dim=-1).mean()


def cross_entropy(online: Tensor, target: Tensor, config: CrossEntropyConfig) -> Tensor:
    """-sum_k q_k ln softmax(s / temperature)_k, mean over rows (SwAV, equation 2; DINO, equation 2)."""
    return -(target * F.log_softmax(online / config.temperature, dim=-1)).sum(-1).mean()


def softmax(online: Tensor, config: CrossEntropyConfig) -> Tensor:
    """The probabilities (..., K) that the cross-entropy compares, from scores (..., K)."""
    return torch.softmax(online / config.temperature, dim=-1)


ALIGNMENTS: dict[str, Loss] = {
    "negative_cosine": Loss(negative_cosine, range=lambda config, width: LossRange(-1.0, 0.0)),
    "byol": Loss(byol, range=lambda config, width: LossRange(0.0, 2.0)),
    "cross_entropy": Loss(
        cross_entropy, "scores", "probabilities", lambda config, width: LossRange(0.0, math.log(width)), softmax
    ),
}


def find_loss(name: str) -> Loss:
    """The row of that name, or the one that package.module:NAME stands for; ValueError where there is none."""
    if parts.is_own(name):
        own: Loss = parts.load(name, "", lambda found: isinstance(found, Loss), "an object of fastrdm's class Loss")
        return own
    if name not in ALIGNMENTS:
        raise ValueError(f"must be a loss, got {name!r}: {nearest(name, ALIGNMENTS)}")
    return ALIGNMENTS[name]


def loss_settings(name: str) -> type[AlignmentConfig]:
    """The settings of the loss of that name."""
    return parts.settings_of(find_loss(name).formula, AlignmentConfig)


def align(
    online: Tensor, target: Tensor, formula: Callable[[Tensor, Tensor, Any], Tensor], config: AlignmentConfig
) -> Tensor:
    """A loss over all pairs of an online view (V, B, D) with another view's target (2, B, D); 0-d, at least float32.

    Two global views give the two directions of the papers; local crops join on the online side only.
    """
    pairs = [(v, t) for v in range(len(online)) for t in range(len(target)) if v != t]
    total = torch.stack([formula(online[v], target[t], config) for v, t in pairs]).sum()
    return total / len(pairs) if config.directions == "mean" else total
