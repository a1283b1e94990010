"""The predictor: a learned head on the online branch (SimSiam, BYOL)."""

from torch import Tensor

from fastrdm.methods.transform import BranchContext, Transform, TransformContext
from fastrdm.methods.transform_settings import PredictorConfig as PredictorConfig
from fastrdm.models.heads import Head, HeadConfig


class Predictor(Transform):
    """z -> h(z); BatchNorm statistics per view like everywhere."""

    def __init__(self, config: PredictorConfig, context: TransformContext) -> None:
        super().__init__(config, context)
        self.constant_lr = config.constant_lr
        hidden = config.hidden or max(context.width // 4, 1)
        head = HeadConfig(layers=2, hidden=hidden, out=context.width, bias=config.bias, last_norm="none")
        self.head = Head(head, context.width, context.sync_bn)

    def forward(self, x: Tensor, branch: BranchContext) -> Tensor:
        out: Tensor = self.head(x.flatten(0, 1))
        return out.view(*x.shape)
