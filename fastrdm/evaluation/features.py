"""Features of a whole set, equal on all processes."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrdm.runtime.distributed import gather_rows, max_over_processes

Encode = Callable[[Tensor], Tensor]  # images (B, 3, S, S) to features (B, D)


class FeatureSet(NamedTuple):
    """Features of a whole set in the order of its source, equal on all processes."""

    features: Tensor  # (N, D) float32
    labels: Tensor  # (N,) int64, -1 where unknown

    def labeled(self) -> "FeatureSet":
        """Return the rows whose label is known."""
        known = self.labels >= 0
        if bool(known.all()):
            return self
        return FeatureSet(self.features[known], self.labels[known])


@torch.no_grad()
def raw_pixels(images: Tensor) -> Tensor:
    """Pixels of images (B, 3, S, S) as features (B, 3 * 32 * 32), or fewer for smaller images.

    Larger images are averaged down.
    """
    return F.adaptive_avg_pool2d(images, min(images.shape[-1], 32)).flatten(1)


def feature_set(encode: Encode, batches: Iterable[tuple[Tensor, Tensor, Tensor]]) -> FeatureSet:
    """Features of (images, index, label) batches of this process, joined with those of the other processes."""
    return feature_sets([encode], batches)[0]


def feature_sets(encoders: Sequence[Encode], batches: Iterable[tuple[Tensor, Tensor, Tensor]]) -> list[FeatureSet]:
    """The features of each encoder as by `feature_set`, with every image read and decoded once for all of them."""
    rows = [([encode(images).float() for encode in encoders], label, index) for images, index, label in batches]
    of_batch, all_labels, all_index = zip(*rows, strict=True)
    labels = _join(torch.cat(all_labels))
    index = _join(torch.cat(all_index).to(labels.device), padding=-1)
    order = index.argsort()[int((index < 0).sum()) :]
    features = (_join(torch.cat(parts)) for parts in zip(*of_batch, strict=True))
    return [FeatureSet(x[order], labels[order]) for x in features]


def _join(x: Tensor, padding: int = 0) -> Tensor:
    """Rows of all processes, whose numbers may differ by some: short ones are padded."""
    longest = int(max_over_processes(torch.tensor([len(x)], device=x.device)).item())
    pad = x.new_full((longest - len(x), *x.shape[1:]), padding)
    return gather_rows(torch.cat([x, pad]))
