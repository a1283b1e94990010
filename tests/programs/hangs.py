"""`python hangs.py CASE`: three processes under the hang watch, one of which stops in the way that CASE says.

Prints a JSON line: exit codes, seconds from the stop to the end, and the addresses that the watch's store listens at.
"""

import json
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

from forked import launch

from fastrdm.runtime import distributed, watchdog

WORLD, TIMEOUT = 3, 3.0


def sleep() -> None:
    time.sleep(600)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


CASES = {"rank 0 sleeps": (0, sleep), "rank 0 is stopped": (0, stop), "rank 2 is stopped": (2, stop)}
CASES |= {"rank 1 sleeps, garbage": (1, sleep)}


def write_garbage(port: int) -> None:
    """Connect to the store and write bytes that mean nothing, some behind a proper greeting."""
    draw = random.Random(0)
    for turn in range(100):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall((b"\x00\xce\xf7\x85\x3c" if turn % 2 else b"") + draw.randbytes(draw.randint(1, 3000)))
    time.sleep(0.1)


def work(case: str, place: Path, rank: int) -> None:
    processes = distributed.start("cpu", 600)
    frozen, freeze = CASES[case]
    listening = watchdog._listening

    def noted(host: str) -> socket.socket:
        listener = listening(host)
        (place / "address").write_text(json.dumps(listener.getsockname()))
        return listener

    watchdog._listening = noted
    guard = watchdog.Watchdog(processes, TIMEOUT)
    for step in range(5):
        guard.heartbeat(step)
        distributed.agree()
        time.sleep(0.2)
    if rank == 0 and "garbage" in case:
        write_garbage(guard_port(place))
        for key in range(WORLD):
            guard._store.set(str(key), '{"no": "position"}')
    if rank == frozen:
        (place / "stopped").write_text(str(time.time()))
        freeze()
    distributed.agree()


def guard_port(place: Path) -> int:
    return int(json.loads((place / "address").read_text())[1])


def main() -> None:
    os.environ["LOCAL_WORLD_SIZE"] = str(WORLD)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        threading.Timer(60, lambda: os._exit(9)).start()
        codes = launch(WORLD, lambda rank: work(sys.argv[1], place, rank))
        seconds = time.time() - float((place / "stopped").read_text())
        print(json.dumps({"codes": codes, "seconds": seconds, "address": json.loads((place / "address").read_text())}))
    os._exit(0)


if __name__ == "__main__":
    main()
