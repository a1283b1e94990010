"""Packed folders: all images of a set in a few large files, and the source that reads them.

meta.json         mode, classes, counts; bytes and sha256 of every other file; what was repaired and refused
index.npy         one row of INDEX an image
shards/NNNNN.npy  mode raw: (n, size, size, 3) uint8;   shards/NNNNN.bin  mode jpeg: encoded images back to back
"""

import hashlib
import json
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrdm.files import read_npy, sha256
from fastrdm.loaders.sources.decode import Allocate, CorruptImage, Pixels
from fastrdm.loaders.sources.pack_fields import check_fields, check_index
from fastrdm.loaders.sources.ranges import RangeSource
from fastrdm.loaders.sources.source import ReadTime

FORMAT = 1
META, INDEX_FILE = "meta.json", "index.npy"
INDEX = np.dtype(
    [
        ("shard", "<u4"),
        ("flags", "<u4"),  # 1: encoded anew, 2: turned upright
        ("offset", "<u8"),  # of the image's first byte in the file of its shard
        ("bytes", "<u4"),
        ("crc32", "<u4"),  # of these bytes
        ("height", "<u4"),  # pixels
        ("width", "<u4"),
        ("label", "<i8"),  # -1 where unknown
    ]
)


def seal(meta: dict[str, Any]) -> str:
    """Checksum over everything in meta.json but itself."""
    rest = {key: value for key, value in meta.items() if key != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_meta(root: Path) -> dict[str, Any]:
    """meta.json, checked, every file that it lists present and as long as it says; ValueError names what is amiss."""
    path = root / META
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"loader.root must be a packed folder, got {root}, which has no {META}") from None
    except OSError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    meta = check_meta(str(path), data)
    for name, told in meta["files"].items():
        size = (root / name).stat().st_size if (root / name).is_file() else None
        if size is None:
            raise ValueError(f"{root / name} is missing from the packed folder")
        if size != told["bytes"]:
            raise ValueError(f"{root / name} has {size} bytes, {told['bytes']} were written: copy it again")
    return meta


def check_meta(path: str, data: bytes) -> dict[str, Any]:
    """The content of a meta.json, if it is what was written; ValueError naming `path` if not."""
    try:
        meta: dict[str, Any] = json.loads(data)
        sound = meta["seal"] == seal(meta)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not sound:
        raise ValueError(f"{path} is damaged: it is not what was written. Pack the set again")
    if meta.get("format") != FORMAT:
        raise ValueError(f"{path} is of format {meta.get('format')}, this version reads {FORMAT}: pack the set again")
    check_fields(path, meta)
    return meta


def read_index(root: Path, meta: dict[str, Any]) -> NDArray[np.void]:
    """index.npy, (N,) of INDEX, checked against its sha256."""
    path = root / INDEX_FILE
    if sha256(path) != meta["files"][INDEX_FILE]["sha256"]:
        raise ValueError(f"{path} is damaged: it is not what was written. Copy it again")
    return check_index(path, read_npy(path), meta, INDEX)


def verify_all(root: Path) -> dict[str, int]:
    """Bytes read of each packed folder that `root` is, or holds as train, val and test; ValueError as for verify."""
    parts = [part for part in sorted(root.glob("*")) if (part / META).is_file()]
    return {str(part): verify(part) for part in ([root] if (root / META).is_file() or not parts else parts)}


def verify(root: Path) -> int:
    """Read every byte of a packed folder and compare it with its sha256; bytes read. ValueError names damaged files."""
    meta = read_meta(root)
    damaged = [name for name, told in meta["files"].items() if sha256(root / name) != told["sha256"]]
    if damaged:
        raise ValueError(f"{root}: damaged files, to be copied or packed again: {', '.join(damaged)}")
    return sum(told["bytes"] for told in meta["files"].values())


class PackedSource(RangeSource):
    """Images of a packed folder; each one's checksum is compared when a process reads it for the first time.

    Raw shards are mapped into memory, which copies faster than reading. Encoded images are read: a failing disk then
    costs an image, not the process.
    """

    name = "packed"

    def __init__(self, root: Path) -> None:
        self.root, self.meta = root, self._read_meta(root)
        index = read_index(root, self.meta)
        self.classes: list[str] = self.meta["classes"]
        self.labels = index["label"].astype(np.int64)
        self.shards = index["shard"].astype(np.int64)
        self.offset, self.length, self.crc32, self.height, self.width = (
            np.ascontiguousarray(index[name]) for name in ("offset", "bytes", "crc32", "height", "width")
        )
        self.raw = self.meta["mode"] == "raw"
        if self.raw:
            self.side = self.meta["size"]
            self.note = (
                f"packed as raw center squares of {self.side} px: random crops cannot reach what was cut off, and "
                "published accuracies were not made this way"
            )
        self.stored_bytes = sum(told["bytes"] for told in self.meta["files"].values())
        self.paths = sorted(str(root / name) for name in self.meta["files"] if name.startswith("shards/"))
        self._checked = np.zeros(len(index), bool)
        self._opening()

    def _read_meta(self, root: Path) -> dict[str, Any]:
        return read_meta(root)

    def _opening(self) -> None:
        super()._opening()
        self._map = self._keep_open(mapped)

    @property
    def encoded(self) -> bool:
        return not self.raw

    def read_into(self, index: int, allocate: Allocate, spent: ReadTime) -> Pixels:
        """Read the image into the memory that `allocate` gives, and add the seconds that this takes to `spent`."""
        if not self.raw:
            return super().read_into(index, allocate, spent)
        began = time.perf_counter()
        pixels = allocate(self.height.item(index), self.width.item(index))
        self._copy(index, pixels.reshape(-1))
        spent.read += time.perf_counter() - began
        return pixels

    def gather(self, indices: NDArray[np.int64], out: Pixels) -> None:
        for index, pixels in zip(indices.tolist(), out.reshape(len(out), -1), strict=True):
            self._copy(index, pixels)

    def _copy(self, index: int, out: NDArray[np.uint8]) -> None:
        start, shard = self.offset.item(index), self.shards.item(index)
        for last in (False, True):
            out[:] = self._map(self.paths[shard])[start : start + out.size]
            if self._right(index, out) or last or not self._mend(shard):
                break
        self._check(index)

    def fetch(self, index: int) -> tuple[bytes, str]:
        data, name = super().fetch(index)
        if not self._right(index, data) and self._mend(self.shards.item(index)):
            data, name = super().fetch(index)
            self._right(index, data)
        self._check(index)
        return data, name

    def _right(self, index: int, data: Any) -> bool:
        """Whether an image is what was packed; compared once."""
        if not self._checked[index]:
            self._checked[index] = zlib.crc32(data) == self.crc32[index]
        return bool(self._checked[index])

    def _check(self, index: int) -> None:
        if not self._checked[index]:
            raise CorruptImage(f"{self.called(index)}: not the bytes that were packed")

    def _mend(self, shard: int) -> bool:
        """Whether a shard that gave wrong bytes can be had anew."""
        return False

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_map"}


def mapped(path: str) -> NDArray[np.uint8]:
    """A file's bytes as a plain array: slicing a numpy.memmap costs microseconds."""
    return np.asarray(np.memmap(path, np.uint8, "r"))
