"""The tie between a worker and its launcher: how it reports its end, and that it does not outlive it. No torch."""

import ctypes
import os
import signal
import sys
import threading
import time

LAUNCHER = "FASTRDM_LAUNCHER"  # environment variable: process id of the launcher that started this worker
OUTCOMES = "FASTRDM_OUTCOMES"  # environment variable: folder in which a worker notes how it ended
SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)
GRACE = 120.0  # seconds in which a worker whose launcher died may finish its step and save


def die_with_launcher() -> None:
    """Let this worker of an elastic agent be asked to stop when the agent dies, and end it GRACE seconds later.

    Does nothing in a process that no agent started.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = int(os.environ.get(LAUNCHER) or os.getppid())
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
    if os.getppid() != launcher:
        sys.exit(f"fastrdm: the launcher {launcher} of this worker has ended")
    threading.Thread(target=_end_after, args=(launcher,), name="launcher watch", daemon=True).start()


def _end_after(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(1)
    time.sleep(GRACE)
    os._exit(1)
