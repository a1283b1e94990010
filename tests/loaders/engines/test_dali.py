"""DALI: every operation against the reference, pixel by pixel; damaged files; what is refused."""

import contextlib
import io
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastrdm.loaders.augment.parameters import sample_parameters
from fastrdm.loaders.augment.reference import augment
from fastrdm.loaders.build import build_loader
from fastrdm.loaders.engines import dali
from fastrdm.loaders.packing import pack
from fastrdm.loaders.sources.decode import CorruptImage, Pixels, decode
from fastrdm.loaders.sources.folder import FolderSource
from fastrdm.loaders.sources.open import open_source
from fastrdm.loaders.sources.source import Source
from fastrdm.loaders.spec import Batch, Loader, LoaderConfig, ViewSpec

COUNT = 24
OFF: dict[str, Any] = {"flip": 0, "jitter": 0, "grayscale": 0, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
FLAT: dict[str, Any] = {**OFF, "scale": (1, 1), "ratio": (1, 1), "size": 24}  # the whole square: no resampling
WHICH = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}


def needs_dali() -> None:
    pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI: pip install 'fastrdm[dali]'")


def image(seed: int, width: int, height: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """24 JPEGs of many sizes in two classes."""
    root = tmp_path / "images"
    for k in range(COUNT):
        path = root / f"class{k % 2}" / f"{k:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image(k, 40 + 3 * k, 90 - 2 * k).save(path, quality=95)
    return root


class Squares(Source):
    """16 images of 24 x 24 held as pixels, each of a different color pattern."""

    name, classes = "squares", ["a"]
    labels = np.arange(16)

    def __len__(self) -> int:
        return 16

    def read(self, index: int) -> Pixels:
        return np.asarray(image(index, 24, 24))


def opened(root: Path, source: str = "folder", **settings: Any) -> Loader:
    views = settings.pop("views", (ViewSpec(size=16), ViewSpec(size=16)))
    fixed = {"source": source, "root": str(root), "batch_size": 8, "views": views, "engine": "dali", "augment": "dali"}
    config = LoaderConfig(**{**fixed, **settings})
    return build_loader(config, open_source(config, "train"), seed=1)


def levels(batch: Batch, source: Any, spec: ViewSpec) -> torch.Tensor:
    """Differences from the reference, of 255."""
    pixels = [torch.from_numpy(source.read(k).copy()) for k in batch.index.tolist()]
    height, width = torch.tensor([p.shape[:2] for p in pixels]).unbind(1)
    drawn = sample_parameters(spec, 1, 0, batch.index, 0, height, width)
    wanted = augment(pixels, drawn, spec, implementation="reference")
    return ((batch.views[0] - wanted) * torch.tensor(spec.std)[:, None, None]).abs() * 255


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"flip": 0.5},
        {"jitter": 1.0, **WHICH, "brightness": 0.8},
        {"jitter": 1.0, **WHICH, "contrast": 0.8},
        {"jitter": 1.0, **WHICH, "saturation": 0.8},
        {"jitter": 1.0, **WHICH, "hue": 0.5},
        {"jitter": 0.8, "brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2},
        {"grayscale": 0.5},
        {"blur": 0.5},
        {"blur": 1.0, "blur_kernel": 5},
        {"solarize": 0.5, "solarize_threshold": 100},
        {"mean": (0.4, 0.5, 0.6), "std": (0.1, 0.2, 0.3)},
        {"flip": 0.5, "jitter": 0.8, "grayscale": 0.2, "blur": 0.5, "solarize": 0.2},
    ],
    ids=lambda settings: "-".join(settings) or "nothing",
)
def test_every_operation_is_the_reference(settings: dict[str, Any]) -> None:
    needs_dali()
    spec = ViewSpec(**{**FLAT, **settings})
    config = LoaderConfig(batch_size=16, views=(spec, spec), engine="dali", augment="dali")
    loader = build_loader(config, Squares(), seed=1)
    (batch,) = loader
    loader.close()
    difference = levels(batch, Squares(), spec)
    assert difference.mean() < 1e-3
    assert difference.max() < 0.05 or "solarize" in settings  # a value at the threshold may fall on either side


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [16, 120])
def test_crops_differ_at_their_border_only(folder: Path, interpolation: Any, size: int) -> None:
    needs_dali()
    spec = ViewSpec(**OFF, size=size, interpolation=interpolation)
    loader = opened(folder, views=(spec, spec))
    difference = torch.cat([levels(batch, FolderSource(folder), spec) for batch in loader])
    loader.close()
    edge = size // 8 if size == 16 else 20
    assert difference[:, :, edge:-edge, edge:-edge].max() < 0.05
    assert difference.mean() < 1.0


def test_views_are_the_native_ones_where_dali_only_decodes(folder: Path) -> None:
    """Its decoder gives our pixels, our kernels make the views: everything is equal, for JPEGs and for one PNG."""
    needs_dali()
    image(60, 33, 21).save(folder / "class0" / "02.png")
    views = (ViewSpec(size=16, blur=0.5), ViewSpec(size=16, solarize=0.2), ViewSpec(size=8))
    pair = opened(folder, views=views, augment="auto"), opened(folder, views=views, augment="auto", engine="native")
    for left, right in zip(*pair, strict=True):
        assert torch.equal(left.index, right.index) and torch.equal(left.label, right.label)
        assert all(torch.equal(a, b) for a, b in zip(left.views, right.views, strict=True))
    for loader in pair:
        loader.close()


def test_decoding_alone_is_a_handful_of_operators() -> None:
    """The graph of two views with all operations is hundreds: each costs the host some 20 us a batch on a GPU."""
    needs_dali()
    from nvidia.dali import pipeline_def

    from fastrdm.loaders.engines import dali_graph

    def operators(definition: Any, *arguments: Any, **options: Any) -> int:
        made = pipeline_def(definition, **options)(*arguments, batch_size=2, num_threads=1, device_id=0)
        made._build_graph()
        return len(made._ops)

    assert operators(dali_graph.rows, lambda: (), True, True) <= 5
    spec = ViewSpec(size=16, blur=0.5, solarize=0.2)
    whole = operators(
        dali_graph.graph, (spec, spec), lambda: (), True, dali_graph.types.FLOAT, True, enable_conditionals=True
    )
    assert whole > 300


def test_a_pack_gives_the_views_of_its_files(folder: Path, tmp_path: Path) -> None:
    needs_dali()
    pack.main([str(folder), str(tmp_path / "jpeg"), "--workers", "1"])
    pair = opened(folder), opened(tmp_path / "jpeg", "packed")
    for left, right in zip(*pair, strict=True):
        assert torch.equal(left.index, right.index) and torch.equal(left.views[1], right.views[1])
    for loader in pair:
        loader.close()


def test_raw_squares_and_sets_in_memory(folder: Path, tmp_path: Path) -> None:
    needs_dali()
    pack.main([str(folder), str(tmp_path / "raw"), "--mode", "raw", "--size", "24", "--workers", "1"])
    spec = ViewSpec(**FLAT)
    digits = LoaderConfig(batch_size=8, views=(replace(spec, size=8),) * 2, engine="dali", augment="dali", subset=50)
    loaders = (
        opened(tmp_path / "raw", "packed", views=(spec, spec)),
        build_loader(digits, open_source(digits, "train"), seed=1),
    )
    for loader in loaders:
        batch = next(iter(loader))
        assert levels(batch, loader.source, loader.views[0]).max() < 0.05  # type: ignore[attr-defined]
        loader.close()


def test_odd_images_are_what_our_decoder_makes_of_them(folder: Path) -> None:
    needs_dali()
    odd = folder / "class0"
    image(50, 30, 20).convert("CMYK").save(odd / "00.jpg")
    image(51, 30, 20).convert("P").save(odd / "02.png")
    image(52, 30, 20).convert("L").save(odd / "04.jpg")
    turned = Image.Exif()
    turned[0x0112] = 6
    image(53, 30, 20).save(odd / "06.jpg", exif=turned)
    (odd / "02.jpg").unlink()
    spec = ViewSpec(**OFF, scale=(0.2, 0.3), size=8)
    loader = opened(folder, views=(spec, spec))
    difference = torch.cat([levels(batch, FolderSource(folder), spec) for batch in loader])
    assert loader.faults == {} and difference[:, :, 2:-2, 2:-2].max() < 6  # of another image it would be a hundred
    loader.close()


def test_what_cannot_be_read_is_replaced_and_named(folder: Path) -> None:
    needs_dali()
    cut, empty = folder / "class0" / "08.jpg", folder / "class1" / "11.jpg"
    cut.write_bytes(cut.read_bytes()[:100])
    empty.write_bytes(b"")
    loader = opened(folder, max_corrupt=0.1)
    seen = torch.cat([batch.index for batch in loader]).tolist()
    named = FolderSource(folder).files
    assert {named[k] for k in loader.faults} == {"class0/08.jpg", "class1/11.jpg"}
    assert len(seen) == COUNT and not set(seen) & loader.faults.keys()
    assert set(seen) == set(range(COUNT)) - loader.faults.keys()
    loader.close()
    strict = opened(folder)
    with pytest.raises(CorruptImage, match=r"of 24 images cannot be read, above loader\.max_corrupt"):
        list(strict)
    strict.close()


def test_the_pipeline_outlives_an_image_that_it_cannot_decode(folder: Path) -> None:
    """Header and end are whole, between them is nothing: DALI fails, and the batch is judged here."""
    needs_dali()
    loader = opened(folder)
    clean = list(loader)
    loader.close()
    bad = clean[1].index[3].item()
    files = FolderSource(folder)
    path = folder / files.files[bad]
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"\xff\xda")] + b"\xff\xd9")
    with pytest.raises(CorruptImage):
        decode(path.read_bytes(), "x")
    loader = opened(folder, max_corrupt=0.1)
    for wanted, batch in zip(clean, loader, strict=True):
        same = wanted.index == batch.index
        assert (~same).nonzero().flatten().tolist() == ([3] if bad in wanted.index else [])
        assert all(torch.equal(a[same], b[same]) for a, b in zip(wanted.views, batch.views, strict=True))
    assert list(loader.faults) == [bad]
    loader.close()


def test_an_image_is_decoded_once_for_all_views(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_dali()
    from nvidia.dali import fn

    asked, decoder = [], fn.decoders.image
    monkeypatch.setattr(fn.decoders, "image", lambda *a, **k: asked.append(k["device"]) or decoder(*a, **k))
    views = (ViewSpec(size=16), ViewSpec(size=16), *(ViewSpec(size=8, scale=(0.05, 0.2)),) * 4)
    loader = opened(folder, views=views)
    batch = next(iter(loader))
    loader.close()
    assert asked == ["cpu"] and [view.shape[-1] for view in batch.views] == [16, 16, 8, 8, 8, 8]


def test_the_seed_decides(folder: Path) -> None:
    needs_dali()
    config = LoaderConfig(source="folder", root=str(folder), batch_size=COUNT, engine="dali")
    found = []
    for seed in (5, 5, 6):
        loader = build_loader(config, open_source(config, "train"), seed=seed)
        found += list(loader)
        loader.close()
    same, again, other = found
    assert torch.equal(same.index, again.index) and torch.equal(same.views[0], again.views[0])
    place = other.index.argsort()[same.index.argsort().argsort()]  # the same images under the other seed
    assert torch.equal(other.index[place], same.index) and not torch.equal(other.index, same.index)
    assert not any(torch.equal(a, b) for a, b in zip(same.views[0], other.views[0][place], strict=True))


def test_views_are_distributed_as_the_reference_draws_them(folder: Path) -> None:
    """Means, spreads and histograms of each channel, over twelve epochs of all operations."""
    needs_dali()
    spec = ViewSpec(size=24, blur=0.5, solarize=0.2, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    loader, source = opened(folder, views=(spec, spec)), FolderSource(folder)
    made, wanted = [], []
    for epoch in range(12):
        loader.set_epoch(epoch)
        made += [batch.views[0] for batch in loader]
    loader.close()
    pixels = [torch.from_numpy(source.read(k)) for k in range(COUNT)]
    height, width = torch.tensor([image.shape[:2] for image in pixels]).unbind(1)
    for epoch in range(12):  # of another seed: the same law, other draws
        drawn = sample_parameters(spec, 77, epoch, torch.arange(COUNT), 0, height, width)
        wanted.append(augment(pixels, drawn, spec, implementation="reference"))
    a, b = (torch.cat(views).transpose(0, 1).flatten(1) for views in (made, wanted))
    assert a.shape == b.shape and (a.mean(dim=1) - b.mean(dim=1)).abs().max() < 0.04
    assert (a.std(dim=1) - b.std(dim=1)).abs().max() < 0.03
    for x, y in zip(a, b, strict=True):
        shares = [torch.histc(side, bins=8, min=0, max=1) / len(side) for side in (x, y)]
        assert (shares[0] - shares[1]).abs().max() < 0.04, shares


def test_size_may_grow_between_epochs(folder: Path) -> None:
    needs_dali()
    spec = ViewSpec(size=16, progressive=((1, 8),))
    loader = opened(folder, views=(spec, spec))
    sizes = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        sizes += [batch.views[0].shape[-1] for batch in loader]
    loader.close()
    assert sizes == [8, 8, 8, 16, 16, 16]


def test_half_precision_comes_from_the_graph(folder: Path) -> None:
    needs_dali()
    config = LoaderConfig(source="folder", root=str(folder), batch_size=8, engine="dali", augment="dali")
    pair = [build_loader(config, open_source(config, "train"), seed=1, dtype=d) for d in (torch.float16, torch.float32)]
    half, full = (next(iter(loader)).views[0] for loader in pair)
    assert half.dtype == torch.float16 and (half - full).abs().max() < 4e-3
    for loader in pair:
        loader.close()


def test_dali_missing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.delitem(sys.modules, "fastrdm.loaders.engines.dali_graph", raising=False)
    config = LoaderConfig(engine="dali")
    with pytest.raises(ValueError, match=r"loader\.engine=dali needs NVIDIA DALI: pip install 'fastrdm\[dali\]'"):
        build_loader(config, open_source(config, "train"), seed=0)


@pytest.mark.parametrize(
    ("settings", "device", "message"),
    [
        ({"augment": "triton"}, "cpu", r"loader\.augment=triton does not run on cpu"),
        ({"augment": "dali", "engine": "native"}, "cpu", r"loader\.augment=dali takes loader\.engine=dali"),
        ({}, "cuda", r"train\.device must be cpu where no GPU is seen"),
        ({}, "meta", r"train\.device must be cpu or cuda"),
        ({"batch_size": 2000}, "cpu", r"loader\.batch_size must be at most the 1437 images"),
        ({"order": "windowed"}, "cpu", r"loader\.order must be full unless the set is packed"),
    ],
)
def test_refused(settings: dict[str, Any], device: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali, "_pipeline", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = LoaderConfig(**{"engine": "dali", **settings})
    with pytest.raises(ValueError, match=message):
        build_loader(config, open_source(config, "train"), seed=0, device=torch.device(device))


def test_an_operation_that_the_graph_lacks_is_refused_there_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali, "_pipeline", lambda: None)
    monkeypatch.setattr(dali, "IN_GRAPH", ("jitter", "grayscale", "solarize"))
    for how, blur in (("dali", 0.0), ("auto", 0.5), ("dali", 0.5)):
        views = (ViewSpec(size=8), ViewSpec(size=8, blur=blur))
        config = LoaderConfig(engine="dali", augment=how, batch_size=16, views=views)  # type: ignore[arg-type]
        refused = pytest.raises(ValueError, match=r"views\.\*\.blur must be 0 where loader\.augment=dali, .* got 0\.5")
        with refused if how == "dali" and blur else contextlib.nullcontext():
            build_loader(config, open_source(config, "train"), seed=0).close()


def test_a_pixmap_is_read_back() -> None:
    pixels = np.asarray(image(0, 7, 5))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(dali.pixmap(pixels).tobytes()))), pixels)
