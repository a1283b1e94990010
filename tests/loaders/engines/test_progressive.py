"""Views that grow: the size of an epoch is all that changes, and a schedule must lie within the run."""

import itertools
from typing import Any

import pytest
import torch

from fastrdm.config import run_config
from fastrdm.loaders.augment.parameters import sample_parameters
from fastrdm.loaders.build import build_loader
from fastrdm.loaders.sources.open import open_source
from fastrdm.loaders.spec import LoaderConfig, ViewSpec
from fastrdm.trainer import Trainer

GROWING = ((1, 4), (3, 6))


def test_the_size_of_an_epoch() -> None:
    view = ViewSpec(size=8, progressive=GROWING, scale=(0.3, 0.5))
    assert [view.at(epoch).size for epoch in range(5)] == [4, 6, 6, 8, 8]
    assert view.at(0) == ViewSpec(size=4, scale=(0.3, 0.5)) and ViewSpec().at(9) == ViewSpec()


@pytest.mark.parametrize("engine", ["resident", "native"])
def test_each_epoch_has_its_size_and_the_same_crops(engine: Any) -> None:
    growing, fixed = ViewSpec(size=8, progressive=GROWING), ViewSpec(size=8)
    config = LoaderConfig(views=(growing, fixed), batch_size=10, subset=40, engine=engine)
    loader = build_loader(config, open_source(config, "train"), seed=3)
    height = width = torch.full((10,), 8)
    for epoch, size in ((0, 4), (1, 6), (3, 8), (0, 4)):
        loader.set_epoch(epoch)
        for batch in itertools.islice(loader, 2):
            assert [view.shape[-1] for view in batch.views] == [size, 8]
            drawn = [
                sample_parameters(v, 3, epoch, batch.index, 0, height, width) for v in (growing, growing.at(epoch))
            ]
            assert torch.equal(*drawn), "what is drawn does not depend on the size"
    loader.close()


@pytest.mark.parametrize("wrong", [((0, 4),), ((3, 4), (2, 6)), ((2, 4), (2, 6)), ((2, 0),), ((2, 9),)])
def test_schedules_that_make_no_sense_are_refused(wrong: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(
        ValueError, match=r"progressive must be pairs of an epoch, rising, and a size of at most 8 pixels"
    ):
        ViewSpec(size=8, progressive=wrong)


def test_a_step_beyond_the_run_is_refused() -> None:
    arguments = [
        "quickstart.yaml",
        "loader.views.*.progressive=[[2, 8], [4, 12]]",
        "encoder.width=4",
        "method.projector.hidden=8",
    ]
    with pytest.raises(ValueError, match=r"^loader.views.\*.progressive must be below the run's 4 epochs, got 4$"):
        Trainer(run_config.load([*arguments, "train.length=4ep"]))
    Trainer(run_config.load([*arguments, "train.length=5ep"]))
