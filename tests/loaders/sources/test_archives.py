"""CIFAR and Fashion-MNIST from files as their authors wrote them: Python 2 pickles, idx, tar.gz."""

import gzip
import hashlib
import io
import json
import pickle
import struct
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastrdm.loaders.sources import archives
from fastrdm.loaders.sources.archives import CIFAR, read_cifar, read_fashion_mnist
from fastrdm.loaders.sources.source import ArraySource

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


def rows(images: Array) -> Array:
    """Rows of 3,072 bytes, red plane first."""
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def batch(images: Array, labels: list[int], key: str) -> bytes:
    """A CIFAR batch file."""
    return b"\x80\x02" + python2({b"batch_label": b"x", key.encode(): labels, b"data": rows(images)}) + b"."


def pixels(count: int, seed: int) -> Array:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def cifar_files(name: str) -> dict[str, bytes]:
    """The files of a small CIFAR: 4 images a training batch, 3 of test, labels counting on."""
    layout = CIFAR[name]
    names = [f"class {k}".encode() for k in range(30)]
    files = {layout.meta: b"\x80\x02" + python2({layout.classes.encode(): names}) + b"."}
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
    with pytest.raises(ValueError, match=r"train\.images\.npy cannot be read as an array: .*Python objects"):
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


def packed_again(key: Any, text: Any, protocol: int, labels: Any) -> dict[str, bytes]:
    """A CIFAR-10 that Python 3 wrote, its keys and names of type `key` and `text`."""
    layout = CIFAR["cifar10"]
    content = {key("data"): rows(pixels(3, 7)), key("labels"): labels, key("filenames"): [text("a.png")] * 3}
    meta = {key("label_names"): [text(f"class {k}") for k in range(10)], key("num_vis"): 3072}
    return {
        layout.files["test"][0]: pickle.dumps(content, protocol),
        layout.meta: pickle.dumps(meta, protocol),
    }


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("key", [str, str.encode])
@pytest.mark.parametrize("labels", [[9, 0, 4], np.array([9, 0, 4]), [np.int64(9), np.int64(0), 4]])
def test_cifar_packed_again_by_python_3_is_read_and_told(protocol: int, key: Any, labels: Any, tmp_path: Path) -> None:
    write_folder(tmp_path / CIFAR["cifar10"].folder, packed_again(key, key, protocol, labels))
    arrays = read_cifar("cifar10", tmp_path, "test", download=False)
    np.testing.assert_array_equal(arrays.images, pixels(3, 7))
    assert arrays.labels.tolist() == [9, 0, 4] and arrays.classes[9] == "class 9"
    assert arrays.note and "test_batch, batches.meta" in arrays.note and "differ from the official files" in arrays.note
    assert ArraySource("cifar10", arrays).note == arrays.note


def test_the_official_files_are_taken_without_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = cifar_files("cifar100")
    sums = {name: hashlib.md5(data).hexdigest() for name, data in files.items()}
    monkeypatch.setitem(CIFAR, "cifar100", CIFAR["cifar100"]._replace(sums=sums))
    write_folder(tmp_path / "cifar-100-python", files)
    assert read_cifar("cifar100", tmp_path, "test", download=False).note is None


def array_pickle(dtype: bytes, state: bytes, shape: bytes = b"(K\x03M\x00\x0ct") -> bytes:
    """A batch whose array has the dtype and the dtype's state that these instructions make."""
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
    array += b"(K\x01" + shape + b"cnumpy\ndtype\n(" + dtype + b"tR" + state + b"\x89" + python2(bytes(9216)) + b"tb"
    return b"\x80\x02}(U\x04data" + array + python2(b"labels") + python2([0, 0, 0]) + b"u."


U1, KEPT = b"U\x02u1K\x00K\x01", b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
HOSTILE = {
    "dtype of objects": (array_pickle(b"U\x02O8K\x00K\x01", KEPT), "no integer type"),
    "dtype with fields": (array_pickle(U1, b"(K\x03U\x01|NU\x01a}U\x01aU\x02O8K\x08K\x08K\x3ftb"), None),
    "dtype of many bytes": (array_pickle(b"U\x0au999999999K\x00K\x01", KEPT), "no integer type"),
    "byte order": (array_pickle(U1, b"(K\x03U\x01?NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"), "plain dtype"),
    "shape beyond its bytes": (array_pickle(U1, KEPT, b"(J\x00\x00\x00\x40M\x00\x0ct"), "of shape"),
    "negative shape": (array_pickle(U1, KEPT, b"(J\xff\xff\xff\xffM\x00\x0ct"), "of shape"),
    "memo of 4 billion": (b"\x80\x02}r\xff\xff\xff\xffK\x01.", None),
    "string of 2 GB": (b"\x80\x02T\xff\xff\xff\x7fabc.", "bytes"),
    "bytes of 8 EB": (b"\x80\x05\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.", "bytes"),
    "bytearray of 8 EB": (b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7fabc.", "bytes"),
    "state of a list": (b"\x80\x02](K\x01K\x02e}b.", "a state"),
    "call of data": (b"\x80\x02(K\x01K\x02t(K\x01tR.", None),
    "no end": (b"\x80\x02}", None),
    "nothing left": (b"\x80\x02.", None),
    "more than one": (b"\x80\x02K\x01K\x02.", None),
    "key that is a list": (b"\x80\x02}]K\x01s.", None),
    "instruction of objects": (b"\x80\x02c__builtin__\nobject\n)\x81.", "NEWOBJ"),
    "instance": (b"(i__builtin__\nobject\n.", "INST"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_pickles_are_damaged_files(kind: str, tmp_path: Path) -> None:
    data, reason = HOSTILE[kind]
    write_folder(tmp_path / CIFAR["cifar10"].folder, cifar_files("cifar10") | {"test_batch": data})
    tracemalloc.start()
    if kind == "dtype with fields":  # fields are passed over: the bytes are numbers all the same
        assert (read_cifar("cifar10", tmp_path, "test", download=False).images == 0).all()
    else:
        with pytest.raises(ValueError, match=rf"cifar-10-batches-py is damaged \(.*{reason or ''}.*\): delete it"):
            read_cifar("cifar10", tmp_path, "test", download=False)
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


@pytest.mark.parametrize("form", ["pair", "pickle"])
def test_labels_out_of_range_are_named(form: str, tmp_path: Path) -> None:
    labels = [0, 1, 250, 3]
    if form == "pair":
        np.save(tmp_path / "train.images.npy", pixels(4, 0))
        np.save(tmp_path / "train.labels.npy", np.array(labels, np.uint8))
        (tmp_path / "classes.json").write_text(json.dumps(list("abcdefghij")))
    else:
        files = cifar_files("cifar10") | {"data_batch_1": batch(pixels(4, 0), labels, "labels")}
        write_folder(tmp_path / CIFAR["cifar10"].folder, files)
    with pytest.raises(ValueError, match=r"one of \d+ classes, from 0 on: image 2 has 250, and so have 0 others"):
        read_cifar("cifar10", tmp_path, "train", download=False)


def test_every_damaged_header_of_a_pair_is_named(tmp_path: Path) -> None:
    np.save(tmp_path / "test.labels.npy", np.zeros(4, np.uint8))
    path = tmp_path / "test.images.npy"
    np.save(path, pixels(4, 0))
    whole = path.read_bytes()
    refused = 0
    for bit in range(8 * 128):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            read_cifar("cifar10", tmp_path, "test", download=False)
        except ValueError as error:
            assert "test.images.npy" in str(error)
            refused += 1
    assert refused > 300
    path.write_bytes(whole.replace(b"(4, 32", b"(9999999, 32")[: len(whole)])
    with pytest.raises(ValueError, match=r"test\.images\.npy cannot be read as an array"):
        read_cifar("cifar10", tmp_path, "test", download=False)


@pytest.mark.parametrize("kind", ["long tail", "many files", "large file", "missing file"])
def test_archives_that_unpack_to_much_more_are_damaged(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, files = CIFAR["cifar10"], cifar_files("cifar10")
    monkeypatch.setattr(archives, "MOST_BYTES", 1 << 20)
    if kind == "many files":
        files |= {f"{k}": b"" for k in range(archives.MOST_MEMBERS)}
    elif kind == "large file":
        files["test_batch"] = bytes(2 << 20)
    elif kind == "missing file":
        del files["test_batch"]
    path = tmp_path / layout.archive
    write_archive(path, layout.folder, files)
    if kind == "long tail":
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + bytes(4 << 20)))
    reason = {"long tail": "does not end", "many files": "more than 1000 files", "large file": "claims 2097152 bytes"}
    with pytest.raises(ValueError, match=rf"is damaged \(.*{reason.get(kind, 'test_batch is missing')}"):
        read_cifar("cifar10", tmp_path, "test", download=False)


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
