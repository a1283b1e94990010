"""The live line of commands that take long: drawn over by tqdm on a terminal, a printed line now and then elsewhere."""

import contextlib
import shutil
import sys
import threading
import time

from tqdm import tqdm


class _Bar(tqdm):  # type: ignore[misc]
    """tqdm without its thread, and with a lock of this process alone: its own is a semaphore, which a kill leaves."""

    monitor_interval = 0


_Bar.set_lock(threading.RLock())


def on_terminal() -> bool:
    """Whether what is printed goes to a terminal, where a line can be drawn over."""
    return sys.stdout is not None and not sys.stdout.closed and sys.stdout.isatty()


def show(text: str) -> None:
    """Print, where there is still somebody to print for: a closed terminal or pipe must not end a run."""
    with contextlib.suppress(OSError, ValueError):
        print(text, flush=True)


class LiveLine:
    """One line that says how far a command is, and lines that stay above it."""

    def __init__(self, every: float = 10.0, at_once: bool = False) -> None:
        """`every`: seconds between two lines that cannot replace each other; the first may come `at_once`."""
        self.every = every
        self._last = -every if at_once else time.monotonic()
        self._bar: _Bar | None = None

    def tell(self, text: str) -> None:
        """Replace the live line by one of work whose amount nobody knows."""
        self.advance(text, None)

    def advance(self, text: str, share: float | None) -> bool:
        """Replace the live line; whether it is time for a line in a file.

        On a terminal a bar stands before the text where the `share` of the work that is done, 0 to 1, is known.
        Elsewhere the text is printed, at most once in `every` seconds.
        """
        due = time.monotonic() - self._last >= self.every
        if due:
            self._last = time.monotonic()
        if on_terminal():
            self._draw(text, share)
        elif due:
            show(text)
        return due

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self.close()
        show(text)

    def close(self) -> None:
        """Remove the live line."""
        if self._bar is not None:
            with contextlib.suppress(OSError, ValueError):
                self._bar.close()
            self._bar = None

    def _draw(self, text: str, share: float | None) -> None:
        with contextlib.suppress(OSError, ValueError):
            if self._bar is None:
                # Given rows are not asked of the terminal: one that says 0, as those without a window do, gets no line.
                self._bar = _Bar(total=1.0, file=sys.stdout, leave=False, nrows=24, bar_format="{desc}")
            self._bar.bar_format = "{desc}" if share is None else "{percentage:3.0f}%|{bar:10}| {desc}"
            self._bar.ncols = shutil.get_terminal_size().columns - 1
            self._bar.n = share or 0.0
            self._bar.set_description_str(text)
