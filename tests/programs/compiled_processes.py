"""Eager and compiled training of some presets on several processes, joined by gloo; rank 0 prints how far apart.

    torchrun --nproc-per-node 2 tests/programs/compiled_processes.py FOLDER PRESET...

Each line: preset, largest difference of a loss as a share of the largest, distance of the weights at the end as a share
of their norm, and the same between processes, which must be 0; graphs that were compiled, and breaks in them.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch._dynamo.utils import counters

from fastrdm.config import run_config
from fastrdm.models.settings import ENCODERS, resnet_row
from fastrdm.runtime import distributed
from fastrdm.runtime.distributed import gather_rows
from fastrdm.trainer import Trainer

STEPS = 6
SMALL = [
    *("encoder.name=resnet_small", "encoder.width=8", "encoder.stem=cifar", "loader.source=digits"),
    *("method.projector.hidden=32", "method.projector.out=16", "loader.views.*.size=8", "loader.subset=160"),
    *("loader.batch_size=16", "optim.warmup=0st", "train.length=1ep", "evaluate.baselines=false", "log.every=100"),
    *("train.device=cpu", "log.report=false", "train.precision=fp32"),
]


def settings(preset: str, *more: str) -> run_config.Config:
    """A run of a few steps; prototypes learn from the third step on, and no queue is filled."""
    method = run_config.load([f"preset={preset}", *SMALL]).method
    for side in ("online", "target"):
        for number, transform in enumerate(getattr(method, side)):
            if transform.name == "prototypes":
                more += tuple(f"method.{side}.{number}.{key}" for key in ("count=24", "freeze=3st"))
            if transform.name == "whiten":
                more += ("method.projector.out=8",)  # fewer dimensions than rows
            if transform.name == "sinkhorn":
                more += (f"method.{side}.{number}.queue=0",)
    return run_config.load([f"preset={preset}", *SMALL, *more])


def run(preset: str, folder: Path, compiled: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses (STEPS,) of this process, and all weights at the end."""
    name = f"{preset}-{'compiled' if compiled else 'eager'}"
    torch.compiler.reset()
    counters.clear()
    trainer = Trainer(settings(preset, f"run={folder / name}", f"train.compile={str(compiled).lower()}"))
    losses, batches = [], iter(trainer.loader)
    for _ in range(STEPS):
        losses.append(trainer.train_step(next(batches)).loss.detach())
        trainer.step += 1
    trainer.monitor.close()
    trainer.watch.close()
    return torch.stack(losses), torch.cat([p.detach().flatten() for p in trainer.learner.parameters()])


def main(folder: Path, presets: list[str]) -> None:
    ENCODERS["resnet_small"] = resnet_row((1,), 8)
    for preset in presets:
        losses, weights = run(preset, folder, compiled=False)
        others, moved = run(preset, folder, compiled=True)
        everywhere = gather_rows(moved[None])
        told = {
            "preset": preset,
            "losses": ((others - losses).abs().max() / losses.abs().max()).item(),
            "weights": ((moved - weights).norm() / weights.norm()).item(),
            "processes": (everywhere - everywhere[0]).abs().max().item(),
            "graphs": counters["stats"]["unique_graphs"],
            "breaks": sum(counters["graph_break"].values()),
        }
        if distributed.process_rank() == 0:
            print(json.dumps(told), flush=True)
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
