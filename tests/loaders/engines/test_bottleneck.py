"""What training waits for is told in words, from measured times alone."""

import time

import numpy as np
import pytest

from fastrdm.loaders.build import build_loader
from fastrdm.loaders.engines import bottleneck
from fastrdm.loaders.engines.bottleneck import Diagnosis
from fastrdm.loaders.sources.decode import Allocate, Pixels
from fastrdm.loaders.sources.packed import PackedSource
from fastrdm.loaders.sources.source import ReadTime
from fastrdm.loaders.spec import LoaderConfig, ViewSpec


def told(watch: Diagnosis, *, waited: float, read: float, decode: float, images: int = 1000) -> str | None:
    """What is said after 20 seconds of these."""
    watch.add(ReadTime(read, decode), images)
    watch.waited, watch.began = waited, time.perf_counter() - 20
    return watch.describe()


def test_every_state_is_told_once() -> None:
    watch = Diagnosis(workers=2, total_bytes=144_000_000_000)
    assert told(watch, waited=1, read=4, decode=30) is None, "it keeps up"
    said = told(watch, waited=12, read=4, decode=30)
    assert said and said.startswith("data: training waits 60 % of its time for decoding (30.0 ms an image and thread)")
    assert "(2 now, " in said and "--mode raw" in said
    assert told(watch, waited=12, read=4, decode=30) is None, "nothing new"
    assert told(watch, waited=0, read=4, decode=30) == "data: loading keeps up with training again"
    said = told(watch, waited=10, read=32, decode=4)
    assert said and "takes 32.0 ms to read and took 4.0 ms before" in said
    assert "the set of 144 GB no longer fits the page cache (" in said and "loader.order=windowed" in said
    said = told(watch, waited=10, read=2, decode=4)
    assert said and "the loading threads idle meanwhile" in said and "loader.prefetch_mb" in said


def test_storage_that_was_never_fast_is_slow() -> None:
    said = told(Diagnosis(workers=2), waited=10, read=32, decode=4)
    assert said and "for storage: 32.0 ms to read an image, 4.0 ms to decode it. Copy the set to a local disk" in said


def test_short_times_are_not_judged() -> None:
    watch = Diagnosis(workers=1)
    watch.add(ReadTime(1.0, 1.0), 10)
    watch.waited = 5.0
    assert watch.describe() is None and watch.images == 10


class Disk(PackedSource):
    """20 images; reading one takes `seconds`, decoding almost none."""

    name, classes, labels, side, stored_bytes = "disk", ["a"], np.zeros(20, np.int64), None, 144_000_000_000

    def __init__(self) -> None:
        self.seconds = 0.0

    def read_into(self, index: int, allocate: Allocate, spent: ReadTime) -> Pixels:
        began = time.perf_counter()
        time.sleep(self.seconds)
        spent.read += time.perf_counter() - began
        pixels = allocate(4, 4)
        pixels[...] = index
        return pixels


def test_a_source_that_slows_down_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bottleneck, "MIN_SECONDS", 0.0)
    source = Disk()
    loader = build_loader(LoaderConfig(batch_size=10, views=(ViewSpec(size=4),) * 2), source, seed=0)
    said = []
    for epoch, seconds in enumerate((0.002, 0.05)):
        source.seconds = seconds
        loader.set_epoch(epoch)
        assert len(list(loader)) == 2
        said.append(loader.diagnosis())
    loader.close()
    assert said[1] and "the set of 144 GB no longer fits the page cache" in said[1]
