"""Images in plain tar files: which folder is what, and what is refused."""

import importlib.util
import io
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastrdm.config import run_config
from fastrdm.loaders.packing.pack import main
from fastrdm.loaders.sources.decode import CorruptImage
from fastrdm.loaders.sources.open import open_source
from fastrdm.loaders.sources.packed import PackedSource
from fastrdm.loaders.sources.source import Source
from fastrdm.loaders.spec import LoaderConfig
from fastrdm.trainer import Trainer

spec = importlib.util.spec_from_file_location("forms", Path(__file__).parents[2] / "programs" / "forms.py")
assert spec and spec.loader
forms = importlib.util.module_from_spec(spec)
sys.modules["forms"] = forms
spec.loader.exec_module(forms)

DATA = forms.photographs(6, 3)


def put(root: Path, **files: list[str]) -> Path:
    """Tar files `name`.tar of members, whose bytes are those of the photographs in turn."""
    for name, members in files.items():
        forms.put(root / f"{name}.tar", forms.tar_of([(m, DATA[k % 6]) for k, m in enumerate(members)]))
    return root


def opened(root: Path, split: Any = "train", labels: str = "auto") -> Source:
    return open_source(LoaderConfig(source="tar", root=str(root), labels=labels), split)


def found(source: Source) -> dict[str, str | None]:
    """Class of each image by its key."""
    return {source.key(k): source.classes[c] if c >= 0 else None for k, c in enumerate(source.labels.tolist())}


@pytest.mark.parametrize(
    ("members", "train", "test"),
    [
        (["a/1.jpg", "b/x/2.jpg"], {"a/1.jpg": "a", "b/x/2.jpg": "b"}, {}),
        (["set/a/1.jpg", "set/b/2.jpg"], {"a/1.jpg": "a", "b/2.jpg": "b"}, {}),
        (["x/set/a/1.jpg", "x/set/b/2.jpg", "x/notes.txt"], {"a/1.jpg": "a", "b/2.jpg": "b"}, {}),
        (["train/a/1.jpg", "train/b/2.jpg", "val/b/3.jpg"], {"a/1.jpg": "a", "b/2.jpg": "b"}, {"b/3.jpg": "b"}),
        (["s/training/1.jpg", "s/test/2.jpg"], {"1.jpg": None}, {"2.jpg": None}),
        (["train/1.jpg", "car/2.jpg"], {"train/1.jpg": "train", "car/2.jpg": "car"}, {}),
        (["1.jpg", "2.jpg"], {"1.jpg": None, "2.jpg": None}, {}),
        (["photos/1.jpg", "photos/2.jpg"], {"photos/1.jpg": None, "photos/2.jpg": None}, {}),
        (["1.jpg", "a/2.jpg", "b/2.jpg"], {"1.jpg": None, "a/2.jpg": None, "b/2.jpg": None}, {}),
    ],
)
def test_folders_within_one_file(tmp_path: Path, members: list[str], train: Any, test: Any) -> None:
    root = put(tmp_path, set=members)
    for place in (root, root / "set.tar"):
        assert found(opened(place)) == train
        assert found(opened(place, "test")) == test
    source = opened(root)
    assert all(
        source.fetch(k)[0] == DATA[next(i for i, m in enumerate(members) if m.endswith(source.key(k)))]
        for k in range(len(source))
    )


def test_names_of_files_tell_splits_and_no_classes(tmp_path: Path) -> None:
    root = put(tmp_path, train_0=["1.jpg", "2.jpg"], train_1=["1.jpg"], val=["val/3.jpg"])
    train, test = opened(root), opened(root, "test")
    assert list(found(train).items()) == [
        ("train_0.tar/1.jpg", None),
        ("train_1.tar/1.jpg", None),
        *[("train_0.tar/2.jpg", None)],
    ]
    assert list(found(test).values()) == [None], "a flat validation file has no class that is called val"
    assert train.shards is not None and sorted(train.shards.tolist()) == [0, 0, 1]
    part = train.take(np.array([2, 1]))
    assert [part.key(k) for k in range(2)] == ["train_0.tar/2.jpg", "train_1.tar/1.jpg"]
    assert part.fetch(1)[0] == DATA[0] and "train_1.tar, 1.jpg" in part.fetch(1)[1]


def test_labels_are_asked_for_told_by_a_file_or_left_out(tmp_path: Path) -> None:
    root = put(tmp_path, set=["1.jpg", "a/2.jpg", "b/3.jpg"])
    by_folder = opened(root, labels="folders")
    assert found(by_folder) == {"a/2.jpg": "a", "b/3.jpg": "b"}
    assert "1 images outside the class folders (1.jpg)" in str(by_folder.note)
    assert set(opened(root, labels="none").labels) == {-1}
    (tmp_path / "told.csv").write_text("file,label\n1.jpg,owl\n3.jpg,wren\nother.jpg,owl\n")
    told = opened(root, labels=str(tmp_path / "told.csv"))
    assert found(told) == {"1.jpg": "owl", "a/2.jpg": None, "b/3.jpg": "wren"}
    assert "names 1 images that are not in" in str(told.note) and "for 2 of the 3 images" in str(told.note)
    with pytest.raises(ValueError, match=r"must hold one folder of images a class, got none in .*flat\.tar"):
        opened(put(tmp_path / "flat", flat=["1.jpg"]), labels="folders")


def test_what_is_passed_over_is_told(tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name in ("a/1.jpg", "b/1.jpg", "a/._1.jpg", "__MACOSX/a/1.jpg", ".cache/1.jpg", "a/notes.txt"):
            member = tarfile.TarInfo(name)
            member.size = len(DATA[0])
            archive.addfile(member, io.BytesIO(DATA[0]))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            link = tarfile.TarInfo(f"a/link{int(kind)}.jpg")
            link.type, link.linkname = kind, "a/1.jpg"
            archive.addfile(link)
    (tmp_path / "x.tar").write_bytes(out.getvalue())
    source = opened(tmp_path)
    assert found(source) == {"a/1.jpg": "a", "b/1.jpg": "b"}
    assert "passed over: 6 members that are links or no images" in str(source.note)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"set": ["a/1.jpg", "a/1.jpg"]}, r"set\.tar holds a/1\.jpg twice"),
        ({"set": ["notes.txt"]}, r"loader\.root must hold images, got none in .*set\.tar"),
        ({"set": ["val/a/1.jpg", "test/a/1.jpg"]}, r"must hold images of a folder train, got those of val, test in"),
        ({}, r"loader\.root must hold \.tar files for loader\.source=tar, got none in"),
    ],
)
def test_what_is_refused(tmp_path: Path, files: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        opened(put(tmp_path, **files))


def test_a_file_that_changes_is_named(tmp_path: Path) -> None:
    source = opened(put(tmp_path, set=["a/1.jpg", "b/2.jpg"]))
    put(tmp_path, set=["a/1.jpg", "b/2.jpg", "c/3.jpg"])
    with pytest.raises(CorruptImage, match=r"set\.tar, a/1\.jpg: the file has changed since it was indexed"):
        source.fetch(0)
    assert opened(tmp_path).classes == ["a", "b", "c"]


@pytest.mark.parametrize("name", ["folder", "tar"])
def test_flat_photographs_train_and_are_packed(tmp_path: Path, name: str) -> None:
    root = tmp_path / "photos"
    files = {f"trip/{k}.jpg": data for k, data in enumerate(forms.photographs(8, 4))}
    for file, data in files.items():
        forms.put(root / file, data)
    if name == "tar":
        root = tmp_path / "photos.tar"
        root.write_bytes(forms.tar_of(list(files.items())))
    arguments = [f"loader.source={name}", f"loader.root={root}", f"run={tmp_path / 'run'}", "log.report=false"]
    arguments += ["encoder.width=4", "loader.batch_size=4", "loader.views.*.size=16", "train.length=2st"]
    arguments += ["optim.warmup=1st", "method.projector.out=8"]
    trainer = Trainer(run_config.load(arguments))
    assert trainer.train() and "loss" in trainer.metrics and "knn" not in trainer.metrics
    assert main([str(root), str(tmp_path / "out"), "--source", name, "--workers", "1"]) == 0
    packed = PackedSource(tmp_path / "out")
    assert sorted(packed.fetch(k)[0] for k in range(8)) == sorted(files.values())
    assert packed.classes == [] and set(packed.labels) == {-1}


def test_an_index_made_for_another_source_is_not_taken(tmp_path: Path) -> None:
    root = put(tmp_path, set=["a/1.jpg", "b/2.jpg"])
    config = LoaderConfig(source="webdataset", root=str(root))
    unlabeled = open_source(config, "train")
    assert set(unlabeled.labels) == {-1} and "loader.source=tar takes folders as classes" in str(unlabeled.note)
    assert set(open_source(replace(config, source="tar"), "train").labels) == {0, 1}
