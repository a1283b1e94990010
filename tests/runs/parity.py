"""`python parity.py OUT PRECISION 1,2,4 PRESET...`: four training steps of each preset on 1, 2 and 4 processes.

Writes OUT/<preset>-<world>.pt: losses, gathered rows, gradients, weights, buffers and the order of the images.
"""

import sys
from pathlib import Path

import torch
from forked import launch

from fastrdm import config, distributed
from fastrdm.kernels.collectives import process_count
from fastrdm.trainer import Trainer

SMALL = [
    "train.length=6st",
    "optim.warmup=0st",
    "encoder.name=resnet_small",
    "encoder.width=4",
    "encoder.stem=cifar",
    "method.projector.hidden=32",  # more than the rows of a batch: whitening amplifies what it finds near its cutoff
    "method.projector.out=24",
    "loader.source=digits",
    "loader.batch_size=16",
    "loader.views.*.size=8",
    "evaluate.baselines=false",
]
STEPS = 4
_SINKHORN = "{name: sinkhorn, queue: 32, queue_start: 1st}"
_SCORES = "{name: prototypes, count: 20, freeze: 1st}"
_SHARPEN = "{name: centre_sharpen, warmup: 50%}"
_HALF, _LOG1P = "{name: filter, power: -0.5}", "{name: filter, kind: log1p}"
SCORED = {  # small prototypes and a queue that is full from the second step on
    "swav": [f"method.online=[{_SCORES}]", f"method.target=[{_SCORES}, {_SINKHORN}]"],
    "swav_target": [f"method.online=[{_SCORES}]", f"method.target=[{_HALF}, {_SCORES}, {_SINKHORN}]"],
    "dino": [f"method.online=[{_SCORES}]", f"method.target=[{_SCORES}, {_SHARPEN}]"],
    "dino_online": [f"method.online=[{_LOG1P}, {_SCORES}]", f"method.target=[{_SCORES}, {_SHARPEN}]"],
}


def record(preset: str, precision: str, run: Path) -> dict[str, torch.Tensor]:
    """Everything that must not depend on the number of processes."""
    settings = [f"preset={preset}", f"train.precision={precision}", f"run={run}", *SMALL, *SCORED.get(preset, [])]
    trainer = Trainer(config.load(settings))
    seen: dict[str, torch.Tensor] = {}
    names = {id(p): name for name, p in trainer.learner.named_parameters()}

    def keep_gradients(optimizer: torch.optim.Optimizer, *_: object) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    seen[f"{step}/gradient/{names[id(p)]}"] = p.grad.clone()

    trainer.optimizer.register_step_pre_hook(keep_gradients)
    for step, batch in zip(range(STEPS), trainer.loader, strict=False):
        seen[f"{step}/index"] = distributed.gather_rows(batch.index)
        seen[f"{step}/views"] = distributed.gather_rows(torch.stack(batch.views), dim=1)
        output = trainer.train_step(batch)
        trainer.step += 1
        seen[f"{step}/loss"] = distributed.sum_over_processes(output.loss.detach()) / process_count()
        for name in ("online", "target", "features"):
            seen[f"{step}/{name}"] = distributed.gather_rows(getattr(output, name), dim=1)
        seen |= {f"{step}/state/{name}": x.clone() for name, x in trainer.learner.state_dict().items()}
    return seen


def main() -> None:
    out, precision, worlds, presets = Path(sys.argv[1]), sys.argv[2], sys.argv[3].split(","), sys.argv[4:]
    for world in map(int, worlds):

        def work(rank: int, world: int = world) -> None:
            for preset in presets:
                seen = record(preset, precision, out / "run")
                if rank == 0:
                    torch.save(seen, out / f"{preset}-{world}.pt")
            distributed.stop()

        if any(launch(world, work)):
            sys.exit(f"a process of {world} failed")


main()
