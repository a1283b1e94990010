"""Labels, pixels and pairs of splits that would give a figure without meaning are named before they do."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fastrdm.loaders.evaluation import evaluation_batches
from fastrdm.loaders.sources.checks import check_labels, no_accuracy
from fastrdm.loaders.sources.decode import new_pixels
from fastrdm.loaders.sources.open import open_source
from fastrdm.loaders.sources.source import ReadTime
from fastrdm.loaders.spec import LoaderConfig, ViewSpec


def split(labels: list[int], classes: str = "abc") -> Any:
    return SimpleNamespace(name="set", labels=np.array(labels), classes=list(classes))


SENSIBLE = [
    (split([0, 1, 2]), split([0, 1, 2])),
    (split([0, 1, -1]), split([-1, 1, 0])),
    (split([0, 1, 2]), split([2, 2])),
]
SENSELESS = [
    (split([-1, -1]), split([0, 1]), "the training images of set have no labels"),
    (split([0, 1]), split([-1]), "the test images of set have no labels"),
    (split([0, 1], "ab"), split([0, 1], "ac"), r"1 only in training \(b\), 1 only in test \(c\)"),
    (split([0, 1], "ab"), split([0, 5], "abcdef"), r"classes: 4 only in test \(c, d, e, \.\.\.\)"),
    (split([0, 1], "ab"), split([0, 1], "ba"), "the same names in another order"),
    (split([1, 1, -1]), split([0, 1]), "all labeled training images of set are of one class, b"),
    (split([0, 1, -1]), split([-1, 1, 2]), r"1 only in training \(a\), 1 only in test \(c\)"),
    (split([0, 1]), split([0, 2, 1]), r"1 only in test \(c\)"),
    (split([0, 1]), split([2, 2, -1]), "no test image of set is of a class of the training images"),
]


@pytest.mark.parametrize("pair", SENSIBLE)
def test_an_accuracy_that_means_something(pair: tuple[Any, Any]) -> None:
    assert no_accuracy(*pair) is None


@pytest.mark.parametrize(("train", "test", "reason"), SENSELESS)
def test_an_accuracy_that_means_nothing(train: Any, test: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        raise ValueError(no_accuracy(train, test))


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (np.array([0, 3, 9]), "image 1 has 3, and so have 1 others"),
        (np.array([0, -2]), "image 1 has -2, and so have 0 others"),
        (np.array([0.0, 1.0]), "integers .N,., got float64"),
        (np.array([[0, 1]]), r"got int64 \(1, 2\)"),
    ],
)
def test_labels(labels: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_labels(labels, ["a", "b", "c"], "x")


SOURCE = """
import numpy as np
from fastrdm.loaders.sources.source import Source

class Own(Source):
    name, classes, labels = "own", ["a", "b"], np.array([0, 1, 0, 1])
    pixels = np.full((6, 6, 3), 7, np.uint8)
    def __init__(self, root, split):
        pass
    def read(self, index):
        return self.pixels

class Right(Own):
    pass

class Floats(Own):
    pixels = np.full((6, 6, 3), np.nan, np.float32)

class Gray(Own):
    pixels = np.full((6, 6, 1), 7, np.uint8)

class Flat(Own):
    pixels = np.full((6, 6), 7, np.uint8)

class Empty(Own):
    pixels = np.full((0, 6, 3), 7, np.uint8)

class NoArray(Own):
    pixels = [[[1, 2, 3]]]

class Labels(Own):
    labels = np.array([0, 1, 2, 1])

class FloatLabels(Own):
    labels = np.array([0.0, 1, 0, 1])

class ListOfLabels(Own):
    labels = [0, 1, 0, 1]

class Mean(Own):
    mean = (0.1, float("nan"), 0.2)

class Std(Own):
    std = (0.1, 0.0, 0.2)

class FloatImages(Own):
    images = np.zeros((4, 6, 6, 3), np.float32)

class FewImages(Own):
    images = np.zeros((3, 6, 6, 3), np.uint8)
"""
AT_ONCE = {
    "Labels": "one of 2 classes, from 0 on: image 2 has 2",
    "FloatLabels": "integers .N,., got float64",
    "ListOfLabels": "must be a numpy array, got list",
    "Mean": "three finite numbers as mean",
    "Std": "three finite numbers above 0 as std",
    "FloatImages": "uint8, 0 to 255, got float32",
    "FewImages": r"shape \(4, any, any, 3\), got \(3, 6, 6, 3\)",
}
WHEN_READ = {
    "Floats": "image 2, must be numpy arrays of uint8, 0 to 255, got float32",
    "Gray": r"shape \(any, any, 3\), got \(6, 6, 1\)",
    "Flat": r"shape \(any, any, 3\), got \(6, 6\)",
    "Empty": r"got \(0, 6, 3\)",
    "NoArray": "uint8, 0 to 255, got list",
}


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_source_of_checks.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    return "own_source_of_checks"


@pytest.mark.parametrize("name", AT_ONCE)
def test_a_source_of_ones_own_is_checked_when_opened(name: str, module: str) -> None:
    with pytest.raises(ValueError, match=AT_ONCE[name]):
        open_source(LoaderConfig(source=f"{module}:{name}"), "train")


@pytest.mark.parametrize("name", WHEN_READ)
def test_pixels_of_ones_own_source_are_checked_wherever_they_are_read(name: str, module: str) -> None:
    source = open_source(LoaderConfig(source=f"{module}:{name}", subset=4), "train")
    with pytest.raises(ValueError, match=WHEN_READ[name]):
        source.read_into(2, new_pixels, ReadTime())
    with pytest.raises(ValueError, match=WHEN_READ[name].removeprefix("image 2, ")):
        list(evaluation_batches(source, ViewSpec(size=4), 2))


def test_a_right_source_of_ones_own(module: str) -> None:
    source = open_source(LoaderConfig(source=f"{module}:Right"), "train")
    assert (source.read_into(2, new_pixels, ReadTime()) == 7).all()
    assert len(list(evaluation_batches(source, ViewSpec(size=4), 2))) == 2
