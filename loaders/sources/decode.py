"""Encoded bytes -> RGB pixels, or the reason why not."""

import errno
import io
import warnings
from collections.abc import Callable

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from fastrdm.errors import RunError

# Pillow warns of images above half of MOST_PIXELS. What an image may claim is decided here, by its bytes.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

Pixels = NDArray[np.uint8]
Allocate = Callable[[int, int], Pixels]  # (height, width) -> the array (height, width, 3) that takes the pixels

JPEG_START = b"\xff\xd8"
MOST_BYTES = 1 << 30  # of one file: what is larger is no image
MOST_PIXELS = 178_956_970  # an image that claims more is damaged, for Pillow too
ORIENTATION = 0x0112  # EXIF tag
TILE_WIDTH, TILE_LENGTH = 322, 323  # TIFF tags
PIXELS_A_BYTE = 1024  # twice what the sparsest JPEG has: a damaged header must not cost gigabytes
# Other formats pack even surfaces tighter: an image may claim FREE_PIXELS, or so many a byte. No PNG or TIFF made with
# deflate has more than 8 x 1032.
FREE_PIXELS, OTHER_PIXELS_A_BYTE = 1 << 22, 8256
# A closed list: among Pillow's other readers are some that start programs (EPS: Ghostscript).
FORMATS = ("JPEG", "PNG", "BMP", "DIB", "GIF", "PPM", "TIFF", "WEBP", "AVIF", "JPEG2000")


class CorruptImage(RunError, ValueError):
    """An image that cannot be decoded; the message names the file and the reason."""


def blame_the_image(error: CorruptImage) -> None:
    """Raise the error behind `error` where it is the machine's, such as too many open files: no image is at fault."""
    cause = error.__cause__
    if isinstance(cause, OSError) and cause.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        raise cause


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
        with _opened(data) as image:
            return _rgb(image)
    except UnidentifiedImageError as error:
        raise CorruptImage(f"{name}: no image, or none of {', '.join(FORMATS)}") from error
    except (Exception, MemoryError) as error:  # Pillow's readers raise whatever their format runs into
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CorruptImage(f"{name}: {reason}") from error


def _opened(data: bytes) -> Image.Image:
    """The image with its header read, whose claim of pixels its bytes can hold."""
    if data[:4] == b"RIFF":
        _believe(*_webp_canvas(data), data, "WEBP")  # Pillow makes room for it before it is asked for pixels
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    _believe(image.width, image.height, data, str(image.format))
    tags = getattr(image, "tag_v2", {})  # a TIFF's tiles may be larger than the image
    _believe(int(tags.get(TILE_WIDTH, 0)), int(tags.get(TILE_LENGTH, 0)), data, "TIFF")
    return image


def _believe(width: int, height: int, data: bytes, kind: str) -> None:
    most = PIXELS_A_BYTE * len(data) if kind in ("JPEG", "MPO") else max(FREE_PIXELS, OTHER_PIXELS_A_BYTE * len(data))
    if width * height > most:
        raise ValueError(f"{len(data)} bytes cannot hold the {width} x {height} pixels that it claims")


def _webp_canvas(data: bytes) -> tuple[int, int]:
    """Width and height in the header of a WebP file, (0, 0) where it has none that is known."""
    kind, body = data[12:16], data[20:30]
    if kind == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF


def _rgb(image: Image.Image) -> Pixels:
    """8 bits a channel; of 16 the high ones. ValueError for numbers whose range for black to white nobody knows."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode in ("I", "F"):
        kind = "floating-point" if image.mode == "F" else "signed or 32-bit integer"
        raise ValueError(f"{kind} pixels have no known black and white: store them in 8 or 16 bits, unsigned")
    return np.array(image.convert("RGB"))


def orientation(data: bytes) -> int:
    """The EXIF orientation, 1 (upright) without or where it cannot be read."""
    try:
        with _opened(data) as image:
            return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # EXIF blocks are often broken, and the image is good all the same
        return 1
