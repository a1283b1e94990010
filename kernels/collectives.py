"""Sums, maxima and gathers over all processes as operators that torch.compile can trace, for gloo and nccl.

`differentiable_sum` and `differentiable_gather` carry a gradient, the others none.

The operators are called directly: the Python wrappers around them change their names between versions of torch.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def process_count() -> int:
    """Number of processes, 1 without a group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_rank() -> int:
    """This process's number, 0 without a group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def reduce_over_processes(x: Tensor, operation: str) -> Tensor:
    """`sum` or `max` of x over all processes, x's shape and dtype, on each of them."""
    if process_count() == 1:
        return x
    ops = torch.ops._c10d_functional
    out: Tensor = ops.wait_tensor(ops.all_reduce(x.contiguous(), operation, _group_name()))
    return out


def gather_over_processes(x: Tensor) -> Tensor:
    """The tensors x of all processes, of one shape, stacked in rank order: (processes, *x.shape)."""
    if process_count() == 1:
        return x[None]
    ops = torch.ops._c10d_functional
    gathered = ops.all_gather_into_tensor(x.contiguous()[None], process_count(), _group_name())
    out: Tensor = ops.wait_tensor(gathered)
    return out


class _Sum(torch.autograd.Function):
    """Sum over all processes; every process's gradient of it reaches the tensors of all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return reduce_over_processes(x, "sum")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return reduce_over_processes(grad, "sum")


class _Gather(torch.autograd.Function):
    """Gather from all processes; every process's gradient of the part that a process gave reaches that process."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return gather_over_processes(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return reduce_over_processes(grad, "sum")[process_rank()]


def differentiable_sum(x: Tensor) -> Tensor:
    """Sum of x over all processes, x's shape and dtype, with gradient.

    The gradient that arrives at x is that of the sum of all processes' losses, so that DistributedDataParallel, which
    averages gradients over processes, gives the gradient of their mean.
    """
    out: Tensor = _Sum.apply(x) if process_count() > 1 else x
    return out


def differentiable_gather(x: Tensor) -> Tensor:
    """The tensors x of all processes, of one shape, stacked in rank order, with gradient as in `differentiable_sum`."""
    out: Tensor = _Gather.apply(x) if process_count() > 1 else x[None]
    return out


def _group_name() -> str:
    group = dist.group.WORLD
    assert group is not None
    return group.group_name
