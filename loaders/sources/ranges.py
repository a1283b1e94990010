"""Images that lie back to back in a few large files: where each one begins, and reading it from there."""

import copy
import os
import resource
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastrdm.loaders.sources.decode import MOST_BYTES, CorruptImage
from fastrdm.loaders.sources.shard_cache import ShardCache
from fastrdm.loaders.sources.source import Source

Opened = TypeVar("Opened")


def keep_open(open_one: Callable[[str], Opened]) -> Callable[[str], Opened]:
    """`open_one` for a path, remembered for the files used last, as many as the limit of open files allows for.

    What is forgotten is closed when the last thread that uses it lets it go.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 4096 if soft == resource.RLIM_INFINITY else min(max(soft // 8, 8), 4096)
    return lru_cache(most)(open_one)


class Descriptor:
    """A file that is open for reading as long as somebody holds this."""

    def __init__(self, path: str) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


class RangeSource(Source):
    """Encoded images that are ranges of bytes in files. A subclass sets the five fields below, and calls `_opening`."""

    paths: Sequence[str]
    """The files."""

    shards: NDArray[np.int64]
    """(N,) int64, number of the file that each image lies in."""

    offset: NDArray[Any]
    """(N,) integers, place of each image's first byte in its file."""

    length: NDArray[Any]
    """(N,) integers, length in bytes of each image."""

    cache: ShardCache | None = None
    """Where the files come from that lie on a store, in the order of `paths`; None where they are here."""

    def _opening(self) -> None:
        """Get ready to read: once all fields are set, after unpickling, and to let go of all files that are open."""
        self._open = self._keep_open(Descriptor)

    def _keep_open(self, open_one: Callable[[str], Opened]) -> Callable[[str], Opened]:
        """keep_open, of a file that may have to be fetched first."""
        if self.cache is None:
            return keep_open(open_one)
        cache, number = self.cache, {path: number for number, path in enumerate(self.paths)}

        def fetched(path: str) -> Opened:
            while True:
                try:
                    return open_one(cache.get(number[path]))
                except FileNotFoundError:  # another process made room just now
                    continue

        return keep_open(fetched)

    def fetch(self, index: int) -> tuple[bytes, str]:
        size = self.length.item(index)
        if size > MOST_BYTES:
            raise CorruptImage(f"{self.called(index)}: {size:,} bytes are too many for an image")
        try:
            file = self._open(self.paths[self.shards.item(index)])
            data = os.pread(file.number, size, self.offset.item(index))
        except OSError as error:
            raise CorruptImage(f"{self.called(index)}: {error.strerror}") from error
        if len(data) < size:
            raise CorruptImage(f"{self.called(index)}: the file ends before it does")
        return data, self.called(index)

    def called(self, index: int) -> str:
        """Name of an image in messages."""
        return f"{self.paths[self.shards.item(index)]}, image {index}"

    def key(self, index: int) -> str:
        return f"{os.path.basename(self.paths[self.shards.item(index)])}:{self.offset.item(index)}"

    def sizes(self) -> NDArray[np.int64]:
        return self.length.astype(np.int64)

    def take(self, index: NDArray[np.int64]) -> "RangeSource":
        part = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray) and len(value) == len(self):
                setattr(part, name, value[index])
        return part

    def read_ahead(self, shards: set[int]) -> None:
        """Ask the system to read these files from one end to the other, in the background.

        Of a store, the cache is told; what was evicted meanwhile is closed, so that it takes no room on the disk.
        """
        if self.cache is not None:
            self._opening()
            self.cache.reached(shards)
        elif hasattr(os, "posix_fadvise"):
            for shard in shards:
                # held until the call is over: of two threads that open a file at once, only one has it remembered
                file = self._open(self.paths[shard])
                os.posix_fadvise(file.number, 0, 0, os.POSIX_FADV_WILLNEED)

    def planned(self, groups: Sequence[Sequence[int]]) -> AbstractContextManager[None]:
        return nullcontext() if self.cache is None else self.cache.following(groups)

    def news(self) -> str | None:
        told = self.cache and self.cache.store.news
        return told.popleft() if told else None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_open"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._opening()
