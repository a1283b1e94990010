"""Stop-gradient on the target branch."""

from typing import Literal

from pydantic.dataclasses import dataclass
from torch import Tensor

from fastrdm.methods.transform import BranchContext, Transform, TransformConfig, TransformContext
from fastrdm.schema import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StopConfig(TransformConfig):
    """Stop-gradient."""

    name: Literal["stop"] = "stop"


class Stop(Transform):
    """Passes its input on and ends the gradient there: sg(z) in SimSiam, algorithm 1."""

    def __init__(self, config: StopConfig, context: TransformContext) -> None:
        super().__init__(config, context)

    def forward(self, x: Tensor, branch: BranchContext) -> Tensor:
        return x.detach()
