"""Whether a source says what its labels and pixels mean, and whether an accuracy on two of them means anything."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from fastrdm.loaders.sources.source import Source

SHOWN = 3  # classes named in a message


def check_labels(labels: NDArray[Any], classes: Sequence[str], where: str) -> None:
    """ValueError names the first label that is no number of a class, nor -1 for unknown."""
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ValueError(f"labels of {where} must be integers (N,), got {labels.dtype} {labels.shape}")
    wrong = np.flatnonzero((labels < -1) | (labels >= len(classes)))
    if len(wrong):
        raise ValueError(
            f"labels of {where} must be -1 (unknown) or the number of one of {len(classes)} classes, from 0 on: "
            f"image {wrong[0]} has {labels[wrong[0]]}, and so have {len(wrong) - 1} others"
        )


def check_pixels(pixels: Any, shape: tuple[int | None, ...], where: str) -> None:
    """ValueError where `pixels` is no array of uint8 of this shape, None standing for any length."""
    expected = ", ".join("any" if side is None else str(side) for side in shape)
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8:
        got = pixels.dtype if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise ValueError(f"{where} must be numpy arrays of uint8, 0 to 255, got {got}")
    fits = pixels.ndim == len(shape) and all(s in (None, side) for s, side in zip(shape, pixels.shape, strict=True))
    if not fits or not pixels.size:
        raise ValueError(f"{where} must have the shape ({expected}), got {pixels.shape}")


def no_accuracy(train: "Source", test: "Source") -> str | None:
    """Why an accuracy on `test`, learned on `train`, would mean nothing; None where it means something."""
    for source, split in ((train, "training"), (test, "test")):
        if not (source.labels >= 0).any():
            return f"the {split} images of {source.name} have no labels"
    if train.classes != test.classes:
        return (
            f"the two splits of {train.name} do not have the same classes: {_difference(train.classes, test.classes)}"
        )
    known, asked = (np.unique(source.labels[source.labels >= 0]) for source in (train, test))
    if np.isin(asked, known).any() and len(known) > 1 and not np.isin(asked, known).all():
        # the splits number their classes together, and some of the test images are of a class that is never seen
        names = [[source.classes[k] for k in labels] for source, labels in ((train, known), (test, asked))]
        return f"the two splits of {train.name} do not have the same classes: {_difference(*names)}"
    if len(known) == 1:
        return f"all labeled training images of {train.name} are of one class, {train.classes[known[0]]}"
    if not np.isin(test.labels, known).any():
        return f"no test image of {train.name} is of a class of the training images"
    return None


def _difference(train: Sequence[str], test: Sequence[str]) -> str:
    parts = [
        f"{len(only)} only in {split} ({', '.join(only[:SHOWN])}{', ...' if len(only) > SHOWN else ''})"
        for split, only in (("training", _without(train, test)), ("test", _without(test, train)))
        if only
    ]
    return ", ".join(parts) or "the same names in another order"


def _without(names: Sequence[str], others: Sequence[str]) -> list[str]:
    known = set(others)
    return [name for name in names if name not in known]
