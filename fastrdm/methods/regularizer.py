"""What a regularizer is: a penalty on rows of the online network, added to the loss that compares the branches."""

from typing import Literal, NamedTuple

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastrdm.kernels.collectives import process_count
from fastrdm.runtime.distributed import sum_with_gradient
from fastrdm.schema import STRICT

Of = Literal["projection", "features", "output"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RegularizerConfig:
    """The name of a regularizer, its weight and its rows; one that has settings has a subclass of this."""

    name: str
    """Which regularizer: a name of the table in docs/methods.md, or package.module:Class for one of your own."""

    weight: float = Field(default=1.0, gt=0)
    """Factor of the penalty in the loss."""

    of: Of = "projection"
    """Rows that are penalized: the projection, the encoder's features, or the output of the online transforms, which
    must be features for that.
    """

    views: Literal["all", "global"] = "all"
    """Views whose rows are penalized, each by itself: all, or the global ones, which have targets."""


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
