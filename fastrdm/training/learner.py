"""The module that a training step runs forward and backward, on one process or several."""

from collections.abc import Iterator, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastrdm.config.run_config import Config
from fastrdm.evaluation.online_probe import OnlineProbe
from fastrdm.loaders.spec import Batch
from fastrdm.methods.dual_branch import DualBranch, Output
from fastrdm.models.encoders import build_encoder
from fastrdm.optim.optimizers import Role
from fastrdm.schema import Horizon

# buffers are equal on all processes by construction, nobody need send them; torch 2.14 renamed the switch
NEW = "forward_sync_buffers" in signature(DistributedDataParallel).parameters
BUFFERS = "forward_sync_buffers" if NEW else "broadcast_buffers"
# a precision that is still open counts as the widest that it can become
DTYPES = {
    "auto": torch.float32,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


class Learner(nn.Module):
    """The method and the online probe as one module, which DistributedDataParallel wraps."""

    def __init__(self, method: DualBranch, probe: OnlineProbe | None) -> None:
        super().__init__()
        self.method, self.probe = method, probe

    def forward(self, views: tuple[Tensor, ...], labels: Tensor) -> tuple[Tensor, Output]:
        """Views (B, 3, H, W) and labels (B,) to what is differentiated, 0-d, and the method's output."""
        output: Output = self.method(views)
        loss = output.loss
        return (loss + self.probe.loss(output.features, labels) if self.probe else loss), output

    def roles(self, probe_lr: float) -> Iterator[Role]:
        """Trainable parameters by their role for the optimizer."""
        yield from self.method.roles()
        if self.probe:
            yield Role("probe", list(self.probe.named_parameters("probe")), probe_lr, weight_decay=0.0)


def build_method(settings: Config, horizon: Horizon) -> DualBranch:
    """The method with its encoder, randomly initialized, on the CPU in float32."""
    c, precision = settings, settings.train.precision
    return DualBranch(
        c.method,
        build_encoder(c.encoder),
        horizon,
        batch_size=c.loader.batch_size // c.train.accumulate,
        sync_bn=c.encoder.sync_bn,
        precision=DTYPES[precision] if precision in ("bf16", "fp16") else None,
    )


def build_learner(method: DualBranch, settings: Config, classes: int) -> Learner:
    """The method and, for `classes` > 0 where it is asked for, the probe, in the dtype of the run's weights."""
    probe = OnlineProbe(method.online.encoder.features, classes) if classes and settings.evaluate.probe else None
    return Learner(method, probe).to(torch.float64 if settings.train.precision == "fp64" else torch.float32)


def wrap_ddp(learner: Learner, world: int, static_graph: bool) -> nn.Module:
    """The learner, with gradients averaged over `world` processes; `static_graph`: every backward pass uses it all."""
    if world == 1:
        return learner
    buffers: dict[str, Any] = {BUFFERS: False}
    return DistributedDataParallel(learner, gradient_as_bucket_view=True, static_graph=static_graph, **buffers)


def microbatches(views: Sequence[Tensor], labels: Tensor, parts: int) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    """Split views and labels into `parts` equal parts of a batch."""
    chunks = zip(*(view.chunk(parts) for view in views), strict=True)
    return zip(chunks, labels.chunk(parts), strict=True)


def dummy_batch(images: int, sizes: Sequence[int], device: torch.device, dtype: torch.dtype) -> Batch:
    """A batch for steps before the state of a run is restored.

    DistributedDataParallel orders its buckets anew after its first two steps, and the order decides how the gradients
    of more than two processes are rounded: a run that goes on takes such steps first to compute as the unbroken one.
    """
    views = tuple(torch.randn(images, 3, size, size, device=device).to(dtype) for size in sizes)
    label = torch.zeros(images, dtype=torch.int64, device=device)
    return Batch(views, label - 1, label)  # of no image
