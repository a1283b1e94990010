"""Stop-gradient on the target branch."""

from typing import Literal

from pydantic.dataclasses import dataclass
from torch import Tensor

from fastrdm.methods.transform import BranchContext, Transform, TransformContext
from fastrdm.schema import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StopConfig:
    """Stop-gradient."""

    name: Literal["stop"] = "stop"


class Stop(Transform):
    """sg(z)."""

    def __init__(self, config: StopConfig, context: TransformContext) -> None:
        super().__init__()

    def forward(self, x: Tensor, branch: BranchContext) -> Tensor:
        return x.detach()
