"""Shards of a set on a store come ahead of the order into a bounded cache that the processes of a machine share.

cache/packs/<digest of URL and content>/shards/*           what has arrived, whole and checked
                                        shards/*.partial   on its way, held by the lock beside it
"""

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastrdm.files import sha256
from fastrdm.loaders.sources.store import Store, StoreError, in_background
from fastrdm.loaders.spec import LoaderConfig
from fastrdm.schema import require

RETRY = 0.5  # seconds until a shard is looked for again that another process is at, or that finds no room
ROOM = 0.02  # seconds until a reader looks again for room, while all of it is held by downloads that go on
DOWNLOADS = 4  # shards that a process fetches ahead at a time


class Shard(NamedTuple):
    """A shard's file on its store."""

    name: str
    bytes: int
    sha256: str  # empty while it is not known


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
    """Shards of one set on this machine. Any thread and any process may ask for them; a kill leaves nothing wrong."""

    def __init__(self, store: Store, folder: Path, shards: Sequence[Shard], limit: int, made: str = "packed") -> None:
        """`limit`: bytes that all sets below the folder's parent may take. `made`: what gave the checksums."""
        self.store, self.folder, self.shards, self.limit, self.made = store, folder, shards, limit, made
        self.plans: list[Plan] = []
        self.changed = threading.Condition()
        self.fetching: set[int] = set()
        self.later: dict[int, float] = {}  # shards that another process is at, and when to look again
        self.threads: list[threading.Thread] = []

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process gets a cache of its own in the same folder."""
        return ShardCache, (self.store, self.folder, self.shards, self.limit, self.made)

    def place(self, shard: Shard) -> Path:
        """Where a shard lies when it is here."""
        return self.folder / "shards" / shard.name.removeprefix("shards/").replace("/", "%")

    @contextlib.contextmanager
    def following(self, groups: Sequence[Sequence[int]]) -> Iterator[None]:
        """Fetch ahead in this order, as long as the context lasts."""
        plan = Plan(groups)
        self.push(plan)
        try:
            yield
        finally:
            self.drop(plan)

    def check_room(self, config: LoaderConfig) -> None:
        """ValueError where the cache is too small for the order of reading."""
        sizes = sorted((shard.bytes for shard in self.shards), reverse=True)
        if config.order == "windowed":
            needed, why = sum(sizes[: 2 * config.window + 1]), f"two windows of {config.window} shards and one more"
        else:
            needed, why = sum(sizes), "all shards; loader.order=windowed needs only some of them"
        require(needed <= self.limit, "loader.cache_gb", f"at least {needed / 1e9:.3g}, {why}", config.cache_gb)

    def get(self, number: int) -> str:
        """The path of a shard, fetched if it is not there; StoreError if it cannot be."""
        shard = self.shards[number]
        path = self.place(shard)
        while not self._there(path, shard):
            if not self._fetch(shard, urgent=True):
                time.sleep(ROOM)
        return str(path)

    def mend(self, number: int) -> bool:
        """Whether the file of a shard was damaged here; it is then removed, to be fetched again."""
        path = self.place(self.shards[number])
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
        """One thread: fetch the next shard of the newest plan that is missing, until no plan is left."""
        while True:
            with self.changed:
                number = self._next()
                while number is None and self.plans:
                    self.changed.wait(RETRY if self.later else None)
                    number = self._next()
                if number is None:
                    self.threads.remove(threading.current_thread())
                    return
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
            if not taken and not self.place(self.shards[number]).exists():
                return number
        return None

    def _fetch(self, shard: Shard, urgent: bool) -> bool:
        """Fetch a shard unless it is there meanwhile; False where another process is at it or there is no room."""
        path = self.place(shard)
        partial = path.with_name(f"{path.name}.partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(f"{path.name}.lock"), wait=urgent) as mine:
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
                    digest = self.store.download(shard.name, shard.bytes, file)
                    file.flush()
                    os.fsync(file.fileno())
                if digest == shard.sha256 or not shard.sha256:
                    # Whoever counts what the cache holds sees one of the two names, never none.
                    with locked(self.folder.parent / "lock", wait=True):
                        partial.rename(path)
                    return True
            partial.unlink()
            raise StoreError(f"{self.store.url}/{shard.name} is not what was {self.made}: its checksum differs")

    def _make_room(self, size: int, partial: Path, urgent: bool) -> bool:
        """Reserve `size` bytes for a download by a file of that length, evicting what was used longest ago.

        What is used next goes only where a reader is waiting, the furthest first. False where there is no room: what
        other threads and processes are downloading cannot be evicted.
        """
        with self.changed:
            kept = [self.place(self.shards[number]) for number in self.kept()]
        with locked(self.folder.parent / "lock", wait=True):
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
                with locked(path.with_suffix(".lock"), wait=False) as free:
                    if free:  # of a process that was killed
                        path.unlink(missing_ok=True)
                        continue
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                found[path] = status.st_mtime, status.st_size
        return found


@contextlib.contextmanager
def locked(path: Path, wait: bool) -> Iterator[bool]:
    """Hold the lock at `path`, which the system lets go when a process ends; False where another one has it."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
