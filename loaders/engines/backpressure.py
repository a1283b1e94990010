"""Beside the stream that trains: copies that nobody waits for, and a limit to how far an engine runs ahead."""

from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

STEPS_AHEAD = 2  # training steps that may be queued on the device behind the one that runs


class Event(Protocol):
    """The part of torch.cuda.Event that is used."""

    def synchronize(self) -> None:
        """Wait until the device has done what was queued before the event."""


class Backpressure:
    """Holds the host back to STEPS_AHEAD steps before the device.

    A captured step is one launch, so the launch queue never fills, and batches of views would pile up in the device's
    memory while decoding is faster than training. Call `step` before each batch is made.
    """

    def __init__(self, device: torch.device, record: Callable[[], Event] | None = None) -> None:
        """`record` notes what is queued until now; None: on the stream that trains, and nothing on a CPU."""
        on_cuda = device.type == "cuda"
        self.record = record or ((lambda: torch.cuda.current_stream(device).record_event()) if on_cuda else None)
        self.queued: deque[Event] = deque()

    def step(self) -> None:
        """Wait for the end of the training step before the last STEPS_AHEAD ones."""
        if self.record is None:
            return
        self.queued.append(self.record())
        if len(self.queued) > STEPS_AHEAD:
            self.queued.popleft().synchronize()


def moved(x: Tensor, device: torch.device) -> Tensor:
    """x on `device`, from pinned memory where that is a GPU, so that neither host nor stream waits for the copy."""
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return (x if x.is_pinned() else x.pin_memory()).to(device, non_blocking=True)
