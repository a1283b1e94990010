"""Rank measures of feature matrices, from the eigenvalues of their smaller Gram matrix."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastrdm.kernels.linalg.gram import choose, gram_of_one
from fastrdm.kernels.linalg.matmul import power_of_two
from fastrdm.kernels.triton_support import triton_module

Convention = Literal["eigenvalues", "singular_values"]


class SpectrumStats(NamedTuple):
    """Spectral statistics of K Gram matrices with eigenvalues l, each (K,) in their dtype; NaN where not `ok`."""

    eigenvalues: Tensor
    """(K, n), descending; 0 where rounding alone could have made them."""
    erank_l: Tensor
    """Effective rank of the eigenvalues (the RDM paper's convention)."""
    erank_s: Tensor
    """Effective rank of the singular values, the eigenvalues' square roots (RankMe's convention)."""
    participation_ratio: Tensor
    """(sum l)^2 / sum l^2."""
    stable_rank: Tensor
    """sum l / max l."""
    topk: Tensor
    """(K, k): the largest eigenvalues as shares of their sum."""
    slope: Tensor
    """Least-squares slope of -ln l over ln(index) inside `slope_range`: alpha-ReQ's exponent."""
    ok: Tensor
    """(K,) bool: every entry of the Gram matrix is finite."""


def spectrum(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (..., n), descending, of Gram matrices (..., n, n), and whether each was finite; NaN where not.

    Values within 8 eps of 0, relative to the largest, are 0. On CUDA the library's solver makes the host wait. Only the
    upper triangles are read (on an AMD EPYC MKL takes them some 5 % sooner than the lower ones).
    """
    # The largest magnitude says it four times as fast as isfinite of every entry.
    ok = matrix.abs().amax((-2, -1)).isfinite()
    values = torch.linalg.eigvalsh(torch.where(ok[..., None, None], matrix, 0.0), UPLO="U").flip(-1)
    noise = 8 * torch.finfo(values.dtype).eps * values[..., :1]
    return torch.where(ok[..., None], torch.where(values > noise, values, 0.0), torch.nan), ok


def _shares(values: Tensor) -> Tensor:
    total = values.sum(-1, keepdim=True)
    return values / torch.where(total == 0, 1.0, total)


def entropy_rank(values: Tensor) -> Tensor:
    """exp(- sum q ln q), q = values / sum, over the last axis (Roy and Vetterli 2007); 0 where all values are 0."""
    shares = _shares(values)
    rank = torch.exp(-torch.special.xlogy(shares, shares).sum(-1))
    return torch.where((values == 0).all(-1), 0.0, rank)


def _slope(values: Tensor, first: int, share: float) -> Tensor:
    """Least-squares slope of -ln(value) over ln(index), for indices from `first` to share * n, counted from 1.

    0 where fewer than two values there are positive.
    """
    index = torch.arange(1, values.shape[-1] + 1, dtype=values.dtype, device=values.device)
    inside = (values > 0) & (index >= first) & (index <= share * values.shape[-1])
    weight = inside.to(values.dtype)
    x, y = index.log(), torch.where(inside, values, 1.0).log()
    count = weight.sum(-1, keepdim=True).clamp_min(1)
    dx = weight * (x - (weight * x).sum(-1, keepdim=True) / count)
    spread = (dx * dx).sum(-1)
    return -(dx * y).sum(-1) / torch.where(spread == 0, 1.0, spread) + 0 * values[..., 0]


@torch.no_grad()
def spectrum_stats(matrix: Tensor, *, topk: int = 8, slope_range: tuple[int, float] = (4, 0.5)) -> SpectrumStats:
    """Statistics of Gram matrices (n, n) or (K, n, n), as made by `gram`, on their device; zero matrices give zeros.

    `slope_range` is the first index, from 1, and the last as a share of n; rows and columns of zero padding count in n.
    """
    if matrix.ndim not in (2, 3) or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"spectrum_stats takes Gram matrices (n, n) or (K, n, n), got {tuple(matrix.shape)}")
    return statistics(*spectrum(matrix), topk=topk, slope_range=slope_range)


def statistics(
    values: Tensor, ok: Tensor, *, topk: int = 8, slope_range: tuple[int, float] = (4, 0.5)
) -> SpectrumStats:
    """Statistics of spectra (..., n), descending, none below 0; `ok` (...) says whether each matrix was finite."""
    shares = _shares(values)
    largest = shares[..., 0]
    return SpectrumStats(
        eigenvalues=values,
        erank_l=entropy_rank(values),
        erank_s=entropy_rank(values.sqrt()),
        participation_ratio=_reciprocal((shares * shares).sum(-1)),
        stable_rank=_reciprocal(largest),
        topk=shares[..., :topk],
        slope=_slope(values, *slope_range),
        ok=ok,
    )


def _reciprocal(x: Tensor) -> Tensor:
    return torch.where(x == 0, 0.0, 1 / torch.where(x == 0, 1.0, x))


@torch.no_grad()
def effective_rank(
    x: Tensor,
    *,
    convention: Convention = "eigenvalues",
    center: bool = False,
    normalize: bool = False,
    precision: Literal["fp64", "fp32"] = "fp64",
) -> Tensor:
    """exp of the spectral entropy (Roy and Vetterli 2007) of features (B, D) -> (), or (K, B, D) -> (K,), no gradient.

    `eigenvalues` of x^T x (the paper's) or `singular_values` of x (RankMe's), scaled to sum 1, natural logarithm. Rows
    are first scaled to length 1 (`normalize`), then column means subtracted (`center`). Zero gives 0, as
    do no rows; NaN or inf gives NaN.
    Computed and returned in float64, or at twice the speed in float32, good to 1e-5 while s_max / s_min < 1e3.
    """
    if convention not in ("eigenvalues", "singular_values"):
        raise ValueError(f"convention must be eigenvalues or singular_values, got {convention!r}")
    if x.ndim not in (2, 3) or not x.is_floating_point():
        raise ValueError(f"effective_rank takes floats of shape (B, D) or (K, B, D), got {tuple(x.shape)} {x.dtype}")
    if precision not in ("fp64", "fp32"):
        raise ValueError(f"precision must be fp64 or fp32, got {precision!r}")
    if x.numel() == 0:
        return x.new_zeros(x.shape[:-2], dtype=torch.float64 if precision == "fp64" else torch.float32)
    # Ranks do not hang on the scale, squares do: at 1e200 they overflow, at 1e-200 they vanish.
    wide = x if x.dtype == torch.float64 else x.float()
    scaled = wide / (power_of_two(wide.unsqueeze(-2)).squeeze(-2) if normalize else power_of_two(wide))
    values, _ = spectrum(gram_of_one(scaled, center, normalize, precision, upper=True))
    return entropy_rank(values.sqrt() if convention == "singular_values" else values)


@torch.no_grad()
def unit_grams(inputs: Sequence[Tensor], centers: Sequence[bool]) -> list[list[Tensor]]:
    """Gram matrices (K, n, n) float64 of the rows of each input (K, B, D) at length 1, one for each of `centers`.

    Made for effective ranks: nothing below the diagonal counts. float64 on a CPU. On CUDA, where Triton is installed,
    float16 and bfloat16 rows are multiplied as they are, all inputs with as many rows at once, and others in three
    float16 products. Both ways rows that are nearly alike keep their spectrum, because what they share is subtracted
    before anything is rounded. Taken out of the Gram matrix of raw bfloat16 rows instead, it would leave a rank that
    is 8 % off where rows differ by a thousandth, and twice too large where they differ by a tenth of that.
    """
    grams: list[list[Tensor]] = [[] for _ in inputs]
    together: dict[tuple[torch.dtype, torch.Size], list[int]] = {}
    for place, x in enumerate(inputs):
        name = choose("auto", x)
        if name == "half-triton":
            together.setdefault((x.dtype, x.shape[:2]), []).append(place)
        else:
            precision = name if name == "fp16x3-triton" else "fp64"
            grams[place] = [gram_of_one(x, center, True, precision, upper=True).double() for center in centers]
    for places in together.values():
        half_grams = triton_module("linalg.half_gram_triton").half_grams
        found = half_grams([inputs[place] for place in places], centers, True, torch.float64)
        for place, matrices in zip(places, found, strict=True):
            grams[place] = matrices
    return grams


@torch.no_grad()
def effective_ranks(grams: Sequence[Tensor]) -> list[Tensor]:
    """Effective ranks (K,) of the eigenvalues of each of several stacks of Gram matrices (K, n, n), in their dtype.

    Stacks with the same n go into one batched eigensolve, and none is padded. Only upper triangles are read. A zero
    matrix gives 0, one with NaN or inf gives NaN.
    """
    ranks: list[Tensor] = list(grams)
    for size in {matrix.shape[-1] for matrix in grams}:
        places = [place for place, matrix in enumerate(grams) if matrix.shape[-1] == size]
        together = entropy_rank(spectrum(torch.cat([grams[place] for place in places]))[0])
        for place, found in zip(places, together.split([len(grams[place]) for place in places]), strict=True):
            ranks[place] = found
    return ranks
