"""The analysis while a run goes on: with frozen weights, at a fixed interval, at the start and at the end."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from fastrdm.analysis.branch_comparison import white_bound
from fastrdm.analysis.settings import IMAGES_PER_DIMENSION, MIN_IMAGES
from fastrdm.analysis.spectral_analysis import Measured, headline, measure
from fastrdm.config.run_config import Config
from fastrdm.loaders.build import build_loader
from fastrdm.loaders.sources.source import Source
from fastrdm.methods.dual_branch import DualBranch
from fastrdm.methods.prototypes import PrototypesConfig
from fastrdm.monitoring.rank_statistics import log_spaced
from fastrdm.runtime.distributed import Processes
from fastrdm.schema import require, steps_of

FILE = "analysis"  # .jsonl in the run's folder: metrics and curves of every measurement
PREFIX = "analysis/"  # of the metrics in metrics.jsonl
OTHER_SEED = 2**32  # added to the run's seed, which lies below: the views are none that the run was trained on


class Observation(NamedTuple):
    """One analysis, as it is logged."""

    metrics: dict[str, float]  # for metrics.jsonl
    record: dict[str, Any]  # for analysis.jsonl: metrics, and curves as [number of the direction from 1, value]
    summary: str


class PeriodicAnalysis:
    """Analyzes a run's method on views of its own images that it is not trained on.

    The model, its random states and the loader of the run are left as they were. Call it on every process.
    """

    def __init__(self, settings: Config, method: DualBranch, train: Source, test: Source, processes: Processes) -> None:
        c, horizon = settings.analysis, method.horizon
        self.settings, self.method, self.processes, self.total = settings, method, processes, horizon.total
        some = steps_of(c.every, 2**32, 2**32) > 0
        self.every, self.images = max(horizon.steps(c.every), 1) if some else 0, 0
        fits = self.every <= self.total
        require(fits, "analysis.every", f"no longer than the run of {self.total} steps", c.every)
        self.source = train if c.split == "train" else test
        if self.every:
            self.images = images_needed(settings, self.source, c.images, "analysis.images")

    def describe(self) -> list[str]:
        """Notes on analyses that will be biased because they have few images."""
        dimension = loss_dimension(self.settings)
        if not self.every or self.images >= IMAGES_PER_DIMENSION * dimension:
            return []
        reads = f"a white spectrum of {dimension} dimensions reads {white_bound(self.images, dimension):.0f}"
        return [
            f"note: the analysis of {self.images:,} images is biased: {reads}; "
            f"{IMAGES_PER_DIMENSION} a dimension are enough"
        ]

    def due(self, step: int) -> bool:
        """True if the method is analyzed after `step` steps."""
        return self.every > 0 and (step % self.every == 0 or step == self.total)

    def measure(self, step: int, beat: Callable[[], object]) -> Observation:
        """Analyze the method as it is after `step` steps. `beat` is called now and then."""
        began = time.perf_counter()
        last = max(step - 1, 0)
        self.method.set_step(last)
        found = analyze_method(
            self.method,
            self.settings,
            self.source,
            last // self.method.horizon.steps_per_epoch,
            self.processes,
            images=self.images,
            replicates=self.settings.analysis.replicates,
            beat=beat,
        )
        seconds = time.perf_counter() - began
        curves = {
            name: [[i, float(f"{values[i - 1]:.5g}")] for i in log_spaced(len(values))]
            for name, values in found.curves.items()
        }
        metrics = {f"{PREFIX}{name}": value for name, value in found.metrics.items()}
        return Observation(
            {**metrics, f"{PREFIX}seconds": seconds},
            {"metrics": found.metrics, "curves": curves},
            f"analysis: {headline(found.metrics)}, {seconds:.1f} s",
        )


def analyze_method(
    method: DualBranch,
    settings: Config,
    source: Source,
    epoch: int,
    processes: Processes,
    *,
    images: int,
    replicates: int,
    beat: Callable[[], object] = bool,
) -> Measured:
    """Analyze `method` as it is, on views of `source` that `epoch` of its run would draw with another seed.

    `beat` is called now and then, as a sign of life.
    """
    part = replace(settings.loader, batch_size=batch_size(settings))
    wide = torch.float64 if settings.train.precision == "fp64" else torch.float32
    loader = build_loader(
        part,
        source,
        seed=settings.train.seed + OTHER_SEED,
        rank=processes.rank,
        world=processes.world,
        device=processes.device,
        dtype=method.precision or wide,
    )
    loader.set_epoch(epoch)
    try:
        batches = (batch.views for batch in loader)
        how = {"batch_size": part.batch_size, "images": images, "replicates": replicates}
        return measure(method, batches, **how, beat=beat)
    finally:
        loader.close()


def loss_dimension(settings: Config) -> int:
    """Number of dimensions of what enters the loss."""
    counts = [t.count for t in settings.method.online if isinstance(t, PrototypesConfig)]
    return counts[0] if counts else settings.method.projector.out


def images_needed(settings: Config, source: Source, images: int | None, key: str) -> int:
    """Number of images to analyze: `images` where given, else IMAGES_PER_DIMENSION a dimension and at least MIN_IMAGES.

    A smaller set is analyzed whole. ValueError, naming `key`, where `source` has fewer images, or fewer than there are
    dimensions.
    """
    size, wide = batch_size(settings), loss_dimension(settings)
    there = len(source) // size * size
    require(
        images is None or images <= there, key, f"at most the {there} of {source.name} in batches of {size}", images
    )
    found = images or min(max(MIN_IMAGES, IMAGES_PER_DIMENSION * wide), there)
    needed = f"at least the {wide} dimensions, and {IMAGES_PER_DIMENSION} times that for metrics without bias"
    require(found >= wide, key, needed, found)
    return found


def batch_size(settings: Config) -> int:
    """Images of one forward pass over all processes."""
    return settings.loader.batch_size // settings.train.accumulate
