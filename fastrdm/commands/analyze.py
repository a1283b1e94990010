"""`fastrdm analyze`: the spectral analysis of finished runs."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from fastrdm.analysis.spectral_analysis import Measured, summary_lines
from fastrdm.commands import parsers
from fastrdm.config import run_config, tree
from fastrdm.config.run_config import Config
from fastrdm.evaluation.sets import open_sets
from fastrdm.files import write_whole
from fastrdm.methods.dual_branch import DualBranch
from fastrdm.runtime import checkpoint, distributed
from fastrdm.runtime.checkpoint import Checkpoint
from fastrdm.runtime.distributed import Processes
from fastrdm.schema import Horizon, require, steps_of
from fastrdm.training.learner import build_method
from fastrdm.training.periodic_analysis import analyze_method, images_needed

FILE = "analysis.json"
CPU = torch.device("cpu")


def main(arguments: Sequence[str]) -> int:
    """Measure the runs that `arguments` name; the exit status."""
    options = parsers.analyze().parse_intermixed_args(arguments)
    world = os.environ.get("WORLD_SIZE", "1")
    require(world == "1", "fastrdm analyze", "run on one process, without torchrun", f"{world} processes")
    require(options.replicates >= 10, "--replicates", "at least 10", options.replicates)
    require(options.images is None or options.images > 0, "--images", "above 0", options.images)
    device = distributed.start(options.device).device
    changes = [word for word in options.words if "=" in word]
    for run in (Path(word) for word in options.words if "=" not in word):
        measured = analyze_run(
            run,
            changes,
            device=device,
            split=options.split,
            images=options.images,
            replicates=options.replicates,
            trust=options.trust,
        )
        write_whole(run / FILE, json.dumps(measured._asdict(), indent=1))
        lines = [str(run), *summary_lines(measured.metrics)]
        if "scores/images" in measured.metrics:
            lines += ["scores before softmax:", *summary_lines(measured.metrics, "scores/")]
        print(*lines, sep="\n  ", flush=True)
    return 0


def analyze_run(
    run: Path,
    changes: Sequence[str] = (),
    *,
    device: torch.device = CPU,
    split: Literal["train", "test"] = "train",
    images: int | None = None,
    replicates: int = 100,
    trust: bool = False,
) -> Measured:
    """Analyze a run's newest checkpoint on new views of its images.

    `changes` are settings `a.b=c` laid over the run's own. ValueError where the checkpoint names parts outside fastrdm
    that `changes` do not name, without `trust`.
    """
    steps = checkpoint.existing(run)
    require(bool(steps), "RUN", "a run folder with checkpoints", str(run))
    found = checkpoint.read(steps[0])
    given = [tree.setting(change) for change in changes]
    settings = run_config.restore(found.meta["config"], found.path / checkpoint.META, given, trust=trust)
    method, epoch = trained(found, settings)
    method.to(device)
    processes = Processes(rank=0, world=1, device=device)
    found_sets = open_sets(settings.loader, settings.evaluate)
    source = found_sets.train if split == "train" else found_sets.test
    images = images_needed(settings, source, images, "--images")
    return analyze_method(method, settings, source, epoch, processes, images=images, replicates=replicates)


def trained(found: Checkpoint, settings: Config) -> tuple[DualBranch, int]:
    """The method as it was in the last step before its checkpoint, and the epoch of that step."""
    steps_per_epoch = len(open_sets(settings.loader, settings.evaluate).train) // settings.loader.batch_size
    horizon = Horizon(steps_per_epoch, steps_of(settings.train.length, steps_per_epoch))
    method = build_method(settings, horizon)
    method.to(torch.float64 if settings.train.precision == "fp64" else torch.float32)
    weights = {key.removeprefix("method."): x for key, x in found.weights.items() if key.startswith("method.")}
    checkpoint.load_weights(method, found._replace(weights=weights))
    step = found.meta["step"] - 1
    method.set_step(step)
    return method, step // steps_per_epoch
