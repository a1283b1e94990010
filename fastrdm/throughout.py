"""The instruments while a run goes on: with frozen weights, every so many steps, at its start and at its end."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from fastrdm import theory
from fastrdm.config import Config
from fastrdm.distributed import Processes
from fastrdm.eigenspaces import white_bound
from fastrdm.instruments import ENOUGH, brief
from fastrdm.loaders.sources import Source
from fastrdm.loaders.spec import require
from fastrdm.methods.branch import DualBranch
from fastrdm.readings import places
from fastrdm.schedules import steps_of

FILE = "instruments"  # .jsonl in the run's folder: figures and curves of every measurement
PREFIX = "instruments/"  # of the figures in metrics.jsonl


class Observation(NamedTuple):
    """One measurement, as it is logged."""

    figures: dict[str, float]  # for metrics.jsonl
    record: dict[str, Any]  # for instruments.jsonl: figures, and curves as [number of the direction from 1, value]
    told: str


class Throughout:
    """Measures a run's method, on views of its own images that it is not trained on.

    The model, its random states and the loader of the run are left as they were. Call it on every process.
    """

    def __init__(self, settings: Config, method: DualBranch, train: Source, test: Source, processes: Processes) -> None:
        c, horizon = settings.instruments, method.horizon
        self.settings, self.method, self.processes, self.total = settings, method, processes, horizon.total
        some = steps_of(c.every, 2**32, 2**32) > 0
        self.every, self.images = max(horizon.steps(c.every), 1) if some else 0, 0
        fits = self.every <= self.total
        require(fits, "instruments.every", f"no longer than the run of {self.total} steps", c.every)
        self.source = train if c.split == "train" else test
        if self.every:
            self.images = theory.enough(settings, self.source, c.images, "instruments.images")

    def introduction(self) -> list[str]:
        """Where the figures will be biased."""
        dimension = theory.dimension(self.settings)
        if not self.every or self.images >= ENOUGH * dimension:
            return []
        reads = f"a white spectrum of {dimension} dimensions reads {white_bound(self.images, dimension):.0f}"
        return [f"note: instruments on {self.images:,} images are biased: {reads}; {ENOUGH} a dimension are enough"]

    def due(self, step: int) -> bool:
        """Whether the method is measured after `step` steps."""
        return self.every > 0 and (step % self.every == 0 or step == self.total)

    def measure(self, step: int, beat: Callable[[], object]) -> Observation:
        """The method as it is after `step` steps; `beat` is called now and then."""
        began = time.perf_counter()
        last = max(step - 1, 0)
        self.method.set_step(last)
        found = theory.on_new_views(
            self.method,
            self.settings,
            self.source,
            last // self.method.horizon.steps_per_epoch,
            self.processes,
            images=self.images,
            replicates=self.settings.instruments.replicates,
            beat=beat,
        )
        seconds = time.perf_counter() - began
        curves = {
            name: [[i, float(f"{values[i - 1]:.5g}")] for i in places(len(values))]
            for name, values in found.curves.items()
        }
        figures = {f"{PREFIX}{name}": value for name, value in found.figures.items()}
        return Observation(
            {**figures, f"{PREFIX}seconds": seconds},
            {"figures": found.figures, "curves": curves},
            f"instruments: {brief(found.figures)}, {seconds:.1f} s",
        )
