"""Output of a run: one live line, metrics.jsonl, and TensorBoard or Weights & Biases where asked for."""

import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastrdm.loaders.spec import ViewSpec
from fastrdm.runtime.profiler import ProfileConfig
from fastrdm.runtime.trackers import TensorBoard, Tracker, WandB, spectrum_picture, view_picture
from fastrdm.schema import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LogConfig:
    """Logging of metrics, the report and the profiler."""

    every: int = Field(default=50, ge=1)
    """Steps between two lines of metrics. The host waits for the device only then."""

    tensorboard: bool = False
    """Write metrics, settings and pictures of views and spectra for TensorBoard as well."""

    wandb: str | None = None
    """Project on Weights & Biases that gets metrics, settings and pictures of views and spectra as well. `null` sends
    nothing.
    """

    report: bool = True
    """Write report.html into the run's folder when the run ends."""

    profile: ProfileConfig | None = None
    """Steps that torch's profiler records, such as `log.profile.steps=10`. `null` records none."""

    peak_tflops: float | None = Field(default=None, gt=0)
    """Peak arithmetic of one device at train.precision, in TFLOP/s, against which utilization is measured. `null` looks
    known GPUs up.
    """


class RunLog:
    """Writes metrics of the main process; the others hold a RunLog that does nothing."""

    def __init__(self, config: LogConfig, run: Path, step: int, settings: dict[str, Any], main: bool) -> None:
        """`step`: where the run goes on; what a killed run wrote after it is dropped, all of it when starting again."""
        self.main = main
        self._trackers: list[Tracker] = []
        if not main:
            return
        if config.tensorboard:
            self._trackers.append(TensorBoard(run, step, settings))
        if config.wandb:
            self._trackers.append(WandB(config.wandb, run, settings))
        self.path = run / "metrics.jsonl"
        for path in {self.path, *run.glob("*.jsonl")}:
            kept = [line for line in _lines(path) if step and json.loads(line)["step"] <= step]
            partial = path.with_suffix(".partial")
            partial.write_text("".join(f"{line}\n" for line in kept))
            partial.replace(path)

    def write(self, step: int, epoch: float, metrics: dict[str, float]) -> None:
        """Append one line of metrics."""
        if not self.main:
            return
        self.append("metrics", step, epoch, {"time": round(time.time(), 3), **metrics})
        for tracker in self._trackers:
            tracker.write(step, metrics)

    def append(self, name: str, step: int, epoch: float, record: dict[str, Any]) -> None:
        """Append a line to NAME.jsonl."""
        if self.main:
            with self.path.with_name(f"{name}.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, "epoch": round(epoch, 4), **record}) + "\n")
        if name == "spectra":
            for tracker in self._trackers:
                tracker.picture(step, f"spectrum/{record['tap']}/{record['convention']}", spectrum_picture(record))

    def show_views(self, step: int, views: Sequence[Tensor], specs: Sequence[ViewSpec]) -> None:
        """Show the first images of a batch to TensorBoard and Weights & Biases, as training sees them."""
        if self._trackers:
            picture = view_picture(views, specs)
            for tracker in self._trackers:
                tracker.picture(step, "views", picture)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if self.main:
            clear = "\r\x1b[K" if sys.stdout.isatty() else ""
            print(f"{clear}{text}", flush=True)

    def progress(self, text: str) -> None:
        """Print the live line: over the last one on a terminal, below it elsewhere."""
        if not self.main:
            return
        if sys.stdout.isatty():
            print(f"\r\x1b[K{text[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)
        else:
            print(text, flush=True)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()


def _lines(path: Path) -> list[str]:
    """Whole lines of a file. A kill can leave half of one at the end."""
    if not path.exists():
        return []
    return [line for line in path.read_text().split("\n")[:-1] if line]
