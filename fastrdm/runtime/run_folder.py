"""The folder of a run: what it may be, and that one run at a time lives in it."""

import contextlib
import fcntl
import json
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

LOCK = ".fastrdm-lock"
HEARTBEAT = 20.0  # seconds between two signs of life
STALE = 75.0  # seconds without one after which a process of another machine counts as dead
SCHEDULER_FILES = (".out", ".err", ".log")  # a scheduler or a shell makes these before the run begins


class RunFolder:
    """The folder of one run.

    A folder belongs to a run when it holds the run's lock file or one of its checkpoints. The lock is an advisory lock
    of the operating system, which ends with the process that holds it. Where a file system has no such locks, or
    does not share them between machines, the modification time of the lock file is the owner's sign of life.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.taken_by: dict[str, Any] | None = None
        """The process that has taken the folder over meanwhile, which only happens to one that was suspended."""

        self._me = {"host": platform.node(), "boot": _boot(), "pid": os.getpid(), "since": time.strftime("%F %T")}
        self._file = -1
        self._ended = threading.Event()

    def check(self) -> None:
        """Raise ValueError, without writing anything, when no run can live here."""
        try:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                self.path.lstat()  # a name that is too long, a folder that may not be looked into
            self._check_content()
        except OSError as error:
            raise self._unusable(error) from None
        place = next(place for place in (self.path, *self.path.absolute().parents) if os.path.lexists(place))
        if not place.is_dir():
            raise ValueError(f"run must be a folder, got {self.path}: {place} is a file")
        if not os.access(place, os.W_OK | os.X_OK):
            raise ValueError(f"run must be a folder that can be written, got {self.path}: {place} cannot")

    @contextlib.contextmanager
    def held(self, say: Callable[[str], None]) -> Iterator[None]:
        """Make the folder and keep every other run out of it; ValueError when another one lives here.

        A lock that a dead process left behind is taken over: at once on the same machine, and after STALE seconds
        without a sign of life when the process ran on another one. `say` is told of such a wait.
        """
        self.check()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._acquire(say)
        except OSError as error:
            self._close()
            raise self._unusable(error) from None
        except BaseException:
            self._close()
            raise
        beats = threading.Thread(target=self._beat, name="run folder", daemon=True)
        beats.start()
        try:
            yield
        finally:
            self._ended.set()
            beats.join()
            with contextlib.suppress(OSError):
                if self.taken_by is None:
                    os.ftruncate(self._file, 0)
            self._close()

    def _check_content(self) -> None:
        if not self.path.is_dir() or (self.path / LOCK).is_file() or any((self.path / "checkpoints").glob("step-*")):
            return
        foreign = sorted(p.name for p in self.path.iterdir() if p.suffix not in SCHEDULER_FILES)
        if foreign:
            told = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
            raise ValueError(
                f"run must be a new folder, an empty one or that of a run, got {self.path}, which holds {told}"
            )

    def _acquire(self, say: Callable[[str], None]) -> None:
        self._file = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        owner, seen = self._owner(), self._sign_of_life()
        deadline = time.monotonic() + STALE - self._age()
        told = False
        while True:
            locked = self._try_lock()
            silent = time.monotonic() > deadline
            if locked is not False and (not owner or silent or (locked and self._is_here(owner))):
                break
            if self._sign_of_life() != seen:
                owner = self._owner()
            if (self._sign_of_life() != seen and owner) or (locked is False and (silent or self._is_here(owner))):
                where = f"process {owner.get('pid')} on {owner.get('host')} since {owner.get('since')}"
                raise ValueError(
                    f"run={self.path} is in use by {where}: wait until it has ended, or choose another run="
                )
            if owner and not told:
                say(f"{self.path} was in use on {owner.get('host')}: waiting to see whether that run still lives")
                told = True
            time.sleep(0.2)
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps(self._me).encode(), 0)

    def _try_lock(self) -> bool | None:
        """Whether the operating system's lock is ours now; None where the file system has no locks."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return None
        return True

    def _is_here(self, owner: dict[str, Any]) -> bool:
        return (owner.get("host"), owner.get("boot")) == (self._me["host"], self._me["boot"])

    def _owner(self) -> dict[str, Any]:
        """Who wrote the lock file; {} when it was released."""
        text = os.pread(self._file, 4096, 0)
        with contextlib.suppress(ValueError):
            owner = json.loads(text)
            if isinstance(owner, dict):
                return owner
        return {"host": "an unknown machine"} if text else {}

    def _sign_of_life(self) -> int:
        return os.fstat(self._file).st_mtime_ns

    def _age(self) -> float:
        """Seconds since the last sign of life, by the file system's own clock."""
        with tempfile.NamedTemporaryFile(dir=self.path, prefix=".fastrdm-clock-") as now:
            now.write(b"0")
            now.flush()
            return max(os.fstat(now.fileno()).st_mtime - os.fstat(self._file).st_mtime, 0.0)

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT):
            with contextlib.suppress(OSError):
                owner = self._owner()
                if owner and owner != self._me:
                    self.taken_by = owner
                    return
                os.utime(self._file)

    def _close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _unusable(self, error: OSError) -> ValueError:
        reason = error.strerror or str(error)
        name = str(self.path)
        return ValueError(f"run={name if len(name) < 100 else name[:100] + '...'} cannot be used as a folder: {reason}")


def _boot() -> str:
    """Which start of the machine this is: a container or a machine of the same name has another one."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""
