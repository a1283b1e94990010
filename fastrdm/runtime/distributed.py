"""Processes of one run: who we are, and the few collectives that training needs; also without a group."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fastrdm.kernels.collectives import (
    differentiable_gather,
    differentiable_sum,
    gather_over_processes,
    process_count,
    process_rank,
    reduce_over_processes,
)

T = TypeVar("T")


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
    rank, world, local = _number("RANK", 0), _number("WORLD_SIZE", 1), _number("LOCAL_RANK", 0)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("train.device must be 'cpu' or 'auto' here, got 'cuda': torch sees no CUDA device")
        place = torch.device("cuda", local)
        torch.cuda.set_device(place)
    else:
        place = torch.device("cpu")
    if world > 1 and not dist.is_initialized():
        backend = "nccl" if place.type == "cuda" else "gloo"
        if not dist.is_backend_available(backend):
            raise ValueError(f"{world} processes on {place.type} need torch built with {backend}, which this one lacks")
        # With the device, communicators are made now: an error in them is told here and not at the first step.
        bound = place if place.type == "cuda" else None
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout), device_id=bound)
    return Processes(rank, world, place)


def _number(variable: str, default: int) -> int:
    """The whole number in an environment variable; `default` where it is unset or empty."""
    text = os.environ.get(variable, "").strip()
    if text and not text.isdecimal():
        raise ValueError(f"the environment variable {variable} must be a whole number, got {text!r}")
    return int(text) if text else default


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


def gather_rows_with_gradient(x: Tensor, dim: int = 0) -> Tensor:
    """The tensors of all processes, of one shape, joined along `dim` in rank order.

    For losses that compare rows of several processes. The gradient of x is that of the sum of all processes' losses;
    with DistributedDataParallel's mean over processes, a loss of all rows has the gradient that it has on one process.
    """
    return torch.cat(differentiable_gather(x).unbind(), dim)


def sum_with_gradient(x: Tensor) -> Tensor:
    """Sum of x over all processes, with gradient as in `gather_rows_with_gradient`: for means and covariances."""
    return differentiable_sum(x)


def gather_objects(value: object) -> list[object]:
    """Every process's picklable value, in rank order, on every process."""
    if process_count() == 1:
        return [value]
    values: list[object] = [None] * process_count()
    dist.all_gather_object(values, value)
    return values


def on_main(work: Callable[[], T]) -> T:
    """The result of `work` on the main process, for every process; what it raises is raised on all of them."""
    result = _attempt(work) if process_rank() == 0 else None
    value, failed = cast(tuple[T, Exception | None], gather_objects(result)[0])
    if failed is not None:
        raise failed
    return value


def together(work: Callable[[], T]) -> T:
    """The result of `work` on this process; where it fails on any, every process raises.

    Each raises its own error if the main process failed too, for then they are of one kind; else that of the first one
    which failed, with its rank.
    """
    value, failed = _attempt(work)
    errors = cast(list[Exception | None], gather_objects(failed))
    if failed is not None and errors[0] is not None:
        raise failed
    for rank, error in enumerate(errors):
        if error is not None:
            raise ValueError(f"rank {rank}: {error}") if isinstance(error, ValueError) else error
    return cast(T, value)


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:
        return None, error


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

    def __init__(self, timeout: float = 600) -> None:
        """`timeout`: seconds that a reduction may take."""
        self.asked = False
        several = process_count() > 1
        self._group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)) if several else None
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
