"""A dual branch small enough for float64 and formulas by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from fastrdm.kernels.batchnorm import ViewBatchNorm
from fastrdm.methods.dual_branch import DualBranch, MethodConfig
from fastrdm.methods.transform import TransformContext
from fastrdm.schema import Horizon

HORIZON = Horizon(steps_per_epoch=5, total=20)
HEAD = {"layers": 2, "hidden": 7, "out": 5}


class TinyEncoder(nn.Sequential):
    """(N, 3, H, W) to (N, 6) features, any H and W."""

    features = 6

    def __init__(self) -> None:
        convolution = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        super().__init__(convolution, ViewBatchNorm(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.fixture
def branch() -> Callable[..., DualBranch]:
    """Build a DualBranch of a method written as in YAML, in training mode."""

    def build(
        method: dict[str, Any],
        *,
        batch_size: int = 8,
        dtype: torch.dtype = torch.float64,
        precision: torch.dtype | None = None,
        horizon: Horizon = HORIZON,
    ) -> DualBranch:
        config = TypeAdapter(MethodConfig).validate_python({"projector": HEAD, **method})
        torch.manual_seed(0)
        built = DualBranch(config, TinyEncoder(), horizon, batch_size=batch_size, precision=precision).to(dtype)
        if built.target is not None:  # a target that is not the online network, as after some steps
            for p in built.target.parameters():
                p.mul_(1 + 0.2 * torch.rand_like(p))
        return built

    return build


@pytest.fixture
def views() -> Callable[..., list[Tensor]]:
    """Draw different views (B, 3, S, S), one for each size."""

    def draw(*sizes: int, batch: int = 8, seed: int = 1, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [
            torch.randn(batch, 3, s, s, generator=generator, dtype=torch.float64).to(dtype) for s in sizes or (8, 8)
        ]

    return draw


@pytest.fixture
def place() -> Callable[..., TransformContext]:
    """What a transform is told when it is built."""

    def make(side: Any = "online", width: int = 5, prototypes: int | None = None, **other: Any) -> TransformContext:
        values: dict[str, Any] = {"batch_size": 4, "sync_bn": True, "horizon": HORIZON, **other}
        return TransformContext(side=side, width=width, prototypes=prototypes, **values)

    return make
