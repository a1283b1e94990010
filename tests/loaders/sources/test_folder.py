"""Folders of any shape: what is taken, what is passed over and told, where labels come from."""

import io
import os
import sys
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastrdm.loaders.sources import listing
from fastrdm.loaders.sources.archives import Split
from fastrdm.loaders.sources.decode import CorruptImage
from fastrdm.loaders.sources.folder import FolderSource, split_folders
from fastrdm.loaders.sources.open import open_source
from fastrdm.loaders.sources.source import Source
from fastrdm.loaders.spec import LoaderConfig


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(file, "JPEG")
    return file.getvalue()


def put(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(jpeg())
    return root


def opened(root: Path, split: Split = "train", labels: str = "auto") -> Source:
    return open_source(LoaderConfig(source="folder", root=str(root), labels=labels), split)


def test_images_at_any_depth_belong_to_the_class_above_them(tmp_path: Path) -> None:
    source = FolderSource(put(tmp_path, "a/1.jpg", "a/sub/deep/2.jpg", "a/sub-b/3.jpg", "b/1.jpg"))
    assert source.classes == ["a", "b"] and source.labels.tolist() == [0, 0, 0, 1]
    assert source.files == ["a/1.jpg", "a/sub-b/3.jpg", "a/sub/deep/2.jpg", "b/1.jpg"]
    assert source.key(2) == "a/sub/deep/2.jpg" and source.read(2).shape == (9, 9, 3)


def test_classes_are_in_order_of_their_names_not_of_their_paths(tmp_path: Path) -> None:
    source = FolderSource(put(tmp_path, "a-b/1.jpg", "a/z.jpg"))
    assert source.classes == ["a", "a-b"] and source.files == ["a/z.jpg", "a-b/1.jpg"]


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["2.jpg", "1.jpg"], ["1.jpg", "2.jpg"]),  # flat
        (["2.jpg", "x/1.jpg", "y/1.jpg"], ["2.jpg", "x/1.jpg", "y/1.jpg"]),  # images beside folders
        (["only/1.jpg", "only/deep/2.jpg"], ["only/1.jpg", "only/deep/2.jpg"]),  # one class is none
    ],
)
def test_without_class_folders_nothing_is_labeled(tmp_path: Path, files: list[str], found: list[str]) -> None:
    source = FolderSource(put(tmp_path, *files))
    assert source.files == found and source.classes == [] and set(source.labels) == {-1}
    assert source.note == f"the images of {tmp_path} are used without labels"


def test_labels_can_be_asked_for_and_refused(tmp_path: Path) -> None:
    put(tmp_path, "loose.jpg", "a/1.jpg", "b/1.jpg")
    named = FolderSource(tmp_path, "folders")
    assert named.classes == ["a", "b"] and "1 images outside the class folders (loose.jpg)" in str(named.note)
    assert set(FolderSource(put(tmp_path / "two", "a/1.jpg", "b/1.jpg"), "none").labels) == {-1}
    with pytest.raises(ValueError, match="must hold one folder of images a class, got none in"):
        FolderSource(put(tmp_path / "flat", "1.jpg"), "folders")


def test_all_that_pillow_reads_well_is_taken_and_the_rest_is_counted(tmp_path: Path) -> None:
    taken = ["1.jpg", "2.pgm", "4.jfif", "5.jpe", "7.JP2", "8.JPG", "9.jpg.jpg"]
    taken += ["3.avif"] if ".avif" in listing.EXTENSIONS else []
    put(tmp_path, *(f"a/{name}" for name in (*taken, "6", "1.xmp", ".hidden.jpg", "._1.jpg")), "b/1.jpg")
    put(tmp_path, "@eaDir/1.jpg/THUMB.jpg", ".thumbs/1.jpg", "__MACOSX/a/1.jpg")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "about.txt").write_text("no image")
    source = FolderSource(tmp_path)
    assert source.classes == ["a", "b"]
    assert sorted(source.files) == sorted([*(f"a/{name}" for name in taken), "b/1.jpg"])
    note = str(source.note)
    assert "3 files of other kinds (" in note
    assert "2 hidden files (a/" in note and "1 hidden folders (.thumbs)" in note
    assert "2 system folders (" in note and "@eaDir" in note and "1 folders without an image (notes)" in note


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    put(tmp_path / "real", "1.jpg")
    put(tmp_path / "set", "a/1.jpg")
    (tmp_path / "set" / "b").symlink_to(tmp_path / "real")
    (tmp_path / "set" / "a" / "up").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "a" / "gone.jpg").symlink_to("/nowhere")
    (tmp_path / "linked").symlink_to(tmp_path / "set")
    source = FolderSource(tmp_path / "linked")
    assert source.files == ["a/1.jpg", "a/gone.jpg", "b/1.jpg"]
    assert "1 links to a folder that they lie in (a/up)" in str(source.note)
    with pytest.raises(CorruptImage, match=r"a/gone\.jpg: No such file"):
        source.read(1)
    assert source.sizes().tolist() == [len(jpeg()), 0, len(jpeg())]


def test_splits_number_their_classes_alike(tmp_path: Path) -> None:
    put(tmp_path, "train/a/1.jpg", "train/c/1.jpg", "validation/b/1.jpg", "validation/c/1.jpg")
    train, test = opened(tmp_path), opened(tmp_path, "test")
    assert train.classes == test.classes == ["a", "b", "c"]
    assert train.labels.tolist() == [0, 2] and test.labels.tolist() == [1, 2]
    assert "1 of 3 classes have no image in" in str(train.note) and "such as b" in str(train.note)
    assert "such as a" in str(test.note)


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (["train/a/1.jpg", "val/a/1.jpg"], {"train": "train", "val": "val"}),
        (["train/a/1.jpg", "val/a/1.jpg", "test/1.jpg"], {"train": "train", "val": "val", "test": "test"}),
        (["training/a/1.jpg", "valid/a/1.jpg"], {"train": "training", "val": "valid"}),
        (["train/1.jpg", "val/1.jpg"], {"train": "train", "val": "val"}),  # flat, unlabeled
        (["train/a/1.jpg", "extra/1.jpg"], {"train": "train"}),
        (["car/1.jpg", "plane/1.jpg", "train/1.jpg"], {}),  # vehicles
        (["a/1.jpg", "b/1.jpg"], {}),
    ],
)
def test_what_is_a_split(tmp_path: Path, files: list[str], splits: dict[str, str]) -> None:
    assert split_folders(put(tmp_path, *files)) == {name: tmp_path / folder for name, folder in splits.items()}


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    assert opened(put(tmp_path, "car/1.jpg", "plane/1.jpg", "train/1.jpg")).classes == ["car", "plane", "train"]


def test_archives_beside_images_are_no_folder_of_images(tmp_path: Path) -> None:
    put(tmp_path, "ILSVRC2012_img_val/1.jpg", "ILSVRC2012_img_val/2.jpg")
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(b"")
    said = r"got archives beside images in .*ILSVRC2012_img_train\.tar\): give loader\.source=imagenet for its own"
    with pytest.raises(ValueError, match=said):
        FolderSource(tmp_path)
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "train.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"got none in .*parquet for \.parquet"):
        FolderSource(tmp_path / "only")


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "a/1.jpg", "b/1.jpg")
    scan = os.scandir

    def refusing(path: Any) -> Any:
        if str(path).rstrip("/").endswith("b"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(listing.os, "scandir", refusing)
    with pytest.raises(ValueError, match=r"b/? cannot be listed: Permission denied"):
        FolderSource(tmp_path)


def test_pipes_and_giants_called_jpg_are_refused_at_once(tmp_path: Path) -> None:
    put(tmp_path, "1.jpg")
    os.mkfifo(tmp_path / "2.jpg")
    with (tmp_path / "3.jpg").open("wb") as file:
        file.truncate(8 << 30)
    source = FolderSource(tmp_path)
    said: list[str] = []

    def read() -> None:
        with pytest.raises(CorruptImage) as refused:
            source.read(1)
        said.append(str(refused.value))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(10)
    assert said, "it waits for somebody to write into the pipe"
    assert said[0].endswith("2.jpg: not a regular file")
    with pytest.raises(CorruptImage, match=r"3\.jpg: 8,589,934,592 bytes are too many for an image"):
        source.read(2)


def test_a_part_holds_no_more_than_it_needs(tmp_path: Path) -> None:
    source = FolderSource(put(tmp_path, "a/1.jpg", "a/2.jpg", "b/1.jpg"))
    part = source.take(np.array([2, 0]))
    assert part.files == ["b/1.jpg", "a/1.jpg"] and part.labels.tolist() == [1, 0] and part.classes == ["a", "b"]
    assert source.files == ["a/1.jpg", "a/2.jpg", "b/1.jpg"]


def test_listing_costs_below_300_bytes_an_image(tmp_path: Path) -> None:
    count = 3000
    for k in range(count):
        (tmp_path / f"n{k % 3:08}").mkdir(exist_ok=True)
        (tmp_path / f"n{k % 3:08}" / f"n{k % 3:08}_{k:05}.JPEG").touch()
    tracemalloc.start()
    source = FolderSource(tmp_path)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(source) == count and held / count < 300, sys.getsizeof(source.files[0])
