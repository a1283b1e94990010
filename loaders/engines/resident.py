"""Engine for sets that fit on the device: images are gathered and augmented there, the host only starts the work."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fastrdm.kernels.cuda_graph import Captured, Recorder
from fastrdm.loaders.augment.parameters import sample_all_parameters
from fastrdm.loaders.augment.reference import augment, chosen
from fastrdm.loaders.engines.backpressure import moved
from fastrdm.loaders.order import EpochLoader, Process
from fastrdm.loaders.sources.source import Source
from fastrdm.loaders.spec import Batch, LoaderConfig


class ResidentLoader(EpochLoader):
    """The whole set on `device` as one uint8 tensor."""

    def __init__(self, config: LoaderConfig, source: Source, process: Process) -> None:
        super().__init__(len(source), config.batch_size, *process[:3])
        if source.images is None:
            raise ValueError(f"loader.engine=resident takes sets held in memory, got {source.name}: use native")
        self.images = torch.as_tensor(source.images, device=process.device)
        self.labels = torch.as_tensor(source.labels, dtype=torch.int64, device=process.device)
        self.views, self.dtype, self.device = config.views, process.dtype, process.device
        self.implementation = chosen(config.augment, process.device)
        self.drawn_for = torch.zeros((), dtype=torch.int64, device=process.device)  # the epoch, where work is recorded
        self.captured: Captured | None = None

    def capture(self, recorder: Recorder) -> None:
        """Record the making of a batch from its indices, once for each size of the views."""
        self.captured = Captured(self._batch, recorder)

    def __iter__(self) -> Iterator[Batch]:
        """The batches of the epoch still to come."""
        share = self.batch_size // self.world
        order = np.array(list(self._remaining()), np.int64).reshape(-1, share)
        self.drawn_for.fill_(self.epoch)
        sizes = tuple(spec.at(self.epoch).size for spec in self.views)
        for index in moved(torch.from_numpy(order), self.device):  # once an epoch, and nothing waits for it
            batch = self.captured(sizes, index) if self.captured else self._batch(index)
            self.position += self.batch_size
            yield batch

    def _batch(self, index: Tensor) -> Batch:
        """The batch of samples `index` (B,) int64; nothing waits for the device."""
        images = self.images[index]
        height, width = (torch.full((len(index),), side, device=self.device) for side in self.images.shape[1:3])
        specs = [spec.at(self.epoch) for spec in self.views]
        drawn = sample_all_parameters(specs, self.seed, self.drawn_for, index, height, width)
        views = [
            augment(images, parameters, spec, self.dtype, self.implementation)
            for parameters, spec in zip(drawn, specs, strict=True)
        ]
        return Batch(tuple(views), index, self.labels[index])
