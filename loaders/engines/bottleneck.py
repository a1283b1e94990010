"""Diagnosis of what training waits for: storage, a page cache that is too small, decoding, or nothing."""

import os
import threading
import time

from fastrdm.loaders.sources.source import ReadTime

WAITS = 0.15  # share of time waiting for data above which something is said
SLOWER = 4.0  # times as slow as its best reading: what was in memory no longer is
MIN_SECONDS = 10.0  # seconds to judge from: the first batch of an epoch is always waited for
IDLE = 0.5  # share of the threads' time at work below which they are not what is missing


class Diagnosis:
    """Seconds of threads and of the training loop, and what they mean."""

    def __init__(self, workers: int, total_bytes: int | None = None) -> None:
        """`total_bytes`: size of the set on storage, where known."""
        self.workers, self.total_bytes = workers, total_bytes
        self.lock = threading.Lock()
        self.best_read: float | None = None  # seconds an image
        self.said = "keeps up"
        self._begin()

    def _begin(self) -> None:
        self.began, self.waited, self.images = time.perf_counter(), 0.0, 0
        self.read = self.decode = 0.0

    def add(self, spent: ReadTime, images: int) -> None:
        """Count what a thread did."""
        with self.lock:
            self.read, self.decode = self.read + spent.read, self.decode + spent.decode
            self.images += images

    def describe(self) -> str | None:
        """A line if the state has changed, else None; judged over at least MIN_SECONDS since the last call."""
        seconds = time.perf_counter() - self.began
        if seconds < MIN_SECONDS:
            return None
        with self.lock:
            state, text = self._state(seconds)
            if self.images:
                read = self.read / self.images
                self.best_read = read if self.best_read is None else min(read, self.best_read)
            self._begin()
        changed, self.said = state != self.said, state
        return f"data: {text}" if changed else None

    def _state(self, seconds: float) -> tuple[str, str]:
        """Name of the state, and the line that tells it."""
        share = self.waited / max(seconds, 1e-9)
        if share < WAITS or not self.images:
            return "keeps up", "loading keeps up with training again"
        waits = f"training waits {100 * share:.0f} % of its time"
        read, decode = self.read / self.images, self.decode / self.images
        if self.read + self.decode < IDLE * self.workers * seconds:
            return "idle", (
                f"{waits}, the loading threads idle meanwhile: epochs of few steps, each of which starts with nothing "
                "made ahead, or too little ahead (loader.prefetch, loader.prefetch_mb)"
            )
        if read <= decode:
            return "decoding", (
                f"{waits} for decoding ({1e3 * decode:.1f} ms an image and thread): raise loader.workers "
                f"({self.workers} now, {os.cpu_count()} cores here), or pack with --mode raw"
            )
        if self.best_read and read > SLOWER * self.best_read:
            size = f" of {self.total_bytes / 1e9:,.0f} GB" if self.total_bytes else ""
            return "page cache", (
                f"{waits} for storage: an image takes {1e3 * read:.1f} ms to read and took "
                f"{1e3 * self.best_read:.1f} ms before, so the set{size} no longer fits the page cache "
                f"({_memory() / 1e9:,.0f} GB of memory). Pack it smaller, use loader.order=windowed, or add memory"
            )
        return "storage", (
            f"{waits} for storage: {1e3 * read:.1f} ms to read an image, {1e3 * decode:.1f} ms to decode it. Copy the "
            "set to a local disk, pack it, or raise loader.workers to read more at a time"
        )


def _memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
