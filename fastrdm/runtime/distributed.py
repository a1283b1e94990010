"""Processes of one run: who we are, and the few collectives that training needs; also without a group."""

import os
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastrdm.kernels.collectives import (
    gather_over_processes,
    process_count,
    reduce_over_processes,
)


class Processes(NamedTuple):
    """Rank, number of processes and device of this process."""

    rank: int
    world: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0


def start(device: str = "auto", timeout: float = 600) -> Processes:
    """Join the group that torchrun describes in the environment (nccl on CUDA, gloo elsewhere); alone without one.

    `timeout`: seconds that a collective may take.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("train.device must be 'cpu' or 'auto' here, got 'cuda': torch sees no CUDA device")
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(place)
    else:
        place = torch.device("cpu")
    if world > 1 and not dist.is_initialized():
        backend = "nccl" if place.type == "cuda" else "gloo"
        if not dist.is_backend_available(backend):
            raise ValueError(f"{world} processes on {place.type} need torch built with {backend}, which this one lacks")
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    return Processes(rank, world, place)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def gather_rows(x: Tensor, dim: int = 0) -> Tensor:
    """Join the tensors of all processes, which have one shape, along `dim` in rank order; without gradient."""
    return torch.cat(gather_over_processes(x.detach()).unbind(), dim)


def sum_over_processes(x: Tensor) -> Tensor:
    """Sum of x over all processes, without gradient."""
    return reduce_over_processes(x.detach(), "sum")


def max_over_processes(x: Tensor) -> Tensor:
    """Maximum of x over all processes, without gradient."""
    return reduce_over_processes(x.detach(), "max")


def gather_objects(value: object) -> list[object]:
    """Every process's picklable value, in rank order, on every process."""
    if process_count() == 1:
        return [value]
    values: list[object] = [None] * process_count()
    dist.all_gather_object(values, value)
    return values


def agree(*values: object) -> None:
    """Raise RuntimeError when processes hold different values: a run of several configurations is no run."""
    seen = gather_objects(values)
    if any(v != seen[0] for v in seen):
        raise RuntimeError(f"processes disagree: {list(zip(range(len(seen)), seen, strict=True))}")


class StopSignal:
    """A request to stop, on which all processes agree at the same step without making the device wait.

    Each step starts a small reduction among the hosts and reads the one of the step before, so that a request is
    honored within two steps.
    """

    def __init__(self) -> None:
        self.asked = False
        self._group: Any = dist.new_group(backend="gloo") if process_count() > 1 else None
        self._pending: tuple[Any, Tensor] | None = None

    def ask(self) -> None:
        """Ask all processes to stop; safe in a signal handler."""
        self.asked = True

    def poll(self) -> bool:
        """True on every process from the same step on, once one of them has set `asked`."""
        if self._group is None:
            return self.asked
        answer = False
        if self._pending is not None:
            work, flag = self._pending
            work.wait()
            answer = bool(flag.item())
        flag = torch.tensor(int(self.asked or answer))
        self._pending = (dist.all_reduce(flag, dist.ReduceOp.MAX, self._group, async_op=True), flag)
        return answer

    def drain(self) -> None:
        """Finish the reduction in flight; call before leaving the group."""
        if self._pending is not None:
            self._pending[0].wait()
            self._pending = None
