"""CIFAR and Fashion-MNIST from files as their authors wrote them: Python 2 pickles, idx, tar.gz."""

import gzip
import hashlib
import io
import json
import pickle
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastrdm.loaders.sources import archives
from fastrdm.loaders.sources.archives import CIFAR, read_cifar, read_fashion_mnist

Array = np.ndarray[Any, np.dtype[Any]]


def python2(value: Any) -> bytes:
    """Opcodes that Python 2 wrote for a str (as bytes), an int, a list, a dict or a uint8 matrix."""
    if isinstance(value, bytes):
        return b"T" + struct.pack("<i", len(value)) + value
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, list):
        return b"](" + b"".join(python2(item) for item in value) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(python2(key) + python2(item) for key, item in value.items()) + b"u"
    empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
    dtype = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    shape = b"(" + b"".join(python2(side) for side in value.shape) + b"t"
    return empty + b"(K\x01" + shape + dtype + b"\x89" + python2(value.tobytes()) + b"tb"


def batch(images: Array, labels: list[int], key: bytes) -> bytes:
    """A CIFAR batch file: rows of 3,072 bytes, red plane first."""
    rows = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    return b"\x80\x02" + python2({b"batch_label": b"x", key: labels, b"data": rows}) + b"."


def pixels(count: int, seed: int) -> Array:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def cifar_files(name: str) -> dict[str, bytes]:
    """The files of a small CIFAR: 4 images a training batch, 3 of test, labels counting on."""
    layout = CIFAR[name]
    names = [f"class {k}".encode() for k in range(30)]
    files = {layout.meta: b"\x80\x02" + python2({layout.classes: names}) + b"."}
    for k, file in enumerate(layout.files["train"]):
        files[file] = batch(pixels(4, k), list(range(4 * k, 4 * k + 4)), layout.labels)
    return {**files, layout.files["test"][0]: batch(pixels(3, 99), [2, 0, 1], layout.labels)}


def write_archive(path: Path, folder: str, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for file, data in files.items():
            member = tarfile.TarInfo(f"{folder}/{file}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def write_folder(path: Path, files: dict[str, bytes]) -> None:
    path.mkdir(parents=True)
    for file, data in files.items():
        (path / file).write_bytes(data)


@pytest.mark.parametrize("name", CIFAR)
@pytest.mark.parametrize("form", ["archive", "folder", "the folder itself"])
def test_cifar(name: str, form: str, tmp_path: Path) -> None:
    layout, files, root = CIFAR[name], cifar_files(name), tmp_path
    if form == "archive":
        write_archive(tmp_path / layout.archive, layout.folder, files)
    else:
        write_folder(tmp_path / layout.folder, files)
        root = tmp_path if form == "folder" else tmp_path / layout.folder
    batches = len(layout.files["train"])
    train, test = (read_cifar(name, root, split, download=False) for split in ("train", "test"))
    np.testing.assert_array_equal(train.images, np.concatenate([pixels(4, k) for k in range(batches)]))
    np.testing.assert_array_equal(train.labels, np.arange(4 * batches))
    np.testing.assert_array_equal(test.images, pixels(3, 99))
    assert test.labels.tolist() == [2, 0, 1] and test.labels.dtype == np.int64
    assert train.classes == [f"class {k}" for k in range(30)] and train.images.flags.c_contiguous


def test_pairs_come_first(tmp_path: Path) -> None:
    np.save(tmp_path / "train.images.npy", pixels(3, 0))
    np.save(tmp_path / "train.labels.npy", np.array([2, 0, 1], np.uint8))
    arrays = read_cifar("cifar10", tmp_path, "train", download=False)
    np.testing.assert_array_equal(arrays.images, pixels(3, 0))
    assert arrays.labels.dtype == np.int64 and arrays.classes == ["0", "1", "2"]
    (tmp_path / "classes.json").write_text(json.dumps(["a", "b", "c"]))
    assert read_cifar("cifar10", tmp_path, "train", download=False).classes == ["a", "b", "c"]


@pytest.mark.parametrize(("shape", "count"), [((4, 3, 8, 8), 4), ((4, 8, 8), 4), ((4, 8, 8, 3), 5)])
def test_pairs_of_another_shape_are_refused(shape: tuple[int, ...], count: int, tmp_path: Path) -> None:
    np.save(tmp_path / "test.images.npy", np.zeros(shape, np.uint8))
    np.save(tmp_path / "test.labels.npy", np.zeros(count, np.uint8))
    with pytest.raises(ValueError, match=r"must be uint8 \(N, H, W, 3\) and its labels \(N,\), got uint8 \(4, "):
        read_cifar("cifar10", tmp_path, "test", download=False)


def test_pickled_objects_in_pairs_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "train.images.npy", np.array([{}]))
    with pytest.raises(ValueError, match=r"train\.images\.npy and its labels cannot be read"):
        read_cifar("cifar10", tmp_path, "train", download=False)


def test_archive_cut_or_flipped_is_named(tmp_path: Path) -> None:
    path = tmp_path / CIFAR["cifar10"].archive
    write_archive(path, CIFAR["cifar10"].folder, cifar_files("cifar10"))
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for data in (whole[: len(whole) // 2], bytes(flipped), b"no archive", b""):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"cifar-10-python\.tar\.gz is damaged \(.+\): delete it and fetch"):
            read_cifar("cifar10", tmp_path, "train", download=False)


class Evil:
    """Unpickled without care, this runs code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("evil"),)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_pickles_that_run_code_are_refused(protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = cifar_files("cifar10") | {"test_batch": pickle.dumps({b"data": Evil()}, protocol)}
    write_folder(tmp_path / CIFAR["cifar10"].folder, files)
    with pytest.raises(ValueError, match=r"is damaged .*which is no data"):
        read_cifar("cifar10", tmp_path, "test", download=False)
    assert not Path("evil").exists()


def test_missing_archive_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"loader\.root must hold cifar-100-python\.tar\.gz.*loader\.download=true"):
        read_cifar("cifar100", tmp_path, "train", download=False)


def test_download_checks_the_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, served, root = CIFAR["cifar10"], tmp_path / "served", tmp_path / "root"
    served.mkdir()
    write_archive(served / layout.archive, layout.folder, cifar_files("cifar10"))
    monkeypatch.setattr(archives, "CIFAR_ADDRESS", f"{served.as_uri()}/")
    with pytest.raises(ValueError, match=f"came with md5 .*, expected {layout.md5}"):
        read_cifar("cifar10", root, "train", download=True)
    assert list(root.iterdir()) == []
    md5 = hashlib.md5((served / layout.archive).read_bytes()).hexdigest()
    monkeypatch.setitem(CIFAR, "cifar10", layout._replace(md5=md5))
    assert len(read_cifar("cifar10", root, "train", download=True).images) == 20
    assert [file.name for file in root.iterdir()] == [layout.archive]
    (served / layout.archive).unlink()
    assert len(read_cifar("cifar10", root, "test", download=True).images) == 3


def test_download_without_network_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "CIFAR_ADDRESS", f"{tmp_path.as_uri()}/nowhere/")
    with pytest.raises(ValueError, match=r"cannot fetch .*: put it into .*root by hand"):
        read_cifar("cifar10", tmp_path / "root", "train", download=True)


def idx(array: Array) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.mark.parametrize("packed", [True, False])
def test_fashion_mnist(packed: bool, tmp_path: Path) -> None:
    images, labels = pixels(5, 0)[:, :28, :28, 0], np.array([9, 0, 3, 3, 1], np.uint8)
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        data = idx(np.ascontiguousarray(array))
        (tmp_path / f"t10k-{name}-ubyte{'.gz' * packed}").write_bytes(gzip.compress(data) if packed else data)
    arrays = read_fashion_mnist(tmp_path, "test")
    assert arrays.images.shape == (5, 28, 28, 3) and arrays.labels.tolist() == labels.tolist()
    assert len(arrays.classes) == 10 and arrays.classes[9] == "Ankle boot"
    for channel in range(3):
        np.testing.assert_array_equal(arrays.images[..., channel], images)
    with pytest.raises(ValueError, match=r"must hold train-images-idx3-ubyte or train-images-idx3-ubyte\.gz"):
        read_fashion_mnist(tmp_path, "train")


@pytest.mark.parametrize("damage", ["cut", "no gzip", "other type"])
def test_damaged_idx_is_named(damage: str, tmp_path: Path) -> None:
    whole = gzip.compress(idx(np.ascontiguousarray(pixels(5, 0)[..., 0])))
    data = {"cut": whole[:-200], "no gzip": b"12345", "other type": gzip.compress(b"\0\0\x0d\x01" + bytes(8))}[damage]
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(data)
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz is damaged \(.+\): fetch it again"):
        read_fashion_mnist(tmp_path, "train")
