"""One shard of a packed folder: files decoded, put right and written one behind the other.

Runs as a process of its own, `python -m fastrdm.loaders.shards`, that knows no torch and so starts fast: settings and
then tasks come in as lines of JSON, progress and records go out likewise. It ends when its input does.
"""

import io
import json
import os
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
    orientation,
)

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

    source: str  # folder of the files
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


def write_shard(
    settings: Settings, number: int, files: list[tuple[str, int]], tell: Callable[[int, int], None]
) -> dict[str, Any]:
    """Write shard `number` of (file, label) pairs; its record: rows of the index, seal, what was repaired and refused.

    `tell` gets the number of files done, and refused, since it was last called.
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
        for done, (file, label) in enumerate(files, start=1):
            try:
                stored = entry(_read(Path(settings.source, file), file), file, settings)
                check = zlib.crc32(stored.data)
                size = len(stored.data)
                rows.append([number, stored.flags, out.tell(), size, check, stored.height, stored.width, label])
                out.write(stored.data)
                repaired += [(file, what) for what in stored.repairs]
            except CorruptImage as error:
                refused.append((file, str(error).removeprefix(f"{file}: ")))
            if done % TELL_EVERY == 0 or done == len(files):
                tell(done - told[0], len(refused) - told[1])
                told = done, len(refused)
        if raw:
            out.seek(0)
            _write_header(out, len(rows), settings.size)
        out.flush()
        os.fsync(out.fileno())
    shard = partial.replace(partial.with_suffix(""))
    seal = {"bytes": shard.stat().st_size, "sha256": sha256(shard)}
    return {"shard": number, "name": name, **seal, "rows": rows, "repaired": repaired, "refused": refused}


def _read(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CorruptImage(f"{name}: {error.strerror}") from error


def _write_header(out: IO[bytes], count: int, size: int) -> None:
    """NumPy's header for (count, size, size, 3) uint8; of one length for any count, so that it can be rewritten."""
    np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": (count, size, size, 3)})


def serve(lines: IO[str], out: IO[str]) -> None:
    """Make the shards that `lines` ask for, until they end."""

    def send(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    settings = Settings(**json.loads(lines.readline()))
    for line in lines:
        task = json.loads(line)
        try:
            files = task["files"]
            send({"record": write_shard(settings, task["shard"], files, lambda n, bad: send({"done": n, "bad": bad}))})
        except OSError as error:  # such as a full disk
            send({"error": str(error)})


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes our input
    try:
        serve(sys.stdin, sys.stdout)
    except BrokenPipeError:  # the parent was killed
        os._exit(1)
