"""Images inside tar files, read in place: the members and where their bytes begin, and the source that reads them."""

import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastrdm.loaders.sources.decode import CorruptImage
from fastrdm.loaders.sources.index_cache import stamp
from fastrdm.loaders.sources.ranges import Descriptor, RangeSource
from fastrdm.loaders.sources.shard_cache import ShardCache

BLOCK = tarfile.BLOCKSIZE


class Member(NamedTuple):
    """A regular file in a tar file."""

    name: str  # its path; in a tar file within the tar file, that one's name without .tar stands before it
    offset: int  # of its first byte in the outer file
    size: int  # bytes


def members(path: Path, links: list[str] | None = None) -> Iterator[Member]:
    """The regular files of a tar file, in its order, those of tar files within it too.

    Names of links, which are no files, go to `links`. ValueError names a file that is compressed, cut short or no tar
    file.
    """
    try:
        with path.open("rb") as file:
            yield from _members(file, "", 0, path.stat().st_size, [] if links is None else links)
    except (tarfile.TarError, ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a tar file: {_reason(path, error)}") from None


def _members(file: IO[bytes], prefix: str, start: int, size: int, links: list[str]) -> Iterator[Member]:
    """Members of the tar file that are `size` bytes from `start` of `file`."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # else every header stays in memory
            name = prefix + member.name.removeprefix("./")
            if member.issym() or member.islnk():
                links.append(name)
            if not member.isreg():
                continue
            if member.issparse():
                raise ValueError(f"{name} is stored with holes, which cannot be read in place: write it anew")
            if name.endswith(".tar"):
                inner = tar.extractfile(member)
                assert inner is not None
                folder = name.removesuffix(".tar") + "/"
                yield from _members(inner, folder, start + member.offset_data, member.size, links)
            else:
                yield Member(name, start + member.offset_data, member.size)
        file.seek(tar.offset)
        if tar.offset + BLOCK > size or file.read(BLOCK).strip(b"\0"):
            raise ValueError(f"{prefix.rstrip('/') or 'it'} has no end mark: it is cut short, copy it again")


def one_line(name: str) -> str:
    """A member's name for a message: it may hold any character, those that begin a line among them."""
    return " ".join(name.split())


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, tarfile.ReadError):
        with path.open("rb") as file:
            start = file.read(6)
        if start[:2] == b"\x1f\x8b" or start[:4] == b"\x28\xb5\x2f\xfd" or start[:6] == b"\xfd7zXZ\0":
            return "it is compressed, so that no image can be found without reading all before it: uncompress it"
        if "end of data" in str(error):
            return "it is cut short: copy it again"
    return one_line(str(error))


class TarSource(RangeSource):
    """Encoded images in tar files."""

    def __init__(
        self,
        name: str,
        paths: Sequence[str | Path],
        shards: NDArray[np.int64],
        offset: NDArray[np.int64],
        length: NDArray[np.int64],
        labels: NDArray[np.int64],
        classes: list[str],
        cache: ShardCache | None = None,
    ) -> None:
        """`shards`, `offset`, `length`, `labels`: (N,), and `cache`, as in RangeSource."""
        self.cache = cache
        self.name, self.paths, self.shards = name, [str(path) for path in paths], shards
        self.offset, self.length, self.labels, self.classes = offset, length, labels, classes
        self._stamps = {} if cache else {path: stamp(Path(path)) for path in self.paths}
        self.stored_bytes = sum(shard.bytes for shard in cache.shards) if cache else 0
        self.stored_bytes += sum(size for size, _ in self._stamps.values())
        self._opening()

    def _opening(self) -> None:
        self._open = self._keep_open(self._open_unchanged if self.cache is None else Descriptor)

    def _open_unchanged(self, path: str) -> Descriptor:
        """The open file, if it is the one that was indexed; OSError if it has changed since."""
        file = Descriptor(path)
        status = os.fstat(file.number)
        if (status.st_size, status.st_mtime_ns) != self._stamps[path]:
            raise OSError(0, "the file has changed since it was indexed")
        return file

    def key(self, index: int) -> str:
        """The member's name behind that of its file, from the header before its bytes; on a store, its offset there."""
        if self.cache is not None:
            return super().key(index)
        path = self.paths[self.shards.item(index)]
        try:
            file = self._open(path)
            header = os.pread(file.number, BLOCK, self.offset.item(index) - BLOCK)
            name = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
        except (OSError, tarfile.TarError) as error:
            raise CorruptImage(f"{path}, image {index}: {error}") from None
        return f"{os.path.basename(path)}/{name.removeprefix('./')}"
