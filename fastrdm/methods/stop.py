"""Stop-gradient on the target branch."""

from torch import Tensor

from fastrdm.methods.transform import BranchContext, Transform, TransformContext
from fastrdm.methods.transform_settings import StopConfig as StopConfig


class Stop(Transform):
    """Passes its input on and ends the gradient there: sg(z) in SimSiam, algorithm 1."""

    def __init__(self, config: StopConfig, context: TransformContext) -> None:
        super().__init__(config, context)

    def forward(self, x: Tensor, branch: BranchContext) -> Tensor:
        return x.detach()
