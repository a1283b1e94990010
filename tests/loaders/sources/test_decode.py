"""Decoding against Pillow, with the traps of large collections."""

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastrdm.loaders.sources.decode import FORMATS, CorruptImage, decode

PHOTO = np.add.outer(np.arange(24) * 5, np.arange(31) * 4)[..., None].repeat(3, axis=2).astype(np.uint8)
PHOTO[..., 1] = 255 - PHOTO[..., 1]


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def by_pillow(data: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("options", [{"quality": 75}, {"quality": 95, "subsampling": 0}, {"progressive": True}])
def test_jpeg(options: dict[str, Any]) -> None:
    data = encoded(Image.fromarray(PHOTO), "JPEG", **options)
    pixels = decode(data, "x")
    assert pixels.dtype == np.uint8 and pixels.shape == (24, 31, 3) and pixels.flags.writeable
    assert np.abs(pixels.astype(int) - by_pillow(data)).max() <= 1


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "RGB"])
def test_png_of_every_mode(mode: str) -> None:
    data = encoded(Image.fromarray(PHOTO).convert(mode), "PNG")
    np.testing.assert_array_equal(decode(data, "x.JPEG"), by_pillow(data))


def test_grey_jpeg() -> None:
    pixels = decode(encoded(Image.fromarray(PHOTO[..., 0]), "JPEG", quality=95), "x")
    assert pixels.shape == (24, 31, 3) and (pixels[..., 0] == pixels[..., 2]).all()
    assert np.abs(pixels[..., 0].astype(int) - PHOTO[..., 0]).max() < 10


def test_sixteen_bits_keep_their_range() -> None:
    deep = (PHOTO[..., 0].astype(np.uint16) << 8) + 77
    pixels = decode(encoded(Image.fromarray(deep), "PNG"), "x")
    np.testing.assert_array_equal(pixels, PHOTO[..., :1].repeat(3, axis=2))


def test_cmyk_jpeg_is_not_inverted() -> None:
    """Adobe's files, and Pillow's, store the inverse of the inks."""
    data = encoded(Image.fromarray(PHOTO).convert("CMYK"), "JPEG", quality=95)
    assert b"Adobe" in data and np.abs(decode(data, "x").astype(int) - PHOTO).mean() < 3


def test_exif_orientation_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(Image.fromarray(PHOTO), "JPEG", exif=exif), "x").shape == (24, 31, 3)


def test_bytes_behind_the_end_do_no_harm() -> None:
    data = encoded(Image.fromarray(PHOTO), "JPEG")
    np.testing.assert_array_equal(decode(data + b"trailing", "x"), decode(data, "x"))


def damaged_png() -> bytes:
    data = bytearray(PNG)
    data[data.index(b"IDAT") + 10] ^= 0xFF
    return bytes(data)


JPEG, PNG = encoded(Image.fromarray(PHOTO), "JPEG"), encoded(Image.fromarray(PHOTO), "PNG")
BAD = {
    "empty": b"",
    "cut": JPEG[: len(JPEG) * 2 // 3],
    "header only": JPEG[:20],
    "two bytes": JPEG[:2],
    "text": b"<html>404 Not Found</html>",
    "cut png": PNG[: len(PNG) // 2],
    "damaged png": damaged_png(),
    "noise": zlib.compress(bytes(range(256))) * 4,
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_image_is_named(kind: str) -> None:
    with pytest.raises(CorruptImage, match=r"^cats/7\.jpg: \S") as error:
        decode(BAD[kind], "cats/7.jpg")
    assert "\n" not in str(error.value) and "object at" not in str(error.value)


def test_a_file_that_would_start_a_program_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow draws PostScript by starting Ghostscript, whatever the file's name says."""
    program = tmp_path / "gs"
    program.write_text(f'#!/bin/sh\necho called >> {tmp_path}/called\n[ "$1" = --version ] && echo 10.0\nexit 0\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    drawing = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(CorruptImage, match=r"^a\.jpg: no image, or none of JPEG, PNG"):
        decode(drawing, "a.jpg")
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize("kind", ["PSD", "FITS", "WMF", "SPIDER", "IM", "XPM", "EPS", "GRIB", "HDF5", "BUFR"])
def test_only_formats_of_photographs_are_opened(kind: str) -> None:
    assert kind not in FORMATS


DEEP = {
    "float of 0 to 1": (np.linspace(0, 1, 600, dtype=np.float32).reshape(20, 30), "floating-point"),
    "32 bits": (np.arange(600, dtype=np.int32).reshape(20, 30) * 100, "32-bit integer"),
}


@pytest.mark.parametrize("what", DEEP)
def test_numbers_without_a_known_white_are_refused(what: str) -> None:
    pixels, reason = DEEP[what]
    with pytest.raises(CorruptImage, match=f"^x: .*{reason} pixels have no known black and white"):
        decode(encoded(Image.fromarray(pixels), "TIFF"), "x")


def test_sixteen_bits_of_every_format() -> None:
    deep = (PHOTO[..., 0].astype(np.uint16) << 8) + 77
    for kind in ("TIFF", "PPM", "PNG"):
        pixels = decode(encoded(Image.fromarray(deep), kind), "x")
        np.testing.assert_array_equal(pixels, PHOTO[..., :1].repeat(3, axis=2), err_msg=kind)


def claims(kind: str) -> bytes:
    """A small file whose header claims an image of a hundred million pixels and more."""
    if kind == "PNG":
        data = bytearray(PNG)
        data[16:24] = 2 * (13000).to_bytes(4, "big")
        data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    elif kind == "GIF":
        data = bytearray(encoded(Image.fromarray(PHOTO), "GIF"))
        data[6:10] = 2 * (13000).to_bytes(2, "little")
    elif kind == "GIF frame":
        data = bytearray(encoded(Image.fromarray(PHOTO), "GIF"))
        frame = data.rindex(b"\x2c\0\0\0\0")
        data[frame + 5 : frame + 9] = 2 * (13000).to_bytes(2, "little")
    elif kind.startswith("TIFF"):
        tags = {256: 13000, 257: 13000} if kind == "TIFF" else {256: 8, 257: 8, 322: 30000, 323: 30000, 324: 8}
        tags |= {258: 8, 259: 8, 262: 1, 277: 1, **({273: 8, 278: 13000, 279: 30} if kind == "TIFF" else {325: 30})}
        entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
        body = zlib.compress(bytes(1000))
        ifd = 8 + len(body)
        data = bytearray(b"II*\0" + ifd.to_bytes(4, "little") + body)
        data += len(tags).to_bytes(2, "little") + entries + bytes(4)
    else:
        data = bytearray(encoded(Image.fromarray(PHOTO), "WEBP", lossless=kind == "WEBP VP8L"))
        if kind == "WEBP VP8L":
            data[21:25] = (16382 | 10000 << 14).to_bytes(4, "little")
        elif kind == "WEBP VP8":
            data[26:30] = 2 * (13000).to_bytes(2, "little")
        else:
            canvas = b"VP8X" + (10).to_bytes(4, "little") + bytes(4) + 2 * (12999).to_bytes(3, "little")
            data[12:12] = canvas
            data[4:8] = (len(data) - 8).to_bytes(4, "little")
    return bytes(data)


CLAIMS = ("PNG", "GIF", "GIF frame", "TIFF", "TIFF tile", "WEBP VP8", "WEBP VP8L", "WEBP VP8X")
MEASURED = """
import resource, sys, pathlib
from fastrdm.loaders.sources.decode import CorruptImage, decode
for file in sys.argv[1:]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        raise SystemExit(f"{file}: {decode(pathlib.Path(file).read_bytes(), file).shape}")
    except CorruptImage as error:
        print(error)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 40_000, f"{file}: {grown} KiB"
"""


def test_headers_that_claim_too_much_cost_no_memory(tmp_path: Path) -> None:
    for kind in CLAIMS:
        (tmp_path / kind).write_bytes(claims(kind))
    command = [sys.executable, "-c", MEASURED, *(str(tmp_path / kind) for kind in CLAIMS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    for kind, line in zip(CLAIMS, done.stdout.splitlines(), strict=True):
        assert line.startswith(f"{tmp_path / kind}: ") and "bytes cannot hold the" in line, line


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF", "WEBP", "AVIF", "JPEG2000"])
def test_an_even_surface_is_no_damage(kind: str) -> None:
    image = Image.new("RGB", (2000, 2000), (9, 120, 200))
    options = {"compression": "tiff_adobe_deflate"} if kind == "TIFF" else {"lossless": True} if kind == "WEBP" else {}
    assert decode(encoded(image, kind, **options), "x").shape == (2000, 2000, 3)


LARGE = """
import io, sys
from PIL import Image
from fastrdm.loaders.sources.decode import decode
file = io.BytesIO()
Image.new("1", (10_000, 10_000)).save(file, "PNG")
print(decode(file.getvalue(), "large.png").shape)
"""


def test_a_large_image_within_bounds_is_read_without_a_warning() -> None:
    """Above 89 million pixels Pillow prints a warning that names no file."""
    done = subprocess.run([sys.executable, "-W", "default", "-c", LARGE], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("(10000, 10000, 3)\n", "")
