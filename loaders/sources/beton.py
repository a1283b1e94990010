"""FFCV's file format: a set as one .beton file, written by ffcv's own writer, and the source that reads it.

images.beton    fields `image` (JPEG, as RGBImageField describes it) and `label`
classes.json    the names of the classes
"""

import json
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np

from fastrdm.loaders.sources.decode import CorruptImage
from fastrdm.loaders.sources.index_cache import stamp
from fastrdm.loaders.sources.packed import PackedSource
from fastrdm.loaders.sources.source import BetonImages, Source

BETON, CLASSES = "images.beton", "classes.json"
JPEG_MODE = 0  # of an image's entry in the file
MISSING = "needs ffcv: pip install 'fastrdm[ffcv]', after apt install libopencv-dev libturbojpeg0-dev pkg-config"


def check_ffcv(what: str) -> None:
    """ValueError that tells how to install ffcv, which `what` needs."""
    try:
        import ffcv  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{what} {MISSING}") from error


class _Entries:
    """Items for ffcv's writer: ((bytes, height, width), label) of each image."""

    def __init__(self, packed: PackedSource) -> None:
        self.packed = packed

    def __len__(self) -> int:
        return len(self.packed)

    def __getitem__(self, index: int) -> tuple[tuple[bytes, int, int], int]:
        data, _ = self.packed.fetch(index)
        size = self.packed.height.item(index), self.packed.width.item(index)
        return (data, *size), self.packed.labels.item(index)


def write_beton(packed: Path, out: Path, workers: int) -> None:
    """The images of a packed folder of mode jpeg, not encoded again, as folder `out`."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    source = PackedSource(packed)
    images = RGBImageField(write_mode="jpg")
    images.encode = MethodType(_store, images)
    out.mkdir(parents=True)
    DatasetWriter(str(out / BETON), {"image": images, "label": IntField()}, num_workers=workers).from_indexed_dataset(
        _Entries(source)
    )
    (out / CLASSES).write_text(json.dumps(source.classes))


def _store(_: Any, entry: Any, image: tuple[bytes, int, int], malloc: Any) -> None:
    """Replacement of ffcv's RGBImageField.encode that stores encoded bytes instead of compressing pixels."""
    data, entry["height"], entry["width"] = image
    entry["mode"] = JPEG_MODE
    entry["data_ptr"], memory = malloc(len(data))
    memory[:] = np.frombuffer(data, np.uint8)


class BetonSource(Source):
    """Images of a folder with a .beton file."""

    name = "packed"
    beton: BetonImages

    def __init__(self, root: Path) -> None:
        check_ffcv(f"loader.root={root}, with a .beton file,")
        from ffcv.reader import Reader

        self.path = root / BETON
        opened = stamp(self.path)
        reader = Reader(str(self.path))
        self.classes: list[str] = json.loads((root / CLASSES).read_text())
        entries = reader.metadata["f0"]
        self.labels = reader.metadata["f1"].astype(np.int64)
        self.height, self.width = entries["height"].astype(np.int64), entries["width"].astype(np.int64)
        self.start = entries["data_ptr"].astype(np.int64)
        by_start = np.argsort(reader.alloc_table["ptr"])
        place = np.searchsorted(reader.alloc_table["ptr"], self.start, sorter=by_start)
        self.bytes = reader.alloc_table["size"][by_start[place]].astype(np.int64)
        self.beton = BetonImages(self.path, opened, np.arange(len(self.labels)), self.height, self.width)
        if (entries["mode"] != JPEG_MODE).any():
            raise ValueError(f"{self.path} holds images that are no JPEGs: write it with fastrdm pack --format beton")
        self._file = np.memmap(self.path, np.uint8, "r")

    def fetch(self, index: int) -> tuple[bytes, str]:
        """The encoded image, and what to call it; raises CorruptImage."""
        start, name = self.start.item(index), f"{self.path}, image {index}"
        self.beton.check()
        data = self._file[start : start + self.bytes.item(index)].tobytes()
        if len(data) < self.bytes.item(index):
            raise CorruptImage(f"{name}: the file ends before it")
        return data, name
