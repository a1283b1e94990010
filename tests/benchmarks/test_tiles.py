"""Tiles keep every pixel, in any number of pieces, and a missing piece is named."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import tiles

pytest.importorskip("PIL.WebPImagePlugin")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    drawn, root = np.random.default_rng(0), tmp_path / "images"
    root.mkdir()
    (root / "classes.json").write_text('["a", "b"]')
    for split, count in (("train", 230), ("test", 40)):
        np.save(root / f"{split}.images.npy", drawn.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8))
        np.save(root / f"{split}.labels.npy", drawn.integers(0, 2, count))
    return root


@pytest.mark.parametrize("pieces", [1, 3])
def test_every_pixel_comes_back(folder: Path, tmp_path: Path, pieces: int) -> None:
    assert len(tiles.pack(folder, tmp_path / "out", pieces)) == pieces
    tiles.unpack(tmp_path / "out", tmp_path / "back")
    assert sorted(p.name for p in (tmp_path / "back").iterdir()) == sorted(p.name for p in folder.iterdir())
    for path in folder.glob("*.npy"):
        assert np.array_equal(np.load(path), np.load(tmp_path / "back" / path.name)), path.name


def test_a_missing_piece_is_named(folder: Path, tmp_path: Path) -> None:
    first, second = tiles.pack(folder, tmp_path / "out", 2)
    second.unlink()
    with pytest.raises(ValueError, match="must hold all pieces, 1 tiles of train are missing"):
        tiles.unpack(first.parent, tmp_path / "back")
