"""Everything a run needs to go on as if it had never stopped, put into checkpoints and taken out again."""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fastrdm import __version__
from fastrdm.config import run_config
from fastrdm.config.run_config import Config
from fastrdm.files import write_whole
from fastrdm.loaders.spec import Loader
from fastrdm.monitoring.monitor import RankMonitor
from fastrdm.runtime import checkpoint, distributed
from fastrdm.runtime.checkpoint import STATE, Checkpoint, CheckpointError, reason
from fastrdm.runtime.checkpoint_store import CheckpointStore
from fastrdm.runtime.distributed import Processes
from fastrdm.runtime.run_folder import RunFolder
from fastrdm.runtime.timers import LossTracker
from fastrdm.training import fingerprint
from fastrdm.training.step import TrainStep


class RunState:
    """The parts of a run that its checkpoints hold, and the folder that they lie in."""

    def __init__(
        self,
        settings: Config,
        home: RunFolder,
        processes: Processes,
        step: TrainStep,
        loader: Loader,
        losses: LossTracker,
        monitor: RankMonitor,
        data: dict[str, Any],
        judged_on: dict[str, dict[str, Any]],
        copies: CheckpointStore | None = None,
    ) -> None:
        """`data`: the fingerprint of the images that are trained on. `judged_on`: those of the images of evaluation.
        `copies`: of checkpoints, on the main process.
        """
        self.settings, self.processes, self.learner = settings, processes, step.learner
        self.optimizer, self.scaler = step.optimizer, step.scaler
        self.loader, self.losses, self.monitor = loader, losses, monitor
        self.data, self.judged_on, self.copies = data, judged_on, copies
        self.home, self.folder = home, home.path
        self.origin: dict[str, Any] | None = None
        """Where the first weights came from, when not from the seed."""

        self.best: dict[str, Any] = {"knn": -1.0, "step": None}

    def fetch(self) -> list[str]:
        """Bring a newer checkpoint from checkpoint.store into the run's folder, on the main process; lines on that.

        ValueError where the store holds another run.
        """
        if self.copies is None:
            return []
        checkpoint.clear_partial(self.folder)
        url = self.copies.store.url
        return self.copies.fetch(self.folder, lambda meta: self._check_same(meta, url, "checkpoint.store"))

    def resume(self) -> tuple[int, dict[str, float], list[str]]:
        """Step and metrics of the newest usable checkpoint, 0 and none without; lines on what was found.

        CheckpointError if there are checkpoints but none can be used; ValueError if they are of another configuration.
        """
        if self.processes.main:
            checkpoint.clear_partial(self.folder)
        said = []
        for found in checkpoint.newest(self.folder):
            try:
                if isinstance(found, CheckpointError):
                    raise found
                self._restore(found)
            except CheckpointError as reason:
                said.append(f"checkpoint not used: {reason}")
                continue
            said.append(f"continuing from {found.path}")
            said += self._changed_around(found)
            return int(found.meta["step"]), dict(found.meta["metrics"]), said
        if said:
            said.append(f"no usable checkpoint in {self.folder}: remove it or choose another run=")
            raise CheckpointError("\n".join(said))
        return 0, {}, said

    def describe(self) -> None:
        """Write config.yaml, from the main process: the settings of this start of the run. OSError names the file."""
        if self.processes.main:
            write_whole(self.folder / "config.yaml", run_config.to_yaml(self.settings))

    def save(self, step: int, metrics: dict[str, float], last: bool = False) -> Path | None:
        """Write the checkpoint of `step` from the main process, where its path is returned; every process must call.

        Its copy on checkpoint.store is waited for if it is the `last`, else by the next call. CheckpointError is raised
        too where a copy failed, when the checkpoint itself has been written.
        """
        random = distributed.gather_objects(_random_state())
        loader, losses, monitor = (part.state_dict() for part in (self.loader, self.losses, self.monitor))
        if not self.processes.main:
            return None
        if self.home.taken_by:
            raise CheckpointError(f"{self.folder} was taken over by {self.home.taken_by} while this run stood still")
        knn = metrics.get("knn", -1.0)
        if knn > self.best["knn"]:
            self.best = {"knn": knn, "step": step}
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "loader": loader,
            "losses": losses,
            "monitor": monitor,
            "random": random,
            "best": self.best,
        }
        meta: dict[str, Any] = {"metrics": metrics, "config": run_config.to_dict(self.settings), "versions": versions()}
        meta |= {"data": self.data, "judged_on": self.judged_on, "init": self.origin}
        failed = self.copies.finish() if self.copies else None  # before a checkpoint that is being copied is removed
        path = checkpoint.save(self.folder, step, self.learner.state_dict(), state, meta)
        keep = self.settings.checkpoint
        best = checkpoint.folder(self.folder, self.best["step"]) if keep.best and self.best["step"] else None
        checkpoint.prune(self.folder, keep.keep, best)
        if self.copies:
            self.copies.start(path, keep.keep, best)
            failed = self.copies.finish() if last else failed
        if failed:
            raise failed
        return path

    def _restore(self, found: Checkpoint) -> None:
        self._check_same(found.meta, str(self.folder), "run")
        checkpoint.load_weights(self.learner, found)
        self.origin = found.meta.get("init")
        parts: dict[str, Callable[[Any], object]] = {
            "optimizer": self.optimizer.load_state_dict,
            "scaler": self.scaler.load_state_dict,
            "losses": self.losses.load_state_dict,
            "monitor": self.monitor.load_state_dict,
            "best": self._restore_best,
            "random": self._restore_random,
        }
        for name, restore in parts.items():
            try:
                restore(found.state[name])
            except Exception as error:  # each part raises what it likes for a state that it did not write
                raise CheckpointError(f"{found.path} cannot be used: {STATE}: {name}: {reason(error)}") from error
        try:
            self.loader.load_state_dict(found.state["loader"])
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{found.path} cannot be used: {STATE}: loader: {reason(error)}") from error

    def _restore_best(self, best: dict[str, Any]) -> None:
        self.best = {"knn": float(best["knn"]), "step": None if best["step"] is None else int(best["step"])}

    def _restore_random(self, states: list[dict[str, torch.Tensor]]) -> None:
        if self.processes.rank < len(states):
            _set_random_state(states[self.processes.rank])

    def _check_same(self, meta: dict[str, Any], place: str, key: str) -> None:
        """ValueError, naming what differs, unless a checkpoint is of this run: same settings, same images.

        `meta` describes the checkpoint, which lies in `place`, set by `key`.
        """
        fixed = run_config.other_run(meta.get("config", {}), run_config.to_dict(self.settings))
        if fixed:
            told = "; ".join(fixed[:5])
            longer = all(line.startswith("train.length") for line in fixed)
            other = f"train.init={place} with another run= starts the longer run from its weights"
            raise ValueError(
                f"{place} holds a run of another configuration ({told}): "
                f"{other if longer and key == 'run' else f'choose another {key}='}"
            )
        if changed := fingerprint.differences(meta.get("data", {}), self.data):
            here = self.settings.loader.root or self.settings.loader.source
            raise ValueError(
                f"{place} holds a run on other data than {here} "
                f"holds now ({'; '.join(changed)}): restore the data, or choose another {key}="
            )

    def _changed_around(self, found: Checkpoint) -> Iterator[str]:
        """Notes on what has changed outside the run's folder and leaves it the same run."""
        judged = found.meta.get("judged_on")
        for name, old in judged.items() if isinstance(judged, dict) else ():
            if changed := fingerprint.differences(old, self.judged_on.get(name, {})):
                yield (
                    f"note: the {name} images of evaluations are not those of step {found.meta['step']} "
                    f"({'; '.join(changed)}): accuracies before and after it do not compare"
                )
        before, now = found.meta["versions"], versions()
        for name in ("fastrdm", "torch", "device"):
            if before.get(name, now[name]) != now[name]:
                yield (
                    f"note: step {found.meta['step']} was computed with {name} {before[name]}, the rest is with "
                    f"{now[name]}: results may differ in the last bits from those of an unbroken run"
                )

    def finish(self, summary: dict[str, float | str]) -> None:
        """Write summary.json: the metrics of the finished run and its verdict."""
        if self.processes.main:
            try:
                write_whole(self.folder / "summary.json", json.dumps(summary, indent=1))
            except OSError as error:
                raise CheckpointError(f"{self.folder}/summary.json could not be written: {error.strerror}") from error


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@cache
def commit() -> str:
    """This code's checkout as `git describe` names it, with "-dirty" if it was changed, or "-" without one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return "-"
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.strip() or "-"
    except OSError:
        return "-"


def versions() -> dict[str, str]:
    """Versions of fastrdm, Python and torch, command, device and core count; stored in a checkpoint's metadata."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "fastrdm": __version__,
        "commit": commit(),
        "command": shlex.join(sys.argv),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device,
        "cpu_cores": str(os.cpu_count()),
    }
