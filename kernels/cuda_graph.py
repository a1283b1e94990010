"""Work recorded once as a CUDA graph and replayed: the host starts one thing a step in place of thousands."""

from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch
from torch import Tensor

WARM_UP = 3  # calls before recording: libraries allocate workspaces and choose algorithms in the first ones
Work = Callable[..., Any]


class Recorder(Protocol):
    """Runs work ahead of its recording, and records it."""

    def aside(self, work: Work) -> Any:
        """Run `work` and return what it returns."""

    def record(self, work: Work) -> tuple[Callable[[], None], Any]:
        """A function that does `work` again on the same tensors, and the tensors that it writes its results into."""


class CudaRecorder:
    """CUDA graphs of one device."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)

    def aside(self, work: Work) -> Any:
        """Run `work` on the recorder's own stream: what is created on the default stream cannot be recorded."""
        here = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            result = work()
        here.wait_stream(self.stream)
        return result

    def record(self, work: Work) -> tuple[Callable[[], None], Any]:
        """Record `work` without running it. Loader threads may use the device meanwhile, hence thread_local."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            result = work()
        return graph.replay, result


def recorder(device: torch.device, key: str) -> Recorder:
    """The recorder of `device`. ValueError, naming the setting `key`, for a device that has none."""
    if device.type != "cuda":
        raise ValueError(f"{key} must be false on {device.type}, got true: CUDA graphs need a CUDA device")
    return CudaRecorder(device)


class Captured:
    """`work(*tensors)`, recorded anew for each phase. Its results are overwritten by the next call."""

    def __init__(self, work: Work, recorder: Recorder) -> None:
        self.work, self.recorder = work, recorder
        self._key: Hashable = None
        self._ahead = 0
        self._replay: Callable[[], None] | None = None
        self._inputs: list[Tensor] = []
        self._result: Any = None

    def __call__(self, phase: Hashable, *inputs: Tensor) -> Any:
        """The result for `inputs`. `phase` must change whenever `work` does other work on the same shapes."""
        key = phase, *((x.shape, x.dtype) for x in inputs)
        # Phases do not come back: the old recording's memory is freed.
        if key != self._key:
            self._key, self._ahead, self._replay, self._result = key, WARM_UP, None, None
        if self._ahead:
            self._ahead -= 1
            return self.recorder.aside(lambda: self.work(*inputs))
        if self._replay is None:
            self._inputs = [x.clone() for x in inputs]
            self._replay, self._result = self.recorder.record(lambda: self.work(*self._inputs))
        else:
            for mine, given in zip(self._inputs, inputs, strict=True):
                mine.copy_(given)
        self._replay()
        return self._result
