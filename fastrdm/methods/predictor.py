"""The predictor: a learned head on the online branch (SimSiam, BYOL)."""

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastrdm.methods.transform import BranchContext, Transform, TransformConfig, TransformContext
from fastrdm.models.heads import Head, HeadConfig
from fastrdm.schema import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PredictorConfig(TransformConfig):
    """A learned head (SimSiam, BYOL): Linear-BN-ReLU-Linear, its output as wide as its input."""

    name: Literal["predictor"] = "predictor"

    hidden: int | None = Field(default=None, ge=1)
    """Features of the predictor's hidden layer. `null` takes a quarter of the projection's features, as SimSiam does;
    BYOL's CIFAR script uses 4096.
    """

    bias: bool = False
    """Give the predictor's first layer, which a BatchNorm follows, a bias. SimSiam has none, BYOL has one."""

    constant_lr: bool = True
    """Keep the predictor's learning rate at its base value, without warm-up and decay, as SimSiam does. BYOL's follows
    the schedule.
    """


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
