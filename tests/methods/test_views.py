"""The images that a method sees: every view with its own draw, and solarized before it is normalized."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from fastrdm.kernels.augment.layout import COLUMNS, Column
from fastrdm.loaders.augment import reference
from fastrdm.loaders.augment.parameters import sample_parameters
from fastrdm.loaders.build import build_loader
from fastrdm.loaders.sources.open import open_source
from fastrdm.loaders.spec import LoaderConfig, ViewSpec


@pytest.mark.parametrize("engine", ["resident", "native"])
def test_each_view_has_its_own_draw(engine: Any) -> None:
    spec = ViewSpec(size=8, jitter=0, grayscale=0, scale=(0.3, 0.6))
    config = LoaderConfig(subset=40, batch_size=10, views=(spec, spec, spec), engine=engine)
    source = open_source(config, "train")
    assert isinstance(source.images, np.ndarray)
    loader = build_loader(config, source, seed=3)
    for batch in itertools.islice(loader, 2):
        images = torch.as_tensor(source.images[batch.index.numpy()])
        height, width = (torch.full((10,), side) for side in images.shape[1:3])
        for view, found in enumerate(batch.views):
            drawn = sample_parameters(spec, 3, 0, batch.index, view, height, width)
            wanted = reference.augment(images, drawn, spec)
            assert (found - wanted).abs().max() < 0.51 / 255 / min(spec.std)  # native crops are rounded to 8 bits
    loader.close()


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_solarized_before_normalized(implementation: str) -> None:
    spec = ViewSpec(size=1, jitter=0, grayscale=0, solarize=0.5)
    images = torch.tensor([[0, 100, 127], [128, 200, 255]], dtype=torch.uint8)[:, None, None, :]  # two pixels
    parameters = torch.zeros(2, COLUMNS)
    parameters[:, [Column.HEIGHT, Column.WIDTH, Column.SOLARIZE]] = 1.0
    solarized = torch.tensor([[0, 100, 127], [127, 55, 0]]) / 255  # from 128 on inverted
    wanted = (solarized - torch.tensor(spec.mean)) / torch.tensor(spec.std)
    views = reference.augment(images, parameters, spec, implementation=implementation)
    torch.testing.assert_close(views[:, :, 0, 0], wanted, rtol=0, atol=1e-5)
