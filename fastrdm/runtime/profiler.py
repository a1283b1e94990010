"""A trace of some steps of a run by torch's profiler, for chrome://tracing or Perfetto."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile, record_function

from fastrdm.files import whole
from fastrdm.runtime.settings import ProfileConfig as ProfileConfig


class StepProfiler:
    """Records the steps `first` to `last`, from 1; one step of warming up before them, where there is one.

    `step` ends a step. Each is a range "step N" of the trace, whose parts are ranges as well.
    """

    def __init__(self, first: int, last: int, done: int, folder: Path, say: Callable[[str], None]) -> None:
        """`done`: steps that the run has done already. `say` is told where the trace is, or why there is none."""
        self.first, self.last, self.done, self.folder, self.say = first, last, done, folder, say
        self._range: record_function | None = None
        self._profile: profile | None = None
        if done >= first:
            say(f"log.profile: step {first:,} is over, nothing is recorded")
            return
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        # the profiler counts its own steps, from 0
        self._profile = profile(
            activities=activities, schedule=lambda count: self._action(count + done + 1), on_trace_ready=self._write
        )
        self._profile.start()
        self._open(done + 1)

    def step(self, step: int) -> None:
        """Call when step number `step` has been given to the device."""
        self.done = step
        if self._profile is None:
            return
        self._close()
        if step == self.last and torch.cuda.is_available():
            torch.cuda.synchronize()
        self._profile.step()
        if step == self.last:
            self._profile.stop()
            self._profile = None
        else:
            self._open(step + 1)

    def close(self) -> None:
        """Call at the end of the run. Steps recorded so far are written."""
        if self._profile is not None:
            self._close()
            self.last = self.done
            self._profile.stop()
            self._profile = None
            if self.done < self.first:
                self.say(f"log.profile: the run ended before step {self.first:,}, nothing is recorded")

    def _action(self, step: int) -> ProfilerAction:
        if step < self.first - 1 or step > self.last:
            return ProfilerAction.NONE
        if step < self.first:
            return ProfilerAction.WARMUP
        return ProfilerAction.RECORD if step < self.last else ProfilerAction.RECORD_AND_SAVE

    def _open(self, step: int) -> None:
        if step >= self.first:
            self._range = record_function(f"step {step}")
            self._range.__enter__()

    def _close(self) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None

    def _write(self, profiler: profile) -> None:
        if self.done < self.first:
            return
        path = self.folder / f"trace_steps_{self.first}-{self.last}.json.gz"
        try:
            with whole(path, RuntimeError) as partial:
                profiler.export_chrome_trace(f"{partial}.gz")  # by whose suffix torch decides to compress
                Path(f"{partial}.gz").rename(partial)
        except OSError as error:
            self.say(f"training goes on, but {path} could not be written: {error.strerror}")
            return
        self.say(f"profiler's trace of steps {self.first} to {self.last}: {path}")
