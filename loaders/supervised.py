"""Augmented images with labels: one random resized crop and flip of each, and shares of a labeled set."""

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic.dataclasses import dataclass

from fastrdm.loaders.build import build_loader
from fastrdm.loaders.sources.source import Source
from fastrdm.loaders.spec import Loader, LoaderConfig, ViewSpec
from fastrdm.schema import STRICT, Pair, require


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SupervisedConfig(LoaderConfig):
    """A loader of one view: the label takes the place of the second."""

    views: tuple[ViewSpec, ...] = (ViewSpec(),)
    """The one view of each image."""

    def __post_init__(self) -> None:
        require(len(self.views) == 1, "views", "one view", len(self.views))


def crop_and_flip(view: ViewSpec, scale: Pair, flip: float) -> ViewSpec:
    """`view` with nothing random but a resized crop of `scale` of the area and a flip of that probability."""
    return replace(view.plain(), scale=scale, ratio=(3 / 4, 4 / 3), flip=flip)


def supervised_loader(
    source: Source, view: ViewSpec, batch_size: int, *, seed: int, workers: int, device: torch.device
) -> Loader:
    """Epochs of `batch_size` images of one view, in float32 on `device`; what is left of an epoch is dropped."""
    config = SupervisedConfig(views=(view,), batch_size=batch_size, workers=workers)
    return build_loader(config, source, seed=seed, device=device)


def labeled_share(labels: NDArray[np.int64], share: float, seed: int) -> NDArray[np.int64]:
    """Numbers of about `share` of the images, in their order, the same number of each class; all of them for 1.

    At least one image of each class, and no more than it has. The same seed gives the same images on every machine,
    and a smaller share lies within a larger one.
    """
    if share == 1:
        return np.arange(len(labels))
    # The raw Philox stream is fixed by its definition, as in loaders.order
    drawn = np.random.Philox(key=np.array([seed % 2**64, 2**63], np.uint64)).random_raw(len(labels))
    classes = np.unique(labels)
    each = max(1, round(share * len(labels) / len(classes)))
    chosen = []
    for label in classes:
        members = np.flatnonzero(labels == label)
        chosen.append(members[np.argsort(drawn[members], kind="stable")][:each])
    return np.sort(np.concatenate(chosen))
