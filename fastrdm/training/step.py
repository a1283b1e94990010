"""One optimizer step: what depends on its number written to the device, then forward, backward, optimizer, EMA."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from fastrdm.config.run_config import Config
from fastrdm.kernels import cuda_graph
from fastrdm.loaders.spec import Batch
from fastrdm.methods.dual_branch import DualBranch, Output
from fastrdm.optim.optimizers import (
    build_optimizer,
    clip_gradients,
    learning_rates,
    parameter_groups,
    set_learning_rates,
    set_weight_decays,
)
from fastrdm.runtime.distributed import Processes
from fastrdm.schema import Horizon, require
from fastrdm.training.learner import Learner, microbatches, wrap_ddp


class TrainStep:
    """The step of one process, on its share of each batch."""

    def __init__(self, settings: Config, learner: Learner, horizon: Horizon, processes: Processes) -> None:
        c = settings
        self.layout = torch.contiguous_format if c.train.channels_last is False else torch.channels_last
        self.optim, self.parts, self.world = c.optim, c.train.accumulate, processes.world
        self.learner, self.method, self.horizon = learner, learner.method, horizon
        self.parallel = wrap_ddp(learner, processes.world, static_graph=self.parts == 1)
        self.groups = parameter_groups(learner.roles(c.evaluate.probe_lr), c.optim, scale=c.loader.batch_size / 256)
        self.optimizer = build_optimizer(self.groups, c.optim, processes.device)
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=c.train.precision == "fp16")
        self.clipped = [p for role in self.method.roles() for _, p in role.parameters]
        self.instead: Callable[[str], None] | None = None
        """Told the reason when compiling fails, and the step runs eagerly from then on; None: a failure is an error."""

        self.captured = self._captured(processes) if c.train.capture is True else None
        self.warmup = horizon.steps(c.optim.warmup)
        fits = self.warmup <= horizon.total
        require(fits, "optim.warmup", f"no longer than the run of {horizon.total} steps", c.optim.warmup)

    def __call__(self, batch: Batch, step: int) -> Output:
        """Run step number `step` on a batch, and return the output of its last part and the mean loss."""
        self.schedule(step)
        try:
            return self._run(batch)
        except Exception as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            reason = " ".join(str(error).split())[:400]
            if self.instead is None:
                raise ValueError(
                    f"train.compile=true failed: {reason} ...; train.compile=false runs eagerly"
                ) from error
        self.instead(f"note: not compiled, for torch.compile failed: {reason} ...")
        self.instead = None
        self.method._compiled_call_impl = None  # the module runs as it is written
        self.optimizer.zero_grad()
        return self._run(batch)

    def _run(self, batch: Batch) -> Output:
        if self.captured is None:
            return self.compute(*batch.views, batch.label)
        return self.captured(self.method.phase(), *batch.views, batch.label)  # type: ignore[no-any-return]

    def _captured(self, processes: Processes) -> cuda_graph.Captured:
        alone = processes.world == 1
        require(alone, "train.capture", "false with several processes: that was never run", True)
        return cuda_graph.Captured(self.compute, cuda_graph.recorder(processes.device, "train.capture"))

    def schedule(self, step: int) -> None:
        """Write rates, momentum, temperatures and the like of `step` into the tensors that `compute` reads."""
        self.method.set_step(step)
        rates = learning_rates(self.groups, step, self.horizon.total, self.warmup, self.optim)
        set_learning_rates(self.optimizer, rates)
        set_weight_decays(self.optimizer, self.groups, step, self.horizon.total, self.optim)

    def compute(self, *batch: Tensor) -> Output:
        """The device's work on views (B, 3, H_v, W_v) and labels (B,): it reads no number from the device.

        What changes with the step lies in tensors, or is told by the method's phase, so that it can be recorded.
        """
        *views, labels = batch
        views = [view.contiguous(memory_format=self.layout) for view in views]
        losses = []
        for part, (some, their_labels) in enumerate(microbatches(views, labels, self.parts)):
            waits = self.world > 1 and part < self.parts - 1
            with self.parallel.no_sync() if waits else nullcontext():  # type: ignore[operator]
                loss, output = self.parallel(some, their_labels)
                self.scaler.scale(loss / self.parts).backward()
            losses.append(output.loss.detach())
        self.method.after_backward()
        if self.optim.clip_grad:
            self.scaler.unscale_(self.optimizer)
            clip_gradients(self.clipped, self.optim)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.method.after_step()
        return output._replace(loss=torch.stack(losses).mean())  # type: ignore[no-any-return]


def changes(settings: Config, method: DualBranch) -> list[tuple[int, str]]:
    """The steps at which a step begins to do other work, in order, and what: compiled or captured anew from there."""
    found = list(method.phases())
    for i, view in enumerate(settings.loader.views):
        sizes = [size for _, size in view.progressive[1:]] + [view.size]
        for (epoch, _), size in zip(view.progressive, sizes, strict=False):
            found.append((epoch * method.horizon.steps_per_epoch, f"view {i}: grows to {size} px"))
    return sorted(found)
