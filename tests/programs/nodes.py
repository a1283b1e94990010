"""`python nodes.py OUT CASE...`: runs of two nodes with two processes each under the agents of torchrun, on loopback.

Prints a JSON line for each: how the nodes ended, which errors were told, whether the final weights and metrics equal
the unbroken run's, and whether a process other than rank 0 wrote into the run's folder.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from forked import free_port
from kills import ARGUMENTS, SWAV, at_step, die, metrics, weights
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from fastrdm import cli

NODES, EACH = 2, 2


def once(rank: int, act: Callable[[], None]) -> Callable[[Path], None]:
    """Do `act` before step 8 on one rank, but not again when the run is started again."""

    def patch(run: Path) -> None:
        def first() -> None:
            done = run.with_suffix(".done")
            if os.environ["RANK"] == str(rank) and not done.exists():
                done.touch()
                act()

        at_step(8, first)()

    return patch


def work(run: Path, patch: Callable[[Path], None], arguments: list[str]) -> None:
    """One process of a run."""
    if os.environ["RANK"] != "0":
        sys.addaudithook(partial(note_writing, run))
    patch(run)
    if status := cli.train([*SWAV, *ARGUMENTS, f"run={run}", *arguments]):
        os._exit(status)


def note_writing(run: Path, event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook: leaves a file beside the run's folder when something is written or renamed inside it."""
    writes = event in ("os.mkdir", "os.rename", "os.remove") or (
        event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    )
    if writes and str(arguments[0]).startswith(f"{run}/"):
        os.close(os.open(run.with_suffix(".written"), os.O_CREAT))


def node(rendezvous: dict[str, Any], logs: Path, arguments: tuple[Any, ...]) -> None:
    """One node's agent, as `torchrun --nnodes 2 --nproc-per-node 2 --max-restarts 1` starts it."""
    launch = LaunchConfig(
        min_nodes=NODES,
        max_nodes=NODES,
        nproc_per_node=EACH,
        run_id="test",
        max_restarts=1,
        monitor_interval=0.1,
        start_method="fork",
        local_addr="127.0.0.1",
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=Std.ALL),
        **rendezvous,
    )
    elastic_launch(launch, work)(*arguments)


def launch(place: Path, backend: str, patch: Callable[[Path], None], arguments: list[str]) -> list[int]:
    """Exit codes of the nodes of a run in place/run; what its processes said lies in place/<node>."""
    endpoint = f"127.0.0.1:{free_port()}"
    children = []
    for number in range(NODES):
        logs = place / str(number)
        logs.mkdir(parents=True)
        child = os.fork()
        if child == 0:
            rendezvous: dict[str, Any] = {"rdzv_backend": backend, "rdzv_endpoint": endpoint}
            rendezvous["rdzv_configs"] = {"rank": number, "timeout": 60}
            code = 1
            try:
                node(rendezvous, logs, (place / "run", patch, arguments))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


CASES: dict[str, tuple[str, Callable[[Path], None], list[str]]] = {
    "unbroken": ("static", lambda run: None, []),
    "killed": ("c10d", once(3, die), []),
    "hanging": ("c10d", once(2, partial(time.sleep, 600)), ["train.hang_timeout=8"]),
}


def main() -> None:
    out, names = Path(sys.argv[1]), sys.argv[2:]
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # see docs/scale.md
    for name in ("unbroken", *names):
        place = out / name
        codes = launch(place, *CASES[name])
        run = place / "run"
        print(
            json.dumps(
                {
                    "case": name,
                    "codes": codes,
                    "errors": "".join(file.read_text() for file in sorted(place.rglob("stderr.log"))),
                    "same": weights(run) == weights(out / "unbroken" / "run"),
                    "logged": metrics(run) == metrics(out / "unbroken" / "run"),
                    "written": run.with_suffix(".written").exists(),
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
