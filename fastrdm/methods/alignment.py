"""Losses: agreement of the online output of one view with the target output of another, one row of a table each."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrdm import parts
from fastrdm.kernels.collectives import process_count
from fastrdm.methods.loss_settings import AlignmentConfig as AlignmentConfig
from fastrdm.methods.loss_settings import CrossCorrelationConfig as CrossCorrelationConfig
from fastrdm.methods.loss_settings import CrossEntropyConfig as CrossEntropyConfig
from fastrdm.methods.loss_settings import loss_row
from fastrdm.methods.transform_settings import Kind
from fastrdm.runtime.distributed import sum_with_gradient


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
    symmetric: bool = False  # formula(a, b) = formula(b, a): alike branches need one of the two


def negative_cosine(online: Tensor, target: Tensor, config: AlignmentConfig) -> Tensor:
    """-cos(p, z), mean over rows (SimSiam, equation 1)."""
    return -F.cosine_similarity(online, target, dim=-1).mean()


def byol(online: Tensor, target: Tensor, config: AlignmentConfig) -> Tensor:
    """|p/|p| - z/|z||^2 = 2 - 2 cos(p, z), mean over rows (BYOL, equation 2)."""
    return 2 - 2 * F.cosine_similarity(online, target, dim=-1).mean()


def cross_entropy(online: Tensor, target: Tensor, config: CrossEntropyConfig) -> Tensor:
    """-sum_k q_k ln softmax(s / temperature)_k, mean over rows (SwAV, equation 2; DINO, equation 2)."""
    return -(target * F.log_softmax(online / config.temperature, dim=-1)).sum(-1).mean()


def mse(online: Tensor, target: Tensor, config: AlignmentConfig) -> Tensor:
    """(p - z)^2, mean over rows and dimensions (VICReg, equation 5, with the mean of its code; LeJEPA)."""
    return F.mse_loss(online, target)


def cross_correlation(online: Tensor, target: Tensor, config: CrossCorrelationConfig) -> Tensor:
    """sum_i (1 - C_ii)^2 + redundancy sum_{i != j} C_ij^2, C the cross-correlation over all rows (Barlow Twins)."""
    rows = len(online) * process_count()
    both = torch.stack((online, target))
    both = both - sum_with_gradient(both.sum(1, keepdim=True)) / rows
    variance = sum_with_gradient(both.square().sum(1, keepdim=True)) / rows
    p, z = both / (variance + config.epsilon).sqrt()
    c = sum_with_gradient(p.mT @ z) / rows
    diagonal = c.diagonal()
    off = (c - torch.diag(diagonal)).square().sum()
    return (1 - diagonal).square().sum() + config.redundancy * off


def softmax(online: Tensor, config: CrossEntropyConfig) -> Tensor:
    """The probabilities (..., K) that the cross-entropy compares, from scores (..., K)."""
    return torch.softmax(online / config.temperature, dim=-1)


NEGATIVE_COSINE = Loss(negative_cosine, range=lambda config, width: LossRange(-1.0, 0.0))
BYOL = Loss(byol, range=lambda config, width: LossRange(0.0, 2.0))
CROSS_ENTROPY = Loss(
    cross_entropy, "scores", "probabilities", lambda config, width: LossRange(0.0, math.log(width)), softmax
)
MSE = Loss(mse, symmetric=True)
CROSS_CORRELATION = Loss(cross_correlation, range=lambda config, width: LossRange(0.0, float(width)), symmetric=True)


def own_loss(name: str) -> Loss:
    """The object that package.module:NAME stands for; ValueError where there is none."""
    own: Loss = parts.load(name, "", lambda found: isinstance(found, Loss), "an object of fastrdm's class Loss")
    return own


def find_loss(name: str) -> Loss:
    """The loss of that name, or the one that package.module:NAME stands for; ValueError where there is none."""
    if parts.is_own(name):
        return own_loss(name)
    found: Loss = parts.of_ours(loss_row(name).code)
    return found


def align(
    online: Tensor,
    target: Tensor,
    formula: Callable[[Tensor, Tensor, Any], Tensor],
    config: AlignmentConfig,
    once: bool = False,
) -> Tensor:
    """A loss over the online views (V, B, D) and the targets (T, B, D) of the first T of them; 0-d, at least float32.

    With `targets` pairs, each online view meets the target of every other view: two global views give the two
    directions of the papers, and local crops join on the online side only. `once` says that both directions of two
    global views are the same number, which is then computed once.
    """
    met = pairs_of(len(online), len(target), config, once)
    total = torch.stack([count * formula(online[v], _joined(target, ts), config) for v, ts, count in met]).sum()
    return config.weight * (total / sum(count for *_, count in met) if config.directions == "mean" else total)


def pairs_of(views: int, targets: int, config: AlignmentConfig, once: bool = False) -> list[tuple[int, list[int], int]]:
    """What is compared: an online view, the targets whose mean it meets, and how often that counts."""
    if config.targets == "center":
        return [(v, list(range(targets)), 1) for v in range(views)]
    others = [(v, [t for t in range(targets) if t != v]) for v in range(views)]
    if config.targets == "mean":
        return [(v, ts, 1) for v, ts in others]
    pairs = [(v, t) for v, ts in others for t in ts]
    if once:
        return [(v, [t], 2 if v < targets else 1) for v, t in pairs if v > t]
    return [(v, [t], 1) for v, t in pairs]


def _joined(target: Tensor, ts: Sequence[int]) -> Tensor:
    """The mean of some targets (T, B, D)."""
    return target[ts[0]] if len(ts) == 1 else torch.stack([target[t] for t in ts]).mean(0)
