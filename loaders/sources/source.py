"""The base class of sources, images in memory, and subsets of a source."""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastrdm.loaders.sources.archives import Arrays
from fastrdm.loaders.sources.checks import check_pixels
from fastrdm.loaders.sources.decode import Allocate, CorruptImage, Pixels, decode, new_pixels
from fastrdm.loaders.sources.index_cache import stamp
from fastrdm.loaders.spec import STATISTICS
from fastrdm.schema import Triple


@dataclass
class ReadTime:
    """Seconds that one thread spent on getting images."""

    read: float = 0.0
    decode: float = 0.0


class BetonImages(NamedTuple):
    """Images of one .beton file, as ffcv's engine finds them."""

    path: Path
    stamp: tuple[int, int]  # size and time of change when the file was opened
    numbers: NDArray[np.int64]  # (N,) of each image in the file
    height: NDArray[np.int64]  # (N,) pixels
    width: NDArray[np.int64]  # (N,) pixels

    def at(self, index: NDArray[np.int64]) -> "BetonImages":
        """The images `index` (n,) of these."""
        return self._replace(numbers=self.numbers[index], height=self.height[index], width=self.width[index])

    def check(self) -> None:
        """CorruptImage where the file is not the one that was opened; a shorter one would end the process."""
        try:
            same = stamp(self.path) == self.stamp
        except OSError as error:
            raise CorruptImage(f"{self.path}: {error.strerror}") from None
        if not same:
            raise CorruptImage(f"{self.path}: the file has changed since it was opened")


class Source:
    """A set of images. A subclass of your own is named as `loader.source=package.module:Class`.

    Set `name`, `classes` and `labels`, and define `fetch` (images as they are stored) or `read` (their pixels). All
    else is an ability: a source that has it gets what it makes possible, a source without it works all the same.
    """

    name: str
    """Name of the set, shown at the start of a run."""

    classes: list[str]
    """Names of the classes; [] where nothing is labeled."""

    labels: NDArray[np.int64]
    """(N,) int64, the number of each image's class, -1 where it is unknown."""

    images: Pixels | None = None
    """(N, H, W, 3) uint8 where the whole set is in memory: the resident engine needs it."""

    mean: Triple | None = None
    """Mean of the training images' red, green and blue in [0, 1]; None: ImageNet's."""

    std: Triple | None = None
    """Standard deviation of the training images' red, green and blue in [0, 1]; None: ImageNet's."""

    whole_view: bool = False
    """The center view shows the whole image, as the protocols of 28 and 32 px sets have it. False, for photographs: the
    short side is resized to 256 / 224 of the view, whatever the image's size, and the center is cut.
    """

    note: str | None = None
    """Note about this set that is shown at the start of a run."""

    shards: NDArray[np.int64] | None = None
    """(N,) int64, the file that each image lies in: loader.order=windowed mixes a few of them at a time."""

    stored_bytes: int | None = None
    """Size of the set on storage: a run then tells how long one reading of it takes."""

    side: int | None = None
    """Pixels a side where all images are stored as squares of one size, which `gather` copies."""

    beton: BetonImages | None = None
    """Where the images lie in a .beton file: loader.engine=ffcv reads no other."""

    @property
    def encoded(self) -> bool:
        """True if `fetch` returns images as they are stored, for engines that decode by themselves."""
        return type(self).fetch is not Source.fetch

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, index: int) -> tuple[bytes, str]:
        """The image as it is stored, and what to call it in messages; raises CorruptImage, from any thread."""
        raise TypeError(f"{type(self).__name__} holds no encoded images")

    def read(self, index: int) -> Pixels:
        """(H, W, 3) uint8; raises CorruptImage, from any thread."""
        return self.read_into(index, new_pixels, ReadTime())

    def read_into(self, index: int, allocate: Allocate, spent: ReadTime) -> Pixels:
        """Read an image into the memory that `allocate` gives, and add the seconds that this takes to `spent`."""
        began = time.perf_counter()
        if not self.encoded:
            read = self.read(index)
            check_pixels(read, (None, None, 3), f"pixels of {self.name}, image {index},")
            pixels = allocate(*read.shape[:2])
            pixels[...] = read
            spent.decode += time.perf_counter() - began
            return pixels
        data, name = self.fetch(index)
        fetched = time.perf_counter()
        pixels = decode(data, name, allocate)
        spent.read += fetched - began
        spent.decode += time.perf_counter() - fetched
        return pixels

    def key(self, index: int) -> str:
        """Name of the image within the set, such as its path below the root, wherever the set lies."""
        return f"image {index}"

    def sizes(self) -> NDArray[np.int64] | None:
        """(N,) int64, about the bytes of each image as it is stored; None where that is not known without reading."""
        return None

    def take(self, index: NDArray[np.int64]) -> "Source":
        """The images `index` (n,) as a source of their own, which holds no more than it needs."""
        return Subset(self, index)

    def gather(self, indices: NDArray[np.int64], out: Pixels) -> None:
        """The images `indices` (n,) of a source with a `side` into `out` (n, side, side, 3); raises CorruptImage."""
        raise TypeError(f"{type(self).__name__} has no side")

    def read_ahead(self, shards: set[int]) -> None:
        """A hint that these `shards` are read soon, from one end to the other."""

    def planned(self, groups: Sequence[Sequence[int]]) -> AbstractContextManager[None]:
        """A hint, as long as the context lasts: shards are read in this order, those of a group mixed."""
        return nullcontext()

    def news(self) -> str | None:
        """A line on what has happened since the last call that a user should know, None without."""
        return None


class ArraySource(Source):
    """Images (N, H, W, 3) uint8 in memory."""

    images: Pixels
    whole_view = True

    def __init__(self, name: str, arrays: Arrays) -> None:
        self.name = name
        self.images, self.labels, self.classes, self.note = arrays
        self.mean, self.std = STATISTICS[name]

    def read(self, index: int) -> Pixels:
        return self.images[index]  # type: ignore[no-any-return]

    def take(self, index: NDArray[np.int64]) -> "ArraySource":
        return ArraySource(self.name, Arrays(self.images[index], self.labels[index], self.classes))


class NoImages(Source):
    """The split of a set that has no such split."""

    def __init__(self, name: str) -> None:
        self.name, self.classes, self.labels = name, [], np.zeros(0, np.int64)


class Subset(Source):
    """Some images of another source, numbered anew, with all its abilities."""

    def __init__(self, source: Source, index: NDArray[np.int64]) -> None:
        self.source, self.index = source, index
        self.name, self.classes, self.labels = source.name, source.classes, source.labels[index]
        self.mean, self.std, self.note = source.mean, source.std, source.note
        self.whole_view = source.whole_view
        self.side, self.stored_bytes = source.side, source.stored_bytes
        self.images = None if source.images is None else source.images[index]
        self.shards = None if source.shards is None else source.shards[index]
        self.beton = source.beton and source.beton.at(index)

    @property
    def encoded(self) -> bool:
        return self.source.encoded

    def fetch(self, index: int) -> tuple[bytes, str]:
        return self.source.fetch(int(self.index[index]))

    def read(self, index: int) -> Pixels:
        return self.source.read(int(self.index[index]))

    def read_into(self, index: int, allocate: Allocate, spent: ReadTime) -> Pixels:
        return self.source.read_into(int(self.index[index]), allocate, spent)

    def key(self, index: int) -> str:
        return self.source.key(int(self.index[index]))

    def sizes(self) -> NDArray[np.int64] | None:
        known = self.source.sizes()
        return None if known is None else known[self.index]

    def take(self, index: NDArray[np.int64]) -> Source:
        part = self.source.take(self.index[index])
        part.classes, part.labels = self.classes, self.labels[index]
        return part

    def gather(self, indices: NDArray[np.int64], out: Pixels) -> None:
        self.source.gather(self.index[indices], out)

    def read_ahead(self, shards: set[int]) -> None:
        self.source.read_ahead(shards)

    def planned(self, groups: Sequence[Sequence[int]]) -> AbstractContextManager[None]:
        return self.source.planned(groups)

    def news(self) -> str | None:
        return self.source.news()
