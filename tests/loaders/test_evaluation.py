"""The center view against torchvision; every sample once, on any number of processes."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastrdm.loaders import evaluation
from fastrdm.loaders.evaluation import center_view, evaluation_batches
from fastrdm.loaders.sources.decode import CorruptImage, Pixels
from fastrdm.loaders.sources.open import open_source
from fastrdm.loaders.sources.source import Source
from fastrdm.loaders.spec import LoaderConfig, ViewSpec

PLAIN: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("shape", "size", "short"),
    [
        ((375, 500), 224, 256),
        ((500, 333), 112, 128),
        ((60, 61), 28, 32),
        ((32, 32), 28, 32),
        ((32, 32), 32, 32),
        ((28, 28), 32, 32),
        ((8, 8), 16, 16),
        ((9, 40), 16, 16),
        ((1, 1), 8, 8),
    ],
)
def test_center_view(mode: Any, shape: tuple[int, int], size: int, short: int) -> None:
    tv = pytest.importorskip("torchvision.transforms.v2.functional")
    images = torch.randint(0, 256, (2, *shape, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    x = images.permute(0, 3, 1, 2).float().div(255)
    x = tv.resize(x, [short], interpolation=tv.InterpolationMode(mode), antialias=True).clamp(0, 1)
    got = center_view(images, ViewSpec(size=size, interpolation=mode, **PLAIN))
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert (got - tv.center_crop(x, [size])).abs().max() < 3e-5


@pytest.mark.parametrize(("shape", "size"), [((40, 60), 224), ((32, 32), 32), ((500, 375), 224)])
@pytest.mark.parametrize("whole", [True, False])
def test_the_protocol_decides_and_not_the_size(shape: tuple[int, int], size: int, whole: bool) -> None:
    tv = pytest.importorskip("torchvision.transforms.v2.functional")
    images = torch.randint(0, 256, (2, *shape, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    x, short = images.permute(0, 3, 1, 2).float().div(255), size if whole else round(size * 256 / 224)
    x = tv.resize(x, [short], interpolation=tv.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    got = center_view(images, ViewSpec(size=size, **PLAIN), whole=whole)
    assert (got - tv.center_crop(x, [size])).abs().max() < 3e-5


def test_sets_by_name_are_shown_whole_and_photographs_are_cut(tmp_path: Path) -> None:
    assert open_source(LoaderConfig(), "test").whole_view and open_source(LoaderConfig(subset=20), "train").whole_view
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    assert not open_source(LoaderConfig(source="folder", root=str(tmp_path)), "train").whole_view


def test_small_sets_pass_unchanged() -> None:
    source = open_source(LoaderConfig(), "test")
    assert source.images is not None
    images = torch.from_numpy(source.images)
    spec = ViewSpec(size=8)
    wanted = images.permute(0, 3, 1, 2) / 255
    wanted = (wanted - torch.tensor(spec.mean)[:, None, None]) / torch.tensor(spec.std)[:, None, None]
    assert (center_view(images, spec) - wanted).abs().max() < 1e-6


class Ragged(Source):
    """25 images of different sizes that must be read one by one."""

    name, classes = "ragged", ["a"]
    labels = np.arange(25) % 4

    def __init__(self, bad: tuple[int, ...] = ()) -> None:
        self.bad = bad

    def __len__(self) -> int:
        return 25

    def read(self, index: int) -> Pixels:
        if index in self.bad:
            raise CorruptImage(f"{index}.jpg: cut short")
        return np.random.default_rng(index).integers(0, 256, (10 + index, 30 - index, 3), dtype=np.uint8)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("size", [4, 7, 400])
def test_every_sample_once(world: int, size: int) -> None:
    digits, spec = open_source(LoaderConfig(), "test"), ViewSpec(size=8)
    assert digits.images is not None
    for source, count in ((digits, 360), (Ragged(), 25)):
        found = [list(evaluation_batches(source, spec, size, rank=r, world=world)) for r in range(world)]
        views, index, label = (
            torch.cat(part) for part in zip(*(batch for rank in found for batch in rank), strict=True)
        )
        assert index.tolist() == list(range(count)) and label.tolist() == source.labels.tolist()
        assert max(len(batch[1]) for rank in found for batch in rank) <= size
        for i in (0, count // 2, count - 1):
            assert torch.equal(
                views[i], center_view(torch.from_numpy(source.read(i))[None], spec, whole=source.whole_view)[0]
            )


def test_dtype_and_layout() -> None:
    for source in (open_source(LoaderConfig(), "test"), Ragged()):
        full, *_ = next(iter(evaluation_batches(source, ViewSpec(size=8), 5)))
        half, *_ = next(iter(evaluation_batches(source, ViewSpec(size=8), 5, dtype=torch.bfloat16)))
        assert half.dtype == torch.bfloat16 and torch.equal(half, full.bfloat16())
        assert half.shape == (5, 3, 8, 8) and half.is_contiguous(memory_format=torch.channels_last)


def test_unreadable_images_are_left_out_and_noted() -> None:
    faults: dict[int, str] = {}
    batches = list(evaluation_batches(Ragged(bad=(0, 9)), ViewSpec(size=8), 10, faults=faults))
    assert torch.cat([index for _, index, _ in batches]).tolist() == [i for i in range(25) if i not in (0, 9)]
    assert [len(views) for views, _, _ in batches] == [10, 10, 3]
    assert faults == {0: "0.jpg: cut short", 9: "9.jpg: cut short"}
    with pytest.raises(CorruptImage, match=r"0\.jpg: cut short"):
        list(evaluation_batches(Ragged(bad=(0, 9)), ViewSpec(size=8), 10))


def test_for_a_gpu_threads_make_the_views_and_a_batch_is_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stand-in for a GPU: nothing is moved but whole batches, and the views are those of a CPU."""
    moves: list[tuple[int, ...]] = []
    monkeypatch.setattr(evaluation, "moved", lambda x, device: (moves.append(tuple(x.shape)), x)[1])
    source, spec = Ragged(), ViewSpec(size=8)
    found = list(evaluation_batches(source, spec, 10, device=torch.device("meta"), workers=2))
    monkeypatch.undo()
    wanted = list(evaluation_batches(source, spec, 10))
    assert [shape for shape in moves if len(shape) == 4] == [(10, 3, 8, 8), (10, 3, 8, 8), (5, 3, 8, 8)]
    assert [shape for shape in moves if len(shape) == 1] == [(10,), (10,), (5,)], "labels; indices stay on the host"
    for ours, theirs in zip(found, wanted, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_set_in_memory_goes_to_the_device_a_batch_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[tuple[int, ...]] = []
    monkeypatch.setattr(evaluation, "moved", lambda x, device: (moves.append(tuple(x.shape)), x)[1])
    digits = open_source(LoaderConfig(subset=25), "train")
    assert sum(len(x) for x, *_ in evaluation_batches(digits, ViewSpec(size=8), 10)) == 25
    assert [shape for shape in moves if len(shape) == 4] == [(10, 8, 8, 3), (10, 8, 8, 3), (5, 8, 8, 3)]


def test_reading_ahead_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images decoded and not yet handed out take no more than the limit, beside the one that is handed out."""
    started: list[int] = []

    class Large(Source):
        name, classes = "large", ["a"]
        labels = np.zeros(40, np.int64)

        def read(self, index: int) -> Pixels:
            started.append(index)
            return np.full((64, 64, 3), index, np.uint8)

    nbytes = 64 * 64 * 3
    for images in (1, 3):
        started.clear()
        monkeypatch.setattr(evaluation, "AHEAD_BYTES", images * nbytes)
        most = 0
        for number, _ in enumerate(evaluation_batches(Large(), ViewSpec(size=8), 1, workers=4)):
            time.sleep(0.005)  # threads could run far ahead meanwhile
            most = max(most, len(started) - number - 1)
        assert sorted(started) == list(range(40))
        assert 1 <= most <= images, f"{most} images ahead, and room for {images}"
