"""The packed source: what it reads, what it refuses to open, and what it costs when a byte is wrong."""

import gc
import hashlib
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastrdm.loaders.build import build_loader
from fastrdm.loaders.packing.pack import main
from fastrdm.loaders.sources.decode import JPEG_START, CorruptImage
from fastrdm.loaders.sources.folder import FolderSource
from fastrdm.loaders.sources.open import open_source
from fastrdm.loaders.sources.packed import PackedSource, seal, verify
from fastrdm.loaders.sources.ranges import Descriptor, RangeSource
from fastrdm.loaders.sources.source import ReadTime
from fastrdm.loaders.spec import Batch, LoaderConfig, ViewSpec

VIEWS = (ViewSpec(size=12, blur=0.5), ViewSpec(size=8))
COUNT = 24


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder `images` of two classes, packed as `jpeg`, as `raw` and, without labels, as `bare`."""
    root = tmp_path_factory.mktemp("packs")
    generator = np.random.default_rng(0)
    for k in range(COUNT):
        path = root / "images" / "ab"[k % 2] / f"{k:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((30 + k, 50 - k), Image.Resampling.BICUBIC).save(path, quality=90)
    for name, more in {"jpeg": [], "raw": ["--mode", "raw", "--size", "24"], "bare": ["--labels", "none"]}.items():
        main([str(root / "images"), str(root / name), "--workers", "1", *more])
    return root


@pytest.fixture
def copy(packs: Path, tmp_path: Path) -> Callable[[str], Path]:
    def copy(mode: str) -> Path:
        return Path(shutil.copytree(packs / mode, tmp_path / mode))

    return copy


def test_jpeg_pack_is_the_folder(packs: Path) -> None:
    packed, files = PackedSource(packs / "jpeg"), FolderSource(packs / "images")
    assert len(packed) == COUNT and packed.classes == files.classes and packed.images is None and packed.note is None
    np.testing.assert_array_equal(packed.labels, files.labels)
    for k in range(COUNT):
        np.testing.assert_array_equal(packed.read(k), files.read(k))


def batches(source: str, root: Path, **settings: object) -> list[Batch]:
    config = LoaderConfig(source=source, root=str(root), batch_size=8, views=VIEWS)
    config = replace(config, **settings)  # type: ignore[arg-type]
    loader = build_loader(config, open_source(config, "train"), seed=3)
    found = list(loader)
    loader.close()
    assert not loader.faults
    return found


def test_training_on_a_pack_is_training_on_its_files(packs: Path) -> None:
    for one, other in zip(batches("packed", packs / "jpeg"), batches("folder", packs / "images"), strict=True):
        assert torch.equal(one.index, other.index) and torch.equal(one.label, other.label)
        assert all(torch.equal(x, y) for x, y in zip(one.views, other.views, strict=True))


def test_raw_pack(packs: Path) -> None:
    packed = PackedSource(packs / "raw")
    shard = np.load(packed.paths[0])
    assert shard.shape == (COUNT, 24, 24, 3) and packed.side == 24 and "center squares of 24 px" in str(packed.note)
    out = np.zeros((3, 24, 24, 3), np.uint8)
    packed.gather(np.array([5, 0, 23]), out)
    np.testing.assert_array_equal(out, shard[[5, 0, 23]])
    np.testing.assert_array_equal(packed.read(7), shard[7])
    assert len(batches("packed", packs / "raw")) == 3


def test_pixels_go_where_they_are_told_and_time_is_counted(packs: Path) -> None:
    for mode in ("jpeg", "raw"):
        packed, spent, room = PackedSource(packs / mode), ReadTime(), np.zeros(10_000, np.uint8)
        pixels = packed.read_into(3, lambda h, w: room[: h * w * 3].reshape(h, w, 3), spent)  # noqa: B023
        assert np.shares_memory(pixels, room) and room.any()
        assert spent.read > 0 and (spent.decode > 0) == (mode == "jpeg")


@pytest.mark.parametrize("mode", ["jpeg", "raw"])
@pytest.mark.parametrize("file", ["index.npy", "shards/00000", "meta.json"])
def test_a_missing_short_or_long_file_is_refused_at_open(copy: Callable[[str], Path], mode: str, file: str) -> None:
    root = copy(mode)
    (path,) = root.glob(f"{file}*")
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole + b"\0"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{path} (has \d+ bytes, {len(whole)} were written|is damaged)"):
            PackedSource(root)
    path.unlink()
    with pytest.raises(ValueError, match=r"meta\.json" if file == "meta.json" else rf"{path} is missing"):
        PackedSource(root)


@pytest.mark.parametrize("mode", ["jpeg", "raw"])
def test_an_altered_shard_is_named_by_verify_and_costs_one_image(copy: Callable[[str], Path], mode: str) -> None:
    root = copy(mode)
    (path,) = (root / "shards").iterdir()
    assert verify(root) == sum(file.stat().st_size for file in root.rglob("*.*")) - (root / "meta.json").stat().st_size
    data = bytearray(path.read_bytes())
    source = PackedSource(root)
    data[int(source.offset[4]) + 100] ^= 4
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"damaged files, .*: shards/{path.name}$"):
        main([str(root), "--verify"])
    source = PackedSource(root)
    for k in range(COUNT):
        if k == 4:
            with pytest.raises(CorruptImage, match=rf"shards/{path.name}, image 4: not the bytes that were packed"):
                source.read(k)
        else:
            source.read(k)


@pytest.mark.parametrize("mode", ["jpeg", "raw"])
def test_a_damaged_image_in_the_middle_of_an_epoch_is_replaced(copy: Callable[[str], Path], mode: str) -> None:
    root = copy(mode)
    (path,) = (root / "shards").iterdir()
    data = bytearray(path.read_bytes())
    data[int(PackedSource(root).offset[4]) + 100] ^= 4
    path.write_bytes(data)
    config = LoaderConfig(source="packed", root=str(root), batch_size=COUNT, views=VIEWS, max_corrupt=0.1)
    loader = build_loader(config, open_source(config, "train"), seed=0)
    (batch,) = loader
    loader.close()
    assert sorted(batch.index.tolist()) == sorted([5, *(k for k in range(COUNT) if k != 4)])
    assert list(loader.faults) == [4] and "image 4: not the bytes" in loader.faults[4]


def test_another_format_is_refused(copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from fastrdm.loaders.sources import packed

    monkeypatch.setattr(packed, "FORMAT", 2)
    with pytest.raises(ValueError, match=r"is of format 1, this version reads 2: pack the set again"):
        PackedSource(copy("raw"))


def test_splits_and_sets_without_labels(packs: Path, tmp_path: Path) -> None:
    def opened(root: Path, split: str) -> int:
        return len(open_source(LoaderConfig(source="packed", root=str(root)), split))  # type: ignore[arg-type]

    for name in ("bare", "jpeg"):
        assert opened(packs / name, "train") == COUNT and opened(packs / name, "test") == 0
    os.symlink(packs / "jpeg", tmp_path / "train")
    os.symlink(packs / "raw", tmp_path / "val")
    assert opened(tmp_path, "train") == opened(tmp_path, "test") == COUNT
    with pytest.raises(ValueError, match=r"must be a packed folder, got .*, which has no meta\.json"):
        opened(packs / "images", "train")


@pytest.mark.parametrize("mode", ["jpeg", "raw"])
def test_windowed_order_reads_shards_ahead(packs: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(PackedSource, "read_ahead", lambda self, shards: asked.extend(shards))
    (windowed, full) = (batches("packed", packs / mode, order=order) for order in ("windowed", "full"))
    assert asked == [0]
    seen = [sorted(torch.cat([batch.index for batch in found]).tolist()) for found in (windowed, full)]
    assert seen[0] == seen[1] == list(range(COUNT))
    monkeypatch.undo()
    PackedSource(packs / mode).read_ahead({0})
    with pytest.raises(ValueError, match=r"loader\.order must be full unless the set is packed"):
        batches("folder", packs / "images", order="windowed")


def test_no_file_stays_open(packs: Path) -> None:
    def held() -> int:
        return len(os.listdir("/proc/self/fd"))

    gc.collect()  # what other tests left
    before = held()
    source = PackedSource(packs / "raw")
    source.read(0)
    assert held() > before
    del source
    gc.collect()
    assert held() == before


def resealed(
    root: Path, change: Callable[[dict[str, Any]], object], index: Callable[[Any], object] | None = None
) -> None:
    """Change meta.json, and index.npy where asked, and seal the folder anew."""
    meta = json.loads((root / "meta.json").read_text())
    if index is not None:
        rows = np.load(root / "index.npy")
        made = index(rows)
        np.save(root / "index.npy", rows if made is None else made)
        content = (root / "index.npy").read_bytes()
        meta["files"]["index.npy"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    change(meta)
    meta["seal"] = seal(meta)
    (root / "meta.json").write_text(json.dumps(meta))


FIELDS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "mode": (lambda meta: meta.update(mode="tar"), "mode is tar"),
    "count that is text": (lambda meta: meta.update(count="24"), "count is 24"),
    "count below 0": (lambda meta: meta.update(count=-1), "count is -1"),
    "classes that are numbers": (lambda meta: meta.update(classes=[1, 2]), r"classes is \[1, 2\]"),
    "no classes": (lambda meta: meta.pop("classes"), "classes is None"),
    "files elsewhere": (
        lambda meta: meta["files"].update({"../../../etc/passwd": {"bytes": 1, "sha256": "0" * 64}}),
        "files is ",
    ),
    "files that are a list": (lambda meta: meta.update(files=[]), r"files is \[\]"),
    "bytes that are text": (lambda meta: meta["files"]["index.npy"].update(bytes="9"), r"files\.index\.npy is "),
    "no checksum": (lambda meta: meta["files"]["index.npy"].pop("sha256"), r"files\.index\.npy is "),
    "no format": (lambda meta: meta.pop("format"), "is of format None"),
}


@pytest.mark.parametrize("what", FIELDS)
def test_a_resealed_meta_with_absurd_fields_is_refused_by_name(what: str, copy: Callable[[str], Path]) -> None:
    root = copy("jpeg")
    change, reason = FIELDS[what]
    resealed(root, change)
    with pytest.raises(ValueError, match=rf"meta\.json (is damaged: )?{reason}") as told:
        PackedSource(root)
    assert "\n" not in str(told.value)


def with_value(field: str, value: int) -> Callable[[Any], None]:
    def change(rows: Any) -> None:
        rows[field][5] = value

    return change


ROWS: dict[str, tuple[str, Callable[[Any], object], str]] = {
    "shard": ("jpeg", with_value("shard", 9), "shard of image 5 is none of 1"),
    "offset": ("jpeg", with_value("offset", 2**64 - 1), "offset of image 5 does not fit"),
    "bytes": ("jpeg", with_value("bytes", 2**32 - 1), "offset of image 5 does not fit"),
    "label": ("jpeg", with_value("label", 7), "one of 2 classes, from 0 on: image 5 has 7"),
    "label below -1": ("jpeg", with_value("label", -9), "image 5 has -9"),
    "height": ("raw", with_value("height", 2**32 - 1), "bytes of image 5 does not fit"),
    "offset of raw": ("raw", with_value("offset", 10**12), "offset of image 5 does not fit"),
    "rows": ("jpeg", lambda rows: rows[:-1], r"dtype or shape is .* \(23,\)"),
    "dtype": ("jpeg", lambda rows: rows["offset"].astype(float), r"dtype or shape is float64 \(24,\)"),
}


@pytest.mark.parametrize("what", ROWS)
def test_a_resealed_index_with_absurd_rows_is_refused_by_name(what: str, copy: Callable[[str], Path]) -> None:
    mode, change, reason = ROWS[what]
    root = copy(mode)
    resealed(root, lambda _: None, change)
    with pytest.raises(ValueError, match=rf"index\.npy .*{reason}"):
        PackedSource(root)


def test_a_file_that_two_threads_open_at_once_stays_open_while_it_is_used(packs: Path, tmp_path: Path) -> None:
    """The second of them gets a descriptor that nothing remembers, as each one is here."""
    source = PackedSource(packs / "jpeg")
    source._open = Descriptor
    source.read_ahead({0})
    assert source.fetch(0)[0][:2] == JPEG_START
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for k in range(2):
            (tmp_path / f"{k}.jpg").write_bytes(source.fetch(k)[0])
            tar.add(tmp_path / f"{k}.jpg", f"{k}.jpg")
    tars = open_source(LoaderConfig(source="webdataset", root=str(tmp_path)), "train")
    assert isinstance(tars, RangeSource)
    tars._open = Descriptor
    assert [tars.key(k) for k in range(2)] == ["x.tar/0.jpg", "x.tar/1.jpg"]
