"""Where images come from: index -> pixels and label, whatever the files look like."""

import difflib
import importlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fastrdm.loaders.archives import CIFAR, FASHION_ROOT, Arrays, Split, read_cifar, read_fashion_mnist
from fastrdm.loaders.beton import BETON, BetonSource
from fastrdm.loaders.classes import check_classes, read_class_list
from fastrdm.loaders.decode import CorruptImage, Pixels, Place, decode, fresh
from fastrdm.loaders.packed import PackedSource, Spent
from fastrdm.loaders.spec import LoaderConfig, Triple

EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".tif", ".tiff", ".webp"))
DIGITS_TRAIN = 1437  # of 1,797 images, in scikit-learn's order
STATISTICS: dict[str, tuple[Triple, Triple]] = {  # mean and std of the training images in [0, 1]
    "digits": ((0.305, 0.305, 0.305), (0.376, 0.376, 0.376)),
    "fashion_mnist": ((0.286, 0.286, 0.286), (0.353, 0.353, 0.353)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


class Source(Protocol):
    """A set of images; a class of your own with these attributes is named as `loader.source=package.module:Class`."""

    @property
    def name(self) -> str: ...

    @property
    def classes(self) -> list[str]: ...

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,), -1 where unknown."""
        ...

    @property
    def images(self) -> Pixels | None:
        """(N, H, W, 3) where the whole set is in memory."""
        ...

    @property
    def mean(self) -> Triple | None:
        """Of the training images in [0, 1], where known; `std` likewise."""
        ...

    @property
    def std(self) -> Triple | None: ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> Pixels:
        """(H, W, 3) uint8; raises CorruptImage."""
        ...


class ArraySource:
    """Images (N, H, W, 3) uint8 in memory."""

    def __init__(self, name: str, arrays: Arrays) -> None:
        self.name = name
        self.images, self.labels, self.classes = arrays
        self.mean, self.std = STATISTICS[name]

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Pixels:
        return self.images[index]  # type: ignore[no-any-return]


class FolderSource:
    """Image files, one folder a class; read and decoded on demand."""

    name = "folder"
    images = mean = std = None

    def __init__(self, root: Path) -> None:
        self.root = root
        self.classes = sorted(f.name for f in root.iterdir() if f.is_dir() and not f.name.startswith("."))
        if not self.classes:
            raise ValueError(f"loader.root must hold one folder of images a class, got none in {root}")
        files = [sorted(filter(is_image, os.listdir(root / name))) for name in self.classes]
        if [] in files:
            empty = root / self.classes[files.index([])]
            raise ValueError(f"class folder {empty} holds no image ({', '.join(sorted(EXTENSIONS))})")
        self.files = [file for found in files for file in found]
        self.labels = np.repeat(np.arange(len(files)), [len(found) for found in files])
        self._folders = [f"{root / name}{os.sep}" for name in self.classes]

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> Pixels:
        return self.read_into(index, fresh, Spent())

    def read_into(self, index: int, place: Place, spent: Spent) -> Pixels:
        """The same in memory that `place` gives; the seconds that it takes are added to `spent`."""
        began = time.perf_counter()
        data, name = self.fetch(index)
        fetched = time.perf_counter()
        pixels = decode(data, name, place)
        spent.read += fetched - began
        spent.decode += time.perf_counter() - fetched
        return pixels

    def fetch(self, index: int) -> tuple[bytes, str]:
        """The encoded image, and what to call it; raises CorruptImage."""
        path = self._folders[self.labels[index]] + self.files[index]
        try:
            return read_file(path), path
        except OSError as error:
            raise CorruptImage(f"{path}: {error.strerror}") from error


def read_file(path: str) -> bytes:
    """What a file holds; raises OSError. Path.read_bytes takes 30 microseconds more, two per cent of decoding."""
    file = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(file).st_size
        data = os.read(file, size)
        while len(data) < size and (more := os.read(file, size - len(data))):
            data += more
        return data
    finally:
        os.close(file)


def is_image(file: str) -> bool:
    """Whether a file's name says so."""
    return not file.startswith(".") and os.path.splitext(file)[1].lower() in EXTENSIONS


class Subset:
    """Some images of another source, numbered anew."""

    def __init__(self, source: Source, index: NDArray[np.int64]) -> None:
        self.source, self.index = source, index
        self.name, self.classes, self.mean, self.std = source.name, source.classes, source.mean, source.std
        self.labels, self.note = source.labels[index], getattr(source, "note", None)
        self.images = None if source.images is None else source.images[index]

    def __len__(self) -> int:
        return len(self.index)

    def read(self, index: int) -> Pixels:
        return self.source.read(int(self.index[index]))


def open_source(config: LoaderConfig, split: Split) -> Source:
    """The images of `split`; `config.subset` shortens the training split. Raises ValueError naming what is amiss."""
    if ":" in config.source:
        source = _open_class(config, split)
    elif config.source in SOURCES:
        source = SOURCES[config.source](config, split)
    else:
        near = difflib.get_close_matches(config.source, SOURCES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(SOURCES)}, or pkg.mod:Class"
        raise ValueError(f"loader.source is unknown: {config.source!r}; {hint}")
    if config.classes is not None:
        source = of_classes(source, config.classes, f"{config.root or config.source} ({split})")
    return source if config.subset is None or split == "test" else balanced(source, config.subset)


def of_classes(source: Source, name: str, where: str) -> Subset:
    """Only the images of the classes in list `name`, numbered and labelled as in a folder that holds no others."""
    wanted = read_class_list(name)
    check_classes(wanted, source.classes, name, where)
    old = np.array([source.classes.index(label) for label in wanted])
    kept = Subset(source, np.flatnonzero(np.isin(source.labels, old)))
    new = np.full(len(source.classes), -1)
    new[old] = np.arange(len(old))
    kept.classes, kept.labels = wanted, new[kept.labels]
    return kept


def balanced(source: Source, size: int) -> Subset:
    """The first images of each class, the same number of each, `size` in all."""
    classes, counts = np.unique(source.labels, return_counts=True)
    share, rest = divmod(size, len(classes))
    if rest or share > counts.min():
        raise ValueError(
            f"loader.subset must be a multiple of the {len(classes)} classes and at most {counts.min() * len(classes)} "
            f"(the smallest class has {counts.min()} images), got {size}"
        )
    chosen = [np.flatnonzero(source.labels == label)[:share] for label in classes]
    return Subset(source, np.sort(np.concatenate(chosen)))


def _root(config: LoaderConfig) -> Path:
    fetched = config.download and config.source in CIFAR
    if config.root is None or not (Path(config.root).is_dir() or fetched):
        raise ValueError(f"loader.root must be the folder of {config.source}, got {config.root!r}, which is no folder")
    return Path(config.root)


def _open_digits(_: LoaderConfig, split: Split) -> Source:
    from sklearn.datasets import load_digits  # takes half a second: only who needs it waits

    digits = load_digits()
    part = slice(DIGITS_TRAIN) if split == "train" else slice(DIGITS_TRAIN, None)
    grey = np.round(digits.images[part] * (255 / 16)).astype(np.uint8)
    return ArraySource("digits", Arrays(np.repeat(grey[..., None], 3, axis=3), digits.target[part], list("0123456789")))


def _open_fashion_mnist(config: LoaderConfig, split: Split) -> Source:
    return ArraySource("fashion_mnist", read_fashion_mnist(Path(config.root or FASHION_ROOT), split))


def _open_cifar(config: LoaderConfig, split: Split) -> Source:
    return ArraySource(config.source, read_cifar(config.source, _root(config), split, config.download))


def _open_folder(config: LoaderConfig, split: Split) -> Source:
    return FolderSource(_part(_root(config), split))


def _open_packed(config: LoaderConfig, split: Split) -> Source:
    root = _root(config)
    if split == "train" or not (root / "meta.json").is_file():
        part = _part(root, split)
        return BetonSource(part) if (part / BETON).is_file() else PackedSource(part)
    whole = PackedSource(root)
    if whole.classes:
        raise ValueError(f"loader.root must hold packed folders train and val, got {root}, which is one packed folder")
    return whole  # without labels nothing is measured on it


def _part(root: Path, split: Split) -> Path:
    """The folder of `split`: root itself for training where it has no folders of that kind."""
    parts = {part for part in ("train", "val", "test") if (root / part).is_dir()}
    if not parts and split == "train":
        return root
    found = [part for part in (("train",) if split == "train" else ("val", "test")) if part in parts]
    if not found:
        missing = "train" if split == "train" else "val or test"
        raise ValueError(f"loader.root must hold a folder {missing}, got {root}, which has none")
    return root / found[0]


def _open_class(config: LoaderConfig, split: Split) -> Source:
    """An instance of pkg.mod:Class, made with (root, split), that has all a Source has."""
    module, _, name = config.source.partition(":")
    try:
        source: Source = getattr(importlib.import_module(module), name)(config.root, split)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"loader.source {config.source!r} cannot be opened: {error}") from error
    needed = ("name", "classes", "labels", "images", "mean", "std", "__len__", "read")
    missing = [attribute for attribute in needed if not hasattr(source, attribute)]
    if missing:
        raise ValueError(
            f"loader.source {config.source!r} lacks {', '.join(missing)} (see fastrdm.loaders.sources.Source)"
        )
    if len(source.labels) != len(source):
        raise ValueError(f"loader.source {config.source!r} has {len(source)} images and {len(source.labels)} labels")
    return source


SOURCES: dict[str, Callable[[LoaderConfig, Split], Source]] = {
    "digits": _open_digits,
    "fashion_mnist": _open_fashion_mnist,
    **dict.fromkeys(CIFAR, _open_cifar),
    "folder": _open_folder,
    "packed": _open_packed,
}
