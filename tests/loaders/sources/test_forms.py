"""ImageNet's archives, Kaggle's tree, WebDataset and parquet: the same images and labels, trained on and packed."""

import importlib.util
import io
import json
import os
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastrdm.config import run_config
from fastrdm.loaders.build import build_loader
from fastrdm.loaders.packing.pack import main
from fastrdm.loaders.sources import tar, webdataset
from fastrdm.loaders.sources.decode import CorruptImage
from fastrdm.loaders.sources.index_cache import indexed
from fastrdm.loaders.sources.open import open_source
from fastrdm.loaders.sources.packed import PackedSource
from fastrdm.loaders.sources.shard_files import expand_braces, shard_files
from fastrdm.loaders.sources.source import Source
from fastrdm.loaders.spec import LoaderConfig, ViewSpec
from fastrdm.trainer import Trainer

spec = importlib.util.spec_from_file_location("forms", Path(__file__).parents[2] / "programs" / "forms.py")
assert spec and spec.loader
forms = importlib.util.module_from_spec(spec)
sys.modules["forms"] = forms
spec.loader.exec_module(forms)

NAMES = list(forms.FORMS)


def make(name: str, root: Path) -> LoaderConfig:
    if name == "parquet":
        pytest.importorskip("pyarrow", reason="needs pyarrow")
    source, build = forms.FORMS[name]
    build(root)
    return LoaderConfig(source=source, root=str(root))


def content(source: Source) -> list[tuple[bytes, str]]:
    """Bytes and class of each image, in an order of its own."""
    return sorted((source.fetch(k)[0], source.classes[source.labels[k]]) for k in range(len(source)))


@pytest.mark.parametrize("name", NAMES)
def test_every_form_holds_the_same_images_and_classes(tmp_path: Path, name: str) -> None:
    config = make(name, tmp_path)
    for _ in range(2):  # the second time from the kept index
        train, test = open_source(config, "train"), open_source(config, "test")
        assert train.classes == test.classes == list(forms.CLASSES)
        assert content(train) == sorted((data, label) for label, _, data in forms.train_files())
        assert content(test) == sorted((data, label) for label, _, data in forms.val_files())
        assert len({train.key(k) for k in range(len(train))}) == len(train)
        assert train.stored_bytes is None or train.stored_bytes > 0
        assert train.read(3).ndim == 3


@pytest.mark.parametrize("name", NAMES)
def test_every_form_trains(tmp_path: Path, name: str) -> None:
    config = make(name, tmp_path / "data")
    arguments = [f"loader.source={config.source}", f"loader.root={config.root}", f"run={tmp_path / 'run'}"]
    arguments += ["encoder.width=4", "loader.batch_size=6", "loader.views.*.size=16", "train.length=2st"]
    arguments += ["optim.warmup=1st", "method.projector.out=8", "log.report=false"]
    if name in ("webdataset", "parquet"):
        arguments += ["loader.order=windowed", "loader.window=2"]
    trainer = Trainer(run_config.load(arguments))
    assert trainer.train() and {"knn", "probe", "loss"} <= trainer.metrics.keys()


@pytest.mark.parametrize("name", NAMES)
def test_every_form_is_packed(tmp_path: Path, name: str) -> None:
    config = make(name, tmp_path / "data")
    assert (
        main([config.root or "", str(tmp_path / "out"), "--source", config.source, "--workers", "2", "--verify"]) == 0
    )
    for split, files in (("train", forms.train_files()), ("val", forms.val_files())):
        packed = PackedSource(tmp_path / "out" / split)
        assert content(packed) == sorted((data, label) for label, _, data in files)
        assert packed.meta["classes"] == list(forms.CLASSES)


@pytest.mark.parametrize("name", ["webdataset", "parquet", "imagenet unpacked once"])
def test_the_windowed_order_takes_each_image_once(tmp_path: Path, name: str) -> None:
    config = replace(make(name, tmp_path), order="windowed", window=2, batch_size=4, workers=2)
    config = replace(config, views=(ViewSpec(size=8), ViewSpec(size=8)))
    source = open_source(config, "train")
    loader = build_loader(config, source, seed=1)
    seen = [k for batch in loader for k in batch.index.tolist()]
    loader.close()
    assert sorted(seen) == list(range(12)) and seen != list(range(12))
    assert source.shards is not None and len(set(source.shards.tolist())) >= 3
    assert len(set(source.shards[seen[:3]].tolist())) <= 2, "three images are of the first window of two shards"


def test_labels_of_imagenet_can_be_told_or_left_out(tmp_path: Path) -> None:
    config = make("kaggle", tmp_path)
    (tmp_path / "LOC_val_solution.csv").rename(tmp_path / "mine.csv")
    with pytest.raises(ValueError, match=r"lie flat: put the devkit \(ILSVRC2012_devkit_t12\.tar\.gz\) or Kaggle's"):
        open_source(config, "test")
    told = open_source(replace(config, labels=str(tmp_path / "mine.csv")), "test")
    assert content(told) == sorted((data, label) for label, _, data in forms.val_files())
    bare = open_source(replace(config, labels="none"), "test")
    assert set(bare.labels) == {-1} and "6 of the 6 validation images have no label" in str(bare.note)
    some = (tmp_path / "mine.csv").read_text().splitlines()[:4]
    (tmp_path / "LOC_val_solution.csv").write_text("\n".join(some))
    assert "3 of the 6 validation images have no label" in str(open_source(config, "test").note)


def test_imagenet_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"loader\.root must hold ILSVRC2012_img_train\.tar, or train/"):
        open_source(LoaderConfig(source="imagenet", root=str(tmp_path)), "train")
    assert len(open_source(LoaderConfig(source="imagenet", root=str(tmp_path)), "test")) == 0
    with pytest.raises(ValueError, match=r"loader\.root must be the folder of ImageNet's files, got None"):
        open_source(LoaderConfig(source="imagenet"), "train")


def test_a_truncated_tar_is_named(tmp_path: Path) -> None:
    config = make("imagenet archives", tmp_path)
    path = tmp_path / "ILSVRC2012_img_train.tar"
    whole = path.read_bytes()
    for size in (len(whole) - 10240, len(whole) // 2, 700):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"ILSVRC2012_img_train\.tar cannot be read as a tar file: .*cut short"):
            open_source(config, "train")
    import gzip

    path.write_bytes(gzip.compress(whole))
    with pytest.raises(ValueError, match=r"it is compressed, so that no image can be found .*: uncompress it"):
        open_source(config, "train")
    path.write_bytes(b"no tar" * 200)
    with pytest.raises(ValueError, match=r"ILSVRC2012_img_train\.tar cannot be read as a tar file"):
        open_source(config, "train")


def test_a_tar_that_changes_is_indexed_again_and_never_misread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make("webdataset", tmp_path)
    source = open_source(config, "train")
    path = tmp_path / "set-train-0001.tar"
    path.write_bytes(forms.tar_of([("x.jpg", forms.photographs(1, 5)[0]), ("x.cls", b"2")]))
    fresh = open_source(config, "train")
    assert len(fresh) == 8 and fresh.labels.tolist()[5] == 2
    source.read(0)
    with pytest.raises(CorruptImage, match=r"set-train-0001\.tar, image 6: the file has changed since it was indexed"):
        source.read(6)
    monkeypatch.setattr(webdataset, "members", lambda _: pytest.fail("the index was kept"))
    assert content(open_source(config, "train")) == content(fresh)


def test_an_index_is_kept_in_the_cache_where_the_set_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def build() -> Any:
        made.append(1)
        return {"a": np.arange(3)}

    (tmp_path / "x.tar").write_bytes(b"x")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    inside = [indexed(tmp_path / "x.tar", "kind", str(tmp_path / "mine"), build)["a"].tolist() for _ in range(2)]
    assert inside == [[0, 1, 2]] * 2 and len(made) == 1 and len(list((tmp_path / "mine").rglob("*.npz"))) == 1
    real = Path.open
    monkeypatch.setattr(
        Path,
        "open",
        lambda self, mode="r", **k: (
            (_ for _ in ()).throw(PermissionError(13, "no"))
            if "a" in mode and self.parent == tmp_path
            else real(self, mode, **k)
        ),
    )
    indexed(tmp_path / "x.tar", "kind", None, build)
    indexed(tmp_path / "x.tar", "kind", None, build)
    assert len(made) == 2 and len(list((tmp_path / "cache" / "fastrdm").rglob("*.npz"))) == 1
    kept = next((tmp_path / "cache").rglob("*.npz"))
    kept.write_bytes(kept.read_bytes()[:50])
    assert indexed(tmp_path / "x.tar", "kind", None, build)["a"].tolist() == [0, 1, 2] and len(made) == 3


SAMPLES = forms.photographs(2, 3)


@pytest.mark.parametrize(
    ("members", "labels", "classes", "found"),
    [
        ([("a/x.jpg", 0), ("a/x.cls", b"7"), ("b/x.jpg", 1), ("b/x.cls", b"12")], "auto", ["7", "12"], [0, 1]),
        ([("x.JPG", 0), ("x.json", b'{"label": "cat"}'), ("y.png.jpg", 1)], "auto", ["cat"], [0, -1]),
        ([("x.jpg", 0), ("x.txt", b"dog\n"), ("y.jpg", 1), ("y.txt", b"cat")], "txt", ["cat", "dog"], [1, 0]),
        ([("x.jpg", 0), ("x.txt", b"a dog"), ("y.jpg", 1)], "auto", [], [-1, -1]),
        ([("x.jpg", 0), ("x.cls", b"1"), ("y.jpg", 1), ("y.cls", b"0")], "none", [], [-1, -1]),
        ([("x.left.jpg", 0), ("x.right.jpg", 1), ("z.cls", b"0"), ("y.jpg", 1)], "auto", ["0"], [-1, -1]),
    ],
)
def test_keys_and_labels_of_webdataset(
    tmp_path: Path, members: list[tuple[str, Any]], labels: str, classes: list[str], found: list[int]
) -> None:
    files = [(name, SAMPLES[data] if isinstance(data, int) else data) for name, data in members]
    (tmp_path / "a.tar").write_bytes(forms.tar_of(files))
    source = open_source(LoaderConfig(source="webdataset", root=str(tmp_path), labels=labels), "train")
    assert source.labels.tolist() == found
    assert source.classes == ([] if classes == ["0"] else classes)
    assert [source.fetch(k)[0] for k in range(2)] == SAMPLES
    assert source.key(0) == f"a.tar/{members[0][0]}"
    if classes == ["0"]:
        assert "passed over: 2 samples without an image, or further images" in str(source.note)


@pytest.mark.parametrize(
    ("members", "labels", "said"),
    [
        ([("x.jpg", b"1"), ("x.jpg", b"2")], "auto", r"a\.tar holds x\.jpg twice"),
        ([("x.jpg", b"1"), ("y.jpg", b"2"), ("x.jpg", b"1")], "auto", r"a\.tar holds x\.jpg twice"),
        ([("x.jpg", b"1"), ("x.json", b"{")], "auto", r"a\.tar, x\.json: "),
        ([("x.jpg", b"1"), ("x.cls", b"\xff")], "auto", r"a\.tar, x\.cls: .*utf-8"),
        ([("x.cls", b"1")], "auto", r"loader\.root must hold images, got none in .*a\.tar"),
        ([("x.jpg", b"1")], "my/labels.csv", r"loader\.labels must be auto, none or the suffix of a member"),
    ],
)
def test_bad_webdatasets_are_named(tmp_path: Path, members: Any, labels: str, said: str) -> None:
    (tmp_path / "a.tar").write_bytes(forms.tar_of(members))
    with pytest.raises(ValueError, match=said):
        open_source(LoaderConfig(source="webdataset", root=str(tmp_path), labels=labels), "train")


def test_too_few_names_of_classes(tmp_path: Path) -> None:
    config = make("webdataset", tmp_path)
    (tmp_path / "classes.txt").write_text("one\ntwo\n")
    with pytest.raises(ValueError, match=r"classes\.txt has 2 lines, and there is a label 2"):
        open_source(config, "train")


def test_text_with_a_byte_order_mark_and_in_latin_1(tmp_path: Path) -> None:
    config = make("webdataset", tmp_path)
    names = tmp_path / "classes.txt"
    names.write_text("\ufeff" + names.read_text(), encoding="utf-8")
    assert open_source(config, "train").classes == list(forms.CLASSES)
    names.write_bytes("eins\nzwei\nhöhle\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"classes\.txt, line 3: not UTF-8 .*: save the file as UTF-8"):
        open_source(config, "train")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a.tar").write_bytes(forms.tar_of([("x.jpg", SAMPLES[0]), ("x.cls", "\ufeff7".encode())]))
    assert open_source(LoaderConfig(source="webdataset", root=str(tmp_path / "b")), "train").classes == ["7"]


@pytest.mark.parametrize(("source", "suffix"), [("webdataset", "tar"), ("tar", "tar"), ("parquet", "parquet")])
def test_pipes_folders_and_addresses_in_the_place_of_files(tmp_path: Path, source: str, suffix: str) -> None:
    if source == "parquet":
        pytest.importorskip("pyarrow", reason="needs pyarrow")
        with pytest.raises(
            ValueError, match=r"must be on this machine for loader\.source=parquet, got 's3://bucket/set'"
        ):
            open_source(LoaderConfig(source=source, root="s3://bucket/set"), "train")
    for make_one in (os.mkfifo, os.mkdir):
        folder = tmp_path / make_one.__name__
        folder.mkdir()
        make_one(folder / f"train.{suffix}")
        with pytest.raises(ValueError, match=rf"train\.{suffix} must be a regular file for loader\.source={source}"):
            open_source(LoaderConfig(source=source, root=str(folder)), "train")


@pytest.mark.parametrize("source", ["webdataset", "tar", "imagenet"])
def test_a_member_of_gigabytes_without_content_costs_no_memory(tmp_path: Path, source: str) -> None:
    """A tar file with a hole in the place of an image of 8 GiB."""
    name = "ILSVRC2012_img_train.tar" if source == "imagenet" else "train.tar"
    member = tarfile.TarInfo("n01440764/x.jpg")
    member.size = 8 << 30
    with (tmp_path / name).open("wb") as file:
        file.write(member.tobuf(tarfile.GNU_FORMAT))
        file.truncate(tarfile.BLOCKSIZE * 3 + member.size)
    with pytest.raises(CorruptImage, match=r"8,589,934,592 bytes are too many for an image"):
        open_source(LoaderConfig(source=source, root=str(tmp_path)), "train").fetch(0)


def test_an_archive_of_imagenet_that_holds_a_file_twice(tmp_path: Path) -> None:
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(forms.tar_of([("n1/x.JPEG", b"1"), ("n1/x.JPEG", b"2")]))
    with pytest.raises(ValueError, match=r"img_train\.tar holds n1/x\.JPEG twice"):
        open_source(LoaderConfig(source="imagenet", root=str(tmp_path)), "train")


def test_a_parquet_file_that_changes_is_never_misread(tmp_path: Path) -> None:
    written(tmp_path / "0.parquet", {"image": SAMPLES, "label": [0, 1]}, LABELS)
    source = parquet(tmp_path)
    written(tmp_path / "0.parquet", {"image": SAMPLES[::-1], "label": [1, 0]}, LABELS)
    with pytest.raises(CorruptImage, match=r"0\.parquet, row group 0: the file has changed since it was opened"):
        source.fetch(0)
    (tmp_path / "0.parquet").unlink()
    with pytest.raises(CorruptImage, match=r"0\.parquet, row group 0: .*No such file"):
        source.fetch(0)


def test_brace_patterns() -> None:
    assert expand_braces("a-{008..010}.tar") == ["a-008.tar", "a-009.tar", "a-010.tar"]
    assert expand_braces("{8..10}") == ["8", "9", "10"]
    assert expand_braces("{a,b}/{0..1}.tar") == ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]
    assert expand_braces("plain.tar") == ["plain.tar"]
    assert sorted(expand_braces("{t-{0..1},v}.tar")) == ["t-0.tar", "t-1.tar", "v.tar"]
    assert expand_braces("{a,a}.tar") == ["a.tar"], "no image comes twice an epoch"


def test_which_file_is_of_which_split(tmp_path: Path) -> None:
    def found(*names: str) -> list[list[str]]:
        folder = tmp_path / "-".join(names).replace("/", "_")
        for name in names:
            forms.put(folder / name, b"")
        return [
            [str(p.relative_to(folder)) for p in shard_files(str(folder), ".tar", "x", s)] for s in ("train", "test")
        ]

    assert found("1.tar", "0.tar") == [["0.tar", "1.tar"], []]
    assert found("train-0.tar", "val-0.tar", "test-0.tar") == [["train-0.tar"], ["val-0.tar"]]
    assert found("train/0.tar", "test/0.tar") == [["train/0.tar"], ["test/0.tar"]]
    assert found("imagenet1k-training-0.tar", "imagenet1k-validation-0.tar")[1] == ["imagenet1k-validation-0.tar"]
    assert found("constrained-0.tar") == [["constrained-0.tar"], []], "a word, not a part of one"
    with pytest.raises(ValueError, match=r"must hold files for training, got val-0\.tar and the like"):
        found("val-0.tar")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"loader\.root must hold \.tar files for loader\.source=x, got none in"):
        shard_files(str(tmp_path / "empty"), ".tar", "x", "train")
    with pytest.raises(ValueError, match=r"got '.*a-\{0\.\.1\}\.tar': there is no .*a-0\.tar"):
        shard_files(str(tmp_path / "a-{0..1}.tar"), ".tar", "x", "train")


def test_a_pattern_names_the_shards(tmp_path: Path) -> None:
    make("webdataset", tmp_path)
    config = LoaderConfig(source="webdataset", root=str(tmp_path / "set-train-{0000..0001}.tar"))
    assert len(open_source(config, "train")) == 10 and len(open_source(config, "test")) == 0


def written(path: Path, columns: dict[str, Any], features: dict[str, Any] | None = None, **how: Any) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.table(columns)
    if features is not None:
        table = table.replace_schema_metadata({b"huggingface": json.dumps({"info": {"features": features}}).encode()})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **how)


def parquet(root: Path, labels: str = "auto") -> Source:
    return open_source(LoaderConfig(source="parquet", root=str(root), labels=labels), "train")


def test_parquet_with_other_columns(tmp_path: Path) -> None:
    written(tmp_path / "a.parquet", {"jpg": SAMPLES, "class": ["dog", "cat"]})
    source = parquet(tmp_path)
    assert source.classes == ["cat", "dog"] and source.labels.tolist() == [1, 0] and source.fetch(1)[0] == SAMPLES[1]
    assert parquet(tmp_path, "none").labels.tolist() == [-1, -1]
    written(tmp_path / "a.parquet", {"picture": SAMPLES, "n": [0, 1]})
    assert parquet(tmp_path).labels.tolist() == [-1, -1]


LABELS = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([({"image": SAMPLES, "label": [0, 2]}, LABELS)], r"0\.parquet, row 1: label 2 is not among the 2 classes"),
        ([({"image": SAMPLES, "label": [-2, 0]}, LABELS)], r"0\.parquet, row 0: label -2 is not among the 2 classes"),
        ([({"text": ["a", "b"], "label": [0, 1]}, None)], r"0\.parquet must have a column image of bytes, or of bytes"),
        (
            [({"image": SAMPLES, "label": [0, 1]}, LABELS), ({"image": SAMPLES, "kind": [0, 1]}, LABELS)],
            r"1\.parquet has images in image and labels in None, unlike the other files, .* image and label",
        ),
    ],
)
def test_bad_parquet_is_named(tmp_path: Path, files: list[Any], said: str) -> None:
    for k, (columns, features) in enumerate(files):
        written(tmp_path / f"{k}.parquet", columns, features)
    with pytest.raises(ValueError, match=said):
        parquet(tmp_path)


def test_damaged_parquet_costs_its_rows_and_is_named(tmp_path: Path) -> None:
    written(tmp_path / "0.parquet", {"image": [SAMPLES[0], None, SAMPLES[1]]}, row_group_size=2)
    source = parquet(tmp_path)
    with pytest.raises(CorruptImage, match=r"0\.parquet, row 1: the row holds no bytes of an image"):
        source.fetch(1)
    assert source.fetch(2)[0] == SAMPLES[1] and source.key(2) == "0.parquet:2"
    data = bytearray((tmp_path / "0.parquet").read_bytes())
    data[4:60] = os.urandom(56)
    (tmp_path / "0.parquet").write_bytes(data)
    with pytest.raises(CorruptImage, match=r"0\.parquet, row group 0: "):
        parquet(tmp_path).fetch(0)
    (tmp_path / "0.parquet").write_bytes(data[:-9])
    with pytest.raises(ValueError, match=r"0\.parquet cannot be read as parquet"):
        parquet(tmp_path)


def test_row_groups_are_read_once_in_the_windowed_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastrdm.loaders.sources.parquet import ParquetSource

    config = replace(make("parquet", tmp_path), order="windowed", window=2, batch_size=2, workers=2)
    config = replace(config, views=(ViewSpec(size=8), ViewSpec(size=8)))
    read: list[int] = []
    whole = ParquetSource._read
    monkeypatch.setattr(ParquetSource, "_read", lambda self, group: (read.append(group), whole(self, group))[1])
    loader = build_loader(config, open_source(config, "train"), seed=0)
    assert sum(len(batch.index) for batch in loader) == 12
    loader.close()
    assert sorted(read) == [0, 1, 2, 3, 4]
    full = open_source(replace(config, order="full"), "train")
    assert "loader.order=windowed reads each of them once" in str(full.note)


def test_members_of_a_tar_with_long_names_links_and_folders(tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, kind in (("d", tarfile.DIRTYPE), ("./a.jpg", tarfile.REGTYPE), ("link.jpg", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "a.jpg"
            archive.addfile(member)
        long = tarfile.TarInfo("ü" * 150 + ".jpg")
        long.size = 3
        archive.addfile(long, io.BytesIO(b"abc"))
    (tmp_path / "x.tar").write_bytes(out.getvalue())
    found = list(tar.members(tmp_path / "x.tar"))
    assert [member.name for member in found] == ["a.jpg", "ü" * 150 + ".jpg"]
    assert out.getvalue()[found[1].offset :][:3] == b"abc"
