"""Watchdog of a run on several processes: ranks that hang, ranks that are slow, devices that differ."""

import json
import os
import platform
import secrets
import socket
import statistics
import sys
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from fastrdm.kernels import collectives
from fastrdm.runtime import distributed
from fastrdm.runtime.distributed import Processes

OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the package
COLLECTIVES = os.path.dirname(dist.__file__), distributed.__file__, collectives.__file__
BACKWARD = "_engine_run_backward"  # the gradients of all processes are averaged inside it
LATE, SLOW = 0.1, 1.5  # share of a step that data may come later, and time of the same work, both against the median


class Position(NamedTuple):
    """Last known position of a process."""

    beats: int  # signs of life of its training thread so far
    step: int
    waits: bool  # for other processes, as far as Python's stack tells
    place: str
    told: int = 0  # positions sent before this one: a process that is stopped sends no more


class Watchdog:
    """Ends a run in which no process has moved for `timeout` seconds, after telling which ranks have not arrived.

    A thread of each process writes its position into a store of rank 0 and reads the others'; another looks at what
    was read, so that a store that does not answer holds up nobody. The lowest rank that still writes judges. Where the
    store does not answer, it is rank 0 that hangs, and rank 1 says so. torchrun then starts all processes again, if
    `--max-restarts` allows it. On one process there is nobody to wait for and no thread.
    """

    def __init__(self, processes: Processes, timeout: float) -> None:
        self.processes, self.timeout = processes, timeout
        self.pause = min(timeout / 10, 5.0)  # seconds between two looks
        self.beats = self.step = self._told = 0
        self._trained, self._done = threading.get_ident(), threading.Event()
        self._talking = threading.Thread(target=self._talk, name="hang watch, store", daemon=True)
        self._thread = threading.Thread(target=self._run, name="hang watch", daemon=True)
        if processes.world > 1:
            self._store = _shared_store(processes)
            self._tell()
            distributed.agree()  # from here on the store holds every rank's position
            self._heard: tuple[float, list[Position | None]] = time.monotonic(), self._positions()
            self._talking.start()
            self._thread.start()

    def heartbeat(self, step: int) -> None:
        """Give a sign of life, in step `step`."""
        self.step = step
        self.beats += 1

    def close(self) -> None:
        """Stop watching."""
        self._done.set()
        for thread in (self._thread, self._talking):
            if thread.is_alive():
                thread.join(self.timeout)

    def _talk(self) -> None:
        with suppress(dist.DistError):  # the store went with rank 0, and torchrun tells of that
            while not self._done.wait(self.pause):
                self._tell()
                self._heard = time.monotonic(), self._positions()

    def _run(self) -> None:
        judge = Judge(self.processes.rank, self.processes.world, self.timeout)
        while not self._done.wait(self.pause):
            answered, positions = self._heard
            lines = judge.update(positions, time.monotonic())
            if time.monotonic() - answered > self.timeout:
                rank_0 = f"{_nothing_moves(self.timeout)}: not arrived: rank 0, whose process does not answer"
                lines = [rank_0] if self.processes.rank == 1 and self._talking.is_alive() else []
            if lines:
                print("\n".join(lines), file=sys.stderr, flush=True)
                os._exit(1)  # the training thread cannot be reached: it waits inside a collective

    def _tell(self) -> None:
        place, waits = _place(sys._current_frames()[self._trained])
        position = Position(self.beats, self.step, waits, f"{socket.gethostname()}, {place}", self._told)
        self._told += 1
        self._store.set(str(self.processes.rank), json.dumps(position))

    def _positions(self) -> list[Position | None]:
        keys = [str(rank) for rank in range(self.processes.world)]
        return [read_position(stored) for stored in self._store.multi_get(keys)]


def read_position(told: bytes) -> Position | None:
    """The position in a message; None where it is none, whoever wrote it."""
    try:
        beats, step, waits, place, count = json.loads(told)
    except (ValueError, TypeError, RecursionError):
        return None
    sound = all(type(n) is int and 0 <= n < 1 << 53 for n in (beats, step, count))
    return Position(beats, step, waits, place[:200], count) if sound and isinstance(place, str) else None


class Judge:
    """Decide from the positions of all processes whether the run hangs, and whether this process reports it."""

    def __init__(self, rank: int, world: int, timeout: float) -> None:
        self.rank, self.timeout = rank, timeout
        self.newest = [Position(0, 0, False, "?", -1)] * world
        self.heard: list[float | None] = [None] * world  # when each process last sent something new
        self.seen, self.since = -1, 0.0

    def update(self, positions: Sequence[Position | None], now: float) -> list[str]:
        """Lines on a hang that this process has to tell of, else none; `now`: seconds of any clock that only rises."""
        for rank, position in enumerate(positions):
            last = self.heard[rank]
            if last is None or (position is not None and position.told != self.newest[rank].told):
                self.heard[rank] = now
            self.newest[rank] = position or self.newest[rank]
        beats = sum(p.beats for p in self.newest)
        if beats != self.seen:
            self.seen, self.since = beats, now
        if now - self.since <= self.timeout:
            return []
        silent = {rank for rank, heard in enumerate(self.heard) if heard is not None and now - heard > self.timeout / 2}
        speakers = [rank for rank in range(len(self.newest)) if rank not in silent]
        return hang(self.newest, self.timeout, silent) if speakers[:1] == [self.rank] else []


def _shared_store(processes: Processes) -> Any:
    """A store that lies in rank 0, at a free port of the address that the job's processes reach it by.

    On one node that is the loopback address alone. The keys carry a name drawn for this run, so that nobody else's
    writing meets them.
    """
    store_at = dist.TCPStore  # type: ignore[attr-defined]  # public, says the documentation
    prefixed = dist.PrefixStore  # type: ignore[attr-defined]
    one_node = os.environ.get("LOCAL_WORLD_SIZE") == str(processes.world)
    host = "127.0.0.1" if one_node else os.environ["MASTER_ADDR"]
    drawn: Any = None
    if processes.main:
        listener = _listening(host)
        port = listener.getsockname()[1]
        options: Any = {"is_master": True, "wait_for_workers": False, "master_listen_fd": listener.detach()}
        drawn, store = (port, secrets.token_hex(16)), store_at(host, port, **options)
    found: Any = distributed.gather_objects(drawn)[0]
    return prefixed(found[1], store if processes.main else store_at(host, found[0]))


def _listening(host: str) -> socket.socket:
    """A socket at a free port of `host`, of all addresses where that is none of this machine's."""
    family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    try:
        return socket.create_server(address[:2], family=family)
    except OSError:  # the name of a node behind another address
        return socket.create_server(("", 0))


def _place(frame: FrameType | None) -> tuple[str, bool]:
    """The innermost call of ours in a stack that is no collective, and whether the stack waits for one below it."""
    waits, place = False, "?"
    for file, line, name in _calls(frame):
        place = f"{os.path.basename(file)}:{line} in {name}"
        if name == BACKWARD or file.startswith(COLLECTIVES):
            waits = True
        elif file.startswith(OURS):
            break
    return place, waits


def _calls(frame: FrameType | None) -> Iterator[tuple[str, int, str]]:
    """(file, line, function) of a stack, innermost first."""
    while frame:
        yield frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name
        frame = frame.f_back


def _nothing_moves(timeout: float) -> str:
    return f"fastrdm: no process has moved for {timeout:g} s"


def hang(positions: Sequence[Position], timeout: float, silent: Collection[int] = ()) -> list[str]:
    """Describe a hang: the ranks that others wait for, and where each of them is.

    `silent`: ranks whose process does not even tell where it is; they are what the others wait for.
    """
    working = sorted(silent) or [rank for rank, p in enumerate(positions) if not p.waits]
    first = _nothing_moves(timeout)
    if not working:
        least = min(p.beats for p in positions)
        working = [rank for rank, p in enumerate(positions) if p.beats == least]
    if len(working) == len(positions):
        lines = [f"{first}, and no rank is behind the others: look at devices, network and disks (docs/scale.md)"]
    else:
        lines = [f"{first}: not arrived: rank {', '.join(map(str, working))}; the others wait"]
    stopped = {rank: ", and its process does not answer" for rank in silent}
    return [
        *lines,
        *(f"  rank {r} at step {positions[r].step}: {positions[r].place}{stopped.get(r, '')}" for r in working[:16]),
    ]


class Pace(NamedTuple):
    """Seconds of one process."""

    data: float  # it waits for data, a step
    work: float  # a fixed piece of work takes


class StragglerDetector:
    """Names ranks that the others wait for in every step: late data, or a slow device; each of them once."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self._told: set[str] = set()

    def update(self, data: float, step: float) -> list[str]:
        """New findings, on every process; `data`, `step`: seconds of a step, here, for data and in all. Waits."""
        if self.processes.world == 1:
            return []
        own = torch.tensor([[data, fixed_work(self.processes.device)]], device=self.processes.device)
        found = slow([Pace(*row) for row in distributed.gather_rows(own).tolist()], step)
        new = [line for key, line in found.items() if key not in self._told]
        self._told |= found.keys()
        return new


def slow(paces: Sequence[Pace], step: float) -> dict[str, str]:
    """Finding: line on it; `step`: seconds of a step."""
    data, work = statistics.median_low(p.data for p in paces), statistics.median_low(p.work for p in paces)
    found = {}
    for rank, pace in enumerate(paces):
        if pace.data - data > LATE * step:
            found[f"data {rank}"] = (
                f"rank {rank} gets its data late: it waits {1e3 * pace.data:.1f} ms of a step's {1e3 * step:.1f} ms, "
                f"the median rank {1e3 * data:.1f} ms; all wait for it"
            )
        if pace.work > SLOW * work:
            found[f"work {rank}"] = (
                f"rank {rank} computes slowly: {pace.work / work:.1f} times the median rank's time for the same work; "
                "all wait for it. Look at its clocks, temperature and other jobs"
            )
    return found


def fixed_work(device: torch.device) -> float:
    """Seconds of a small matrix product here, the shortest of five; waits."""
    size = 2048 if device.type == "cuda" else 128
    x, times = torch.ones(size, size, device=device), []
    for _ in range(5):
        began = time.perf_counter()
        (x @ x)[0, 0].item()
        times.append(time.perf_counter() - began)
    return min(times)


def mixed_devices(processes: Processes) -> list[str]:
    """A line where the processes do not all have the same device, else none; every process must call."""
    cuda = processes.device.type == "cuda"
    name = torch.cuda.get_device_name(processes.device) if cuda else f"CPU {platform.machine()}, {os.cpu_count()} cores"
    return mixed([str(name) for name in distributed.gather_objects(name)])


def mixed(names: Sequence[str]) -> list[str]:
    """Line on the devices of all ranks, which are given in rank order."""
    if len(set(names)) == 1:
        return []
    ranks = {name: [r for r, other in enumerate(names) if other == name] for name in dict.fromkeys(names)}
    groups = "; ".join(f"{name}: ranks {', '.join(map(str, r))}" for name, r in ranks.items())
    return [f"devices differ ({groups}): each gets as many images, so every step takes as long as on the slowest"]
