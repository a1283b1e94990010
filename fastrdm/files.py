"""Files on disk: checksums, flushing, and writing under another name before the rename. No torch."""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PIECE = 1 << 20  # bytes hashed at a time


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


def flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_npy(path: Path) -> NDArray[Any]:
    """The array in a .npy file; ValueError names the file where it is none or claims more than the file holds."""
    try:
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)  # mapping compares the claim with the file's size
        if not isinstance(mapped, np.memmap):
            raise ValueError("not a .npy file")
        return np.array(mapped)
    except Exception as error:  # numpy hands the header to Python's parser, which raises whatever it runs into
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{path} cannot be read as an array: {reason}") from error


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under another name and rename it: where the disk is full, what was there stays. Raises OSError."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
