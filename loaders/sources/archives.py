"""CIFAR and Fashion-MNIST as their authors publish them: images (N, H, W, 3) uint8, labels (N,), class names."""

import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import tarfile
import urllib.request
import zlib
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "test"]
DAMAGE = (OSError, EOFError, ValueError, KeyError, IndexError, zlib.error, tarfile.TarError, pickle.UnpicklingError)


class Arrays(NamedTuple):
    """One split of a set."""

    images: NDArray[np.uint8]  # (N, H, W, 3)
    labels: NDArray[np.int64]  # (N,)
    classes: list[str]


class Layout(NamedTuple):
    """Names of an archive, its files and its keys."""

    archive: str
    md5: str
    folder: str
    files: dict[Split, tuple[str, ...]]
    labels: bytes
    meta: str
    classes: bytes


CIFAR = {
    "cifar10": Layout(
        "cifar-10-python.tar.gz",
        "c58f30108f718f92721af3b95e74349a",
        "cifar-10-batches-py",
        {"train": tuple(f"data_batch_{k}" for k in range(1, 6)), "test": ("test_batch",)},
        b"labels",
        "batches.meta",
        b"label_names",
    ),
    "cifar100": Layout(
        "cifar-100-python.tar.gz",
        "eb9058c3a382ffc7106e4002c42a8d85",
        "cifar-100-python",
        {"train": ("train",), "test": ("test",)},
        b"fine_labels",
        "meta",
        b"fine_label_names",
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
        data = path.read_bytes() if path == plain else gzip.decompress(path.read_bytes())
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
        *batches, meta = (_unpickle(found[file]) for file in wanted)
        images = np.concatenate([batch[b"data"] for batch in batches]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        labels = np.concatenate([batch[layout.labels] for batch in batches])
        classes = [label.decode() for label in meta[layout.classes]]
    except DAMAGE as error:
        raise ValueError(f"{path} is damaged ({error!r}): delete it and fetch it again") from error
    return Arrays(np.ascontiguousarray(images), labels.astype(np.int64), classes)


def _read_pair(root: Path, split: Split) -> Arrays:
    """images.npy and labels.npy of a split, with the class names of classes.json where there is one."""
    try:
        images, labels = (np.load(root / f"{split}.{part}.npy") for part in ("images", "labels"))
        names = root / "classes.json"
        classes = json.loads(names.read_text()) if names.exists() else [str(k) for k in range(labels.max() + 1)]
    except DAMAGE as error:
        raise ValueError(f"{root}/{split}.images.npy and its labels cannot be read: {error}") from error
    if images.dtype != np.uint8 or images.shape[3:] != (3,) or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{root}/{split}.images.npy must be uint8 (N, H, W, 3) and its labels (N,), "
            f"got {images.dtype} {images.shape} and {labels.shape}"
        )
    return Arrays(images, labels.astype(np.int64), classes)


def _read_members(archive: Path, folder: str, wanted: tuple[str, ...]) -> dict[str, bytes]:
    """The wanted files of `folder` in the archive, read in one pass and never written to disk."""
    found = {}
    with gzip.open(archive) as unpacked, tarfile.open(fileobj=unpacked) as tar:
        for member in tar:
            file = member.name.removeprefix(f"{folder}/")
            if file in wanted and (stream := tar.extractfile(member)):
                found[file] = stream.read()
        unpacked.read()  # the checksum stands behind the padding, which tarfile leaves unread
    return found


class _DataOnly(pickle.Unpickler):
    """Reads arrays, dicts, lists, numbers and strings; refuses whatever could run code."""

    ALLOWED: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no data")
        return self.ALLOWED[module, name]


def _unpickle(data: bytes) -> Any:
    return _DataOnly(io.BytesIO(data), encoding="bytes").load()


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
