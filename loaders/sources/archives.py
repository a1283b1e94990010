"""CIFAR and Fashion-MNIST as their authors publish them: images (N, H, W, 3) uint8, labels (N,), class names."""

import gzip
import hashlib
import json
import os
import shutil
import tarfile
import urllib.request
import zlib
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastrdm.files import read_npy
from fastrdm.loaders.sources.checks import check_labels
from fastrdm.loaders.sources.plain_pickle import read_pickle

Split = Literal["train", "test"]
# a damaged file may hold any instruction of a pickle, any header and any length
DAMAGE = (
    *(OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError),
    *(zlib.error, tarfile.TarError),
)
MOST_BYTES = 1 << 29  # of one file in an archive, unpacked; the largest, CIFAR-100's training images, has 155 MB
MOST_MEMBERS = 1000  # of an archive, which has nine


class Arrays(NamedTuple):
    """One split of a set."""

    images: NDArray[np.uint8]  # (N, H, W, 3)
    labels: NDArray[np.int64]  # (N,)
    classes: list[str]
    note: str | None = None  # what a user should know of these files


class Layout(NamedTuple):
    """Names of an archive, its files and its keys."""

    archive: str
    md5: str
    folder: str
    files: dict[Split, tuple[str, ...]]
    labels: str
    meta: str
    classes: str
    sums: dict[str, str]  # MD5 of each official file


CIFAR = {
    "cifar10": Layout(
        "cifar-10-python.tar.gz",
        "c58f30108f718f92721af3b95e74349a",
        "cifar-10-batches-py",
        {"train": tuple(f"data_batch_{k}" for k in range(1, 6)), "test": ("test_batch",)},
        "labels",
        "batches.meta",
        "label_names",
        {
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "40351d587109b95175f43aff81a1287e",
            "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
        },
    ),
    "cifar100": Layout(
        "cifar-100-python.tar.gz",
        "eb9058c3a382ffc7106e4002c42a8d85",
        "cifar-100-python",
        {"train": ("train",), "test": ("test",)},
        "fine_labels",
        "meta",
        "fine_label_names",
        {
            "train": "16019d7e3df5f24257cddd939b257f8d",
            "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
            "meta": "7973b15100ade9c7d40fb424638fde48",
        },
    ),
}
CIFAR_ADDRESS = "https://www.cs.toronto.edu/~kriz/"
FASHION_ROOT = "/usr/share/datasets/fashion-mnist"  # of Debian's package dataset-fashion-mnist
FASHION_FILES: dict[Split, str] = {"train": "train", "test": "t10k"}
FASHION_CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"]
FASHION_CLASSES += ["Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


def read_fashion_mnist(root: Path, split: Split) -> Arrays:
    """28 x 28 gray images from idx files, plain or .gz, in `root`."""
    images = _read_idx(root, f"{FASHION_FILES[split]}-images-idx3-ubyte")
    labels = _read_idx(root, f"{FASHION_FILES[split]}-labels-idx1-ubyte")
    return Arrays(np.repeat(images[..., None], 3, axis=3), labels.astype(np.int64), FASHION_CLASSES)


def _read_idx(root: Path, name: str) -> NDArray[np.uint8]:
    plain, packed = root / name, root / f"{name}.gz"
    path = plain if plain.exists() else packed
    if not path.exists():
        raise ValueError(f"loader.root must hold {name} or {name}.gz, got {root}: apt install dataset-fashion-mnist")
    try:
        data = path.read_bytes() if path == plain else _unzipped(path)
        if data[:3] != b"\0\0\x08":
            raise ValueError("not an idx file of bytes")
        header = 4 + 4 * data[3]
        return np.frombuffer(data, np.uint8, offset=header).reshape(np.frombuffer(data[4:header], ">u4"))
    except DAMAGE as error:
        raise ValueError(f"{path} is damaged ({error}): fetch it again") from error


def read_cifar(name: str, root: Path, split: Split, download: bool) -> Arrays:
    """32 x 32 images of `cifar10` or `cifar100`, from the first of these that `root` has: .npy pairs, the extracted
    folder, the archive, which is downloaded when `download` is set."""
    layout = CIFAR[name]
    if (root / f"{split}.images.npy").exists():
        return _read_pair(root, split)
    folders = [folder for folder in (root / layout.folder, root) if (folder / layout.meta).exists()]
    path = folders[0] if folders else root / layout.archive
    if not path.exists():
        if not download:
            raise ValueError(
                f"loader.root must hold {layout.archive}, {layout.folder}/ or {split}.images.npy, got {root}: "
                "set loader.download=true to fetch the archive"
            )
        _download(CIFAR_ADDRESS + layout.archive, layout.md5, path)
    wanted = (*layout.files[split], layout.meta)
    try:
        if folders:
            found = {file: (path / file).read_bytes() for file in wanted}
        else:
            found = _read_members(path, layout.folder, wanted)
        *batches, meta = (read_pickle(found[file]) for file in wanted)
        images = np.concatenate([_field(batch, "data") for batch in batches])
        labels = np.concatenate([np.asarray(_field(batch, layout.labels)) for batch in batches])
        classes = [_text(label) for label in _field(meta, layout.classes)]
        if images.dtype != np.uint8 or images.shape[1:] != (3 * 32 * 32,) or labels.shape != images.shape[:1]:
            raise ValueError(f"images {images.dtype} {images.shape} with labels {labels.dtype} {labels.shape}")
        check_labels(labels, classes, f"{path} ({split})")
    except DAMAGE as error:
        raise ValueError(f"{path} is damaged ({error}): delete it and fetch it again") from error
    images = np.ascontiguousarray(images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return Arrays(images, labels.astype(np.int64), classes, _unofficial(path, layout, found))


def _field(batch: Any, name: str) -> Any:
    """An entry of a pickled dict, whose keys are bytes as Python 2 wrote them, or str where packed again since."""
    if not isinstance(batch, dict):
        raise ValueError(f"a dict with {name} is expected, got {type(batch).__name__}")
    value = batch[name.encode()] if name.encode() in batch else batch[name]
    return getattr(value, "array", value)  # an array inside a dict


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _unofficial(path: Path, layout: Layout, found: dict[str, bytes]) -> str | None:
    """Which of the files read are not the ones that were published."""
    other = [f for f, data in found.items() if hashlib.md5(data, usedforsecurity=False).hexdigest() != layout.sums[f]]
    if not other:
        return None
    return f"{', '.join(other)} of {path} differ from the official files (MD5): accuracies are of another set"


def _read_pair(root: Path, split: Split) -> Arrays:
    """images.npy and labels.npy of a split, with the class names of classes.json where there is one."""
    images, labels = (read_npy(root / f"{split}.{part}.npy") for part in ("images", "labels"))
    if images.dtype != np.uint8 or images.shape[3:] != (3,) or labels.shape != images.shape[:1] or not len(labels):
        raise ValueError(
            f"{root}/{split}.images.npy must be uint8 (N, H, W, 3) and its labels (N,), "
            f"got {images.dtype} {images.shape} and {labels.shape}"
        )
    names = root / "classes.json"
    try:
        classes = json.loads(names.read_text()) if names.exists() else [str(k) for k in range(int(labels.max()) + 1)]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{names} is damaged: {error}") from error
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"{names} must be a list of class names")
    check_labels(labels, classes, f"{root}/{split}.labels.npy")
    return Arrays(images, labels.astype(np.int64), classes)


class _Unpacked(gzip.GzipFile):
    """A .gz file that is never asked for more at once than any file of an archive holds."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= MOST_BYTES:
            raise ValueError(f"one of its files claims {size} bytes")
        return super().read(size)


def _unzipped(path: Path) -> bytes:
    """Return the decompressed contents of a .gz file."""
    with _Unpacked(path) as unpacked:
        data = unpacked.read(MOST_BYTES)
        if unpacked.read(1):
            raise ValueError(f"it holds more than {MOST_BYTES} bytes")
    return data


def _read_members(archive: Path, folder: str, wanted: tuple[str, ...]) -> dict[str, bytes]:
    """The wanted files of `folder` in the archive, read in one pass and never written to disk."""
    found = {}
    with _Unpacked(archive) as unpacked, tarfile.open(fileobj=unpacked, mode="r:") as tar:
        for number, member in enumerate(tar):
            if number == MOST_MEMBERS:
                raise ValueError(f"it holds more than {MOST_MEMBERS} files")
            file = member.name.removeprefix(f"{folder}/")
            if file in wanted and (stream := tar.extractfile(member)):
                found[file] = stream.read()
        rest = 0
        while piece := unpacked.read(1 << 20):  # the checksum stands behind the padding, which tarfile leaves unread
            rest += len(piece)
            if rest > MOST_BYTES:
                raise ValueError("it does not end behind its last file")
    if missing := [file for file in wanted if file not in found]:
        raise ValueError(f"{', '.join(missing)} is missing")
    return {file: found[file] for file in wanted}


def _download(address: str, md5: str, path: Path) -> None:
    """Fetch `address` to `path`, which appears only when complete and right."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # processes side by side do not meet
    try:
        with urllib.request.urlopen(address, timeout=60) as answer, part.open("wb") as file:
            shutil.copyfileobj(answer, file)
        got = hashlib.md5(part.read_bytes(), usedforsecurity=False).hexdigest()
        if got != md5:
            raise ValueError(f"{address} came with md5 {got}, expected {md5}: try again, or put it into {path.parent}")
        part.replace(path)
    except OSError as error:
        raise ValueError(f"cannot fetch {address} ({error}): put it into {path.parent} by hand") from error
    finally:
        part.unlink(missing_ok=True)
