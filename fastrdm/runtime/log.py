"""Output of a run: its live line, train.log, metrics.jsonl, and TensorBoard or Weights & Biases where asked for."""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fastrdm.files import whole, write_whole
from fastrdm.live_line import LiveLine, show
from fastrdm.loaders.spec import ViewSpec
from fastrdm.runtime.settings import LogConfig as LogConfig
from fastrdm.runtime.trackers import TensorBoard, Tracker, WandB, spectrum_picture, view_picture

FILES = ("metrics", "spectra", "alarms", "analysis")  # NAME.jsonl in a run's folder
PRINTED = "train.log"  # what was printed
QUIET = 30.0  # seconds between two progress lines where they do not replace each other


class RunLog:
    """Writes metrics of the main process; the others hold a RunLog that does nothing.

    A line that cannot be written, as on a full disk, is kept in memory and written with the next one that can be:
    training goes on.
    """

    def __init__(self, config: LogConfig, run: Path, step: int, settings: dict[str, Any], main: bool) -> None:
        """`step`: where the run goes on; what a killed run wrote after it is dropped, all of it when starting again."""
        self.main, self.run = main, run
        self._trackers: list[Tracker] = []
        self._waiting: dict[str, str] = {}  # by the name of its file, what could not be written yet
        self._told = False  # that a line could not be written
        self._live = LiveLine(QUIET, at_once=True)
        if not main:
            return
        if config.tensorboard:
            self._add(TensorBoard, run, step, settings)
        if config.wandb:
            self._add(WandB, config.wandb, run, settings)
        for name in ("metrics", *(name for name in FILES if (run / f"{name}.jsonl").exists())):
            self._cut(run / f"{name}.jsonl", step)

    def write(self, step: int, epoch: float, metrics: dict[str, float]) -> None:
        """Append one line of metrics."""
        if not self.main:
            return
        self.append("metrics", step, epoch, {"time": round(time.time(), 3), **metrics})
        self._track(lambda tracker: tracker.write(step, metrics))

    def append(self, name: str, step: int, epoch: float, record: dict[str, Any]) -> None:
        """Append a line to NAME.jsonl, one of FILES."""
        if self.main:
            line = json.dumps({"step": step, "epoch": round(epoch, 4), **record})
            failed = self._write(f"{name}.jsonl", f"{line}\n")
            if failed and not self._told:
                self._told = True
                self.say(f"training goes on, but {self.run / name}.jsonl could not be written: {failed.strerror}")

        if name == "spectra":
            title = f"spectrum/{record['tap']}/{record['convention']}"
            self._track(lambda tracker: tracker.picture(step, title, spectrum_picture(record)))

    def show_views(self, step: int, views: Sequence[Tensor], specs: Sequence[ViewSpec]) -> None:
        """Show the first images of a batch to TensorBoard and Weights & Biases, as training sees them."""
        self._track(lambda tracker: tracker.picture(step, "views", view_picture(views, specs)))

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The lines of metrics.jsonl so far; none on processes that write none."""
        if self.main:
            yield from map(json.loads, _lines(self.run / "metrics.jsonl"))

    def say(self, text: str) -> None:
        """Print a line that stays, and note it in train.log."""
        if self.main:
            self._live.say(text)
            self.note(text)

    def note(self, text: str) -> None:
        """Note in train.log what was printed elsewhere."""
        if self.main:
            self._write(PRINTED, f"{text}\n")

    def progress(self, text: str, share: float) -> None:
        """Show the live line of a run whose `share` 0 to 1 is done; train.log gets it every QUIET seconds."""
        if self.main and self._live.advance(text, share):
            self.note(text)

    def close(self) -> None:
        self._live.close()
        for name in list(self._waiting):
            if failed := self._write(name, ""):
                lost = self._waiting[name].count("\n")
                show(f"note: {lost} lines of {self.run / name} are lost: {failed.strerror}")
        self._track(lambda tracker: tracker.close())

    def _add(self, kind: Callable[..., Tracker], *arguments: Any) -> None:
        """Open a tracker; where that fails, as on a full disk or without a network, the run goes on without it.

        ValueError where its package is not installed.
        """
        try:
            self._trackers.append(kind(*arguments))
        except ValueError:
            raise
        except Exception as error:
            self.say(f"note: no metrics for {kind.__name__}: {type(error).__name__}: {_first_line(error)}")

    def _track(self, tell: Callable[[Tracker], None]) -> None:
        """Tell each tracker; one that fails gets nothing more."""
        for tracker in list(self._trackers):
            try:
                tell(tracker)
            except Exception as error:
                self._trackers.remove(tracker)
                self.say(f"note: {tracker.name} gets no more metrics: {type(error).__name__}: {_first_line(error)}")

    def _write(self, name: str, text: str) -> OSError | None:
        """Append to a file of the run, after what waits for it; the error where that fails and began to."""
        path, new = self.run / name, name not in self._waiting
        data = (self._waiting.pop(name, "") + text).encode("utf-8", "backslashreplace")
        size = None
        try:
            with path.open("ab") as file:
                size = file.tell()
                file.write(data)
        except OSError as error:
            if size is not None:
                with contextlib.suppress(OSError):
                    os.truncate(path, size)  # not half a line
            self._waiting[name] = data.decode("utf-8")
            return error if new or not text else None
        return None

    def _cut(self, path: Path, step: int) -> None:
        """Keep the lines up to `step`. Lines that nothing can be read from stay in a copy beside the file."""
        lines, kept, damaged = _lines(path), [], 0
        for line in lines if step else []:
            try:
                at = json.loads(line)["step"]
            except (ValueError, KeyError, TypeError):
                damaged += 1
                continue
            if at <= step:
                kept.append(line)
        text = "".join(f"{line}\n" for line in kept)
        try:
            if damaged:
                with whole(path.with_suffix(".damaged")) as copy:
                    shutil.copyfile(path, copy)
                self.say(f"note: {damaged} damaged lines of {path} are left out; {path.stem}.damaged still has them")
            if not path.exists() or path.read_bytes() != text.encode():
                write_whole(path, text)
        except OSError as error:
            raise ValueError(f"run: {path} cannot be written: {error.strerror}") from None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _lines(path: Path) -> list[str]:
    """Whole lines of a file. A kill can leave half of one at the end."""
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if line]
