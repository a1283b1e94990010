"""What a transform is, and those that carry gradient: the predictor, the spectral filter, the prototypes."""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass as plain_dataclass
from typing import Literal, NamedTuple

from torch import Tensor, nn

from fastrdm.schema import Horizon

Kind = Literal["features", "scores", "probabilities"]
Side = Literal["online", "target"]


class TransformContext(NamedTuple):
    """What a transform is told when it is built."""

    side: Side
    width: int  # D of the projection
    prototypes: int | None  # K, where this method has prototypes
    batch_size: int  # images a step over all processes
    sync_bn: bool
    horizon: Horizon


@plain_dataclass
class BranchContext:
    """What a transform may ask of the branch it runs in, besides its input."""

    other: Tensor | None  # the other branch's projection of the partner view, (V, B, D), without gradient
    score: Callable[[Tensor], Tensor] | None  # this branch's prototypes: features (..., D) to scores (..., K)
    scored: Tensor | None = None  # the features (V, B, D) that the prototypes of this branch scored
    scores: Tensor | None = None  # and their scores (V, B, K)


class Transform(nn.Module):
    """One step of a branch: (V, B, D) of kind `takes` to (V, B, K) of kind `gives`; V views of B images."""

    takes: Kind = "features"
    gives: Kind = "features"
    constant_lr = False  # whether its parameters keep the base rate throughout
    phase: Hashable = None  # what decides at this step which work is done, besides the numbers in tensors

    def set_step(self, step: int) -> None:
        """Write what changes with the step into device tensors, before the forward pass."""

    def phases(self) -> Iterator[tuple[int, str]]:
        """The steps at which `phase` changes, and to what."""
        yield from ()

    def forward(self, x: Tensor, branch: BranchContext) -> Tensor:
        raise AssertionError(f"{type(self).__name__} has no forward")
