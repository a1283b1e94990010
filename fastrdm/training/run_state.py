"""Everything a run needs to go on as if it had never stopped, put into checkpoints and taken out again."""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fastrdm import __version__
from fastrdm.config import run_config
from fastrdm.config.run_config import Config
from fastrdm.loaders.spec import Loader
from fastrdm.monitoring.monitor import RankMonitor
from fastrdm.runtime import checkpoint, distributed
from fastrdm.runtime.checkpoint import STATE, Checkpoint, CheckpointError, reason
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
    ) -> None:
        """`data`: the fingerprint of the images that are trained on."""
        self.settings, self.processes, self.learner = settings, processes, step.learner
        self.optimizer, self.scaler = step.optimizer, step.scaler
        self.loader, self.losses, self.monitor = loader, losses, monitor
        self.data = data
        self.home, self.folder = home, home.path
        self.origin: dict[str, Any] | None = None
        """Where the first weights came from, when not from the seed."""

        self.best: dict[str, Any] = {"knn": -1.0, "step": None}

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
            return int(found.meta["step"]), dict(found.meta["metrics"]), said
        if said:
            said.append(f"no usable checkpoint in {self.folder}: remove it or choose another run=")
            raise CheckpointError("\n".join(said))
        return 0, {}, said

    def describe(self) -> None:
        """Write config.yaml, from the main process: the settings of this start of the run."""
        if self.processes.main:
            (self.folder / "config.yaml").write_text(run_config.to_yaml(self.settings), encoding="utf-8")

    def save(self, step: int, metrics: dict[str, float]) -> Path | None:
        """Write the checkpoint of `step` from the main process, where its path is returned; every process must call."""
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
        meta |= {"data": self.data, "init": self.origin}
        path = checkpoint.save(self.folder, step, self.learner.state_dict(), state, meta)
        keep = self.settings.checkpoint
        best = checkpoint.folder(self.folder, self.best["step"]) if keep.best and self.best["step"] else None
        checkpoint.prune(self.folder, keep.keep, best)
        return path

    def _restore(self, found: Checkpoint) -> None:
        self._check_same(found)
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

    def _check_same(self, found: Checkpoint) -> None:
        """ValueError, naming what differs, unless the checkpoint is of this run: same settings, same images."""
        fixed = run_config.other_run(found.meta["config"], run_config.to_dict(self.settings))
        if fixed:
            told = "; ".join(fixed[:5])
            longer = all(line.startswith("train.length") for line in fixed)
            other = f"train.init={self.folder} with another run= starts the longer run from its weights"
            raise ValueError(
                f"{self.folder} holds a run of another configuration ({told}): "
                f"{other if longer else 'choose another run='}"
            )
        if changed := fingerprint.differences(found.meta.get("data", {}), self.data):
            here = self.settings.loader.root or self.settings.loader.source
            raise ValueError(
                f"{self.folder} holds a run on other data than {here} "
                f"holds now ({'; '.join(changed)}): restore the data, or choose another run="
            )

    def finish(self, summary: dict[str, float | str]) -> None:
        """Write summary.json: the metrics of the finished run and its verdict."""
        if self.processes.main:
            try:
                (self.folder / "summary.json").write_text(json.dumps(summary, indent=1))
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
