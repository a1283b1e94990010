"""Engine that loads nothing: what a run costs beside its loading, for benchmarks."""

from collections.abc import Iterator

import numpy as np
import torch

from fastrdm.loaders.engines.backpressure import moved
from fastrdm.loaders.order import EpochLoader, Process
from fastrdm.loaders.sources.source import Source
from fastrdm.loaders.spec import Batch, LoaderConfig


class SyntheticLoader(EpochLoader):
    """Batches of one fixed noise tensor on `device`. Length, order and labels are the source's."""

    def __init__(self, config: LoaderConfig, source: Source, process: Process) -> None:
        super().__init__(len(source), config.batch_size, *process[:3])
        generator = torch.Generator().manual_seed(process.seed + process.rank)
        share, views = config.batch_size // process.world, []
        for spec in config.views:
            noise = torch.randn(share, 3, spec.size, spec.size, generator=generator)
            views.append(noise.to(process.device, process.dtype, memory_format=torch.channels_last))
        self.views = tuple(views)
        self.labels = torch.as_tensor(source.labels, dtype=torch.int64, device=process.device)

    def __iter__(self) -> Iterator[Batch]:
        """The batches of the epoch still to come."""
        order = np.array(list(self._remaining()), np.int64).reshape(-1, len(self.views[0]))
        for index in moved(torch.from_numpy(order), self.labels.device):
            self.position += self.batch_size
            yield Batch(self.views, index, self.labels[index])
