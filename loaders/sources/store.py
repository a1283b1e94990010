"""Files on an object store or a web server, by fsspec: read in pieces with retries, written complete or not at all."""

import contextlib
import hashlib
import posixpath
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

Answer = TypeVar("Answer")

MISSING = "needs fsspec: pip install 'fastrdm[remote]', and the package that fsspec names for its protocol"
PIECE = 8 << 20  # bytes of one request
ATTEMPTS = 8  # of one request, about a minute in all
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds before the second attempt, and before any other one
TIMEOUT = 60.0  # seconds of one request
TAGS = ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime", "updated")  # of fsspec's protocols
NEWS = 20  # lines that wait to be told


class StoreError(ValueError):
    """A store that does not answer, or not with what was written; the message names the file."""


def is_remote(root: object) -> bool:
    """Whether a folder is named by a URL, as s3://bucket/pack."""
    return "://" in str(root)


class Store:
    """The files below one URL."""

    def __init__(self, url: str, what: str = "loader.root") -> None:
        """ValueError, naming the setting `what`, where fsspec or the package for the protocol is missing."""
        try:
            import fsspec

            protocol = url.partition("://")[0]
            self.fs, self.path = fsspec.core.url_to_fs(url.rstrip("/"), **_options(protocol))
        except ImportError as error:
            raise ValueError(f"{what}={url} {MISSING} ({error})") from error
        except Exception as error:  # each protocol has its own
            raise ValueError(f"{what}={url} cannot be opened: {error}") from error
        self.url, self.what = url.rstrip("/"), what
        self.news: deque[str] = deque(maxlen=NEWS)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the store anew."""
        return Store, (self.url, self.what)

    def stamp(self, name: str) -> tuple[int, int] | None:
        """Bytes of a file, and a number of its content or time as far as the store tells; None where there is none."""
        try:
            told = self._persist(name, lambda: self.fs.info(self._at(name)))
        except FileNotFoundError:
            return None
        tag = next((str(told[key]) for key in TAGS if told.get(key)), "")
        return int(told["size"]), int.from_bytes(hashlib.sha256(tag.encode()).digest()[:7], "little")

    def files(self) -> list[str]:
        """Names of all files at any depth, sorted; none where there is no such folder, or it cannot be listed."""
        try:
            found = self._persist("", lambda: self.fs.find(self.path))
        except (FileNotFoundError, NotImplementedError):
            # The second is fsspec's word for a protocol that cannot list.
            return []
        return sorted(path.removeprefix(self.path).lstrip("/") for path in found)

    def size(self, name: str) -> int | None:
        """Bytes of a file, None where there is none."""
        try:
            return int(self._persist(name, lambda: self.fs.info(self._at(name))["size"]))
        except FileNotFoundError:
            return None

    def read(self, name: str) -> bytes | None:
        """The content of a small file, None where there is none."""
        try:
            return bytes(self._persist(name, lambda: self.fs.cat_file(self._at(name))))
        except FileNotFoundError:
            return None

    def download(self, name: str, size: int, to: IO[bytes]) -> str:
        """Write the `size` bytes of a file to `to`, a piece at a time; their sha256."""
        digest = hashlib.sha256()
        for start in range(0, size, PIECE):
            end = min(start + PIECE, size)
            piece = self._persist(name, partial(self._piece, name, start, end, size))
            digest.update(piece)
            to.write(piece)
        return digest.hexdigest()

    def _piece(self, name: str, start: int, end: int, size: int) -> bytes:
        piece: bytes = self.fs.cat_file(self._at(name), start=start, end=end)
        if len(piece) == size > end - start:  # a server that knows no ranges
            piece = piece[start:end]
        if len(piece) != end - start:
            raise OSError(f"{len(piece):,} bytes came of {end - start:,}")
        return piece

    def names(self) -> list[str]:
        """Names of the files and folders at the top; none where there is no such folder yet."""
        try:
            found = self._persist("", lambda: self.fs.ls(self.path, detail=False))
        except FileNotFoundError:
            return []
        return [posixpath.basename(path.rstrip("/")) for path in found]

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all below it, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._persist(name, lambda: self.fs.rm(self._at(name), recursive=True))

    def upload(self, file: Path, name: str, replace: bool = False) -> None:
        """Write a file; without `replace`, unless one of its size is there already."""
        size = file.stat().st_size
        if not replace and self.size(name) == size:
            return
        self._persist(name, lambda: self.fs.makedirs(posixpath.dirname(self._at(name)), exist_ok=True))
        self._persist(name, lambda: self.fs.put_file(str(file), self._at(name)))
        if self.size(name) != size:
            raise StoreError(f"{self.url}/{name} has not the {size:,} bytes that were written")

    def _at(self, name: str) -> str:
        return f"{self.path}/{name}" if name else self.path

    def _persist(self, name: str, act: Callable[[], Answer]) -> Answer:
        """Return the result of `act`, tried again with growing pauses where the store fails."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return act()
            except (FileNotFoundError, NotImplementedError):
                # No failure of the store but its answer: there is no such file, or the protocol cannot do this.
                raise
            except Exception as error:  # each protocol has its own for a broken connection
                reason = str(error) or type(error).__name__
                if isinstance(error, PermissionError) or getattr(error, "status", 0) in (400, 401, 403, 405, 410):
                    raise StoreError(f"{self.url}/{name}: {reason}") from error
            if attempt < ATTEMPTS:
                wait = min(FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT) * random.uniform(0.75, 1.25)
                self.news.append(f"{self.url}/{name}: {reason}; attempt {attempt + 1} of {ATTEMPTS} in {wait:.1f} s")
                time.sleep(wait)
        raise StoreError(f"{self.url}/{name} cannot be reached after {ATTEMPTS} attempts: {reason}")


def _options(protocol: str) -> dict[str, Any]:
    """Timeouts, which fsspec sets by the protocol; our own retries take the place of the client's."""
    options: dict[str, Any] = {"use_listings_cache": False}
    if protocol in ("http", "https"):
        import aiohttp

        options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=TIMEOUT)}
    elif protocol in ("s3", "s3a"):
        times = {"read_timeout": TIMEOUT, "connect_timeout": 10}
        options["config_kwargs"] = {**times, "retries": {"max_attempts": 1}}
    return options


def upload_folder(folder: Path, url: str, last: str) -> None:
    """Write all files of a folder below `url`, the file `last` when every other one is there."""
    store = Store(url, "OUT")
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    for name in (*(name for name in names if name != last), last):
        store.upload(folder / name, name)


def in_background(act: Callable[[], None], name: str) -> threading.Thread:
    """A thread that ends with the process."""
    thread = threading.Thread(target=act, name=name, daemon=True)
    thread.start()
    return thread
