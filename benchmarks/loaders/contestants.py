"""Common parts of the contestants of benchmarks.loaders.throughput, and those of its table of decoders."""

import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from fastrdm.loaders.build import build_loader
from fastrdm.loaders.engines.native import NativeLoader
from fastrdm.loaders.sources.folder import FolderSource
from fastrdm.loaders.sources.open import open_source
from fastrdm.loaders.sources.packed import PackedSource
from fastrdm.loaders.spec import LoaderConfig, ViewSpec

BATCH = 250
CHUNK = 16  # images a task of the plain loops, as of the engine


class Setup(NamedTuple):
    """The data and the resources that every contestant gets."""

    folder: Path  # one folder of images a class, or CIFAR-10 as loader.root takes it
    packs: Path  # what is packed from it
    workers: int  # threads or processes
    device: torch.device


Batches = Iterator[tuple[Sequence[Tensor], Any]]  # finished views, and the numbers of their images
Epoch = Callable[[], Batches]  # one more epoch


class Contestant(NamedTuple):
    """A way of loading: how it is built, and whom it is compared with."""

    build: Callable[[Setup], Epoch]
    plain: str
    bar: float | None = None  # levels of 255 in the mean; None: it makes no views that could be compared
    own: bool = False  # draws its own parameters, so that means and spreads of its views are compared
    needs: tuple[str, ...] = ()  # modules that it imports beyond what fastrdm needs


def paths_of(folder: Path) -> list[Path]:
    """The files in the order of FolderSource."""
    return [folder / name for name in FolderSource(folder).files]


def tensor(data: bytes) -> Tensor:
    """The bytes as uint8."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


Decoder = Callable[[bytes], Any]  # encoded bytes to RGB pixels


def by_simplejpeg() -> Decoder:
    return lambda data: simplejpeg.decode_jpeg(data, "RGB")


def by_pillow() -> Decoder:
    return lambda data: np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def by_torchvision() -> Decoder:
    from torchvision.io import ImageReadMode, decode_jpeg

    return lambda data: decode_jpeg(tensor(data), ImageReadMode.RGB)


def by_opencv() -> Decoder:
    import cv2

    cv2.setNumThreads(0)
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    return lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), flags)


def by_torchcodec() -> Decoder:
    from torchcodec.decoders import ImageReadMode, decode_jpeg

    return lambda data: decode_jpeg(tensor(data), mode=ImageReadMode.RGB)


# What makes each decoder, and the module that it needs.
DECODERS: dict[str, tuple[Callable[[], Decoder], tuple[str, ...]]] = {
    "simplejpeg": (by_simplejpeg, ()),
    "pillow": (by_pillow, ()),
    "torchvision": (by_torchvision, ("torchvision",)),
    "opencv": (by_opencv, ("cv2",)),
    "torchcodec": (by_torchcodec, ("torchcodec.decoders",)),
}


def in_threads(work: Callable[[int], Any], count: int, workers: int) -> Epoch:
    """Epochs that call `work` for 0 to count - 1, some at a time in each thread, results dropped."""
    pool = ThreadPoolExecutor(workers)

    def task(start: int) -> None:
        for number in range(start, min(start + CHUNK, count)):
            work(number)

    def epoch() -> Batches:
        for done in [pool.submit(task, start) for start in range(0, count, CHUNK)]:
            done.result()
        yield (), range(count)

    return epoch


def loop(name: str, setup: Setup) -> Epoch:
    """Read a file, decode it, drop the result."""
    paths, decode = paths_of(setup.folder), DECODERS[name][0]()
    return in_threads(lambda k: decode(paths[k].read_bytes()), len(paths), setup.workers)


def kept(setup: Setup) -> Epoch:
    """Read a file, decode it by simplejpeg, and hold the images of two batches, as the engine does."""
    paths, held = paths_of(setup.folder), [None] * 2 * BATCH

    def work(k: int) -> None:
        held[k % len(held)] = simplejpeg.decode_jpeg(paths[k].read_bytes(), "RGB")

    return in_threads(work, len(paths), setup.workers)


def decoded(source: str, mode: str, setup: Setup) -> Epoch:
    """The native engine up to where views are cut."""
    root = setup.folder if source == "folder" else setup.packs / mode
    config = LoaderConfig(
        source=source, root=str(root), batch_size=BATCH, workers=setup.workers, views=(ViewSpec(), ViewSpec())
    )
    loader = build_loader(config, open_source(config, "train"), seed=0)
    assert isinstance(loader, NativeLoader)

    def epoch() -> Batches:
        loader.load_state_dict({"epoch": loader.epoch + 1, "position": 0})
        for pending in loader.decoded():
            yield (), pending.slot.images().offset
            loader.ring.give(pending.slot)

    return epoch


def copies(setup: Setup, private: bool) -> Epoch:
    """Each square once in random order to a batch, from the mapped shards or from memory of our own."""
    raw = PackedSource(setup.packs / "raw")
    mapped = [np.load(path, mmap_mode="r") for path in raw.paths]
    starts = [mapped[raw.shards[k]].offset for k in range(len(raw))]
    rows = [(raw.shards[k], (raw.offset[k] - starts[k]) // raw.length[k]) for k in range(len(raw))]
    shards = [np.asarray(shard) for shard in mapped]
    order, batch = np.random.default_rng(0).permutation(len(raw)), np.zeros((len(raw), 256, 256, 3), np.uint8)
    memory = np.concatenate(shards) if private else None

    def work(k: int) -> None:
        if memory is not None:
            batch[k] = memory[order[k]]
        else:
            shard, row = rows[order[k]]
            batch[k] = shards[shard][row]

    return in_threads(work, len(raw), setup.workers)


def decode_table() -> dict[str, Contestant]:
    """Files to decoded images."""
    plain, copied = "loop simplejpeg", "copy from the mapped shards"
    table = {
        f"loop {name}": Contestant(partial(loop, name), plain, needs=needs) for name, (_, needs) in DECODERS.items()
    }
    table["loop simplejpeg kept"] = Contestant(kept, plain)
    table["engine files"] = Contestant(partial(decoded, "folder", ""), plain)
    table["engine packed jpeg"] = Contestant(partial(decoded, "packed", "jpeg"), plain)
    table[copied] = Contestant(partial(copies, private=False), copied)
    table["copy from private memory"] = Contestant(partial(copies, private=True), copied)
    table["engine packed raw 256"] = Contestant(partial(decoded, "packed", "raw"), copied)
    return table
