"""Rank measures of feature matrices, from the eigenvalues of their smaller Gram matrix."""

from typing import Literal

import torch
from torch import Tensor

Convention = Literal["eigenvalues", "singular_values"]


def _gram_eigenvalues(x: Tensor, center: bool, normalize: bool) -> Tensor:
    x = x.detach().double()
    if normalize:
        x = torch.nn.functional.normalize(x, dim=-1)
    if center:
        x = x - x.mean(-2, keepdim=True)
    gram = x @ x.mT if x.shape[-2] <= x.shape[-1] else x.mT @ x
    fine = gram.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    values = torch.linalg.eigvalsh(torch.where(fine, gram, 0.0)).clamp_min(0)
    noise = 8 * torch.finfo(values.dtype).eps * values.amax(-1, keepdim=True)  # what rounding leaves of a zero
    return torch.where(fine[..., 0], torch.where(values > noise, values, 0.0), torch.nan)


def effective_rank(
    x: Tensor, *, convention: Convention = "eigenvalues", center: bool = False, normalize: bool = False
) -> Tensor:
    """exp of the spectral entropy (Roy and Vetterli 2007) of features (B, D) -> (), or (K, B, D) -> (K,), in float64.

    `eigenvalues` of x^T x (the paper's) or `singular_values` of x (RankMe's), scaled to sum 1, natural logarithm. Rows
    are first scaled to length 1 (`normalize`), then column means subtracted (`center`). Zero gives 0, NaN or inf NaN.
    """
    if convention not in ("eigenvalues", "singular_values"):
        raise ValueError(f"convention must be eigenvalues or singular_values, got {convention!r}")
    if x.ndim not in (2, 3) or not x.is_floating_point():
        raise ValueError(f"effective_rank takes floats of shape (B, D) or (K, B, D), got {tuple(x.shape)} {x.dtype}")
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        values = _gram_eigenvalues(x, center, normalize)
        values = values.sqrt() if convention == "singular_values" else values
        total = values.sum(-1, keepdim=True)
        shares = values / torch.where(total == 0, 1.0, total)
        entropy = -torch.special.xlogy(shares, shares).sum(-1)
        return torch.where(total[..., 0] == 0, 0.0, entropy.exp())
