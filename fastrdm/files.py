"""Files on disk: checksums, flushing, and writing under another name before the rename. No torch."""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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


def read_npy(path: Path) -> "NDArray[Any]":
    """The array in a .npy file; ValueError names the file where it is none or claims more than the file holds."""
    import numpy as np  # here, since the command line reads its files without it

    try:
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)  # mapping compares the claim with the file's size
        if not isinstance(mapped, np.memmap):
            raise ValueError("not a .npy file")
        return np.array(mapped)
    except Exception as error:  # numpy hands the header to Python's parser, which raises whatever it runs into
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{path} cannot be read as an array: {reason}") from error


@contextmanager
def whole(path: Path, *failures: type[Exception]) -> Iterator[Path]:
    """A name beside `path` for what the block writes, a file or a folder; after the block it is called `path`.

    Where writing fails, as on a full disk, what was at `path` stays, nothing else is left, and OSError names `path`.
    `failures`: what a library raises in place of OSError.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    except failures as error:
        raise OSError(errno.EIO, str(error), str(path)) from error
    finally:
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file so that it is there whole or as it was before. OSError names the file.

    Text becomes UTF-8, in which bytes of names of files that are no text are escaped.
    """
    with whole(path) as partial:
        partial.write_bytes(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)
