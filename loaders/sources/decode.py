"""Encoded bytes -> RGB pixels, or the reason why not."""

import io
from collections.abc import Callable

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from fastrdm.errors import RunError

Pixels = NDArray[np.uint8]
Allocate = Callable[[int, int], Pixels]  # (height, width) -> the array (height, width, 3) that takes the pixels

JPEG_START = b"\xff\xd8"
MOST_PIXELS = 178_956_970  # an image that claims more is damaged, for Pillow too
ORIENTATION = 0x0112  # EXIF tag
PIXELS_A_BYTE = 1024  # twice what the sparsest JPEG has: a damaged header must not cost gigabytes


class CorruptImage(RunError, ValueError):
    """An image that cannot be decoded; the message names the file and the reason."""


def new_pixels(height: int, width: int) -> Pixels:
    """New memory for an image."""
    return np.empty((height, width, 3), np.uint8)


def decode(data: bytes, name: str, allocate: Allocate = new_pixels) -> Pixels:
    """(H, W, 3) uint8 of any file Pillow reads; gray, palette, alpha, CMYK as RGB, EXIF orientation ignored.

    JPEGs go through simplejpeg, about 1.3 times as fast as Pillow; what it refuses, Pillow judges.
    Raises CorruptImage naming the file and the reason; `allocate` may then have been asked in vain.
    """
    pixels = decode_plain(data, allocate)
    if pixels is None:
        judged = decode_any(data, name)
        pixels = allocate(*judged.shape[:2])
        pixels[...] = judged
    return pixels


def decode_plain(data: bytes, allocate: Allocate = new_pixels) -> Pixels | None:
    """The pixels of a gray or YCbCr JPEG in which libjpeg-turbo finds no fault, else None."""
    size = plain_size(data)
    if size is None:
        return None
    try:
        return simplejpeg.decode_jpeg(data, "RGB", buffer=allocate(*size))  # type: ignore[no-any-return]
    except ValueError:
        return None


def plain_size(data: bytes) -> tuple[int, int] | None:
    """Height and width of a gray or YCbCr JPEG by its header, None for anything else."""
    if data[:2] != JPEG_START:
        return None
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if colors in ("CMYK", "YCCK") or height * width > min(MOST_PIXELS, PIXELS_A_BYTE * len(data)):
        return None
    return height, width


def decode_any(data: bytes, name: str) -> Pixels:
    """RGB pixels of an image that Pillow reads, also of a JPEG with harmless faults; raises CorruptImage."""
    if not data:
        raise CorruptImage(f"{name}: the file is empty")
    try:
        image = Image.open(io.BytesIO(data))
        if image.format == "JPEG" and image.width * image.height > PIXELS_A_BYTE * len(data):
            raise ValueError(f"{len(data)} bytes cannot hold the {image.width} x {image.height} pixels that it claims")
        if image.mode.startswith("I;16"):
            return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=2)
        return np.array(image.convert("RGB"))
    except UnidentifiedImageError as error:
        raise CorruptImage(f"{name}: no kind of image that Pillow knows") from error
    except Exception as error:  # Pillow's readers raise whatever their format runs into
        raise CorruptImage(f"{name}: {error}") from error


def orientation(data: bytes) -> int:
    """The EXIF orientation, 1 (upright) without or where it cannot be read."""
    try:
        return int(Image.open(io.BytesIO(data)).getexif().get(ORIENTATION, 1))
    except Exception:  # EXIF blocks are often broken, and the image is good all the same
        return 1
