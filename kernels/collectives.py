"""Sums, maxima and gathers over all processes as operators that torch.compile can trace; no gradient; gloo and nccl.

The operators are called directly: the Python wrappers around them change their names between versions of torch.
"""

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


def _group_name() -> str:
    group = dist.group.WORLD
    assert group is not None
    return group.group_name
