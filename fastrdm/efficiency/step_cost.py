"""Memory and arithmetic of one process of a run, from a small step of the model on the CPU."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from fastrdm.config.run_config import Config
from fastrdm.optim.optimizers import build_optimizer, parameter_groups
from fastrdm.schema import Horizon
from fastrdm.training.learner import DTYPES, Learner, build_learner, build_method

CPU = torch.device("cpu")
PROBED = (4, 8)  # images of the two small steps between which memory is extrapolated


class Footprint(NamedTuple):
    """Bytes of one process, unless another unit is given. All but `activations` are counted exactly."""

    weights: int  # parameters, those of the EMA target and the probe included
    target: int  # of them, the EMA target's
    gradients: int
    optimizer: int  # its state
    buffers: int  # BatchNorm statistics, queue, center
    activations: int  # what the backward pass needs, extrapolated linearly from two small steps
    state_dict: int  # weights in a checkpoint
    flops: float  # of one image: all its views, forward and backward, matrix products and convolutions


def build(settings: Config, horizon: Horizon, classes: int) -> tuple[Learner, Optimizer]:
    """Model and optimizer as the trainer has them, on the CPU; `classes`: of the probe, 0 without labels."""
    c = settings
    learner = build_learner(build_method(c, horizon), c, classes)
    groups = parameter_groups(learner.roles(c.evaluate.probe_lr), c.optim, scale=c.loader.batch_size / 256)
    return learner, build_optimizer(groups, c.optim, CPU)


def measure(settings: Config, learner: Learner, optimizer: Optimizer, images: int) -> Footprint:
    """The footprint of a process that runs `images` images at a time; trains the learner for two small steps."""
    sizes = sorted({min(images, size) for size in PROBED})
    points = [small_step(settings, learner, size) for size in sizes]
    learner.method.after_backward()
    optimizer.step()
    (first, _), (last, flops) = points[0], points[-1]
    slope = (last - first) / (sizes[-1] - sizes[0]) if len(sizes) > 1 else 0.0
    target = learner.method.target
    parameters = list(learner.parameters())
    return Footprint(
        weights=_bytes(parameters),
        target=_bytes(target.parameters()) if target else 0,
        gradients=_bytes([p for p in parameters if p.requires_grad]),
        optimizer=_bytes([x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]),
        buffers=_bytes(learner.buffers()),
        activations=round(last + slope * (images - sizes[-1])),
        state_dict=_bytes(learner.state_dict().values()),
        flops=flops / sizes[-1],
    )


def step_flops(settings: Config, horizon: Horizon, classes: int, images: int, sizes: Sequence[int]) -> int:
    """Floating-point operations of matrix products and convolutions, forward and backward, of a step of one process.

    On `images` images of views of `sizes` pixels. Counted on tensors without contents: nothing is computed, nothing
    sent, nothing drawn at random that others would miss. What a spectral filter computes is not in it, nor what
    encoder.checkpointing computes twice.
    """
    once = replace(settings, encoder=replace(settings.encoder, checkpointing=False))
    with torch.random.fork_rng(devices=[]):
        learner = build_learner(build_method(once, horizon), once, classes)
    learner.method.set_step(0)
    mode = FakeTensorMode()
    named = *learner.named_parameters(), *learner.named_buffers()
    state: dict[str, Tensor] = {name: mode.from_tensor(x) for name, x in named}
    with mode, FlopCounterMode(display=False) as counter:
        dtype = DTYPES[settings.train.precision]
        views = tuple(torch.empty(images, 3, size, size, dtype=dtype) for size in sizes)
        loss, _ = functional_call(learner, state, (views, torch.zeros(images, dtype=torch.int64)))
        loss.backward()
    return int(counter.get_total_flops())


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.nbytes for t in tensors)


def small_step(settings: Config, learner: Learner, images: int) -> tuple[int, int]:
    """Bytes kept for the backward pass and floating-point operations of a step on `images` random images."""
    dtype = DTYPES[settings.train.precision]
    views = tuple(torch.randn(images, 3, v.size, v.size).to(dtype) for v in settings.loader.views)
    labels = torch.zeros(images, dtype=torch.int64)
    own = {t.untyped_storage().data_ptr() for t in (*learner.parameters(), *learner.buffers())}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x.detach()

    learner.method.set_step(0)
    learner.zero_grad(set_to_none=True)
    with FlopCounterMode(display=False) as counter, saved_tensors_hooks(keep, lambda x: x):
        loss, _ = learner(views, labels)
        loss.backward()
    return sum(kept.values()), counter.get_total_flops()
