"""How a loss compares the views of both branches: which online view meets the targets of which views."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastrdm.methods.losses import AlignmentConfig


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
