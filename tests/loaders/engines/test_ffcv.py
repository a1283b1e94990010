"""FFCV: written by its own writer, decoded once, our order and views; what it cannot decode; what is refused."""

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastrdm.loaders.build import build_loader
from fastrdm.loaders.order import epoch_order
from fastrdm.loaders.packing import pack
from fastrdm.loaders.sources import beton
from fastrdm.loaders.sources.decode import CorruptImage
from fastrdm.loaders.sources.folder import FolderSource
from fastrdm.loaders.sources.open import open_source
from fastrdm.loaders.spec import Batch, Loader, LoaderConfig, ViewSpec

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # numba's, at its end
COUNT = 50
VIEWS = (ViewSpec(size=12, blur=0.5), ViewSpec(size=12, solarize=0.2), ViewSpec(size=6))
ffcv = pytest.mark.skipif("not __import__('importlib.util').util.find_spec('ffcv')", reason="needs ffcv")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 JPEGs and PNGs of many sizes in five classes."""
    root = tmp_path_factory.mktemp("ffcv") / "images"
    for k in range(COUNT):
        path = root / f"class{k % 5}" / f"{k:02}.{'jpg' if k % 7 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = np.random.default_rng(k).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((60 + k, 90 - k), Image.Resampling.BICUBIC).save(path)
    return root


@pytest.fixture(scope="module")
def packed(folder: Path) -> Path:
    """The same as a .beton file."""
    out = folder.parent / "beton"
    pack.main([str(folder), str(out), "--format", "beton", "--workers", "1"])
    return out


def opened(root: Path, engine: str = "ffcv", rank: int = 0, world: int = 1, **settings: Any) -> Loader:
    config = LoaderConfig(
        **{"source": "packed", "root": str(root), "batch_size": 8, "views": VIEWS, "engine": engine, **settings}
    )
    return build_loader(config, open_source(config, "train"), seed=4, rank=rank, world=world)


def same(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a.index, b.index)
        and torch.equal(a.label, b.label)
        and all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))
        for a, b in zip(left, right, strict=True)
    )


@ffcv
def test_a_beton_file_holds_the_files_as_they_are(folder: Path, packed: Path) -> None:
    assert sorted(path.name for path in packed.iterdir()) == ["classes.json", "images.beton", "plan"]
    assert sorted(path.name for path in packed.parent.iterdir()) == ["beton", "images"]
    source, files = beton.BetonSource(packed), FolderSource(folder)
    assert source.classes == files.classes and source.labels.tolist() == files.labels.tolist()
    for k, name in enumerate(files.files):
        if name.endswith("jpg"):
            assert source.fetch(k)[0] == files.fetch(k)[0]
        assert source.read(k).shape == files.read(k).shape == (source.height[k], source.width[k], 3)


@ffcv
def test_views_are_the_native_ones_to_its_decoder(packed: Path) -> None:
    pair = list(opened(packed)), list(opened(packed, "native"))
    assert len(pair[0]) == 6
    assert torch.equal(torch.cat([b.index for b in pair[0]]), torch.from_numpy(epoch_order(COUNT, 4, 0)[:48]))
    for left, right in zip(*pair, strict=True):
        assert torch.equal(left.index, right.index) and torch.equal(left.label, right.label)
        for a, b, spec in zip(left.views, right.views, VIEWS, strict=True):
            assert a.shape == b.shape and a.is_contiguous(memory_format=torch.channels_last)
            assert ((a - b) * torch.tensor(spec.std)[:, None, None]).abs().mean() < 2 / 255


@ffcv
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_and_a_restart_in_mid_epoch_change_nothing(packed: Path, world: int) -> None:
    whole = list(opened(packed))
    first = opened(packed)
    seen = [batch for batch, _ in zip(first, range(2), strict=False)]
    parts = [opened(packed, rank=rank, world=world, workers=1) for rank in range(world)]
    for part in parts:
        part.load_state_dict({"epoch": 0, "position": 16})
    rest = [
        Batch(
            tuple(torch.cat(views) for views in zip(*(batch.views for batch in step), strict=True)),
            torch.cat([batch.index for batch in step]),
            torch.cat([batch.label for batch in step]),
        )
        for step in zip(*parts, strict=True)
    ]
    assert same(seen + rest, whole) and parts[0].state_dict() == {"epoch": 0, "position": 48}


@ffcv
def test_epochs_subsets_and_growing_sizes(packed: Path) -> None:
    views = (ViewSpec(size=12, progressive=((1, 8),)),) * 2
    loader = opened(packed, batch_size=10, subset=40, views=views)
    for epoch, size in ((0, 8), (1, 12), (2, 12)):
        loader.set_epoch(epoch)
        found = list(loader)
        assert {batch.views[1].shape[-1] for batch in found} == {size}
        assert sorted(torch.cat([batch.index for batch in found]).tolist()) == list(range(40))
        assert list(loader) == []


@ffcv
def test_what_ffcv_cannot_decode_is_replaced_and_named(packed: Path, tmp_path: Path) -> None:
    """Its decoder says no, which ffcv itself passes over; the row would hold the pixels of an older batch."""
    copy = tmp_path / "copy"
    copy.mkdir()
    data = bytearray((packed / "images.beton").read_bytes())
    source = beton.BetonSource(packed)
    start = source.start.item(11)
    data[start : start + 200] = bytes(200)
    (copy / "images.beton").write_bytes(data)
    (copy / "classes.json").write_bytes((packed / "classes.json").read_bytes())
    loader = opened(copy, max_corrupt=0.1, batch_size=10)
    clean = opened(packed, batch_size=10)
    for batch, wanted in zip(loader, clean, strict=True):
        other = wanted.index != batch.index
        assert wanted.index[other].tolist() == ([11] if 11 in wanted.index else [])
        assert batch.index[other].tolist() == ([12] if 11 in wanted.index else [])
        assert torch.equal(batch.views[0][~other], wanted.views[0][~other])
    assert list(loader.faults) == [11] and "image 11" in loader.faults[11]


@ffcv
@pytest.mark.parametrize("how", ["shorter", "written again", "gone"])
def test_a_file_that_changes_after_opening_is_told_and_never_read(packed: Path, tmp_path: Path, how: str) -> None:
    copy = shutil.copytree(packed, tmp_path / "copy")
    file = copy / "images.beton"
    loader, source = opened(copy), beton.BetonSource(copy)
    if how == "shorter":
        os.truncate(file, 100)
    elif how == "written again":
        os.utime(file, ns=(0, 0))
    else:
        file.unlink()
    said = "No such file" if how == "gone" else "the file has changed since it was opened"
    with pytest.raises(CorruptImage, match=said):
        next(iter(loader))
    with pytest.raises(CorruptImage, match=said):
        source.fetch(0)


@ffcv
def test_mixed_kinds_of_images_are_what_the_native_engine_reads(tmp_path: Path) -> None:
    """Gray, CMYK, palette, alpha, 16 bits, turned by EXIF, progressive, one pixel; no plain JPEG: becomes one."""
    root = tmp_path / "images" / "all"
    root.mkdir(parents=True)
    image = Image.fromarray(np.random.default_rng(9).integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((40, 30))
    turned = Image.Exif()
    turned[0x0112] = 6
    image.convert("L").save(root / "gray.jpg")
    image.convert("CMYK").save(root / "cmyk.jpg")
    image.convert("P").save(root / "palette.png")
    image.convert("RGBA").save(root / "alpha.png")
    image.convert("I;16").save(root / "deep.png")
    image.save(root / "turned.jpg", exif=turned)
    image.save(root / "progressive.jpg", progressive=True)
    image.resize((1, 1)).save(root / "single.jpg")
    pack.main([str(root.parent), str(tmp_path / "beton"), "--format", "beton", "--workers", "1"])
    spec = ViewSpec(size=12, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    pair = [opened(tmp_path / "beton", engine, views=(spec, spec)) for engine in ("ffcv", "native")]
    (left,), (right,) = pair
    assert pair[0].faults == {} and sorted(left.index.tolist()) == list(range(8))
    assert torch.equal(left.index, right.index) and (left.views[0] - right.views[0]).abs().mean() < 3 / 255


@ffcv
def test_training_dtype(packed: Path) -> None:
    config = LoaderConfig(source="packed", root=str(packed), batch_size=8, views=VIEWS, engine="ffcv")
    pair = [
        build_loader(config, open_source(config, "train"), seed=4, dtype=d) for d in (torch.bfloat16, torch.float32)
    ]
    half, full = (next(iter(loader)).views[0] for loader in pair)
    assert half.dtype == torch.bfloat16 and torch.equal(half, full.bfloat16())


@ffcv
@pytest.mark.parametrize(
    ("settings", "device", "message"),
    [
        ({"order": "windowed"}, "cpu", r"loader\.order must be full"),
        ({"augment": "triton"}, "cpu", r"loader\.augment=triton does not run on cpu"),
        ({"batch_size": 60}, "cpu", r"loader\.batch_size must be at most the 50 images"),
        ({}, "cuda", r"train\.device must be cpu where no GPU is seen"),
    ],
)
def test_refused(
    packed: Path, settings: dict[str, Any], device: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = LoaderConfig(**{"source": "packed", "root": str(packed), "batch_size": 8, "engine": "ffcv", **settings})
    with pytest.raises(ValueError, match=message):
        build_loader(config, open_source(config, "train"), seed=0, device=torch.device(device))


@ffcv
def test_pack_refuses(folder: Path, tmp_path: Path) -> None:
    for options in (["--mode", "raw"], ["--verify"]):
        with pytest.raises(ValueError, match=r"--format beton takes --mode jpeg, a local OUT and no --verify"):
            pack.main([str(folder), str(tmp_path / "out"), "--format", "beton", *options])


@ffcv
def test_other_sources_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"loader\.engine=ffcv reads \.beton files .* got loader\.source=folder"):
        opened(folder, source="folder")


def test_ffcv_missing_is_one_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ffcv", None)
    told = r"needs ffcv: pip install 'fastrdm\[ffcv\]', after apt install libopencv-dev"
    config = LoaderConfig(engine="ffcv")
    with pytest.raises(ValueError, match="loader.engine=ffcv " + told):
        build_loader(config, open_source(config, "train"), seed=0)
    with pytest.raises(ValueError, match="--format beton " + told):
        pack.main([str(folder), str(tmp_path / "out"), "--format", "beton"])
    (tmp_path / "images.beton").write_bytes(b"")
    with pytest.raises(ValueError, match="with a .beton file, " + told):
        open_source(replace(config, source="packed", root=str(tmp_path)), "train")
