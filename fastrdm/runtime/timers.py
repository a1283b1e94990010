"""Timers of the training loop: losses without making the host wait, and time without what is not training."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from fastrdm.errors import RunError
from fastrdm.kernels.collectives import process_count
from fastrdm.loaders.spec import Batch
from fastrdm.runtime import distributed


class NonFiniteLoss(RunError):
    """The loss was no finite number; the message gives the range of steps."""


class LossTracker:
    """Sums losses since the last look and finds the first step whose loss was not finite, on the device."""

    def __init__(self, device: torch.device) -> None:
        self.sum = torch.zeros((), dtype=torch.float64, device=device)
        self.bad = torch.zeros((), dtype=torch.float64, device=device)
        self.steps = self.seen = self.sound = 0

    def add(self, loss: Tensor, step: int) -> None:
        loss = loss.detach().double()
        self.sum += loss
        self.bad += ~loss.isfinite()
        self.steps += 1
        self.seen = step

    def check(self) -> None:
        """Raise NonFiniteLoss with the range of steps, on every process, if any of them had one; waits."""
        if distributed.sum_over_processes(self.bad).item():
            raise NonFiniteLoss(
                f"the loss was not finite in steps {self.sound + 1} to {self.seen}; the newest checkpoint is older "
                "than that. Try a lower optim.lr, a longer optim.warmup, or train.precision=fp32"
            )
        self.sound = self.seen

    def state_dict(self) -> dict[str, float]:
        """The sum so far, over processes, and its steps; waits."""
        total = distributed.sum_over_processes(self.sum).item() / process_count()
        return {"sum": total, "steps": self.steps, "seen": self.seen}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from `state_dict`, on any number of processes."""
        self.sum.fill_(state["sum"])
        self.steps, self.seen = int(state["steps"]), int(state["seen"])
        self.sound = self.seen

    def mean(self) -> float:
        """Mean over processes and the steps since the last look; waits, and checks."""
        self.check()
        mean = self.state_dict()["sum"] / self.steps
        self.sum.zero_()
        self.steps = 0
        return mean


class Stopwatch:
    """Measures the time inside its context: of the device's queue on CUDA, between two events, else of the host.

    Events are read at a lap: entering and leaving never wait. Each entry is a range of that name in a profiler's trace.
    """

    def __init__(self, device: torch.device, name: str) -> None:
        self.device, self.name = device, name
        self._total = self._told = 0.0
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @property
    def total(self) -> float:
        """Seconds so far; waits for the device."""
        for begun, ended in self._pairs:
            ended.synchronize()
            self._total += begun.elapsed_time(ended) / 1e3
        self._pairs.clear()
        return self._total

    def lap(self) -> float:
        """Seconds since the last lap; waits for the device."""
        total = self.total
        lap, self._told = total - self._told, total
        return lap

    def __enter__(self) -> None:
        self._range = record_function(self.name)
        self._range.__enter__()
        self._began = _mark() if self.device.type == "cuda" else time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if isinstance(self._began, float):
            self._total += time.perf_counter() - self._began
        else:
            self._pairs.append((self._began, _mark()))
        self._range.__exit__(None, None, None)


def _mark() -> torch.cuda.Event:
    """An event behind what the device has been given so far."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class Lap(NamedTuple):
    """Training time between two looks at the clock."""

    steps: int
    seconds: float
    waited: float  # of them, for the next batch


class TrainingClock:
    """Seconds of training and of waiting for data, evaluation and saving left out; each look waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.data = device, Stopwatch(device, "wait for data")
        self.start, self.steps = time.perf_counter(), 0

    def waiting(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Iterate over `batches`, and count the time until each is there as waiting."""
        iterator = iter(batches)
        while True:
            with self.data:
                batch = next(iterator, None)
            if batch is None:
                return
            self.steps += 1
            yield batch

    def lap(self) -> Lap:
        now = self._now()
        lap = Lap(self.steps, max(now - self.start, 1e-9), self.data.lap())
        self.start, self.steps = now, 0
        return lap

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside this context out of the training time."""
        began = self._now()
        try:
            yield
        finally:
            self.start += self._now() - began

    def _now(self) -> float:
        """The host's clock, after the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return time.perf_counter()


def duration(seconds: float) -> str:
    """A time to wait in two units at most, such as `2 h 05 min` or `40 s`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
