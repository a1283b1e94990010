"""Files on disk: checksums, flushing, and writing under another name before the rename. No torch."""

import hashlib
import os
from pathlib import Path

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
