"""The interface of a transform, which is one step of a branch: what it receives when it is built and when it runs."""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass as plain_dataclass
from typing import Literal, NamedTuple

from torch import Tensor, nn

from fastrdm import parts
from fastrdm.methods.transform_settings import Kind as Kind
from fastrdm.methods.transform_settings import TransformConfig as TransformConfig
from fastrdm.methods.transform_settings import transform_row
from fastrdm.schema import Horizon

Side = Literal["online", "target"]


class TransformContext(NamedTuple):
    """The arguments with which a transform is built."""

    side: Side
    width: int  # D of the projection
    prototypes: int | None  # K, where this method has prototypes
    batch_size: int  # images a step over all processes
    sync_bn: bool
    horizon: Horizon
    target_views: int = 2  # global views, which have targets


@plain_dataclass
class BranchContext:
    """The parts of its branch that a transform may use besides its input."""

    other: Tensor | None  # the other branch's projection of the partner view, (V, B, D), without gradient
    score: Callable[[Tensor], Tensor] | None  # this branch's prototypes: features (..., D) to scores (..., K)
    scored: Tensor | None = None  # the features (V, B, D) that the prototypes of this branch scored
    scores: Tensor | None = None  # and their scores (V, B, K)


class Transform(nn.Module):
    """One step of a branch: (V, B, D) of kind `takes` to (V, B, K) of kind `gives`, for V views of B images.

    A subclass annotates the parameter `config` of its constructor with its own settings.
    """

    takes: Kind = "features"
    gives: Kind = "features"
    constant_lr = False  # whether its parameters keep the base rate throughout
    shared = False  # whether it is the same on both branches, gradient included: lists that are alike then run once
    wide_loss = False  # whether the loss behind it on the online branch is taken in float64
    phase: Hashable = None  # what decides at this step which work is done, besides the numbers in tensors

    def __init__(self, config: TransformConfig, context: TransformContext) -> None:
        super().__init__()

    @staticmethod
    def waits(config: TransformConfig) -> bool:
        """Whether the transform, so set, calls a library that makes the host wait: a CUDA graph cannot record that."""
        return False

    def set_step(self, step: int) -> None:
        """Write what changes with the step into device tensors, before the forward pass."""

    def phases(self) -> Iterator[tuple[int, str]]:
        """Each step at which `phase` changes, and a line that says to what."""
        yield from ()

    def ramps(self) -> Iterator[tuple[int, str]]:
        """Each step at which a value that moves with the steps reaches its end, and a line that says to what."""
        yield from ()

    def unfinished(self, duration: str) -> str | None:
        """Say what follows if the run ends before this duration of the settings is over, None if nothing does."""
        return "it never ends"

    def forward(self, x: Tensor, branch: BranchContext) -> Tensor:
        raise AssertionError(f"{type(self).__name__} has no forward")


def own_transform(name: str) -> type[Transform]:
    """The class that package.module:Class stands for; ValueError where there is none."""
    own: type[Transform] = parts.load(name, "", _is_transform, "a class derived from fastrdm's Transform")
    return own


def _is_transform(found: object) -> bool:
    return isinstance(found, type) and issubclass(found, Transform)


def find_transform(name: str) -> type[Transform]:
    """The class of that name, or the one that package.module:Class stands for; ValueError where there is none."""
    if parts.is_own(name):
        return own_transform(name)
    found: type[Transform] = parts.of_ours(transform_row(name).code)
    return found
