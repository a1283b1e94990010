"""Centering and sharpening of the target's scores (DINO)."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrdm.kernels.collectives import process_count
from fastrdm.methods.transform import BranchContext, Kind, Transform, TransformContext
from fastrdm.methods.transform_settings import CenterSharpenConfig as CenterSharpenConfig
from fastrdm.optim.schedules import linear_ramp
from fastrdm.runtime.distributed import sum_over_processes


class CenterSharpen(Transform):
    """Scores to probabilities; the center then moves towards the mean score over views, rows and processes."""

    takes: Kind = "scores"
    gives: Kind = "probabilities"
    center: Tensor
    temperature: Tensor

    def __init__(self, config: CenterSharpenConfig, context: TransformContext) -> None:
        super().__init__(config, context)
        self.config = config
        self.warmup = min(context.horizon.steps(config.warmup), context.horizon.total)
        assert context.prototypes is not None
        self.register_buffer("center", torch.zeros(context.prototypes))
        self.register_buffer("temperature", torch.tensor(config.warmup_temperature), persistent=False)

    def set_step(self, step: int) -> None:
        self.temperature.fill_(linear_ramp(step, self.warmup, self.config.warmup_temperature, self.config.temperature))

    def ramps(self) -> Iterator[tuple[int, str]]:
        yield self.warmup, f"center_sharpen: temperature reaches {self.config.temperature:g}"

    def unfinished(self, duration: str) -> str:
        return "the temperature rises over the whole run instead"

    @torch.no_grad()
    def forward(self, x: Tensor, branch: BranchContext) -> Tensor:
        out = F.softmax((x - self.center) / self.temperature, dim=-1)
        if self.training:
            mean = sum_over_processes(x.mean((0, 1))) / process_count()
            self.center.lerp_(mean.to(self.center.dtype), 1 - self.config.momentum)
        return out
