"""Damaged files: an error or the right pixels, never a crash, a hang or a pixel that was not packed."""

import io
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastrdm.loaders.packing.pack import main
from fastrdm.loaders.sources.decode import CorruptImage, decode
from fastrdm.loaders.sources.packed import PackedSource

LONGEST = 5.0  # seconds for one damaged file, on a busy machine


def damaged(data: bytes, random: np.random.Generator) -> bytes:
    """The bytes cut short, with some bits flipped, with a part overwritten, doubled or left out."""
    out = bytearray(data)
    kind, at = random.integers(5), int(random.integers(len(out)))
    reach = at + int(random.integers(1, 40))
    if kind == 0:
        del out[at:]
    elif kind == 1:
        for place in random.integers(len(out), size=random.integers(1, 5)):
            out[place] ^= 1 << int(random.integers(8))
    elif kind == 2:
        out[at:reach] = random.bytes(len(out[at:reach]))
    elif kind == 3:
        out[at:at] = out[at:reach]
    else:
        del out[at:reach]
    return bytes(out)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fuzz") / "images"
    (root / "a").mkdir(parents=True)
    coarse = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    for k in range(5):
        Image.fromarray(coarse).resize((20 + k, 24 - k), Image.Resampling.BICUBIC).save(root / "a" / f"{k}.jpg")
    return root


def check_pack(images: Path, tmp_path: Path, mode: str, mutations: int) -> None:
    root = tmp_path / mode
    main([str(images), str(root), "--labels", "folders", "--mode", mode, "--size", "16", "--workers", "1"])
    source = PackedSource(root)
    expected = [source.read(k) for k in range(5)]
    files = sorted(path for path in root.rglob("*") if path.is_file())
    assert len(files) == 3
    random, refused, survived = np.random.default_rng(1), 0, 0
    for k in range(mutations):
        path = files[k % 3]
        whole = path.read_bytes()
        path.write_bytes(damaged(whole, random))
        began = time.monotonic()
        try:
            source = PackedSource(root)
        except ValueError as error:
            assert path.name in str(error)
            refused += 1
        else:
            assert source.classes == ["a"] and source.labels.tolist() == [0] * 5
            for number, pixels in enumerate(expected):
                try:
                    np.testing.assert_array_equal(source.read(number), pixels)
                except CorruptImage as error:
                    assert f"image {number}: not the bytes" in str(error)
                else:
                    survived += 1
        assert time.monotonic() - began < LONGEST
        path.write_bytes(whole)
    assert refused > mutations / 2 and survived > 0
    shutil.rmtree(root)


def encodings() -> list[bytes]:
    """One image in each kind of file that sets hold."""
    coarse = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((40, 33), Image.Resampling.BICUBIC)
    kinds = [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("JPEG", {"subsampling": 0, "optimize": True})]
    out = []
    for picture, kind, options in [(image, *k) for k in kinds] + [(image.convert("CMYK"), "JPEG", {})]:
        file = io.BytesIO()
        picture.save(file, kind, **options)
        out.append(file.getvalue())
    return out


def check_decoder(mutations: int) -> None:
    random, whole = np.random.default_rng(2), encodings()
    refused = 0
    for k in range(mutations):
        data = damaged(whole[k % len(whole)], random)
        began = time.monotonic()
        try:
            pixels = decode(data, "x")
            assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.size > 0
        except CorruptImage as error:
            assert str(error).startswith("x: ")
            refused += 1
        assert time.monotonic() - began < LONGEST
    assert refused > mutations / 3


@pytest.mark.parametrize("mode", ["jpeg", "raw"])
def test_packs(images: Path, tmp_path: Path, mode: str) -> None:
    check_pack(images, tmp_path, mode, 600)


def test_decoder() -> None:
    check_decoder(800)


@pytest.mark.parametrize("side", [60_000, 12_000])
def test_a_header_that_claims_too_much_costs_no_memory(side: int) -> None:
    data = bytearray(encodings()[0])
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = 2 * side.to_bytes(2, "big")
    with pytest.raises(CorruptImage, match=r"^x: (\d+ bytes cannot hold|Image size .* exceeds limit)"):
        decode(bytes(data), "x", lambda height, width: pytest.fail(f"{height} x {width} pixels were asked for"))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["jpeg", "raw"])
def test_packs_at_length(images: Path, tmp_path: Path, mode: str) -> None:
    check_pack(images, tmp_path, mode, 6000)


@pytest.mark.slow
def test_decoder_at_length() -> None:
    check_decoder(8000)
