"""Everything a run needs to go on as if it had never stopped, put into checkpoints and taken out again."""

import json
import os
import platform
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fastrdm import __version__
from fastrdm.config import run_config, tree
from fastrdm.config.run_config import Config
from fastrdm.loaders.spec import Loader
from fastrdm.monitoring.monitor import RankMonitor
from fastrdm.runtime import checkpoint, distributed
from fastrdm.runtime.checkpoint import Checkpoint, CheckpointError
from fastrdm.runtime.distributed import Processes
from fastrdm.runtime.timers import LossTracker
from fastrdm.training.step import TrainStep

# settings that change neither the weights nor the order of images: a run may continue with other ones
FREE = (
    "run",
    "log.",
    "checkpoint.",
    "monitor.",
    "analysis.",
    "train.device",
    "train.compile",
    "train.capture",
    "train.hang_timeout",
    "loader.root",
    "loader.workers",
    "loader.prefetch",
    "loader.augment",
)


class RunState:
    """The parts of a run that its checkpoints hold, and the folder that they lie in."""

    def __init__(
        self,
        settings: Config,
        processes: Processes,
        step: TrainStep,
        loader: Loader,
        losses: LossTracker,
        monitor: RankMonitor,
    ) -> None:
        self.settings, self.processes, self.learner = settings, processes, step.learner
        self.optimizer, self.scaler = step.optimizer, step.scaler
        self.loader, self.losses, self.monitor = loader, losses, monitor
        self.folder = run_config.run_folder(settings)
        self.best: dict[str, Any] = {"knn": -1.0, "step": None}

    def resume(self) -> tuple[int, dict[str, float], list[str]]:
        """Step and metrics of the newest usable checkpoint, 0 and none without; lines on what was found.

        CheckpointError if there are checkpoints but none can be used; ValueError if they are of another configuration.
        """
        if self.processes.main:
            self.folder.mkdir(parents=True, exist_ok=True)
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
        if self.processes.main:
            (self.folder / "config.yaml").write_text(run_config.to_yaml(self.settings))
        return 0, {}, said

    def save(self, step: int, metrics: dict[str, float]) -> Path | None:
        """Write the checkpoint of `step` from the main process, where its path is returned; every process must call."""
        random = distributed.gather_objects(_random_state())
        loader, losses, monitor = (part.state_dict() for part in (self.loader, self.losses, self.monitor))
        if not self.processes.main:
            return None
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
        meta = {"metrics": metrics, "config": run_config.to_dict(self.settings), "versions": versions()}
        path = checkpoint.save(self.folder, step, self.learner.state_dict(), state, meta)
        keep = self.settings.checkpoint
        best = checkpoint.folder(self.folder, self.best["step"]) if keep.best and self.best["step"] else None
        checkpoint.prune(self.folder, keep.keep, best)
        return path

    def _restore(self, found: Checkpoint) -> None:
        lines = tree.differences(found.meta["config"], run_config.to_dict(self.settings))
        fixed = [line for line in lines if not line.startswith(FREE)]
        if fixed:
            changes = "; ".join(fixed[:5])
            raise ValueError(f"{self.folder} holds a run of another configuration ({changes}): choose another run=")
        checkpoint.load_weights(self.learner, found)
        state = found.state
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.loader.load_state_dict(state["loader"])
        self.losses.load_state_dict(state["losses"])
        self.monitor.load_state_dict(state["monitor"])
        self.best = state["best"]
        if self.processes.rank < len(state["random"]):
            _set_random_state(state["random"][self.processes.rank])

    def finish(self, metrics: dict[str, float]) -> None:
        """Write summary.json: the metrics of the finished run."""
        if self.processes.main:
            (self.folder / "summary.json").write_text(json.dumps(metrics, indent=1))


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
    """What `git describe` calls the checkout of this code, with "-dirty" if it was changed, or "-" without one."""
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
