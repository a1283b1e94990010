"""`python parity.py OUT PRECISION 1,2,4 RUN...`: four training steps of each preset or MORE on 1, 2 and 4 processes.

Writes OUT/<run>-<world>.pt: losses, gathered rows, gradients, weights, buffers and the order of the images.
"""

import sys
from pathlib import Path

import torch
from forked import launch

from fastrdm.config import run_config
from fastrdm.kernels.collectives import process_count
from fastrdm.runtime import distributed
from fastrdm.trainer import Trainer

SMALL = [
    "quickstart.yaml",
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
_RAMP = "{name: sinkhorn, epsilon: 0.07, warmup_epsilon: 0.04, warmup: 50%}"
_SHARPEN = "{name: center_sharpen, warmup: 50%}"
_HALF, _LOG1P = "{name: filter, power: -0.5}", "{name: filter, kind: log1p}"
SCORED = {  # small prototypes and a queue that is full from the second step on
    "swav": [f"method.online=[{_SCORES}]", f"method.target=[{_SCORES}, {_SINKHORN}]"],
    "swav_target": [f"method.online=[{_SCORES}]", f"method.target=[{_HALF}, {_SCORES}, {_SINKHORN}]"],
    "dino": [f"method.online=[{_SCORES}]", f"method.target=[{_SCORES}, {_SHARPEN}]"],
    "dino_sinkhorn": [f"method.online=[{_SCORES}]", f"method.target=[{_SCORES}, {_RAMP}]"],
    "dino_koleo": [f"method.online=[{_SCORES}]", f"method.target=[{_SCORES}, {_SHARPEN}]"],
    "dino_online": [f"method.online=[{_LOG1P}, {_SCORES}]", f"method.target=[{_SCORES}, {_SHARPEN}]"],
}
# Whitening takes more rows than dimensions; AdamW takes the rounding in a gradient that is zero for a gradient.
NARROW = {"w_mse": ["method.projector.out=8", "optim.name=sgd"], "lejepa": ["optim.name=sgd"]}
MORE = {
    "power_anneals": [
        "preset=rdm_simsiam",
        "method.target=[{name: filter, power: -1, power_end: -0.3, momentum: 0.5}]",
    ],
    "crossed": [
        "preset=byol",
        "method.projector.out=4",  # all directions of the cross-correlation well above its rounding
        "method.online=[{name: filter, power: 0, basis: cross, momentum: 0.5, epsilon: 0.1}]",
    ],
    "whitened": [
        "preset=vicreg",
        "method.projector.out=8",
        "method.online=[{name: whiten, size: 8}]",
        "method.target=[{name: filter, kind: whiten, strength: 0.5}]",
    ],
    "dino_crops": [
        "preset=dino",
        *SCORED["dino"],
        "method.bn_views=joint",
        "loader.views=[{size: 8}, {size: 8}, {size: 6}]",
    ],
}


def record(name: str, precision: str, run: Path) -> dict[str, torch.Tensor]:
    """Everything that must not depend on the number of processes."""
    own = MORE.get(name) or [f"preset={name}", *SCORED.get(name, []), *NARROW.get(name, [])]
    settings = [f"train.precision={precision}", f"run={run}", *SMALL, *own]
    trainer = Trainer(run_config.load(settings))
    seen: dict[str, torch.Tensor] = {}
    names = {id(p): key for key, p in trainer.learner.named_parameters()}

    def keep_gradients(optimizer: torch.optim.Optimizer, *_: object) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    seen[f"{step}/gradient/{names[id(p)]}"] = p.grad.clone()

    trainer.optimizer.register_step_pre_hook(keep_gradients)
    for step, batch in zip(range(STEPS), trainer.loader, strict=False):
        seen[f"{step}/index"] = distributed.gather_rows(batch.index)
        seen |= {f"{step}/{i}/views": distributed.gather_rows(view) for i, view in enumerate(batch.views)}
        output = trainer.train_step(batch)
        trainer.step += 1
        seen[f"{step}/loss"] = distributed.sum_over_processes(output.loss.detach()) / process_count()
        for key in ("online", "target", "features"):
            seen[f"{step}/{key}"] = distributed.gather_rows(getattr(output, key), dim=1)
        seen |= {f"{step}/state/{key}": x.clone() for key, x in trainer.learner.state_dict().items()}
    return seen


def main() -> None:
    out, precision, worlds, runs = Path(sys.argv[1]), sys.argv[2], sys.argv[3].split(","), sys.argv[4:]
    for world in map(int, worlds):

        def work(rank: int, world: int = world) -> None:
            for name in runs:
                seen = record(name, precision, out / "run")
                if rank == 0:
                    torch.save(seen, out / f"{name}-{world}.pt")
            distributed.stop()

        if any(launch(world, work)):
            sys.exit(f"a process of {world} failed")


main()
