"""A sample of rows of both branches, for the figures of pairs where groups of moments would take too much memory."""

from typing import Any

import torch
from torch import Tensor

from fastrdm.monitoring import rank_statistics
from fastrdm.monitoring.moments import Moments
from fastrdm.monitoring.rank_statistics import CENTERED_CONVENTION, ENERGY_KEPT, HEADLINE_CONVENTION, Eigen

IMAGES = 2048  # of a window, whose rows of both views are kept
CHUNK = 256  # rows that are projected at a time


class PairedRows:
    """Rows of length 1 of the online and the target branch, of both views of the same images, in float16.

    A product of two such rows is off by less than 1e-3 of their lengths. They give the widths of intervals and the
    signs of directions, never a rank.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.rows = torch.empty(2, 2, IMAGES, width, dtype=torch.float16, device=device)
        """(branch, view, image, D): online first."""
        self.clusters = torch.empty(IMAGES, dtype=torch.int64)
        """(image,): images of one cluster were in one batch, whose rows BatchNorm ties together."""
        self.filled = 0

    def add(self, online: Tensor, target: Tensor, window_rows: int, groups: int, turn: int | None) -> None:
        """Keep this batch's share of the sample, of unit rows (2, B, D); the host does not wait.

        `turn` is the batch's number in the window. None makes clusters of images, image b in cluster b mod `groups`.
        """
        images = online.shape[1]
        share = min(-(-2 * images * IMAGES // window_rows), images, IMAGES - self.filled)
        place = slice(self.filled, self.filled + share)
        for kept, rows in zip(self.rows, (online, target), strict=True):
            kept[:, place].copy_(rows[:, :share])
        self.clusters[place] = torch.arange(share) % groups if turn is None else turn
        self.filled += share

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows[:, :, : self.filled].clone(), "clusters": self.clusters[: self.filled].clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.filled = len(state["clusters"])
        self.rows[:, :, : self.filled] = state["rows"]
        self.clusters[: self.filled] = state["clusters"]


def bytes_of(width: int) -> int:
    """Memory of the kept rows in bytes."""
    return 2 * 2 * IMAGES * width * torch.finfo(torch.float16).bits // 8


def read(
    pairs: PairedRows, moments: dict[str, Moments], intervals: bool
) -> tuple[dict[str, float], dict[tuple[str, bool], Eigen]]:
    """Rank differences with their null, and the filter between branches; eigenvalues of all moments that were read.

    Ranks are those of the moments, of all rows. The sample gives the intervals: the influence of each of its images,
    the null's at the derivative of the target's rank over both views.
    """
    metrics: dict[str, float] = {}
    found: dict[tuple[str, bool], Eigen] = {}
    online, target = pairs.rows[:, :, : pairs.filled]
    clusters, images = pairs.clusters[: pairs.filled], int(moments["target/unit"].rows.sum().item()) // 2
    views = [moments["target/view1"], moments["target/view2"]]
    for convention, center in ((HEADLINE_CONVENTION, False), (CENTERED_CONVENTION, True)):
        spectra: dict[str, Eigen] = {}
        effects: dict[str, Tensor] = {}
        for name, rows in (("online", online), ("target", target)):
            sums = moments[f"{name}/unit"]
            whole = rank_statistics.lean_eigen(sums, center)
            of_rows = _influence(rows.flatten(0, 1), whole, sums.mean if center else None)
            effects[name] = of_rows.unflatten(0, (2, -1)).mean(0)
            if name == "target":
                one, two = (
                    _influence(x, whole, view.mean if center else None) for x, view in zip(rows, views, strict=True)
                )
                effects["null"] = two - one
                if not center:
                    metrics["filter/negative_share/window"] = _negative_share(whole, online, target)
            spectra[name] = found[f"{name}/unit", center] = Eigen(whole.values, whole.vectors[:, :0].clone())
            del whole
        for number, view in enumerate(views, start=1):
            spectra[f"view{number}"] = rank_statistics.lean_eigen(view, center, vectors=False)
        for name, a, b, effect in (
            ("difference", "target", "online", effects["target"] - effects["online"]),
            ("null", "view2", "view1", effects["null"]),
        ):
            key = f"{name}/{convention}/window"
            value = rank_statistics.rank(spectra[a], "erank_l") - rank_statistics.rank(spectra[b], "erank_l")
            metrics[key] = value
            if intervals:
                half = rank_statistics.sampled_half_width(effect.cpu(), clusters, images)
                metrics |= {f"{key}/low": value - half, f"{key}/high": value + half}
    return metrics, found


def _influence(rows: Tensor, spectrum: Eigen, mean: Tensor | None) -> Tensor:
    """Influence (N,) float64 of each row (N, D) on the rank `erank_l` whose spectrum this is, up to a constant."""
    slope = rank_statistics.derivative(spectrum.values)
    vectors = spectrum.vectors
    origin = None if mean is None else mean.to(vectors.dtype) @ vectors
    parts = []
    for chunk in rows.split(CHUNK):
        along = chunk.to(vectors.dtype) @ vectors
        along = along if origin is None else along - origin
        parts.append(along.square_().double() @ slope)
    return torch.cat(parts)


def _negative_share(target: Eigen, online_rows: Tensor, target_rows: Tensor) -> float:
    """`rank_statistics.negative_share` with the cross moment of the sample's rows (2, N, D)."""
    vectors = target.vectors
    weights = torch.zeros_like(target.values)
    for x, y in zip(online_rows.flatten(0, 1).split(CHUNK), target_rows.flatten(0, 1).split(CHUNK), strict=True):
        weights += ((x.to(vectors.dtype) @ vectors) * (y.to(vectors.dtype) @ vectors)).sum(0)
    held = target.values.cumsum(0) - target.values < ENERGY_KEPT * target.values.sum()
    return (weights[held] < 0).sum().item() / max(held.sum().item(), 1)
