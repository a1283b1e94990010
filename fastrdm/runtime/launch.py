"""`fastrdm train --processes N`: the workers of a run under torch's elastic agent, and how they ended."""

import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Collection, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from torch.distributed.elastic.agent.server.api import WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousParameters
from torch.distributed.elastic.rendezvous import registry as rendezvous

from fastrdm.worker import LAUNCHER, OUTCOMES

WORKER = Path(__file__).parents[1] / "train.py"  # a file and not `-m`, which would look into the working folder first
INTERVAL = 0.2  # seconds between two looks at the workers


class Launch(NamedTuple):
    """How many processes to start, and where several nodes meet."""

    processes: int
    """Workers on this node."""

    nodes: int = 1
    endpoint: str | None = None
    """HOST:PORT of the first node, the same on all of them; None for one node."""

    run_id: str | None = None
    """The name that keeps apart two runs that meet at one endpoint."""

    restarts: int = 0
    """How often the workers are started again after one of them died."""


class Outcome(NamedTuple):
    """How a worker ended by its own account."""

    status: int
    told: str  # the line that it would have printed, "" for none


def launch(arguments: Sequence[str], how: Launch, stopped: int, signals: Collection[signal.Signals]) -> int:
    """Run `fastrdm/train.py` with `arguments` in all processes of this node; the exit status is the run's own.

    Workers are started again only after an end that they did not account for, such as a signal, an error of the
    network or a watchdog: a refusal, an alarm or a request to stop would come out the same again. `signals` are handed
    to the workers as SIGTERM, which they may answer as slowly as they need; `stopped` is the status when that happens
    before they run. What the workers have to tell is printed once.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # a restart must not meet the store of the dead
    os.environ.setdefault("OMP_NUM_THREADS", str(max(len(os.sched_getaffinity(0)) // how.processes, 1)))
    with tempfile.TemporaryDirectory(prefix="fastrdm-launch-") as folder, handled(signals, stopped) as handler:
        agent = _Agent(_specification(arguments, how), Path(folder), handler)
        try:
            os.environ |= {OUTCOMES: folder, LAUNCHER: str(os.getpid())}  # for the workers
            agent.run()
        except RendezvousError as error:
            return _tell([Outcome(1, f"fastrdm: the nodes did not meet at {how.endpoint}: {error}")])
        finally:
            for name in (OUTCOMES, LAUNCHER):
                del os.environ[name]
            agent.get_worker_group().spec.rdzv_handler.shutdown()
        return _tell(agent.ended())


def _tell(outcomes: Sequence[Outcome]) -> int:
    for line in dict.fromkeys(outcome.told for outcome in outcomes if outcome.told):
        print(line, file=sys.stderr, flush=True)
    return next((outcome.status for outcome in outcomes if outcome.status), 0)


def _specification(arguments: Sequence[str], how: Launch) -> WorkerSpec:
    here = how.endpoint is None
    parameters = RendezvousParameters(
        backend="c10d",
        endpoint="127.0.0.1:0" if how.endpoint is None else how.endpoint,
        run_id=how.run_id or (str(uuid.uuid4()) if here else "fastrdm"),
        min_nodes=how.nodes,
        max_nodes=how.nodes,
        local_addr="127.0.0.1" if here else None,
    )
    return WorkerSpec(
        role="train",
        local_world_size=how.processes,
        entrypoint=sys.executable,
        args=(str(WORKER), *arguments),
        rdzv_handler=rendezvous.get_rendezvous_handler(parameters),
        max_restarts=how.restarts,
        monitor_interval=INTERVAL,
        local_addr=parameters.get("local_addr") or ("127.0.0.1" if here else None),
    )


class _Handler:
    """Hands signals on to the workers, once there are some."""

    def __init__(self, stopped: int) -> None:
        self.stopped = stopped
        self.workers: list[int] = []

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not self.workers:
            sys.exit(self.stopped)
        for worker in self.workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGTERM)


class handled(contextlib.AbstractContextManager[_Handler]):
    """The signals go to a handler meanwhile; one that is ignored stays ignored, as `nohup` has it."""

    def __init__(self, signals: Collection[signal.Signals], stopped: int) -> None:
        self.handler = _Handler(stopped)
        self.numbers = [n for n in signals if signal.getsignal(n) is not signal.SIG_IGN]
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Handler:
        self.before = {n: signal.signal(n, self.handler) for n in self.numbers}
        return self.handler

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class _Agent(LocalElasticAgent):
    """The agent of torch: what ended by its own account is not started again, and signals are left to the workers."""

    def __init__(self, spec: WorkerSpec, folder: Path, handler: _Handler) -> None:
        super().__init__(spec, logs_specs=DefaultLogsSpecs(), start_method="spawn")
        self.folder, self.handler = folder, handler
        self._failures: dict[int, Any] = {}

    def outcomes(self) -> dict[int, Outcome]:
        """How workers say that they ended, by rank; those that say nothing are missing."""
        found = {}
        for file in self.folder.iterdir():
            with contextlib.suppress(OSError, ValueError):
                found[int(file.name)] = Outcome(*json.loads(file.read_text()))
        return dict(sorted(found.items()))

    def ended(self) -> list[Outcome]:
        """How the run ended, those first that decide its status."""
        outcomes = list(self.outcomes().values())
        if any(outcome.status for outcome in outcomes) or not self._failures:
            return outcomes
        return [Outcome(1, f"fastrdm: rank {rank} {_death(f.exitcode)}") for rank, f in self._failures.items()][:1]

    def _start_workers(self, worker_group: Any) -> dict[int, Any]:
        self._failures = {}
        for file in self.folder.iterdir():
            file.unlink()
        own = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)}
        workers: dict[int, Any] = super()._start_workers(worker_group)
        for number, handler in own.items():  # torch's own would end the agent and give the workers 30 seconds
            signal.signal(number, handler)
        self.handler.workers = list(workers.values())
        return workers

    def _monitor_workers(self, worker_group: Any) -> Any:
        result = super()._monitor_workers(worker_group)
        if result.state in (WorkerState.FAILED, WorkerState.UNHEALTHY):
            self._failures = dict(result.failures)
            if any(outcome.status for outcome in self.outcomes().values()):
                self._remaining_restarts = 0
        return result


def _death(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(-code).name}"
    return f"ended with status {code}; what it said stands above"
