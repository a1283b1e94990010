"""The direction in which collapsed features all point, taken out so that what remains has the whole range to itself."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastrdm.kernels.linalg.matmul import power_of_two

ROUNDS = 3  # of the power iteration; each divides the error by at least 1 / ALONE^2
ALONE = 1 / 20  # what remains, in Frobenius norm, as a share of the singular value that is taken out, at most


class Dominant(NamedTuple):
    """The largest singular value of V matrices (V, n, d) and its vectors; all zero where it does not stand alone."""

    left: Tensor
    """(V, n, 1) float64."""
    size: Tensor
    """(V, 1, 1) float64."""
    right: Tensor
    """(V, d, 1) float64."""


def split_dominant(x: Tensor) -> tuple[Dominant, Tensor]:
    """The dominant direction of x (V, n, d), and x without it in x's dtype: x itself, bit for bit, where there is none.

    Nothing waits for the host: whether the direction stands alone is decided on the device. Products with vectors are
    float64, so that what remains is as exact as x's own rounding lets it be.
    """
    unit = power_of_two(x).double()
    wide = x.double() / unit
    longest = wide.square().sum(-1, keepdim=True).argmax(1, keepdim=True)
    right = _unit(wide.gather(1, longest.expand(-1, 1, wide.shape[-1])).mT)
    for _ in range(ROUNDS):
        left = _unit(wide @ right)
        along = wide.mT @ left
        right = _unit(along)
    size = torch.linalg.matrix_norm(along, keepdim=True)
    rest = torch.baddbmm(wide, left * size, right.mT, alpha=-1)
    alone = (torch.linalg.matrix_norm(rest, keepdim=True) <= ALONE * size) & (size > 0)
    found = Dominant(*(torch.where(alone, part, 0.0) for part in (left, size * unit, right)))
    return found, (torch.where(alone, rest, wide) * unit).to(x.dtype)


def _unit(x: Tensor) -> Tensor:
    length = torch.linalg.matrix_norm(x, keepdim=True)
    return x / torch.where(length == 0, 1.0, length)
