"""CIFAR-10 as lossless tiles in a few tar files, for a machine that takes small files only.

    python -m benchmarks.tiles pack FOLDER OUT --pieces 2
    python -m benchmarks.tiles unpack OUT FOLDER

FOLDER holds what `loader.root` takes: train and test images (N, S, S, 3) uint8 and labels as .npy, and classes.json. A
tile is a WebP of 100 images, which keeps every pixel. Pieces are OUT/piece0.tar and so on. All must be there to unpack.
"""

import io
import tarfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks import common

SIDE = 10  # images across a tile
SPLITS = ("train", "test")
Pixels = NDArray[np.uint8]


def tile(images: Pixels) -> bytes:
    """At most SIDE^2 images (n, S, S, 3) as one lossless WebP; places that are left over are black."""
    count, size = images.shape[:2]
    whole = np.zeros((SIDE * SIDE, size, size, 3), np.uint8)
    whole[:count] = images
    rows = whole.reshape(SIDE, SIDE, size, size, 3).swapaxes(1, 2).reshape(SIDE * size, SIDE * size, 3)
    file = io.BytesIO()
    Image.fromarray(rows).save(file, "WEBP", lossless=True, method=4)
    return file.getvalue()


def images_of(data: bytes) -> Pixels:
    """The images (SIDE^2, S, S, 3) of a tile."""
    rows = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    size = len(rows) // SIDE
    return rows.reshape(SIDE, size, SIDE, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)


def pack(folder: Path, out: Path, pieces: int) -> list[Path]:
    """Write the tar files and return their paths; labels and classes lie in the first."""
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"piece{number}.tar" for number in range(pieces)]
    with ExitStack() as held:
        files = [held.enter_context(tarfile.open(path, "w")) for path in paths]
        _fill(files, folder)
    return paths


def _fill(files: Sequence[tarfile.TarFile], folder: Path) -> None:
    """Write tiles in turn to the files."""
    for name in ("classes.json", *(f"{split}.labels.npy" for split in SPLITS)):
        files[0].add(folder / name, name)
    number = 0
    for split in SPLITS:
        images = np.load(folder / f"{split}.images.npy", mmap_mode="r")
        for start in range(0, len(images), SIDE * SIDE):
            data = tile(np.asarray(images[start : start + SIDE * SIDE]))
            entry = tarfile.TarInfo(f"{split}.{start}.webp")
            entry.size = len(data)
            files[number % len(files)].addfile(entry, io.BytesIO(data))
            number += 1


def unpack(out: Path, folder: Path) -> None:
    """Write the folder that `pack` was given. ValueError where a piece is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    tiles: dict[str, Pixels] = {}
    for path in sorted(out.glob("piece*.tar")):
        with tarfile.open(path) as file:
            for entry in file:
                content = file.extractfile(entry)
                assert content is not None
                data = content.read()
                if entry.name.endswith(".webp"):
                    tiles[entry.name] = images_of(data)
                else:
                    (folder / Path(entry.name).name).write_bytes(data)
    for split in SPLITS:
        count = len(np.load(folder / f"{split}.labels.npy")) if (folder / f"{split}.labels.npy").exists() else -1
        names = [f"{split}.{start}.webp" for start in range(0, max(count, 1), SIDE * SIDE)]
        missing = [name for name in names if name not in tiles]
        if count < 0 or missing:
            raise ValueError(f"{out} must hold all pieces, {len(missing)} tiles of {split} are missing")
        np.save(folder / f"{split}.images.npy", np.concatenate([tiles[name] for name in names])[:count])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("action", choices=("pack", "unpack"))
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--pieces", type=int, default=2)
    args = parser.parse_args(arguments)
    if args.action == "unpack":
        unpack(args.source, args.target)
        return
    for path in pack(args.source, args.target, args.pieces):
        print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
