"""What a regularizer is: a penalty on rows of the online network, added to the loss that compares the branches."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastrdm import parts
from fastrdm.kernels.collectives import process_count
from fastrdm.methods.regularizer_settings import RegularizerConfig as RegularizerConfig
from fastrdm.methods.regularizer_settings import regularizer_row
from fastrdm.runtime.distributed import sum_with_gradient


class RegularizerContext(NamedTuple):
    """What a regularizer is told when it is built."""

    width: int  # D of its rows
    batch_size: int  # images a step over all processes


class Regularizer(nn.Module):
    """Rows (V, B, D) of V views to a penalty, 0-d: the mean over views of a function of the rows of all processes.

    A subclass annotates the parameter `config` of its constructor with its own settings. Rows of other processes come
    through `gather_rows_with_gradient` and `sum_with_gradient`.
    """

    def __init__(self, config: RegularizerConfig, context: RegularizerContext) -> None:
        super().__init__()

    def set_step(self, step: int) -> None:
        """Write what changes with the step into device tensors, before the forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError(f"{type(self).__name__} has no forward")


def row_count(x: Tensor) -> int:
    """Rows of each view of x (V, B, D), over all processes."""
    return x.shape[-2] * process_count()


def centered(x: Tensor) -> Tensor:
    """x (V, B, D) minus the mean row of each view over all processes."""
    return x - sum_with_gradient(x.sum(-2, keepdim=True)) / row_count(x)


def second_moment(x: Tensor) -> Tensor:
    """Sum over the rows of all processes of the outer products of x (V, B, D) with itself: (V, D, D)."""
    return sum_with_gradient(x.mT @ x)


def off_diagonal(matrix: Tensor) -> Tensor:
    """(..., D, D) with zeros on its diagonal."""
    return matrix - torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1))


def own_regularizer(name: str) -> type[Regularizer]:
    """The class that package.module:Class stands for; ValueError where there is none."""
    own: type[Regularizer] = parts.load(
        name, "", lambda x: isinstance(x, type) and issubclass(x, Regularizer), "a class derived from Regularizer"
    )
    return own


def find_regularizer(name: str) -> type[Regularizer]:
    """The class of that name, or the one that package.module:Class stands for; ValueError where there is none."""
    if parts.is_own(name):
        return own_regularizer(name)
    found: type[Regularizer] = parts.of_ours(regularizer_row(name).code)
    return found
