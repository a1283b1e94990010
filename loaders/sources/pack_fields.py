"""Fields of a packed folder's meta.json and index, checked against its files before anything is read from them.

Checksums tell damage. They do not tell a folder that somebody else sealed: its numbers must be as sound as ours.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrdm.loaders.sources.checks import check_labels

NAMES = re.compile(r"index\.npy|shards/[0-9]{5,}\.(bin|npy)")
LARGEST = 1 << 48  # bytes of a file, images of a set
SHA256 = re.compile(r"[0-9a-f]{64}")


def _count(value: object, most: int = LARGEST) -> bool:
    return type(value) is int and 0 <= value <= most


def check_fields(path: Path | str, meta: dict[str, Any]) -> None:
    """ValueError names `path` and the first field of a meta.json that is not what packing writes."""
    files = meta.get("files")
    sound = {
        "mode": meta.get("mode") in ("jpeg", "raw"),
        "count": _count(meta.get("count")),
        "classes": isinstance(meta.get("classes"), list) and all(isinstance(name, str) for name in meta["classes"]),
        "size": meta.get("mode") != "raw" or (_count(meta.get("size"), 1 << 16) and meta["size"] > 0),
        "files": isinstance(files, dict) and "index.npy" in files and all(map(NAMES.fullmatch, files)),
    }
    for name, told in files.items() if sound["files"] and isinstance(files, dict) else ():
        key = f"files.{name}"
        sound[key] = isinstance(told, dict) and _count(told.get("bytes"))
        sound[key] = sound[key] and isinstance(told.get("sha256"), str) and bool(SHA256.fullmatch(told["sha256"]))
    for key, fine in sound.items():
        if not fine:
            value: Any = meta
            for part in key.split(".", 1):
                value = value.get(part) if isinstance(value, dict) else None
            raise ValueError(f"{path} is damaged: {key} is {str(value)[:80]}")


def check_index(path: Path, index: NDArray[Any], meta: dict[str, Any], dtype: np.dtype[Any]) -> NDArray[np.void]:
    """The index, or ValueError naming `path`, the field and the first image that lies outside its shard."""
    if index.dtype != dtype or index.shape != (meta["count"],):
        raise ValueError(f"{path} is damaged: dtype or shape is {str(index.dtype)[:80]} {index.shape}")
    shards = sorted(name for name in meta["files"] if name != "index.npy")
    if (index["shard"] >= len(shards)).any():
        raise ValueError(
            f"{path} is damaged: shard of image {_first(index['shard'] >= len(shards))} is none of {len(shards)}"
        )
    room = np.array([meta["files"][name]["bytes"] for name in shards], np.int64)[index["shard"]]
    ends = {"offset": index["offset"].astype(np.float64) + index["bytes"] > room}
    if meta["mode"] == "raw":
        pixels = index["height"].astype(np.int64) * index["width"].astype(np.int64) * 3
        ends["bytes"] = pixels != index["bytes"]
        ends["height"] = (index["height"] != meta["size"]) | (index["width"] != meta["size"])
    for field, wrong in ends.items():
        if wrong.any():
            raise ValueError(f"{path} is damaged: {field} of image {_first(wrong)} does not fit its shard")
    check_labels(index["label"], meta["classes"], str(path))
    return index


def _first(wrong: NDArray[np.bool_]) -> int:
    return int(np.flatnonzero(wrong)[0])
