"""Memory that decoded images go to: a few buffers, used again and again, pinned where a GPU reads them."""

import threading
from collections import deque

import numpy as np
import torch
from numpy.typing import NDArray

from fastrdm.kernels.augment.ragged import Ragged
from fastrdm.loaders.sources.decode import Pixels

ALIGN = 64  # bytes, of a cache line: two threads never write to the same one
SPARE = 1.25  # times what a batch needed: the next one rarely needs more


class Slot:
    """The images of one batch, written by many threads into one buffer, which later batches use again."""

    def __init__(self, pin: bool = False) -> None:
        self.pin = pin
        self.lock = threading.Lock()
        self.copied: torch.cuda.Event | None = None  # the device has what it needs of this memory
        self._take(0)
        self.begin(0)

    def _take(self, size: int) -> None:
        self.buffer = torch.empty(size, dtype=torch.uint8, pin_memory=self.pin)
        self._array: NDArray[np.uint8] = self.buffer.numpy()

    def begin(self, count: int) -> None:
        """Forget the images, expect `count` new ones."""
        self.used = 0
        self.offset = np.zeros(count, np.int64)
        self.sides = np.zeros((2, count), np.int32)  # heights, widths
        self._beyond: dict[int, Pixels] = {}  # by offset, what found no room in the buffer

    def place(self, number: int, height: int, width: int) -> Pixels:
        """Memory (height, width, 3) for image `number`; the newest place of a number counts."""
        size = 3 * height * width
        with self.lock:
            start, self.used = self.used, -(-(self.used + size) // ALIGN) * ALIGN
            self.offset[number], self.sides[:, number] = start, (height, width)
            if start + size > len(self._array):
                self._beyond[start] = np.empty((height, width, 3), np.uint8)
                return self._beyond[start]
        return self._array[start : start + size].reshape(height, width, 3)

    def rows(self, place: slice, side: int) -> Pixels:
        """Memory (n, side, side, 3) for the images `place` where all are squares, with room made for all at once."""
        size, count = 3 * side * side, len(self.offset)
        with self.lock:
            if self.used != size * count:
                if len(self._array) < size * count:
                    self._take(size * count)
                self.used = size * count
                self.offset[:], self.sides[:] = np.arange(count) * size, side
        return self._array[size * place.start : size * place.stop].reshape(-1, side, side, 3)

    def images(self) -> Ragged:
        """All images, once they are written; valid until `begin`."""
        if self._beyond:
            before = self._array
            self._take(int(self.used * SPARE))
            self._array[: len(before)] = before
            for start, pixels in self._beyond.items():
                self._array[start : start + pixels.size] = pixels.reshape(-1)
            self._beyond = {}
        height, width = torch.from_numpy(self.sides).unbind(0)
        return Ragged(self.buffer[: self.used], torch.from_numpy(self.offset), height, width)


class Ring:
    """Slots in turn; one is used again when it was given back and the device has copied what it held."""

    def __init__(self, pin: bool) -> None:
        self.pin = pin
        self.free: deque[Slot] = deque()
        self.largest = 0  # bytes of the largest batch so far

    def take(self, count: int) -> Slot:
        slot = self.free.popleft() if self.free else Slot(self.pin)
        if slot.copied:
            slot.copied.synchronize()
            slot.copied = None
        slot.begin(count)
        return slot

    def give(self, slot: Slot) -> None:
        self.free.append(slot)

    def learn(self, slot: Slot) -> None:
        """Note how large a decoded batch is."""
        self.largest = max(self.largest, slot.used)

    def fits(self, batches: int, limit: int) -> bool:
        """True if so many batches stay below `limit` bytes.

        False before the first batch, whose size is not known yet.
        """
        return 0 < self.largest * batches <= limit
