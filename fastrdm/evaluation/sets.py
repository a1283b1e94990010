"""The three sets of a run: what it trains on, where k-NN looks for neighbors, and what is classified."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from fastrdm.evaluation.knn import EvaluateConfig
from fastrdm.loaders.sources.checks import no_accuracy
from fastrdm.loaders.sources.open import balanced, open_whole
from fastrdm.loaders.sources.source import Source, Subset
from fastrdm.loaders.spec import LoaderConfig
from fastrdm.loaders.supervised import labeled_share
from fastrdm.schema import require

HOLDOUT = 0.2  # of an evaluation set of its own that has no split to evaluate on
DRAW = 0  # seed of the images that are set aside: the same ones in every run


class Sets(NamedTuple):
    """Images of a run."""

    train: Source
    bank: Source  # labeled images among which k-NN looks for neighbors
    test: Source  # images to classify, none of them in `train` or `bank`; empty where there are none
    notes: list[str]  # what a user should know of them, a line each

    @property
    def probed(self) -> bool:
        """Whether a classifier of the training images can be judged on the test images."""
        return no_accuracy(self.bank, self.test) is None and no_accuracy(self.train, self.test) is None


def open_sets(loader: LoaderConfig, evaluate: EvaluateConfig) -> Sets:
    """Open what a run trains on and what it is judged on; ValueError names what is amiss."""
    train = open_whole(loader, "train")
    own = evaluate.source is not None or evaluate.root is not None
    if own:
        other = replace(
            loader,
            source=evaluate.source or loader.source,
            root=evaluate.root if evaluate.source else evaluate.root or loader.root,
            labels=evaluate.labels,
        )
        bank, test = open_whole(other, "train"), open_whole(other, "test")
    else:
        bank, test = train, open_whole(loader, "test")
    holdout = evaluate.holdout or (HOLDOUT if own and not len(test) else None)
    notes = [train.note, bank.note if own else None, test.note]
    if holdout is not None:
        unused = not len(test)
        require(unused, "evaluate.holdout", f"left out: {bank.name} has images to evaluate on", evaluate.holdout)
        bank, test = set_aside(bank, holdout)
        notes.append(f"{len(test):,} of the images of {bank.name} are set aside for evaluation")
        train = train if own else bank
    elif not len(test):
        notes.append(
            "there are no images to evaluate on: evaluate.holdout=0.1 sets some aside, evaluate.root names others"
        )
    if loader.subset is not None:
        train = balanced(train, loader.subset, "loader.subset")
        bank = bank if own else train
    return Sets(train, bank, test, list(dict.fromkeys(filter(None, notes))))


def set_aside(source: Source, holdout: float) -> tuple[Source, Source]:
    """The images that stay, and a share (below 1) or number of them that does not, the same share of each class."""
    share = holdout if holdout < 1 else holdout / len(source)
    require(share < 1, "evaluate.holdout", f"below the {len(source):,} images of {source.name}", holdout)
    held = np.zeros(len(source), bool)
    held[labeled_share(source.labels, share, DRAW)] = True
    require(not held.all(), "evaluate.holdout", "small enough to leave images of each class", holdout)
    return Subset(source, np.flatnonzero(~held)), Subset(source, np.flatnonzero(held))
