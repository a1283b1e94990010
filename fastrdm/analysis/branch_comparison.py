"""Two branches compared through second moments of their rows: ranks with intervals, spectral filter, alignment.

Rows are (V, N, D): V views of N images, the same images in the same order on both branches. Everything is float64.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.special import ndtri
from torch import Tensor

from fastrdm.kernels.linalg.effective_rank import entropy_rank, spectrum
from fastrdm.monitoring.moments import unit_rows

# of images, resampled as wholes: the deviation of a figure is then known to about a tenth, and the images of a batch,
# which share its statistics and its filter, stay together for the most part
GROUPS = 50
# shares of the variance: directions of a filter's verdict, and of its curve (as published)
BODY_ENERGY, CURVE_ENERGY = 0.99, 0.9999
SOLVED_TOGETHER = 2**24  # numbers in the moments of replicates that are solved together
RATIO_DECIMALS = 6  # decimals of ln ratio beyond which two directions count as passed alike
PUBLISHED_DIRECTIONS = 512  # leading eigenvectors in the published alignment, or all where there are fewer
NORMAL = float(ndtri(0.975))  # of the normal distribution, two-sided 95 %


class Interval(NamedTuple):
    """A metric and its 95 % bootstrap interval over images. A biased metric may lie outside its interval."""

    value: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 or -1 where the interval lies on one side of 0, else 0."""
        return int(self.low > 0) - int(self.high < 0)


class Filter(NamedTuple):
    """Variance of both branches along k common directions, largest first, as shares; mean over views and halves.

    The body are the first directions, which hold 99 % of the variance, the tail are the others, up to 99.99 %.
    """

    online: Tensor  # (k,)
    target: Tensor  # (k,)
    ratio: Tensor  # (k,) online over target, geometric mean; its square root is the filter on singular values
    body: Interval  # rank correlation of ratio and variance: above 0 low-pass, below 0 high-pass, around 0 neither
    tail: Interval
    tilt: float  # mean ratio of the first quarter of the body over that of its last, geometric
    directions: int  # of the body: a correlation over two or three says little


class Alignment(NamedTuple):
    """Mean cosine of C v and v, v the leading eigenvectors of the target's second moment, C the online one's.

    Those of the body, which hold 99 % of the target's variance, but for `published`: the first 512.
    """

    value: float  # both from all images
    crossed: float  # v from one half of the images, C from the other
    ceiling: float  # the same with the eigenvectors of C those of the target: what a shared eigenspace would read
    chance: float  # v from a random rotation: what unrelated eigenspaces of these spectra would read
    published: float  # both from all images, as many v as the paper takes


def second_moment(x: Tensor, center: bool = False) -> Tensor:
    """Mean of x x^T over rows, (V, N, D) -> (V, D, D) float64; `center` subtracts the mean row first."""
    x = x.double()
    x = x - x.mean(-2, keepdim=True) if center else x
    return x.mT @ x / x.shape[-2]


def white_bound(images: int, dimension: int) -> float:
    """Effective rank that white rows of so many images and dimensions read on average: D exp(-D / 2N), N >= D.

    The entropy of a sampled white spectrum (Page 1993). No Gaussian spectrum loses a larger share of its rank.
    """
    few, many = sorted((images, dimension))
    return few * math.exp(-few / (2 * many))


def resamples(parts: int, replicates: int, device: torch.device) -> Tensor:
    """Bootstrap counts (R, parts) float64: how often each part is drawn in each of R samples. Equal at every call."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(parts, (replicates, parts), generator=generator)
    counts = torch.zeros(replicates, parts, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())
    return counts.to(device)


def _replicated_ranks(x: Tensor, center: bool, replicates: int) -> Tensor:
    """Effective ranks (R + 1, V) of unit rows (V, N, D): of all images, then of each bootstrap sample of groups.

    Moments are summed once a group: a replicate costs a sum of G matrices and an eigvalsh, not a pass over rows.
    """
    groups = min(GROUPS, x.shape[1])
    parts = [unit_rows(part) for part in x.tensor_split(groups, dim=1)]
    squares = torch.stack([part.mT @ part for part in parts])
    sums = torch.stack([part.sum(1) for part in parts])
    counts = torch.tensor([part.shape[1] for part in parts], dtype=torch.float64, device=x.device)
    weights = torch.cat([torch.ones_like(counts)[None], resamples(groups, replicates, x.device)])
    ranks = []
    for part in (weights / (weights @ counts)[:, None]).split(max(SOLVED_TOGETHER // squares[0].numel(), 1)):
        moment, mean = torch.tensordot(part, squares, 1), torch.tensordot(part, sums, 1)
        if center:
            moment = moment - mean.unsqueeze(-1) * mean.unsqueeze(-2)
        ranks.append(entropy_rank(spectrum(moment)[0]))
    return torch.cat(ranks)


def _interval(values: Tensor) -> Interval:
    """Bias-corrected 95 % normal interval from R + 1 estimates.

    Entry 0 is the estimate on all images, the others are its bootstrap replicates.
    """
    value, others = values[0], values[1:]
    middle, half = 2 * value - others.mean(), NORMAL * others.std()
    return Interval(*(float(v) for v in (value, middle - half, middle + half)))


def rank_differences(online: Tensor, target: Tensor, *, center: bool, replicates: int) -> dict[str, Interval]:
    """Effective rank (erank_l/unit) of target minus online, mean over views, and of view 2 minus view 1 of a branch.

    Cost: R eigenvalue problems of size D a branch and view.
    """
    o, t = (_replicated_ranks(x, center, replicates) for x in (online, target))
    return {
        "difference": _interval((t - o).mean(1)),
        "null/online": _interval(o[:, 1] - o[:, 0]),
        "null/target": _interval(t[:, 1] - t[:, 0]),
    }


def _ranks(x: Tensor) -> Tensor:
    """Ranks of (..., k) values, centered to sum 0. Equal values share their mean rank."""
    ordered = x.sort(-1).values.contiguous()
    x = x.contiguous()
    below = torch.searchsorted(ordered, x)
    upto = torch.searchsorted(ordered, x, right=True)
    return (below + upto).double() / 2 - x.shape[-1] / 2


def spearman_with_order(x: Tensor) -> Tensor:
    """Rank correlation (...) of (..., k) values with k, k - 1, ..., 1; 0 where all values are equal."""
    ranks, order = _ranks(x), _ranks(-torch.arange(x.shape[-1], dtype=torch.float64, device=x.device))
    size = ranks.norm(dim=-1) * order.norm()
    return (ranks @ order) / torch.where(size == 0, 1.0, size)


def _half_splits(online: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Unit rows of online and target, one half of the images then the other, for each view and both ways round."""
    for o, t in zip(online, target, strict=True):
        (o1, o2), (t1, t2) = (unit_rows(x).tensor_split(2) for x in (o, t))
        yield o1, t1, o2, t2
        yield o2, t2, o1, t1


def spectral_filter_between(online: Tensor, target: Tensor, *, replicates: int) -> Filter:
    """Cross-fitted spectral filter of the online branch relative to the target, from rows (V, N, D) of each.

    Directions and their order come from one half of the images, the variances along them from the other: in the same
    half a branch's own eigenvectors follow its noise, and equal branches would look filtered. The directions are the
    eigenvectors of the mean of both second moments, which are well defined where one branch's spectrum is flat. The
    interval resamples groups of images of the second half and takes the directions as given.
    """
    curves, bodies, tails, sizes = [], [], [], []
    for o1, t1, o2, t2 in _half_splits(online, target):
        values, vectors = torch.linalg.eigh((second_moment(o1) + second_moment(t1)) / 2)
        held = values.flip(0).cumsum(0) / values.sum()
        body, keep = (int((held < share).sum()) + 1 for share in (BODY_ENERGY, CURVE_ENERGY))
        along = torch.stack([(x @ vectors.flip(1)[:, :keep]).square() for x in (o2, t2)])
        groups = along.tensor_split(min(GROUPS // 2, len(o2)), dim=1)
        sums = torch.stack([group.sum(1) for group in groups], dim=1)  # (2, G, keep)
        weights = torch.cat([sums.new_ones(1, len(groups)), resamples(len(groups), replicates, o2.device)])
        means = weights @ sums  # (2, R + 1, keep), up to a factor that the ratio does not see
        log_ratio = (means[0] / means[1]).log().round(decimals=RATIO_DECIMALS)
        bodies.append(spearman_with_order(log_ratio[:, :body]))
        tails.append(spearman_with_order(log_ratio[:, body:]))
        curves.append(means[:, 0] / len(o2))
        sizes.append(body)
    o, t = torch.stack([curve[:, : min(c.shape[1] for c in curves)] for curve in curves], dim=1)
    log_ratio = (o / t).log().mean(0)
    quarter = -(-min(sizes) // 4)
    tilt = log_ratio[:quarter].mean() - log_ratio[min(sizes) - quarter : min(sizes)].mean()
    verdict, rest = (_percentiles(torch.stack(x).mean(0)) for x in (bodies, tails))
    return Filter(o.mean(0), t.mean(0), log_ratio.exp(), verdict, rest, float(tilt.exp()), min(sizes))


def _percentiles(values: Tensor) -> Interval:
    """Percentile 95 % interval from R + 1 estimates, entry 0 from all images.

    There is no correction for bias, which would be wrong for a correlation near 0.
    """
    value, low, high = values[0], values[1:].quantile(0.025), values[1:].quantile(0.975)
    return Interval(float(value), float(low), float(high))


def _cosine(moment: Tensor, directions: Tensor) -> Tensor:
    """Mean cosine of C v and v over the columns v of (D, k)."""
    return F.cosine_similarity(moment @ directions, directions, dim=0).mean()


def _leading(moment: Tensor) -> tuple[Tensor, int]:
    """Eigenvectors (D, D), largest eigenvalue first, and how many make the body."""
    values, vectors = torch.linalg.eigh(moment)
    return vectors.flip(1), int((values.flip(0).cumsum(0) < BODY_ENERGY * values.sum()).sum()) + 1


def alignment_between(online: Tensor, target: Tensor) -> Alignment:
    """Alignment of the branches' eigenspaces, from rows (V, N, D) of each; mean over views and halves."""
    generator = torch.Generator().manual_seed(0)
    square = torch.randn(online.shape[2], online.shape[2], generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(square)[0].to(online.device)
    values, crossed, ceiling, chance, published = [], [], [], [], []
    for o, t in zip(online, target, strict=True):
        moment = second_moment(unit_rows(o))
        vectors, body = _leading(second_moment(unit_rows(t)))
        values.append(_cosine(moment, vectors[:, :body]))
        published.append(_cosine(moment, vectors[:, :PUBLISHED_DIRECTIONS]))
        chance.append(_cosine(moment, rotation))
    for _, t1, o2, t2 in _half_splits(online, target):
        vectors, body = _leading(second_moment(t1))
        moment, own = second_moment(o2), _leading(second_moment(t2))[0]
        shared = own * torch.linalg.eigvalsh(moment).flip(0) @ own.T
        crossed.append(_cosine(moment, vectors[:, :body]))
        ceiling.append(_cosine(shared, vectors[:, :body]))
    return Alignment(*(float(torch.stack(x).mean()) for x in (values, crossed, ceiling, chance, published)))
