"""Watchdog of a run on several processes: ranks that hang, ranks that are slow, devices that differ."""

import json
import os
import platform
import socket
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
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

    beats: int  # signs of life so far
    step: int
    waits: bool  # for other processes, as far as Python's stack tells
    place: str


class Watchdog:
    """Ends a run in which no process has moved for `timeout` seconds, after telling which ranks have not arrived.

    A thread of each process writes its position into a store of rank 0, whose thread judges. torchrun then starts all
    processes again, if `--max-restarts` allows it. On one process there is nobody to wait for and no thread.
    """

    def __init__(self, processes: Processes, timeout: float) -> None:
        self.processes, self.timeout = processes, timeout
        self.beats = self.step = 0
        self._trained, self._done = threading.get_ident(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="hang watch", daemon=True)
        if processes.world > 1:
            self._store = _shared_store(processes)
            self._tell()
            distributed.agree()  # from here on the store holds every rank's position
            self._thread.start()

    def heartbeat(self, step: int) -> None:
        """Give a sign of life, in step `step`."""
        self.step = step
        self.beats += 1

    def close(self) -> None:
        """Stop watching."""
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        seen, since = 0, time.monotonic()
        try:
            while not self._done.wait(min(self.timeout / 10, 5)):
                self._tell()
                if not self.processes.main:
                    continue
                positions = self._positions()
                beats = sum(p.beats for p in positions)
                if beats != seen:
                    seen, since = beats, time.monotonic()
                elif time.monotonic() - since > self.timeout:
                    print("\n".join(hang(positions, self.timeout)), file=sys.stderr, flush=True)
                    os._exit(1)  # the training thread cannot be reached: it waits inside a collective
        except dist.DistError:
            return  # the store went with rank 0, and torchrun tells of that

    def _tell(self) -> None:
        place, waits = _place(sys._current_frames()[self._trained])
        position = Position(self.beats, self.step, waits, f"{socket.gethostname()}, {place}")
        self._store.set(str(self.processes.rank), json.dumps(position))

    def _positions(self) -> list[Position]:
        keys = [str(rank) for rank in range(self.processes.world)]
        return [Position(*json.loads(stored)) for stored in self._store.multi_get(keys)]


def _shared_store(processes: Processes) -> Any:
    """A store that lies in rank 0, at a free port of its host."""
    store_at = dist.TCPStore  # type: ignore[attr-defined]  # public, says the documentation
    host, port = os.environ["MASTER_ADDR"], 0
    if processes.main:
        store = store_at(host, 0, is_master=True, wait_for_workers=False)
        port = store.port
    ports = distributed.gather_objects(port)
    return store if processes.main else store_at(host, int(str(ports[0])))


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


def hang(positions: Sequence[Position], timeout: float) -> list[str]:
    """Message about a hang: the ranks that others wait for, and the position of each."""
    working = [rank for rank, p in enumerate(positions) if not p.waits]
    first = f"fastrdm: no process has moved for {timeout:g} s"
    if not working:
        least = min(p.beats for p in positions)
        working = [rank for rank, p in enumerate(positions) if p.beats == least]
    if len(working) == len(positions):
        lines = [f"{first}, and no rank is behind the others: look at devices, network and disks (docs/scale.md)"]
    else:
        lines = [f"{first}: not arrived: rank {', '.join(map(str, working))}; the others wait"]
    return [*lines, *(f"  rank {r} at step {positions[r].step}: {positions[r].place}" for r in working[:16])]


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
