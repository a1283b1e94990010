"""One shard of a packed folder: files decoded, put right and written one behind the other.

Runs as a process of its own that knows no torch and so starts fast: settings and then tasks come in as pickles of the
parent, progress and records go out as lines of JSON. It ends when its input does.
"""

import io
import json
import os
import pickle
import signal
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from fastrdm.files import sha256
from fastrdm.loaders.sources.decode import (
    FORMATS,
    JPEG_START,
    CorruptImage,
    Pixels,
    decode_any,
    decode_plain,
    new_pixels,
    orientation,
)
from fastrdm.loaders.sources.source import ReadTime, Source

LONGEST = 64  # a strip that is more times as long as wide is not resized as a whole
TRANSCODED, TURNED = 1, 2  # flags of an image in the index
TELL_EVERY = 32  # files
TURNS: dict[int, Callable[[Pixels], Pixels]] = {  # what puts an image of this EXIF orientation upright
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x.swapaxes(0, 1)[:, ::-1],
    7: lambda x: x.swapaxes(0, 1)[::-1, ::-1],
    8: lambda x: x.swapaxes(0, 1)[::-1],
}


class Settings(NamedTuple):
    """Settings that all shards of a pack share."""

    folder: str  # where shards go
    mode: str  # raw or jpeg
    size: int  # pixels a side, in mode raw
    exif: str  # ignore or apply


class Entry(NamedTuple):
    """Stored form of one image file."""

    data: bytes
    height: int
    width: int
    flags: int
    repairs: list[str]  # in words, what was done to it


def entry(data: bytes, name: str, settings: Settings) -> Entry:
    """Stored form of a file's bytes; raises CorruptImage."""
    pixels = decode_plain(data)
    plain = pixels is not None
    repairs, flags = [], 0
    if pixels is None:
        pixels = decode_any(data, name)
        repairs += _oddities(data, name, settings.mode)
    turn = orientation(data) if settings.exif == "apply" else 1
    if turn in TURNS:
        pixels, flags = TURNS[turn](pixels), TURNED
        repairs.append(f"turned upright, EXIF orientation {turn}")
    if settings.mode == "raw":
        pixels = center_square(pixels, settings.size)
        return Entry(pixels.tobytes(), settings.size, settings.size, flags, repairs)
    height, width = pixels.shape[:2]
    if plain and not flags:
        return Entry(data, height, width, 0, [])
    return _encoded(pixels, name, flags, repairs)


def _encoded(pixels: Pixels, name: str, flags: int, repairs: list[str]) -> Entry:
    """The entry of pixels in mode jpeg."""
    height, width = pixels.shape[:2]
    try:
        data = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=100, colorsubsampling="444")
    except ValueError as error:  # a side of more than 65,500 pixels
        raise CorruptImage(f"{name}: cannot be made a JPEG: {error}") from error
    return Entry(data, height, width, flags | TRANSCODED, repairs)


def center_square(pixels: Pixels, size: int) -> Pixels:
    """(size, size, 3): the short side resized with antialiasing, bicubic, and the center cut.

    As torchvision does it with PIL images, pixel by pixel, but for strips of more than LONGEST times their width.
    """
    height, width = pixels.shape[:2]
    tall, wide = (int(size * side / min(height, width)) for side in (height, width))
    top, left = round((tall - size) / 2), round((wide - size) / 2)
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if max(wide, tall) <= LONGEST * size:
        # The order in which Pillow takes rows and columns hangs on the whole size. With a box it may be the other one,
        # and what the cubic kernel overshoots is cut off elsewhere, by up to three levels.
        whole = image.resize((wide, tall), Image.Resampling.BICUBIC)
        return np.asarray(whole.crop((left, top, left + size, top + size)))
    box = (
        left * width / wide,
        top * height / tall,
        min((left + size) * width / wide, width),
        min((top + size) * height / tall, height),
    )
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def _oddities(data: bytes, name: str, mode: str) -> list[str]:
    """Repairs to report for a file that is no plain JPEG."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    kind, called = str(image.format), Path(name).suffix.lower()
    if data[:2] == JPEG_START:
        return ["CMYK turned into RGB" if image.mode == "CMYK" else "a JPEG with faults that do no harm, decoded"]
    if called in (".jpg", ".jpeg"):
        return [f"a {kind} by the name of a JPEG"]
    return [f"{kind} turned into JPEG"] if mode == "jpeg" else []


def entry_of(source: Source, index: int, settings: Settings) -> Entry:
    """Return the bytes to store for image `index`; raises CorruptImage."""
    name = source.key(index)
    if source.encoded:
        try:
            data, _ = source.fetch(index)
        except CorruptImage as error:
            # the reason without the path on this machine
            raise CorruptImage(f"{name}: {str(error).rpartition(': ')[2]}") from error
        return entry(data, name, settings)
    pixels = source.read_into(index, new_pixels, ReadTime())
    if settings.mode == "jpeg":
        return _encoded(pixels, name, 0, [])
    return Entry(center_square(pixels, settings.size).tobytes(), settings.size, settings.size, 0, [])


def write_shard(
    settings: Settings, number: int, source: Source, tell: Callable[[int, list[str]], None]
) -> dict[str, Any]:
    """Write shard `number` of the images of `source`; its record: rows of the index, seal, what was repaired, refused.

    `tell` gets the number of images done, and those refused, since it was last called.
    """
    raw = settings.mode == "raw"
    name = f"shards/{number:05}.{'npy' if raw else 'bin'}"
    partial = Path(settings.folder, f"{name}.partial")
    rows: list[list[int]] = []
    repaired: list[tuple[str, str]] = []
    refused: list[tuple[str, str]] = []
    told = 0, 0
    with partial.open("wb") as out:
        if raw:
            _write_header(out, 0, settings.size)
        for index in range(len(source)):
            key, label, done = source.key(index), int(source.labels[index]), index + 1
            try:
                stored = entry_of(source, index, settings)
                check = zlib.crc32(stored.data)
                size = len(stored.data)
                rows.append([number, stored.flags, out.tell(), size, check, stored.height, stored.width, label])
                out.write(stored.data)
                repaired += [(key, what) for what in stored.repairs]
            except CorruptImage as error:
                refused.append((key, str(error).removeprefix(f"{key}: ")))
            if done % TELL_EVERY == 0 or done == len(source):
                tell(done - told[0], [": ".join(pair) for pair in refused[told[1] :]])
                told = done, len(refused)
        if raw:
            out.seek(0)
            _write_header(out, len(rows), settings.size)
        out.flush()
        os.fsync(out.fileno())
    shard = partial.replace(partial.with_suffix(""))
    seal = {"bytes": shard.stat().st_size, "sha256": sha256(shard)}
    return {"shard": number, "name": name, **seal, "rows": rows, "repaired": repaired, "refused": refused}


def _write_header(out: IO[bytes], count: int, size: int) -> None:
    """NumPy's header for (count, size, size, 3) uint8; of one length for any count, so that it can be rewritten."""
    np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": (count, size, size, 3)})


def serve(tasks: IO[bytes], out: IO[str]) -> None:
    """Make the shards that `tasks` asks for, until it ends."""

    def send(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    settings: Settings = pickle.load(tasks)
    while True:
        try:
            shard, part = pickle.load(tasks)
        except EOFError:
            return
        try:
            source: Source = pickle.loads(part)
            send({"record": write_shard(settings, shard, source, lambda n, bad: send({"done": n, "bad": bad}))})
        except BrokenPipeError:
            raise
        except OSError as error:  # such as a full disk
            send({"error": str(error)})
        except Exception as error:  # a source of the user's own raises what it likes
            send({"error": f"{type(error).__name__}: {error}"})


def main() -> None:
    """Entry of the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes our input
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a module of the user's prints is no message of ours
    try:
        serve(sys.stdin.buffer, out)
    except BrokenPipeError:  # the parent was killed
        os._exit(1)
