"""Prototypes: scores of features against learned unit vectors (SwAV's prototypes, DINO's last layer)."""

from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastrdm.methods.transform import BranchContext, Kind, Transform, TransformConfig, TransformContext
from fastrdm.schema import STRICT, Duration


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PrototypesConfig(TransformConfig):
    """Scores against K learned unit vectors: SwAV's prototypes, DINO's last layer."""

    name: Literal["prototypes"] = "prototypes"

    count: int = Field(default=3000, ge=2)
    """Number of prototypes. The CIFAR scripts use 3000 for SwAV and 4096 for DINO."""

    freeze: Duration = "0ep"
    """Time from the start of the run during which the prototypes are not updated. The authors' scripts use 2ep for SwAV
    and 1ep for DINO.
    """


class Prototypes(Transform):
    """x -> x/|x| . c_k/|c_k|. The layer belongs to the branch's network, so that an EMA target has its own copy."""

    gives: Kind = "scores"

    def __init__(self, config: PrototypesConfig, context: TransformContext) -> None:
        super().__init__(config, context)

    def unfinished(self, duration: str) -> str:
        return "the prototypes never learn"

    def forward(self, x: Tensor, branch: BranchContext) -> Tensor:
        assert branch.score is not None
        branch.scored, branch.scores = x, branch.score(x)
        return branch.scores


class PrototypeLayer(nn.Module):
    """Cosines of (..., D) features with K prototypes: weight norm with its gain fixed at 1."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.weight = nn.Linear(width, count, bias=False).weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))
