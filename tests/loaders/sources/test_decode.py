"""Decoding against Pillow, with the traps of large collections."""

import io
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastrdm.loaders.sources.decode import CorruptImage, decode

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
