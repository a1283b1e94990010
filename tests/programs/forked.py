"""Runs of several processes forked from one that has imported everything, so that each start costs nothing.

Used by scripts that the tests start, never inside pytest: a process that has computed with threads must not fork.
"""

import contextlib
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable

import sklearn.datasets  # noqa: F401
import torch
import torch._dynamo


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def launch(world: int, work: Callable[[int], None]) -> list[int]:
    """Call work(rank) in `world` processes as torchrun would start them; exit codes, negative for a signal.

    When one of them fails, the others are killed, as torchrun does.
    """
    os.environ.update(WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    children = {}
    for rank in range(world):
        child = os.fork()
        if child == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            _run(work, rank)
        children[child] = rank
    codes = {}
    while len(codes) < world:
        child, status = os.wait()
        codes[children.pop(child)] = code = os.waitstatus_to_exitcode(status)
        if code:
            for other in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(other, signal.SIGKILL)
    return [codes[rank] for rank in range(world)]


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
