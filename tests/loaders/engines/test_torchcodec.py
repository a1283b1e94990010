"""torchcodec: the native engine's pixels, whatever the files; what it refuses costs no other image."""

import io
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastrdm.kernels.augment.layout import COLUMNS
from fastrdm.kernels.augment.ragged import ragged
from fastrdm.loaders.augment import reference
from fastrdm.loaders.build import build_loader
from fastrdm.loaders.engines import torchcodec
from fastrdm.loaders.engines.torchcodec import TorchcodecLoader
from fastrdm.loaders.packing import pack
from fastrdm.loaders.sources.decode import CorruptImage, Pixels, decode
from fastrdm.loaders.sources.open import open_source
from fastrdm.loaders.spec import Batch, Loader, LoaderConfig, ViewSpec

COUNT = 24
VIEWS = (ViewSpec(size=16, blur=0.5), ViewSpec(size=12))


def needs_torchcodec() -> None:
    pytest.importorskip("torchcodec", reason="needs torchcodec: pip install 'fastrdm[torchcodec]'", exc_type=Exception)


def encoded(number: int, kind: str = "JPEG", mode: str = "RGB", **options: Any) -> bytes:
    coarse = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((30 + 2 * number, 60 - number), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.convert(mode).save(file, kind, **options)
    return file.getvalue()


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """24 files: JPEGs of each kind, some that torchcodec would turn or refuse, and two that nobody reads."""
    files = {k: encoded(k) for k in range(COUNT)}
    files |= {1: encoded(1, mode="L"), 2: encoded(2, progressive=True), 3: encoded(3, mode="CMYK")}
    files |= {4: encoded(4, "PNG"), 5: encoded(5, exif=turned()), 6: encoded(6)[:-9], 7: b"", 8: encoded(8) + b"more"}
    root = tmp_path / "images"
    (root / "a").mkdir(parents=True)
    for k, data in files.items():
        (root / "a" / f"{k:02}.jpg").write_bytes(data)
    return root


def opened(root: Path, engine: str = "torchcodec", source: str = "folder", **settings: Any) -> Loader:
    settings |= {"source": source, "root": str(root), "engine": engine, "max_corrupt": 0.2}
    config = LoaderConfig(batch_size=8, views=VIEWS, **settings)
    return build_loader(config, open_source(config, "train"), seed=1)


def epoch(loader: Loader) -> list[Batch]:
    loader.load_state_dict({"epoch": 0, "position": 0})
    return list(loader)


def assert_same(found: list[Batch], wanted: list[Batch]) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a.index, b.index) and torch.equal(a.label, b.label)
        for spec, x, y in zip(VIEWS, a.views, b.views, strict=True):  # two builds of libjpeg-turbo
            assert ((x - y) * torch.tensor(spec.std)[:, None, None]).abs().max() <= 2 / 255


def test_every_kind_of_file_is_what_the_native_engine_makes_of_it(folder: Path) -> None:
    needs_torchcodec()
    native, ours = opened(folder, "native"), opened(folder)
    assert_same(epoch(ours), epoch(native))
    assert ours.faults == native.faults and sorted(ours.faults) == [6, 7]
    assert isinstance(ours, TorchcodecLoader) and not ours.refused
    for loader in (native, ours):
        loader.close()
    assert not [t.name for t in threading.enumerate() if t.name.startswith("fastrdm-loader")]


def test_a_packed_folder(folder: Path, tmp_path: Path) -> None:
    needs_torchcodec()
    pack.main([str(folder), str(tmp_path / "packed"), "--workers", "1", "--max-bad", "0.1"])
    native, ours = (opened(tmp_path / "packed", name, "packed", order="windowed") for name in ("native", "torchcodec"))
    assert_same(epoch(ours), epoch(native))
    for loader in (native, ours):
        loader.close()


@pytest.fixture
def picky(folder: Path) -> Callable[[bytes], TorchcodecLoader]:
    """A loader whose decoder refuses every batch with certain bytes in it, as nvJPEG may; and counts them."""

    def make(bad: bytes, error: type[RuntimeError] = RuntimeError) -> TorchcodecLoader:
        needs_torchcodec()
        loader = opened(folder, workers=1)
        assert isinstance(loader, TorchcodecLoader)
        decode = loader.decode

        def refuse(jpegs: list[bytes], device: torch.device) -> list[torch.Tensor]:
            if bad in jpegs:
                raise error("not supported")
            return decode(jpegs, device=device)

        loader.decode = refuse
        return loader

    return make


def test_a_refused_image_is_decoded_on_the_host_and_costs_no_other(folder: Path, picky: Any) -> None:
    loader, native = picky(encoded(12)), opened(folder, "native")
    for _ in range(2):
        assert_same(epoch(loader), epoch(native))
        assert loader.refused == {12} and 12 not in loader.faults
    loader.close()
    native.close()


def test_a_refused_image_that_the_host_cannot_read_is_replaced(picky: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loader, bad = picky(encoded(12)), encoded(12)
    wanted = epoch(loader)

    def unreadable(data: bytes, name: str) -> Pixels:
        if data == bad:
            raise CorruptImage(f"{name}: damaged")
        return decode(data, name)

    monkeypatch.setattr(torchcodec, "decode", unreadable)
    loader.refused.clear()
    found = epoch(loader)
    loader.close()
    assert sorted(loader.faults) == [6, 7, 12] and loader.faults[12].endswith("12.jpg: damaged")
    for a, b in zip(found, wanted, strict=True):
        assert a.index.tolist() == [13 if k == 12 else k for k in b.index.tolist()]
        same = b.index != 12
        assert torch.equal(a.views[0][same], b.views[0][same])


def as_planes(jpegs: list[bytes], device: torch.device) -> list[torch.Tensor]:
    """The images (3, H, W) on a CPU in the memory layout that nvJPEG gives on a GPU."""
    return [torch.from_numpy(decode(data, "")).permute(2, 0, 1).contiguous() for data in jpegs]


@pytest.fixture
def as_on_a_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A loader with planes from the decoder and views from Triton, which its interpreter runs here."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torchcodec, "_decoder", lambda device: as_planes)
    monkeypatch.setattr(reference, "chosen", lambda name, device: name)
    loader: Any = opened(folder)
    loader.implementation = "triton"
    yield loader
    loader.close()


def test_views_of_planes_are_those_of_joined_pixels_bit_for_bit(as_on_a_gpu: Any, monkeypatch: Any) -> None:
    """JPEGs lie in planes, what the host decodes in pixels."""
    found = epoch(as_on_a_gpu)
    monkeypatch.setattr(torchcodec, "strided", ragged)
    for a, b in zip(found, epoch(as_on_a_gpu), strict=True):
        assert torch.equal(a.index, b.index) and all(map(torch.equal, a.views, b.views))


def test_a_batch_is_as_many_launches_whatever_its_number_of_images(as_on_a_gpu: Any, monkeypatch: Any) -> None:
    counted = pytest.importorskip("benchmarks.kernels.launches").launches
    monkeypatch.setattr(torchcodec, "sample_all_parameters", lambda specs, *_: torch.zeros(len(specs), 1, COLUMNS))
    loader = as_on_a_gpu
    jpegs, host = ([loader._encoded(k) for k in some] for some in (range(9, COUNT), (4, 5)))
    assert all(isinstance(image.data, torch.Tensor) for image in host)
    data = [image.data for image in jpegs]
    decoded = dict(zip(data, as_planes(data, loader.device), strict=True))
    loader.decode = lambda some, device: [decoded[one] for one in some]

    def launches(images: list[Any]) -> Any:
        return counted(lambda: loader._made(images, VIEWS, 0))

    few = launches(jpegs[:2])
    assert few == launches(jpegs) and few.count("_crop_kernel") == len(VIEWS)
    assert not {"cat", "clone", "copy_"} & set(few), few
    mixed = launches([*jpegs, *host])
    assert mixed == launches([*jpegs, *host * 8]) and mixed.count("cat") == 1, "what the host decoded is one copy"


def test_a_full_device_is_no_bad_image(picky: Any) -> None:
    loader = picky(encoded(12), torch.OutOfMemoryError)
    with pytest.raises(torch.OutOfMemoryError):
        epoch(loader)
    loader.close()


def test_too_many_faults_stop_the_run(folder: Path) -> None:
    needs_torchcodec()
    for k in range(9, 20):
        (folder / "a" / f"{k:02}.jpg").write_bytes(b"")
    loader = opened(folder)
    with pytest.raises(ValueError, match=r"of 24 images cannot be read, above loader\.max_corrupt=0\.2"):
        epoch(loader)
    loader.close()


def test_refused_without_jpegs(folder: Path, tmp_path: Path) -> None:
    pack.main([str(folder), str(tmp_path / "raw"), "--mode", "raw", "--size", "8", "--max-bad", "0.1"])
    for settings in ({"source": "digits"}, {"source": "packed", "root": str(tmp_path / "raw")}):
        config = LoaderConfig(engine="torchcodec", batch_size=8, **settings)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"loader\.engine=torchcodec takes JPEG files, packed or not, got \w+"):
            build_loader(config, open_source(config, "train"), seed=0)


def test_refused_without_torchcodec(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(
        ValueError, match=r"needs torchcodec 0\.16: pip install 'fastrdm\[torchcodec\]', or take native"
    ):
        opened(folder)


def test_a_decoder_that_does_not_work_here_is_told_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every image would be decoded on the host, without a word."""
    needs_torchcodec()

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("not compiled with nvJPEG")

    monkeypatch.setattr("torchcodec.decoders.decode_jpeg", fail)
    with pytest.raises(ValueError, match=r"loader\.engine=torchcodec does not decode on cpu: not compiled with nvJPEG"):
        opened(folder)
