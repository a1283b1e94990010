"""Image files in a folder of any shape."""

import copy
import errno
import os
import stat
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastrdm.loaders.sources.decode import MOST_BYTES, CorruptImage
from fastrdm.loaders.sources.label_file import read_labels
from fastrdm.loaders.sources.listing import (
    EXTENSIONS,
    PassedOver,
    find_images,
    holds_images,
    is_image,
    subfolders,
)
from fastrdm.loaders.sources.source import Source

TRAIN, VAL, TEST = ("train", "training"), ("val", "valid", "validation"), ("test",)
SPLIT_FOLDERS = {*TRAIN, *VAL, *TEST}


class FolderSource(Source):
    """Image files below a folder; read and decoded on demand.

    `labels`: `folders`, the name of the first folder below the root is the class; `none`; `auto`, folders where there
    are two or more and no image lies beside them, else none; or the path of a file that read_labels understands.
    `classes_elsewhere`: classes of the set's other splits, so that all splits number them alike.
    """

    name = "folder"

    def __init__(self, root: Path, labels: str = "auto", classes_elsewhere: Collection[str] = ()) -> None:
        self.root, self._folder = root, f"{root}{os.sep}"
        passed, notes = PassedOver(), list[str]()
        groups = _grouped(root, passed)
        loose = groups.get("", [])
        if labels == "auto" and not loose:
            _refuse_empty(root, groups)
        named = class_names([group[:-1] for group in groups], labels, classes_elsewhere, str(root))
        if named:
            self._label_by_folder(named, groups, passed, notes)
        else:
            self.files = sorted(chain(*groups.values()))
            self.classes, self.labels = [], np.full(len(self.files), -1)
            if labels in ("auto", "none"):
                notes.append(f"the images of {root} are used without labels")
            else:
                self.labels, self.classes = label_by_file(Path(labels), self.files, str(root), notes)
        self.note = "; ".join(filter(None, (*notes, str(passed)))) or None

    def _label_by_folder(
        self, named: list[str], groups: dict[str, list[str]], passed: PassedOver, notes: list[str]
    ) -> None:
        _refuse_empty(self.root, groups)
        for file in groups.get("", []):
            passed.add("images outside the class folders", file)
        for name in set(subfolders(self.root)) - set(named):
            passed.add("folders without an image", name)
        if missing := [name for name in named if f"{name}/" not in groups]:
            some = f"{len(missing)} of {len(named)} classes"
            notes.append(f"{some} have no image in {self.root}, such as {missing[0]}")
        found = [sorted(groups.get(f"{name}/", [])) for name in named]
        self.classes, self.files = named, list(chain.from_iterable(found))
        self.labels = np.repeat(np.arange(len(found)), [len(files) for files in found])

    def fetch(self, index: int) -> tuple[bytes, str]:
        path = self._folder + self.files[index]
        try:
            return read_file(path), path
        except OSError as error:
            raise CorruptImage(f"{path}: {error.strerror}") from error

    def key(self, index: int) -> str:
        return self.files[index]

    def sizes(self) -> NDArray[np.int64]:
        return np.array([_size(self._folder + file) for file in self.files], np.int64)

    def take(self, index: NDArray[np.int64]) -> "FolderSource":
        part = copy.copy(self)
        part.files, part.labels = [self.files[k] for k in index.tolist()], self.labels[index]
        return part


def class_names(tops: Iterable[str], labels: str, elsewhere: Collection[str], where: str) -> list[str] | None:
    """The classes of images whose first folders are `tops`, '' for an image in none; None where folders are no classes.

    ValueError where there is no folder although `labels` is folders.
    """
    tops = set(tops)
    named = sorted({*tops, *elsewhere} - {""})
    if labels == "folders" and tops <= {""}:
        raise ValueError(f"loader.root must hold one folder of images a class, got none in {where}")
    return named if labels == "folders" or (labels == "auto" and len(named) > 1 and "" not in tops) else None


def label_by_file(
    path: Path, files: Sequence[str], where: str, notes: list[str]
) -> tuple[NDArray[np.int64], list[str]]:
    """Labels (N,) of `files` by the file at `path`, and its classes; what does not match is noted.

    ValueError where the file names none of them.
    """
    labels, classes, unmatched = read_labels(path, files)
    known = int((labels >= 0).sum())
    if not known:
        raise ValueError(f"{path} names none of the images of {where}, but for instance {unmatched[0]}")
    if known < len(labels):
        notes.append(f"{path} has a label for {known:,} of the {len(labels):,} images of {where}")
    if unmatched:
        notes.append(f"{path} names {len(unmatched):,} images that are not in {where}, such as {unmatched[0]}")
    return labels, classes


def split_folders(root: Path) -> dict[str, Path]:
    """The folders of `root` that are splits, by the names train, val and test; {} where root is one set."""
    holds_some = partial(_holds_images_itself, root)
    splits = name_splits(subfolders(root), lambda name: holds_images(root / name), holds_some)
    return {split: root / name for split, name in splits.items()}


def name_splits(
    found: Collection[str], holds_any: Callable[[str], bool], holds_itself: Callable[[str], bool]
) -> dict[str, str]:
    """Which of the folders `found` are the splits train, val and test; {} where the set has none.

    A folder that is called like a split is a class where it holds images itself and others beside it do too: a set of
    vehicles may well have the class `train`.
    """
    named = {names[0]: name for names in (TRAIN, VAL, TEST) if (name := _first(names, found))}
    others = [name for name in found if name not in named.values() and holds_any(name)]
    return {split: name for split, name in named.items() if not others or not holds_itself(name)}


def _first(names: Collection[str], found: Collection[str]) -> str | None:
    return next((name for name in names if name in found), None)


def _holds_images_itself(root: Path, name: str) -> bool:
    return any(map(is_image, os.listdir(root / name)))


def class_folders(folder: Path) -> list[str]:
    """Names of the folders in `folder` that hold images."""
    return [name for name in subfolders(folder) if holds_images(folder / name)]


def read_file(path: str) -> bytes:
    """Return the contents of a file; raises OSError.

    Path.read_bytes takes 30 microseconds more, which is two per cent of decoding.
    """
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would let us wait for a writer
    try:
        status = os.fstat(file)
        size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        if size > MOST_BYTES:
            raise OSError(errno.EFBIG, f"{size:,} bytes are too many for an image")
        data = os.read(file, size)
        while len(data) < size and (more := os.read(file, size - len(data))):
            data += more
        return data
    finally:
        os.close(file)


def _size(path: str) -> int:
    """Bytes of a file, 0 where there is none."""
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _grouped(root: Path, passed: PassedOver) -> dict[str, list[str]]:
    """Every image below `root` by the first folder of its path, which ends in a slash and is '' for root's own."""
    groups: dict[str, list[str]] = {}
    for file in find_images(root, passed):
        groups.setdefault(file[: file.find("/") + 1], []).append(file)
    archives = [name for name in passed.examples.get("archives", []) if "/" not in name]
    if archives or not groups:
        found = "archives beside images" if groups else "none"
        sources = "imagenet for its own archives, tar or webdataset for .tar, parquet for .parquet"
        hint = f"; {passed}: give loader.source={sources}, or move them away" if "archives" in passed.counts else ""
        raise ValueError(f"loader.root must hold images ({', '.join(sorted(EXTENSIONS))}), got {found} in {root}{hint}")
    return groups


def _refuse_empty(root: Path, groups: Collection[str]) -> None:
    """A class folder with nothing in it, as a broken download or unpacking leaves it."""
    for name in subfolders(root):
        if f"{name}/" not in groups and not os.listdir(root / name):
            raise ValueError(
                f"class folder {root / name} holds no image ({', '.join(sorted(EXTENSIONS))}): remove it, or give "
                "loader.labels=none if folders are no classes"
            )
