"""Indexes of large files that are made once and kept: beside the file, or in a cache where that is not writable."""

import contextlib
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMAT = 1
Arrays = dict[str, NDArray[Any]]


def cache_folder(cache: str | None) -> Path:
    """The folder for what can be made again: `cache`, else $XDG_CACHE_HOME/fastrdm, ~/.cache/fastrdm or a temporary."""
    if cache is not None:
        return Path(cache).expanduser()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastrdm"
    except RuntimeError:  # no home
        return Path(tempfile.gettempdir()) / f"fastrdm-{os.getuid()}"


def stamp(path: Path) -> tuple[int, int]:
    """Size and time of change (ns): what a file must still have for its index to hold."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def indexed(path: Path, kind: str, cache: str | None, build: Callable[[], Arrays]) -> Arrays:
    """Return what `build` makes of the file at `path`, read back where it was kept and the file has not changed since.

    One process builds and the others of a machine wait for it. Where nothing can be written, it is made every time.
    """
    return _kept(_places(path, kind, cache), stamp(path), build)


def indexed_at(place: Path, stamp: tuple[int, int], build: Callable[[], Arrays]) -> Arrays:
    """As `indexed`, of a file elsewhere that has this stamp, kept at `place`."""
    return _kept([place], stamp, build)


def read_index(place: Path, stamp: tuple[int, int]) -> Arrays | None:
    """A kept index, None where there is none, it is damaged, or the file has another stamp since."""
    return _read(place, np.array([FORMAT, *stamp], np.int64))


def _kept(places: Iterable[Path], stamp: tuple[int, int], build: Callable[[], Arrays]) -> Arrays:
    key = np.array([FORMAT, *stamp], np.int64)
    with contextlib.ExitStack() as stack:
        place = next((place for place in places if _lock(place.with_suffix(".lock"), stack)), None)
        if place is not None and (kept := _read(place, key)) is not None:
            return kept
        made = build()
        if place is not None:
            _write(place, {**made, "key": key})
        return made


def _places(path: Path, kind: str, cache: str | None) -> Iterator[Path]:
    if cache is None:
        yield path.with_name(f".{path.name}.{kind}.npz")
    digest = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]
    yield cache_folder(cache) / "index" / f"{path.name}-{digest}.{kind}.npz"


def _lock(path: Path, stack: contextlib.ExitStack) -> bool:
    """Whether this place can be written, which is this process's alone until `stack` ends."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = stack.enter_context(path.open("a"))
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def _read(place: Path, key: NDArray[np.int64]) -> Arrays | None:
    """A kept index, None where there is none, it is damaged, or the file has changed since."""
    try:
        with np.load(place, allow_pickle=False) as kept:
            if not np.array_equal(kept["key"], key):
                return None
            return {name: kept[name] for name in kept.files if name != "key"}
    except Exception:  # NumPy and zipfile raise whatever a damaged file leads them to; it is made anew
        return None


def _write(place: Path, arrays: Arrays) -> None:
    """Keep an index; a full disk costs only that."""
    partial = place.with_suffix(f".{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        partial.replace(place)
    except OSError:
        partial.unlink(missing_ok=True)


def text_array(texts: list[str]) -> NDArray[np.bytes_]:
    """Texts as UTF-8 in a NumPy array, which is written without pickling."""
    return np.array([text.encode("utf-8", "surrogateescape") for text in texts], np.bytes_)


def texts_of(array: NDArray[np.bytes_]) -> list[str]:
    """The texts of an array that text_array made."""
    return [text.decode("utf-8", "surrogateescape") for text in array.tolist()]
