"""Runs of several processes forked from one that has imported everything, so that each start costs nothing.

Used by scripts that the tests start, never inside pytest: a process that has computed with threads must not fork.
"""

import os
import socket
import sys
import traceback
from collections.abc import Callable

import torch


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def launch(world: int, work: Callable[[int], None]) -> list[int]:
    """Call work(rank) in `world` processes as torchrun would start them; exit codes, negative for a signal."""
    os.environ.update(WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            _run(work, rank)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _run(work: Callable[[int], None], rank: int) -> None:
    torch.set_num_threads(1)
    try:
        work(rank)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    else:
        status = 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
