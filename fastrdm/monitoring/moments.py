"""Sums over the rows of a window, from which all its spectra are made; apart in groups for intervals."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrdm.kernels.linalg import gram
from fastrdm.kernels.linalg.gram import LEAF


class Moments(NamedTuple):
    """Sums over rows of width D in G groups, on the rows' device but for the counts.

    Second moments are float32, or float64 of float64 rows; all else is float64. Every product is added up over some
    hundred rows and then over the batches of a window, so that an entry is off by at most some 1e-6 of the largest
    diagonal one (measured: 1e-7), far less than what a window's number of rows leaves open.
    """

    rows: Tensor
    """(G,) float64, on the CPU."""
    first: Tensor
    """(G, D) float64: sum of x."""
    panels: tuple[Tensor, ...]
    """The sum of x x^T, of which the upper triangle is kept: panel p (G, n, D - p n) holds the rows from p n on, right
    of column p n. One panel (G, D, D) holds the sum of x y^T, where two kinds of rows are added."""

    @property
    def mean(self) -> Tensor:
        """Mean row (D,) over all groups."""
        return self.first.sum(0) / self.rows.sum().item()

    @property
    def noise(self) -> Tensor:
        """0-d: eigenvalues of `matrix` up to this one are what rounding alone could have made."""
        trace = torch.stack([panel.diagonal(dim1=1, dim2=2).double().sum() for panel in self.panels]).sum()
        return 8 * torch.finfo(self.panels[0].dtype).eps * trace / self.rows.sum().item()

    def second(self, group: int | None = None) -> Tensor:
        """(D, D) float64, the sum of x x^T or x y^T over one group, or over all."""
        width = self.first.shape[1]
        out, start = self.first.new_empty(width, width), 0
        for panel in self.panels:
            end = start + panel.shape[1]
            out[start:end, start:] = panel.sum(0, dtype=torch.float64) if group is None else panel[group]
            out[end:, start:end] = out[start:end, end:].mT
            start = end
        return out

    def matrix(self, center: bool = False, dtype: torch.dtype = torch.float64) -> Tensor:
        """(D, D) second moment over all groups, about the mean where `center`.

        In another `dtype` than float64 it is made in place, from one panel in float64 at a time.
        """
        if dtype == torch.float64:
            second = self.second() / self.rows.sum().item()
            return second - torch.outer(self.mean, self.mean) if center else second
        width, start = self.first.shape[1], 0
        out = self.first.new_empty(width, width, dtype=dtype)
        for panel in self.panels:
            end = start + panel.shape[1]
            rows = panel.sum(0, dtype=torch.float64) / self.rows.sum().item()
            out[start:end, start:] = rows - torch.outer(self.mean[start:end], self.mean[start:]) if center else rows
            out[end:, start:end] = out[start:end, end:].mT
            start = end
        return out

    @property
    def deviations(self) -> Tensor:
        """(D,) standard deviation of each dimension over all groups."""
        squares = torch.cat([panel.diagonal(dim1=1, dim2=2).sum(0, dtype=torch.float64) for panel in self.panels])
        return (squares / self.rows.sum().item() - self.mean.square()).clamp_min(0).sqrt()

    def to(self, device: torch.device) -> "Moments":
        return Moments(self.rows, self.first.to(device), tuple(panel.to(device) for panel in self.panels))


def panel_rows(device: torch.device, width: int) -> int:
    """Rows of a panel of symmetric sums: a GPU multiplies whole matrices sooner than it starts a kernel for each."""
    return LEAF if device.type == "cpu" else width


def zeros(
    width: int, groups: int, device: torch.device, dtype: torch.dtype = torch.float64, block: int | None = None
) -> Moments:
    """Empty sums for rows of this width in this many groups, in panels of `block` rows; None: in one panel."""
    block = block or width
    panels = tuple(
        torch.zeros(groups, min(block, width - start), width - start, dtype=dtype, device=device)
        for start in range(0, width, block)
    )
    first = torch.zeros(groups, width, dtype=torch.float64, device=device)
    return Moments(torch.zeros(groups, dtype=torch.float64), first, panels)


def add(moments: Moments, x: Tensor, y: Tensor | None = None, turn: int | None = None) -> None:
    """Add rows (V, B, D) in place to group `turn` mod G, else image b to group b mod G. Without a wait of the host."""
    (views, images), groups = x.shape[:2], len(moments.rows)
    if turn is not None:
        group, places = slice(turn % groups, turn % groups + 1), [views * images]
        rows, others = (None if z is None else z.flatten(0, 1)[None] for z in (x, y))
    else:
        group, places = slice(None), [views * len(range(g, images, groups)) for g in range(groups)]
        rows, others = (None if z is None else _grouped(z, groups) for z in (x, y))
    assert rows is not None
    moments.rows[group] += torch.tensor(places)
    moments.first[group] += rows.sum(1, dtype=torch.float64)
    start, dtype = 0, moments.panels[0].dtype
    left, right = rows.to(dtype), (rows if others is None else others).to(dtype)
    for panel in moments.panels:
        end = start + panel.shape[1]
        panel[group].baddbmm_(left[..., start:end].mT, right[..., start:])
        start = end


def pooled(a: Moments, b: Moments) -> Moments:
    """Moments of the union of two sets of rows."""
    panels = tuple(x + y for x, y in zip(a.panels, b.panels, strict=True))
    return Moments(a.rows + b.rows, a.first + b.first, panels)


def join_views(half_sum: Moments, half_difference: Moments) -> Moments:
    """Moments of paired rows a and b, from the moments of (a + b) / 2 and (a - b) / 2."""
    panels = tuple(2 * (x + y) for x, y in zip(half_sum.panels, half_difference.panels, strict=True))
    return Moments(2 * half_sum.rows, 2 * half_sum.first, panels)


def unit_rows(x: Tensor) -> Tensor:
    """Rows (..., D) in float64, scaled to length 1."""
    return gram.unit_rows(x.double())


def _grouped(x: Tensor, groups: int) -> Tensor:
    """(V, B, D) as (G, V * ceil(B / G), D); rows of zeros, which add nothing, where groups are smaller."""
    padded = F.pad(x, (0, 0, 0, -x.shape[1] % groups))
    split: Tensor = padded.unflatten(1, (-1, groups)).permute(2, 0, 1, 3)
    return split.flatten(1, 2)
