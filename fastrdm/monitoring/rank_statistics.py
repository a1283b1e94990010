"""Statistics of a set of rows from its moments: effective ranks, their difference and interval, RankMe, LiDAR."""

import math
from typing import Any, NamedTuple

import torch
from scipy.linalg import eigh
from scipy.special import stdtrit
from torch import Tensor

from fastrdm.kernels.linalg.effective_rank import entropy_rank
from fastrdm.monitoring.moments import Moments
from fastrdm.monitoring.settings import CENTERED_CONVENTION as CENTERED_CONVENTION
from fastrdm.monitoring.settings import HEADLINE_CONVENTION as HEADLINE_CONVENTION
from fastrdm.monitoring.settings import Convention as Convention

MAX_POINTS = 128  # eigenvalues of a spectrum in spectra.jsonl, evenly spaced in the logarithm of their index
ENERGY_KEPT = 0.9999  # of the sum of eigenvalues, in the directions that a filter is judged on (RDM, figure 4)
SMALLEST = torch.finfo(torch.float64).tiny  # in place of a sum of eigenvalues that are all 0


class Eigen(NamedTuple):
    """Eigenvalues (D,) float64, descending, and eigenvectors (D, D) as columns of a second moment.

    Eigenvectors are float64 too; those of `lean_eigen` may be float32, or (D, 0) where they were not asked for.
    """

    values: Tensor
    vectors: Tensor


def eigen(moments: Moments, center: bool = False) -> Eigen:
    """Eigenvalues and eigenvectors of the second moment over all groups, about the mean where `center`.

    Eigenvalues that rounding alone could have produced are set to 0.
    """
    values, vectors = torch.linalg.eigh(moments.matrix(center))
    return _descending(moments, values, vectors)


def lean_eigen(moments: Moments, center: bool = False, vectors: bool = True) -> Eigen:
    """`eigen`, on a CPU in the moments' own dtype and in place, without `vectors` where they are not asked for.

    In float32 it takes a third of the time and at most two matrices of memory. Eigenvalues are off by less than what
    is set to 0.
    """
    if moments.first.device.type != "cpu":
        matrix = moments.matrix(center)
        if vectors:
            return _descending(moments, *torch.linalg.eigh(matrix))
        return _descending(moments, torch.linalg.eigvalsh(matrix), matrix[:, :0])
    # Symmetric, so its transpose, in the order that LAPACK overwrites, is the matrix. For values alone ev is the
    # fastest; with vectors evr needs no workspace beside them.
    matrix = moments.matrix(center, dtype=moments.panels[0].dtype)
    how: dict[str, Any] = {"overwrite_a": True, "check_finite": False}
    if not vectors:
        values = eigh(matrix.numpy().T, eigvals_only=True, driver="ev", **how)
        return _descending(moments, torch.from_numpy(values).double(), matrix[:, :0])
    found = [torch.from_numpy(x) for x in eigh(matrix.numpy().T, driver="evr", **how)]
    del matrix
    return _descending(moments, found[0].double(), found[1])


def _descending(moments: Moments, values: Tensor, vectors: Tensor) -> Eigen:
    return Eigen(torch.where(values > moments.noise, values, 0.0).flip(-1), vectors.flip(-1))


def rank(spectrum: Eigen, kind: str) -> float:
    """Effective rank of eigenvalues (`erank_l`) or of singular values (`erank_s`)."""
    return entropy_rank(spectrum.values.sqrt() if kind == "erank_s" else spectrum.values).item()


def derivative(values: Tensor) -> Tensor:
    """Derivative (D,) of the effective rank `erank_l` with respect to each eigenvalue; 0 at eigenvalues that are 0."""
    total = values.sum().clamp_min(SMALLEST)
    shares = values / total
    entropy = -torch.special.xlogy(shares, shares).sum()
    return torch.where(shares > 0, -entropy.exp() * (shares.log() + entropy) / total, 0.0)


def influence(moments: Moments, spectrum: Eigen, center: bool) -> Tensor:
    """Influence (G,) of each group on the effective rank `erank_l` of all rows, up to a constant; on the CPU.

    To first order: the gradient of exp(H), H = - sum q ln q, with respect to the matrix, applied to each group's
    own moment.
    """
    gradient = (spectrum.vectors * derivative(spectrum.values)) @ spectrum.vectors.mT
    rows = moments.rows.to(gradient.device)
    effect = torch.stack([(moments.second(g) * gradient).sum() for g in range(len(rows))]) / rows
    if center:
        effect = effect - 2 * moments.first @ gradient @ moments.mean / rows
    return effect.cpu()


def half_width(effects: Tensor, shares: Tensor) -> float:
    """Half-width of the 95 % confidence interval of a statistic, by Student's t with G - 1 degrees of freedom.

    `effects` (G,) are the influences of the groups on it, `shares` (G,) their shares of the rows.
    """
    groups = len(effects)
    centered = effects - (shares * effects).sum()
    variance = groups / (groups - 1) * (shares * centered).square().sum()
    return float(stdtrit(groups - 1, 0.975)) * math.sqrt(variance.item())


def sampled_half_width(effects: Tensor, clusters: Tensor, images: int) -> float:
    """Half-width of the 95 % confidence interval of a statistic of `images` images, from a sample of them.

    `effects` (N,) are the influences of the sample's images, `clusters` (N,) say which were drawn together. The spread
    of the clusters' means holds what ties images of a cluster, and the images' own spread over N; of that, only its
    share over all images is kept. Never below the interval of independent images.
    """
    _, place, counts = clusters.unique(return_inverse=True, return_counts=True)
    groups, sample = len(counts), len(effects)
    means = effects.new_zeros(groups).index_add_(0, place, effects) / counts
    within = (effects - means[place]).square().sum() / max(sample - groups, 1)
    between = groups / (groups - 1) * (counts / sample * (means - effects.mean())).square().sum()
    variance = torch.maximum(between - within * (1 / sample - 1 / images), within / images)
    return float(stdtrit(groups - 1, 0.975)) * math.sqrt(variance.item())


Population = tuple[Moments, Eigen]


def difference(a: Population, b: Population, center: bool, key: str) -> dict[str, float]:
    """Rank `erank_l` of `a` minus that of `b` under `key`, and the ends of its interval where there are groups.

    The groups of both hold the same images, so that what they share does not widen the interval.
    """
    value = rank(a[1], "erank_l") - rank(b[1], "erank_l")
    shares = a[0].rows / a[0].rows.sum()
    if len(shares) < 2:
        return {key: value}
    half = half_width(influence(*a, center) - influence(*b, center), shares)
    return {key: value, f"{key}/low": value - half, f"{key}/high": value + half}


def negative_share(target: Eigen, cross: Moments) -> float:
    """Share of the target's directions v with v^T W v < 0, W the least-squares map from target to online rows.

    `cross` is the moment of online and target rows of the same view. The directions are the leading ones, which hold
    ENERGY_KEPT of the sum of eigenvalues. W's estimate along v is v^T E[p z^T] v / lambda.
    """
    held = target.values.cumsum(0) - target.values < ENERGY_KEPT * target.values.sum()
    weights = ((cross.matrix() @ target.vectors) * target.vectors).sum(0)
    return (weights[held] < 0).sum().item() / max(held.sum().item(), 1)


def lidar(half_sum: Moments, half_difference: Moments, delta: float = 1e-4) -> float:
    """Effective rank of the LDA matrix, the two views of an image as its class (Thilak et al. 2023, section 4).

    S_w^-1/2 S_b S_w^-1/2, S_b the covariance of the images' means, S_w the mean square about them plus `delta`.
    Both published summands epsilon (1e-7) are left out.
    """
    within = half_difference.matrix()
    within = within + delta * torch.eye(len(within), dtype=within.dtype, device=within.device)
    root = torch.linalg.cholesky(within)
    left = torch.linalg.solve_triangular(root, half_sum.matrix(center=True), upper=False)
    whitened = torch.linalg.solve_triangular(root, left.mT, upper=False)
    return entropy_rank(torch.linalg.eigvalsh(whitened).clamp_min(0)).item()


def log_spaced(width: int) -> list[int]:
    """At most MAX_POINTS integers from 1 to `width`, evenly spaced in their logarithm."""
    return sorted({round(width ** (i / (MAX_POINTS - 1))) for i in range(MAX_POINTS)})


def spectrum_points(spectrum: Eigen) -> dict[str, list[int] | list[float]]:
    """At most MAX_POINTS eigenvalues as shares of their sum, and their indices from 1, for spectra.jsonl."""
    ranks = log_spaced(len(spectrum.values))
    shares = (spectrum.values / spectrum.values.sum().clamp_min(SMALLEST)).tolist()
    return {"ranks": ranks, "eigenvalues": [shares[i - 1] for i in ranks]}
