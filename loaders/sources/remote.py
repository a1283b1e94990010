"""Packed folders on a store: shards come ahead of the order into a bounded cache that the processes of a machine share.

cache/packs/<digest of URL and pack>/meta.json, index.npy, shards/*   what has arrived, whole and checked
                                     shards/*.partial                on its way, held by the lock beside it
"""

import contextlib
import fcntl
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from fastrdm.files import sha256, write_whole
from fastrdm.loaders.sources.archives import Split
from fastrdm.loaders.sources.index_cache import cache_folder
from fastrdm.loaders.sources.packed import INDEX_FILE, META, PackedSource, check_meta, mapped
from fastrdm.loaders.sources.ranges import Descriptor, Opened, keep_open
from fastrdm.loaders.sources.source import NoImages, Source
from fastrdm.loaders.sources.store import Store, StoreError, in_background
from fastrdm.loaders.spec import LoaderConfig
from fastrdm.schema import require

RETRY = 0.5  # seconds until a shard is looked for again that another process is at, or that finds no room
ROOM = 0.02  # seconds until a reader looks again for room, while all of it is held by downloads that go on
DOWNLOADS = 4  # shards that a process fetches ahead at a time
PARTS: dict[Split, tuple[str, ...]] = {"train": ("", "train"), "test": ("val", "test")}


def open_remote(config: LoaderConfig, split: Split) -> Source:
    """The pack at the URL `config.root`, or its part train, val or test."""
    store = Store(str(config.root))
    whole = store.size(META) is not None
    if split == "test" and whole:
        return NoImages("packed")
    for part in ("",) if whole else PARTS[split]:
        if store.size(f"{part}/{META}".lstrip("/")) is not None:
            return RemotePack(f"{store.url}/{part}".rstrip("/"), config)
    if split == "test":
        return NoImages("packed")
    raise ValueError(f"loader.root must be a packed folder, got {store.url}, which has neither {META} nor train/{META}")


def verify_remote(url: str) -> dict[str, int]:
    """As verify_all, of a pack on a store, which is read as a whole."""
    found = {}
    for part in dict.fromkeys(name for names in PARTS.values() for name in names):
        store = Store(f"{url}/{part}".rstrip("/"), "SRC")
        if (data := store.read(META)) is None:
            continue
        files = check_meta(f"{store.url}/{META}", data)["files"]
        with open(os.devnull, "wb") as nowhere:
            damaged = [n for n, told in files.items() if store.download(n, told["bytes"], nowhere) != told["sha256"]]
        if damaged:
            raise ValueError(f"{store.url}: damaged files, to be copied or packed again: {', '.join(damaged)}")
        found[store.url] = sum(told["bytes"] for told in files.values())
    if not found:
        raise ValueError(f"SRC must be a packed folder, got {url}, which has no {META}")
    return found


class Shard(NamedTuple):
    """A shard's file, as meta.json tells of it."""

    name: str
    bytes: int
    sha256: str


class Plan:
    """Shards in the order of their use: groups that are read mixed, one after the other."""

    def __init__(self, groups: Sequence[Sequence[int]]) -> None:
        self.groups, self.now = groups, 0
        self.group_of = {shard: number for number, group in enumerate(groups) for shard in group}

    def reached(self, shards: set[int]) -> None:
        """Reading has come to these shards; the group before theirs may still be in use."""
        self.now = max(self.now, max((self.group_of.get(shard, 0) for shard in shards), default=0) - 1)

    def ahead(self) -> Iterator[int]:
        """Shards in use or still to be used, in order."""
        for group in self.groups[self.now :]:
            yield from group


class ShardCache:
    """Shards of one pack on this machine. Any thread and any process may ask for them; a kill leaves nothing wrong."""

    def __init__(self, store: Store, folder: Path, shards: Sequence[Shard], limit: int) -> None:
        """`limit`: bytes that all packs below the folder's parent may take."""
        self.store, self.folder, self.shards, self.limit = store, folder, shards, limit
        self.plans: list[Plan] = []
        self.changed = threading.Condition()
        self.fetching: set[int] = set()
        self.later: dict[int, float] = {}  # shards that another process is at, and when to look again
        self.threads: list[threading.Thread] = []

    def get(self, number: int) -> str:
        """The path of a shard, fetched if it is not there; StoreError if it cannot be."""
        shard = self.shards[number]
        path = self.folder / shard.name
        while not self._there(path, shard):
            if not self._fetch(shard, urgent=True):
                time.sleep(ROOM)
        return str(path)

    def mend(self, number: int) -> bool:
        """Whether the file of a shard was damaged here; it is then removed, to be fetched again."""
        path = self.folder / self.shards[number].name
        with contextlib.suppress(FileNotFoundError):
            if sha256(path) == self.shards[number].sha256:
                return False
            path.unlink()
        return True

    def push(self, plan: Plan) -> None:
        """Fetch ahead as `plan` says until it is dropped; the newest plan comes first."""
        with self.changed:
            self.plans.append(plan)
            missing = DOWNLOADS - len(self.threads)
            self.threads += [in_background(self._run_ahead, "fastrdm-shards") for _ in range(missing)]
            self.changed.notify_all()

    def drop(self, plan: Plan) -> None:
        """Forget a plan."""
        with self.changed:
            self.plans.remove(plan)
            self.changed.notify_all()

    def reached(self, shards: set[int]) -> None:
        """Reading has come to these shards."""
        with self.changed:
            for plan in self.plans[-1:]:
                plan.reached(shards)
            self.changed.notify_all()

    def kept(self) -> list[int]:
        """Shards that are used next, as many as the cache holds."""
        kept, room = [], self.limit
        for number in self.plans[-1].ahead() if self.plans else ():
            room -= self.shards[number].bytes
            if room < 0:
                break
            kept.append(number)
        return kept

    def _there(self, path: Path, shard: Shard) -> bool:
        """Whether a shard is here; that it is used is noted for all processes."""
        try:
            os.utime(path)
            return path.stat().st_size == shard.bytes
        except FileNotFoundError:
            return False

    def _run_ahead(self) -> None:
        """One thread: fetch the next shard of the newest plan that is missing."""
        while True:
            with self.changed:
                while (number := self._next()) is None:
                    self.changed.wait(RETRY if self.later else None)
                self.fetching.add(number)
            try:
                got = self._fetch(self.shards[number], urgent=False)
            except (StoreError, OSError):
                got = False  # whoever needs the shard will be told
            with self.changed:
                self.fetching.discard(number)
                if not got:
                    self.later[number] = time.monotonic() + RETRY

    def _next(self) -> int | None:
        now = time.monotonic()
        self.later = {number: until for number, until in self.later.items() if until > now}
        for number in self.kept():
            taken = number in self.fetching or number in self.later
            if not taken and not (self.folder / self.shards[number].name).exists():
                return number
        return None

    def _fetch(self, shard: Shard, urgent: bool) -> bool:
        """Fetch a shard unless it is there meanwhile; False where another process is at it or there is no room."""
        path = self.folder / shard.name
        partial = path.with_name(f"{path.name}.partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(f"{path.name}.lock"), wait=urgent) as mine:
            if not mine:
                return False
            if path.exists():
                if path.stat().st_size == shard.bytes:
                    return True
                path.unlink()
            if not self._make_room(shard.bytes, partial, urgent):
                return False
            for _ in range(2):
                with partial.open("r+b") as file:
                    right = self.store.download(shard.name, shard.bytes, file) == shard.sha256
                    file.flush()
                    os.fsync(file.fileno())
                if right:
                    # Whoever counts what the cache holds sees one of the two names, never none.
                    with _locked(self.folder.parent / "lock", wait=True):
                        partial.rename(path)
                    return True
            partial.unlink()
            raise StoreError(f"{self.store.url}/{shard.name} is not what was packed: its checksum differs")

    def _make_room(self, size: int, partial: Path, urgent: bool) -> bool:
        """Reserve `size` bytes for a download by a file of that length, evicting what was used longest ago.

        What is used next goes only where a reader is waiting, the furthest first. False where there is no room: what
        other threads and processes are downloading cannot be evicted.
        """
        with self.changed:
            kept = [self.folder / self.shards[number].name for number in self.kept()]
        with _locked(self.folder.parent / "lock", wait=True):
            partial.unlink(missing_ok=True)
            files = self._files()
            used = sum(bytes for _, bytes in files.values())
            old = (path for path in files if path not in kept and path.suffix != ".partial")
            others = sorted(old, key=lambda path: files[path][0])
            victims = [*others, *(path for path in reversed(kept) if path in files)] if urgent else others
            for path in victims:
                if used + size <= self.limit:
                    break
                used -= files[path][1]
                path.unlink(missing_ok=True)
            if used + size > self.limit:
                return False
            with partial.open("wb") as file:
                file.truncate(size)
            return True

    def _files(self) -> dict[Path, tuple[float, int]]:
        """Time of last use and bytes of every shard in the cache, without those that somebody is fetching."""
        found: dict[Path, tuple[float, int]] = {}
        for path in self.folder.parent.glob("*/shards/*"):
            if path.suffix == ".lock":
                continue
            if path.suffix == ".partial":
                with _locked(path.with_suffix(".lock"), wait=False) as free:
                    if free:  # of a process that was killed
                        path.unlink(missing_ok=True)
                        continue
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                found[path] = status.st_mtime, status.st_size
        return found


@contextlib.contextmanager
def _locked(path: Path, wait: bool) -> Iterator[bool]:
    """Hold the lock at `path`, which the system lets go when a process ends; False where another one has it."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


class RemotePack(PackedSource):
    """A pack on a store, whose shards are read from the cache of this machine."""

    def __init__(self, url: str, config: LoaderConfig) -> None:
        self.url, self.limit = url, int(config.cache_gb * 1e9)
        store = Store(url)
        meta = store.read(META) or b""
        digest = hashlib.sha256(url.encode() + meta).hexdigest()[:16]
        self.folder = cache_folder(config.cache) / "packs" / digest
        self._keep(META, meta)
        index, told = self.folder / INDEX_FILE, check_meta(f"{url}/{META}", meta)["files"][INDEX_FILE]
        if not (index.is_file() and sha256(index) == told["sha256"]):
            self._keep(INDEX_FILE, store.read(INDEX_FILE) or b"")
            if sha256(index) != told["sha256"]:
                raise StoreError(f"{url}/{INDEX_FILE} is not what was written: its checksum differs")
        super().__init__(self.folder)
        self._check_limit(config)

    def _keep(self, name: str, data: bytes) -> None:
        """Put a small file into the cache, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / name, data)

    def _check_limit(self, config: LoaderConfig) -> None:
        sizes = sorted((shard.bytes for shard in self.cache.shards), reverse=True)
        if config.order == "windowed":
            needed, why = sum(sizes[: 2 * config.window + 1]), f"two windows of {config.window} shards and one more"
        else:
            needed, why = sum(sizes), "the whole pack; loader.order=windowed needs only a part of it"
        require(needed <= self.limit, "loader.cache_gb", f"at least {needed / 1e9:.3g}, {why}", config.cache_gb)

    def _read_meta(self, root: Path) -> dict[str, Any]:
        return check_meta(f"{self.url}/{META}", (root / META).read_bytes())

    def _opening(self) -> None:
        super()._opening()
        files = self.meta["files"]
        names = sorted(name for name in files if name.startswith("shards/"))
        shards = [Shard(name, files[name]["bytes"], files[name]["sha256"]) for name in names]
        self.cache = ShardCache(Store(self.url), self.folder, shards, self.limit)
        self._number = {path: number for number, path in enumerate(self.paths)}
        self._forget()

    def _forget(self) -> None:
        """Let go of all shards that are open: those that were evicted then take no room on the disk any more."""
        self._open, self._map = keep_open(partial(self._opened, Descriptor)), keep_open(partial(self._opened, mapped))

    def _opened(self, open_one: Callable[[str], Opened], path: str) -> Opened:
        while True:
            try:
                return open_one(self.cache.get(self._number[path]))
            except FileNotFoundError:  # another process made room just now
                continue

    def called(self, index: int) -> str:
        return f"{self.url}/{self.cache.shards[self.shards.item(index)].name}, image {index}"

    @contextlib.contextmanager
    def planned(self, groups: Sequence[Sequence[int]]) -> Iterator[None]:
        plan = Plan(groups)
        self.cache.push(plan)
        try:
            yield
        finally:
            self.cache.drop(plan)

    def read_ahead(self, shards: set[int]) -> None:
        self._forget()
        self.cache.reached(shards)

    def _mend(self, shard: int) -> bool:
        mended = self.cache.mend(shard)
        if mended:
            self._forget()
        return mended

    def news(self) -> str | None:
        told = self.cache.store.news
        return told.popleft() if told else None

    def __getstate__(self) -> dict[str, Any]:
        return {name: v for name, v in super().__getstate__().items() if name not in ("cache", "_number")}
