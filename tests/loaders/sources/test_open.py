"""Opening sets by name, and one clear line for each thing that can be wrong."""

import errno
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastrdm.loaders.evaluation import evaluation_batches
from fastrdm.loaders.sources.archives import Split
from fastrdm.loaders.sources.decode import CorruptImage, new_pixels
from fastrdm.loaders.sources.open import open_source
from fastrdm.loaders.sources.reader import Reader
from fastrdm.loaders.sources.source import ReadTime, Source
from fastrdm.loaders.spec import LoaderConfig, ViewSpec

Array = np.ndarray[Any, np.dtype[Any]]


def opened(source: str, split: Split = "train", **settings: Any) -> Source:
    return open_source(LoaderConfig(source=source, **settings), split)


def picture(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (value, 2, 3)).save(path)


def test_digits() -> None:
    sklearn = pytest.importorskip("sklearn.datasets").load_digits()
    train, test = opened("digits"), opened("digits", "test")
    assert (len(train), len(test)) == (1437, 360) and train.name == "digits"
    assert train.images is not None and train.images.shape == (1437, 8, 8, 3) and train.images.dtype == np.uint8
    np.testing.assert_array_equal(train.images[0, :, :, 1], np.round(sklearn.images[0] * 255 / 16))
    np.testing.assert_array_equal(np.concatenate([train.labels, test.labels]), sklearn.target)
    np.testing.assert_array_equal(test.read(3), opened("digits", "test").read(3))
    assert train.mean is not None and train.std is not None
    unit = train.images / 255.0
    np.testing.assert_allclose([unit.mean(), unit.std()], [train.mean[0], train.std[0]], atol=1e-3)


def test_subset_is_balanced_and_of_the_training_split() -> None:
    whole, subset = opened("digits"), opened("digits", subset=200)
    assert len(subset) == 200 and np.bincount(subset.labels).tolist() == [20] * 10
    firsts = np.sort(np.concatenate([np.flatnonzero(whole.labels == label)[:20] for label in range(10)]))
    assert whole.images is not None and subset.images is not None
    np.testing.assert_array_equal(subset.images, whole.images[firsts])
    np.testing.assert_array_equal(subset.read(7), subset.images[7])
    assert len(opened("digits", "test", subset=200)) == 360


def test_subset_is_as_balanced_as_it_can_be() -> None:
    assert np.bincount(opened("digits", subset=205).labels).tolist() in ([20] * 5 + [21] * 5, [21] * 5 + [20] * 5) or (
        sorted(np.bincount(opened("digits", subset=205).labels)) == [20] * 5 + [21] * 5
    )
    with pytest.raises(ValueError, match=r"loader\.subset must be at most the 1,437 images of digits, got 5000"):
        opened("digits", subset=5000)


def test_a_long_tail_gives_what_it_has(tmp_path: Path) -> None:
    for name, count in (("a", 9), ("b", 1), ("c", 4)):
        for k in range(count):
            picture(tmp_path / name / f"{k}.png")
    assert np.bincount(opened("folder", root=str(tmp_path), subset=9).labels).tolist() == [4, 1, 4]
    assert np.bincount(opened("folder", root=str(tmp_path), subset=12).labels).tolist() == [7, 1, 4]


def test_folder(tmp_path: Path) -> None:
    for k, name in enumerate(["b/2.PNG", "b/10.jpg", "a/1.jpeg", "c/x.webp", "c/.hidden/y.png"]):
        picture(tmp_path / "train" / name, k)
    (tmp_path / "train" / "a" / "notes.txt").write_text("no image")
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "train" / "a" / "._1.jpeg").write_bytes(b"what macOS leaves beside a file")
    picture(tmp_path / "val" / "a" / "v.png", 9)
    train = opened("folder", root=str(tmp_path))
    assert train.classes == ["a", "b", "c"] and train.labels.tolist() == [0, 1, 1, 2] and train.labels.dtype == np.int64
    assert train.images is None and len(train) == 4
    assert train.read(2).shape == (4, 6, 3) and train.read(2)[0, 0].tolist() == [0, 2, 3]  # b/2.PNG, behind b/10.jpg
    test = opened("folder", "test", root=str(tmp_path))
    assert len(test) == 1 and test.read(0)[0, 0, 0] == 9
    subset = opened("folder", root=str(tmp_path), subset=3)
    assert subset.images is None and subset.labels.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(subset.read(1), train.read(1))


def test_folder_without_splits_is_for_training(tmp_path: Path) -> None:
    picture(tmp_path / "a" / "1.png")
    picture(tmp_path / "b" / "1.png")
    assert opened("folder", root=str(tmp_path)).classes == ["a", "b"]
    assert len(opened("folder", "test", root=str(tmp_path))) == 0
    picture(tmp_path / "test" / "a" / "1.png")
    with pytest.raises(ValueError, match=r"loader\.root must hold a folder train, got .*, which has test"):
        opened("folder", root=str(tmp_path))


def test_empty_class_folder_is_named(tmp_path: Path) -> None:
    picture(tmp_path / "a" / "1.png")
    (tmp_path / "dogs").mkdir()
    with pytest.raises(ValueError, match=r"class folder .*dogs holds no image \(.*\.bmp, \.gif, .*labels=none if"):
        opened("folder", root=str(tmp_path))
    assert len(opened("folder", root=str(tmp_path), labels="none")) == 1


@pytest.mark.parametrize(("source", "wanted"), [("folder", "a folder of images"), ("cifar10", "the folder of cifar10")])
def test_missing_root(source: str, wanted: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"loader\.root must be {wanted}, got '.*nowhere', which is no"):
        opened(source, root=str(tmp_path / "nowhere"), download=source == "folder")


def test_missing_fashion_mnist_says_where_it_comes_from(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"loader\.root must hold train-images.*apt install dataset-fashion-mnist"):
        opened("fashion_mnist", root=str(tmp_path / "nowhere"))


def test_root_must_be_told() -> None:
    with pytest.raises(ValueError, match=r"loader\.root must be the folder of cifar10, got None"):
        opened("cifar10")


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    picture(tmp_path / "a" / "1.png")
    (tmp_path / "a" / "2.jpg").write_bytes(b"")
    source = opened("folder", root=str(tmp_path))
    with pytest.raises(CorruptImage, match=r"a/2\.jpg: the file is empty"):
        source.read(1)
    (tmp_path / "a" / "1.png").unlink()
    with pytest.raises(CorruptImage, match=r"a/1\.png: No such file"):
        source.read(0)


def test_wrong_name_offers_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"loader\.source is unknown: 'cifar_10'; did you mean 'cifar10'\?"):
        opened("cifar_10")
    with pytest.raises(ValueError, match=r"'zebra'; known: digits, fashion_mnist, .*, or pkg\.mod:Class"):
        opened("zebra")


OWN = """
import numpy as np
from fastrdm.loaders.sources.reader import Reader
from fastrdm.loaders.sources.source import ReadTime, Source

class Good(Source):
    name, classes = "good", ["only"]

    def __init__(self, root, split):
        self.labels = np.full(3, -1)
        self.told = (root, split)

    def __len__(self):
        return 3

    def read(self, index):
        return np.full((4, 4, 3), index, np.uint8)

class Short(Good):
    def __len__(self):
        return 4

class Bare(Source):
    def __init__(self, root, split):
        self.name = "bare"

class Alone:
    def __init__(self, root, split):
        self.name = "alone"
"""


def test_class_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_set.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    source: Any = opened("own_set:Good", "test", root="somewhere")
    assert source.told == ("somewhere", "test") and source.read(2)[0, 0, 0] == 2
    assert opened("own_set:Good", subset=2).labels.tolist() == [-1, -1]
    with pytest.raises(ValueError, match="'own_set:Bare' lacks classes, labels, fetch or read"):
        opened("own_set:Bare")
    with pytest.raises(ValueError, match=r"'own_set:Alone' must be a subclass of fastrdm\.Source"):
        opened("own_set:Alone")
    with pytest.raises(ValueError, match="'own_set:Short' has 4 images and 3 labels"):
        opened("own_set:Short")
    with pytest.raises(ValueError, match=r"'own_set:Missing' cannot be loaded: .*Missing"):
        opened("own_set:Missing")
    with pytest.raises(ValueError, match="'no_such_set:X' cannot be loaded: No module"):
        opened("no_such_set:X")


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_too_many_open_files_are_no_damage_to_an_image(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for k in range(4):
        picture(tmp_path / "a" / f"{k}.png")
    source = opened("folder", root=str(tmp_path))

    def full(path: str) -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fastrdm.loaders.sources.folder.read_file", full)
    faults: dict[int, str] = {}
    with pytest.raises(OSError, match=re.escape(os.strerror(number))):
        Reader(source, faults, 0.5).read(1, new_pixels, ReadTime())
    with pytest.raises(OSError, match=re.escape(os.strerror(number))):
        list(evaluation_batches(source, ViewSpec(size=4), 2, faults=faults))
    assert not faults
