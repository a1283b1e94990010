"""Prototypes: scores of features against learned unit vectors (SwAV's prototypes, DINO's last layer)."""

import torch.nn.functional as F
from torch import Tensor, nn

from fastrdm.methods.transform import BranchContext, Kind, Transform, TransformContext
from fastrdm.methods.transform_settings import PrototypesConfig as PrototypesConfig


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
