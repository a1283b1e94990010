"""Sinkhorn-Knopp: the target's scores to balanced assignments, with a queue of earlier features (SwAV)."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrdm.kernels.collectives import process_count, process_rank
from fastrdm.methods.transform import BranchContext, Kind, Transform, TransformContext
from fastrdm.methods.transform_settings import SinkhornConfig as SinkhornConfig
from fastrdm.optim.schedules import linear_ramp
from fastrdm.runtime.distributed import gather_rows, max_over_processes, sum_over_processes
from fastrdm.schema import require


def sinkhorn_knopp(scores: Tensor, epsilon: float | Tensor, iterations: int) -> Tensor:
    """Assignments (V, B, K), rows summing to 1, of scores (V, B, K) whose rows lie on all processes; float32 or wider.

    Each iteration scales prototypes to equal mass, then samples to mass 1: the samples' marginal is exact, that of the
    prototypes approximate (SwAV, equations 3 to 5).
    """
    scores = (scores if scores.dtype == torch.float64 else scores.float()) / epsilon
    top = max_over_processes(scores.amax((1, 2), keepdim=True))  # of a view: it cancels, and exp cannot overflow
    q = torch.exp(scores - top)
    prototypes, samples = q.shape[2], q.shape[1] * process_count()
    for _ in range(iterations):
        q = q / (sum_over_processes(q.sum(1, keepdim=True)) * prototypes / samples)
        q = q / q.sum(2, keepdim=True)
    return q


class Sinkhorn(Transform):
    """Scores to assignments. The queue is one ring for all processes; each scores its own part of it."""

    takes: Kind = "scores"
    gives: Kind = "probabilities"
    queue: Tensor
    pointer: Tensor
    epsilon: Tensor | float

    def __init__(self, config: SinkhornConfig, context: TransformContext) -> None:
        super().__init__(config, context)
        self.config = config
        self.start = context.horizon.steps(config.queue_start)
        self.fill = config.queue // context.batch_size  # steps until the ring is full
        self.phase = False  # whether the queue takes part
        self.warmup = min(context.horizon.steps(config.warmup), context.horizon.total)
        if config.warmup_epsilon is not None:
            self.register_buffer("epsilon", torch.tensor(config.warmup_epsilon), persistent=False)
        else:
            self.epsilon = config.epsilon
        if config.queue:
            divides = config.queue % context.batch_size == 0 and config.queue % process_count() == 0
            expected = f"a multiple of loader.batch_size={context.batch_size} and of the {process_count()} processes"
            require(divides, "sinkhorn.queue", expected, config.queue)
            self.register_buffer("queue", torch.zeros(context.target_views, config.queue, context.width))
            self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    def set_step(self, step: int) -> None:
        if self.config.warmup_epsilon is not None:
            assert isinstance(self.epsilon, Tensor)
            self.epsilon.fill_(linear_ramp(step, self.warmup, self.config.warmup_epsilon, self.config.epsilon))
        self.phase = self.config.queue > 0 and step >= max(self.start, self.fill)

    def phases(self) -> Iterator[tuple[int, str]]:
        if self.config.queue:
            yield max(self.start, self.fill), "sinkhorn: the queue joins in"

    def ramps(self) -> Iterator[tuple[int, str]]:
        if self.config.warmup_epsilon is not None:
            yield self.warmup, f"sinkhorn: epsilon reaches {self.config.epsilon:g}"

    def unfinished(self, duration: str) -> str | None:
        if duration == "warmup":
            return None if self.config.warmup_epsilon is None else "epsilon goes there over the whole run instead"
        return "the queue is never used" if self.config.queue else None

    @torch.no_grad()
    def forward(self, x: Tensor, branch: BranchContext) -> Tensor:
        batch = x.shape[1]
        if self.phase:
            assert branch.score is not None
            mine = self.queue.unflatten(1, (process_count(), -1))[:, process_rank()]
            x = torch.cat([x, branch.score(mine.to(x.dtype))], dim=1)
        assignments = sinkhorn_knopp(x, self.epsilon, self.config.iterations)[:, :batch]
        if self.config.queue and self.training:
            assert branch.scored is not None
            self._push(gather_rows(F.normalize(branch.scored, dim=-1), dim=1))
        return assignments

    def _push(self, features: Tensor) -> None:
        """Overwrite the oldest rows of the ring with (V, B, D) features of all processes."""
        rows = (self.pointer + torch.arange(features.shape[1], device=features.device)) % self.queue.shape[1]
        self.queue.index_copy_(1, rows, features.to(self.queue.dtype))
        self.pointer.copy_((self.pointer + features.shape[1]) % self.queue.shape[1])
