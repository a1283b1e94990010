"""The engine that loads nothing keeps the promises of a loader."""

import torch

from fastrdm.loaders.build import build_loader
from fastrdm.loaders.sources.open import open_source
from fastrdm.loaders.spec import LoaderConfig, ViewSpec


def test_noise_of_any_size_with_the_sources_order_and_labels() -> None:
    config = LoaderConfig(
        source="digits", subset=100, batch_size=40, engine="synthetic", views=(ViewSpec(size=40), ViewSpec(size=16))
    )
    source = open_source(config, "train")
    loader = build_loader(config, source, seed=3, rank=1, world=2, dtype=torch.float64)
    real = build_loader(
        LoaderConfig(source="digits", subset=100, batch_size=40, views=(ViewSpec(size=8),) * 2),
        source,
        seed=3,
        rank=1,
        world=2,
    )
    batches = list(loader)
    assert len(batches) == len(loader) == 2
    for batch, wanted in zip(batches, real, strict=True):
        assert [tuple(view.shape) for view in batch.views] == [(20, 3, 40, 40), (20, 3, 16, 16)]
        assert torch.equal(batch.index, wanted.index) and torch.equal(batch.label, wanted.label)
        assert batch.views[0] is batches[0].views[0], "nothing is made anew"
    first = batches[0].views[0]
    assert first.dtype == torch.float64 and first.is_contiguous(memory_format=torch.channels_last)
    assert abs(first.std().item() - 1) < 0.05
    loader.set_epoch(1)
    loader.load_state_dict({"epoch": 1, "position": 40})
    assert len(list(loader)) == 1
