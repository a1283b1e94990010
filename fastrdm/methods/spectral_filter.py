"""The spectral filter of the Rank Differential Mechanism as a transform of either branch."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastrdm import parts
from fastrdm.kernels.collectives import process_count, process_rank
from fastrdm.kernels.spectral.filter_factors import CUTOFF, filter_function
from fastrdm.kernels.spectral.spectral_filter import spectral_filter
from fastrdm.methods.transform import BranchContext, Transform, TransformContext
from fastrdm.methods.transform_settings import FilterConfig as FilterConfig
from fastrdm.methods.transform_settings import TransformConfig, has_weighting, is_normalized
from fastrdm.optim.schedules import linear_ramp
from fastrdm.runtime.distributed import gather_rows, sum_over_processes
from fastrdm.schema import require


def own_function(name: str) -> Callable[[Tensor], Tensor]:
    """The function f that package.module:function stands for; ValueError where there is none."""
    expected = "a function annotated as returning a Tensor"
    own: Callable[[Tensor], Tensor] = parts.load(
        name, "filter.kind", lambda x: not isinstance(x, type) and parts.makes(x, Tensor), expected
    )
    return own


Weights = Callable[[Tensor], Tensor]


class Weighting:
    """The function f of a filter whose weights are no fixed row of the kernels' table.

    Called with singular values (V, n), of which those below the cutoff stand in as the smallest that is kept.
    """

    def __init__(self, config: FilterConfig, own: Weights | None) -> None:
        self.config, self.own = config, own
        self.power = torch.tensor(0.0 if config.power is None else config.power, dtype=torch.float64)

    def __call__(self, s: Tensor) -> Tensor:
        weights = self._plain(s)
        return weights / weights.abs().amax(-1, keepdim=True) if is_normalized(self.config) else weights

    def _plain(self, s: Tensor) -> Tensor:
        if self.own is not None:
            return self.own(s)
        if self.config.strength is not None:
            return 1 - self.config.strength + self.config.strength * s.amax(-1, keepdim=True) / s
        return s**self.power if self.config.kind == "power" else filter_function(self.config.kind).g(s)


class SpectralFilter(Transform):
    """Online: x W with W constant, so that the gradient is g W (isotropic: g). Target: the same without gradient."""

    wide_loss = True
    moment: Tensor
    steps: Tensor

    def __init__(self, config: FilterConfig, context: TransformContext) -> None:
        super().__init__(config, context)
        self.config, self.side = config, context.side
        isotropic = config.gradient == "isotropic"
        require(self.side == "online" or not isotropic, "filter.gradient", "filtered on the target", config.gradient)
        own = own_function(config.kind) if parts.is_own(config.kind) else None
        self.weighting = Weighting(config, own) if has_weighting(config) else None
        self.function: str | Weights = self.weighting or own or config.kind
        self.anneal = min(context.horizon.steps(config.anneal), context.horizon.total)
        if config.momentum is not None:
            self.register_buffer("moment", torch.zeros(context.width, context.width))
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @staticmethod
    def waits(config: TransformConfig) -> bool:
        assert isinstance(config, FilterConfig)
        normalized = is_normalized(config)
        return parts.is_own(config.kind) or config.momentum is not None or normalized or has_weighting(config)

    def set_step(self, step: int) -> None:
        if self.weighting is not None and self.config.power_end is not None:
            assert self.config.power is not None
            self.weighting.power.fill_(linear_ramp(step, self.anneal, self.config.power, self.config.power_end))

    def ramps(self) -> Iterator[tuple[int, str]]:
        if self.config.power_end is not None:
            yield self.anneal, f"filter: power reaches {self.config.power_end:g}"

    def unfinished(self, duration: str) -> None:
        """A shorter run takes its whole length."""

    def forward(self, x: Tensor, branch: BranchContext) -> Tensor:
        if self.side == "target":
            return self._weighted(x.detach(), branch)
        if self.config.gradient == "isotropic":
            # The values of the output with the gradient of x: what is added is zero.
            return self._weighted(x.detach(), branch) + (x - x.detach())
        return self._weighted(x, branch)

    def _weighted(self, x: Tensor, branch: BranchContext) -> Tensor:
        """x W, its floor included."""
        out = self._crossed(x, branch) if self.config.basis == "cross" else self._filtered(x, branch)
        return out + self.config.epsilon * x if self.config.epsilon else out

    def _filtered(self, x: Tensor, branch: BranchContext) -> Tensor:
        c = self.config
        basis = branch.other if c.basis == "other" else None
        power = None if self.weighting is not None else c.power
        if c.momentum is not None:
            rows = x.shape[1] * process_count()
            source = (x if basis is None else basis).detach().flatten(0, 1)
            moment = self._moving(source, source) * rows
            # A moment is rounded before its roots are taken: what lies below its last digit is noise.
            cutoff = max(CUTOFF[x.dtype], torch.finfo(x.dtype).eps ** 0.5) if c.cutoff is None else c.cutoff
            options: dict[str, Any] = {"side": self.side, "cutoff": cutoff, "scale": c.scale, "solver": c.solver}
            return spectral_filter(x.flatten(0, 1), self.function, power, gram=moment, rows=rows, **options).view_as(x)
        return spectral_filter(
            x,
            self.function,
            power,
            x_all=gather_rows(x, dim=1),
            offset=process_rank() * x.shape[1],
            basis=None if basis is None else gather_rows(basis, dim=1),
            side=self.side,
            cutoff=c.cutoff,
            scale=c.scale,
            solver=c.solver,
        )

    def _crossed(self, x: Tensor, branch: BranchContext) -> Tensor:
        """x U S^power V^T, U S V^T the cross-correlation of both branches, without gradient through it."""
        c = self.config
        assert branch.other is not None and c.power is not None
        both = self._moving(x.detach().flatten(0, 1), branch.other.flatten(0, 1))
        w = spectral_filter(both, "power", c.power - 1, side="target", cutoff=c.cutoff, solver=c.solver)
        if is_normalized(c):
            w = w / torch.linalg.matrix_norm(w, 2)
        return x @ w

    @torch.no_grad()
    def _moving(self, a: Tensor, b: Tensor) -> Tensor:
        """E[a^T b] (D, D) over all rows of all processes, joined with its moving average where there is one."""
        batch = sum_over_processes(a.mT @ b) / (len(a) * process_count())
        if self.config.momentum is None:
            return batch
        kept = (self.steps > 0).to(batch.dtype) * self.config.momentum
        moving = torch.lerp(batch, self.moment.to(batch.dtype), kept)
        if self.training:
            self.moment.copy_(moving)
            self.steps += 1
        return moving
