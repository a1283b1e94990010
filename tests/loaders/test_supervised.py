"""Shares of a labeled set, and the loader of one view."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from fastrdm.loaders.sources.open import open_source
from fastrdm.loaders.spec import LoaderConfig, ViewSpec
from fastrdm.loaders.supervised import SupervisedConfig, crop_and_flip, labeled_share, supervised_loader

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 200))


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_shares_are_balanced_and_deterministic(share: float) -> None:
    chosen = labeled_share(LABELS, share, seed=3)
    assert np.bincount(LABELS[chosen]).tolist() == [round(200 * share)] * 10
    assert np.array_equal(chosen, np.unique(chosen))
    assert np.array_equal(chosen, labeled_share(LABELS, share, seed=3))
    assert not np.array_equal(chosen, labeled_share(LABELS, share, seed=4))


def test_a_smaller_share_lies_within_a_larger_one() -> None:
    one, ten, all_ = (labeled_share(LABELS, share, seed=0) for share in (0.01, 0.1, 1.0))
    assert set(one) < set(ten) < set(all_)
    assert np.array_equal(all_, np.arange(len(LABELS)))


def test_the_images_of_a_seed_never_change() -> None:
    assert labeled_share(np.arange(40) % 2, 0.1, seed=0).tolist() == [2, 25, 27, 32]


def test_small_classes_give_what_they_have() -> None:
    labels = np.array([0] * 90 + [1] * 10)
    assert np.bincount(labels[labeled_share(labels, 0.5, seed=0)]).tolist() == [25, 10]
    assert np.bincount(labels[labeled_share(labels, 0.001, seed=0)]).tolist() == [1, 1]


def test_crops_and_flips_are_all_that_is_random() -> None:
    view = ViewSpec(size=8, blur=0.5, solarize=0.2, interpolation="bilinear", mean=(0.1, 0.2, 0.3))
    plain = crop_and_flip(view, (0.08, 1.0), 0.5)
    assert (plain.jitter, plain.grayscale, plain.blur, plain.solarize) == (0, 0, 0, 0)
    assert (plain.size, plain.interpolation, plain.mean) == (8, "bilinear", (0.1, 0.2, 0.3))
    assert (plain.scale, plain.flip) == ((0.08, 1.0), 0.5)


def test_the_loader_gives_one_view_of_every_image() -> None:
    source = open_source(LoaderConfig(source="digits", subset=100), "train")
    loader = supervised_loader(source, ViewSpec(size=8), 20, seed=0, workers=1, device=torch.device("cpu"))
    batches = list(loader)
    assert len(batches) == len(loader) == 5
    assert all(len(batch.views) == 1 and batch.views[0].shape == (20, 3, 8, 8) for batch in batches)
    index = torch.cat([batch.index for batch in batches])
    assert sorted(index.tolist()) == list(range(100))
    assert torch.equal(torch.cat([batch.label for batch in batches]), torch.as_tensor(source.labels)[index])


def test_two_views_are_refused() -> None:
    with pytest.raises(ValidationError, match="views must be one view, got 2"):
        SupervisedConfig(views=(ViewSpec(), ViewSpec()))
