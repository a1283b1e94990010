"""Features of a whole set, equal on all processes."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrdm.runtime.distributed import gather_rows, max_over_processes


class FeatureSet(NamedTuple):
    """Features of a whole set in the order of its source, equal on all processes."""

    features: Tensor  # (N, D) float32
    labels: Tensor  # (N,) int64, -1 where unknown

    def labeled(self) -> "FeatureSet":
        """Return the rows whose label is known."""
        known = self.labels >= 0
        return FeatureSet(self.features[known], self.labels[known])


@torch.no_grad()
def raw_pixels(images: Tensor) -> Tensor:
    """Pixels of images (B, 3, S, S) as features (B, 3 * 32 * 32), or fewer for smaller images.

    Larger images are averaged down.
    """
    return F.adaptive_avg_pool2d(images, min(images.shape[-1], 32)).flatten(1)


def feature_set(encode: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor, Tensor]]) -> FeatureSet:
    """Features of (images, index, label) batches of this process, joined with those of the other processes."""
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
