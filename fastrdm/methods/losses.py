"""Losses: settings and formula of each, one row of a table. Formulas import torch, which reading the table does not."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field
from pydantic.dataclasses import dataclass

from fastrdm import parts
from fastrdm.methods.transform_settings import Kind
from fastrdm.schema import STRICT, nearest

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AlignmentConfig:
    """Which loss compares two views, and how pairs of views are joined; a loss with settings has a subclass of this."""

    name: str = "negative_cosine"
    """Loss of one online view against the target of another: negative_cosine (SimSiam), byol (squared distance of unit
    vectors), mse (VICReg, LeJEPA), cross_correlation (Barlow Twins), cross_entropy (SwAV, DINO), or package.module:NAME
    for one of your own.
    """

    weight: float = Field(default=1.0, gt=0)
    """Factor of this loss beside the regularizers. VICReg uses 25, LeJEPA 1 minus the weight of its regularizer."""

    targets: Literal["pairs", "mean", "center"] = "pairs"
    """What an online view is compared with: pairs, each target of another view; mean, the mean of the targets of the
    other views (FastSiam); center, the mean of all targets, its own among them (LeJEPA).
    """

    directions: Literal["mean", "sum"] = "mean"
    """Whether the losses of all pairs of views are averaged or summed. SimSiam, SwAV and DINO average, BYOL sums."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CrossEntropyConfig(AlignmentConfig):
    """Cross-entropy between the target's probabilities and the softmax of the online scores (SwAV, DINO)."""

    name: Literal["cross_entropy"] = "cross_entropy"

    temperature: float = Field(default=0.1, gt=0)
    """Temperature by which the online scores are divided before the softmax. SwAV and DINO use 0.1."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CrossCorrelationConfig(AlignmentConfig):
    """Distance of the cross-correlation of both outputs from the identity (Barlow Twins, equation 1)."""

    name: Literal["cross_correlation"] = "cross_correlation"

    redundancy: float = Field(default=0.0051, ge=0)
    """Factor of the entries off the diagonal, lambda of Barlow Twins, whose code uses 0.0051."""

    epsilon: float = Field(default=1e-5, gt=0)
    """Added to each variance by which the outputs are divided, as in the BatchNorm of the published code."""


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

    formula: Callable[["Tensor", "Tensor", Any], "Tensor"]
    online: Kind = "features"  # kind of the online output
    target: Kind = "features"  # kind of the target output
    range: Callable[[Any, int], LossRange] | None = None  # of settings and K; None: no alarm watches the floor
    monitored: Callable[["Tensor", Any], "Tensor"] | None = None  # online output as monitored; None: as it is
    symmetric: bool = False  # formula(a, b) = formula(b, a): alike branches need one of the two


def negative_cosine(online: "Tensor", target: "Tensor", config: AlignmentConfig) -> "Tensor":
    """-cos(p, z), mean over rows (SimSiam, equation 1)."""
    from torch.nn.functional import cosine_similarity

    return -cosine_similarity(online, target, dim=-1).mean()


def byol(online: "Tensor", target: "Tensor", config: AlignmentConfig) -> "Tensor":
    """|p/|p| - z/|z||^2 = 2 - 2 cos(p, z), mean over rows (BYOL, equation 2)."""
    from torch.nn.functional import cosine_similarity

    return 2 - 2 * cosine_similarity(online, target, dim=-1).mean()


def cross_entropy(online: "Tensor", target: "Tensor", config: CrossEntropyConfig) -> "Tensor":
    """-sum_k q_k ln softmax(s / temperature)_k, mean over rows (SwAV, equation 2; DINO, equation 2)."""
    return -(target * (online / config.temperature).log_softmax(-1)).sum(-1).mean()


def mse(online: "Tensor", target: "Tensor", config: AlignmentConfig) -> "Tensor":
    """(p - z)^2, mean over rows and dimensions (VICReg, equation 5, with the mean of its code; LeJEPA)."""
    from torch.nn.functional import mse_loss

    return mse_loss(online, target)


def cross_correlation(online: "Tensor", target: "Tensor", config: CrossCorrelationConfig) -> "Tensor":
    """sum_i (1 - C_ii)^2 + redundancy sum_{i != j} C_ij^2, C the cross-correlation over all rows (Barlow Twins)."""
    import torch

    from fastrdm.kernels.collectives import process_count
    from fastrdm.runtime.distributed import sum_with_gradient

    rows = len(online) * process_count()
    both = torch.stack((online, target))
    both = both - sum_with_gradient(both.sum(1, keepdim=True)) / rows
    variance = sum_with_gradient(both.square().sum(1, keepdim=True)) / rows
    p, z = both / (variance + config.epsilon).sqrt()
    c = sum_with_gradient(p.mT @ z) / rows
    diagonal = c.diagonal()
    off = (c - torch.diag(diagonal)).square().sum()
    return (1 - diagonal).square().sum() + config.redundancy * off


def softmax(online: "Tensor", config: CrossEntropyConfig) -> "Tensor":
    """The probabilities (..., K) that the cross-entropy compares, from scores (..., K)."""
    return (online / config.temperature).softmax(-1)


ALIGNMENTS: dict[str, Loss] = {
    "negative_cosine": Loss(negative_cosine, range=lambda config, width: LossRange(-1.0, 0.0)),
    "byol": Loss(byol, range=lambda config, width: LossRange(0.0, 2.0)),
    "cross_entropy": Loss(
        cross_entropy, "scores", "probabilities", lambda config, width: LossRange(0.0, math.log(width)), softmax
    ),
    "mse": Loss(mse, symmetric=True),
    "cross_correlation": Loss(
        cross_correlation, range=lambda config, width: LossRange(0.0, float(width)), symmetric=True
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
    """The settings of the loss of that name. ValueError where they take `weight`, by which every loss is multiplied."""
    kind: type[AlignmentConfig] = parts.settings_of(find_loss(name).formula, AlignmentConfig)
    if kind is not AlignmentConfig and "weight" in vars(kind).get("__annotations__", {}):
        raise ValueError(f"{name} must call its setting other than weight, by which every loss is multiplied already")
    return kind
