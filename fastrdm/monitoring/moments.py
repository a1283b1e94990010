"""Sums over the rows of a window, from which all its spectra are made; apart in groups for intervals."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrdm.kernels.linalg import gram


class Moments(NamedTuple):
    """Sums over rows of width D in G groups, float64, on the rows' device but for the counts."""

    rows: Tensor  # (G,), on the CPU
    first: Tensor  # (G, D), sum of x
    second: Tensor  # (G, D, D), sum of x x^T, or of x y^T where two kinds of rows were added

    @property
    def mean(self) -> Tensor:
        """Mean row (D,) over all groups."""
        return self.first.sum(0) / self.rows.sum().item()

    def matrix(self, center: bool = False) -> Tensor:
        """(D, D) second moment over all groups, about the mean where `center`."""
        second = self.second.sum(0) / self.rows.sum().item()
        return second - torch.outer(self.mean, self.mean) if center else second

    def to(self, device: torch.device) -> "Moments":
        return Moments(self.rows, self.first.to(device), self.second.to(device))


def zeros(width: int, groups: int, device: torch.device) -> Moments:
    """Empty sums for rows of this width in this many groups."""
    first, second = (torch.zeros(groups, *d, dtype=torch.float64, device=device) for d in ((width,), (width, width)))
    return Moments(torch.zeros(groups, dtype=torch.float64), first, second)


def add(moments: Moments, x: Tensor, y: Tensor | None = None, turn: int | None = None) -> None:
    """Add rows (V, B, D) in place to group `turn` mod G, else image b to group b mod G. Without a wait of the host."""
    (views, images), groups = x.shape[:2], len(moments.rows)
    if turn is not None:
        g, rows = turn % groups, x.double().flatten(0, 1)
        moments.rows[g] += len(rows)
        moments.first[g] += rows.sum(0)
        moments.second[g].addmm_(rows.mT, rows if y is None else y.double().flatten(0, 1))
        return
    rows = _grouped(x, groups)
    moments.rows.add_(torch.tensor([views * len(range(g, images, groups)) for g in range(groups)]))
    moments.first.add_(rows.sum(1))
    moments.second.baddbmm_(rows.mT, rows if y is None else _grouped(y, groups))


def pooled(a: Moments, b: Moments) -> Moments:
    """Moments of the union of two sets of rows."""
    return Moments(*(x + y for x, y in zip(a, b, strict=True)))


def join_views(half_sum: Moments, half_difference: Moments) -> Moments:
    """Moments of paired rows a and b, from the moments of (a + b) / 2 and (a - b) / 2."""
    return Moments(2 * half_sum.rows, 2 * half_sum.first, 2 * (half_sum.second + half_difference.second))


def unit_rows(x: Tensor) -> Tensor:
    """Rows (..., D) in float64, scaled to length 1."""
    return gram.unit_rows(x.double())


def _grouped(x: Tensor, groups: int) -> Tensor:
    """(V, B, D) as (G, V * ceil(B / G), D); rows of zeros, which add nothing, where groups are smaller."""
    padded = F.pad(x.double(), (0, 0, 0, -x.shape[1] % groups))
    split: Tensor = padded.unflatten(1, (-1, groups)).permute(2, 0, 1, 3)
    return split.flatten(1, 2)
