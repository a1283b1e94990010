"""Threads: faults are replaced, counted, named and limited; errors arrive; nothing is left running."""

import itertools
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastrdm.loaders.build import build_loader
from fastrdm.loaders.engines.native import NativeLoader, TritonViews
from fastrdm.loaders.engines.threads import start_threads
from fastrdm.loaders.sources.decode import CorruptImage, Pixels
from fastrdm.loaders.sources.source import Source
from fastrdm.loaders.spec import Batch, Loader, LoaderConfig, ViewSpec

VIEWS = (ViewSpec(size=4), ViewSpec(size=4))


class Numbers(Source):
    """40 images, each of its own color; some cannot be read, one is a bug."""

    name, classes = "numbers", ["a"]
    labels = np.arange(40)

    def __init__(self, bad: tuple[int, ...] = (), bug: int = -1, wait: float = 0.0) -> None:
        self.bad, self.bug, self.wait = bad, bug, wait
        self.reads: list[int] = []

    def __len__(self) -> int:
        return 40

    def read(self, index: int) -> Pixels:
        self.reads.append(index)
        time.sleep(self.wait)
        if index in self.bad:
            raise CorruptImage(f"{index}.jpg: cut short")
        if index == self.bug:
            raise ZeroDivisionError("a bug of the source")
        return np.full((5, 7, 3), index, np.uint8)


def opened(source: Numbers, **settings: float) -> Loader:
    config = LoaderConfig(batch_size=10, views=VIEWS, **settings)  # type: ignore[arg-type]
    return build_loader(config, source, seed=0)


def images_of(batch: Batch) -> dict[int, torch.Tensor]:
    return {int(i): batch.views[0][k] for k, i in enumerate(batch.index)}


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("fastrdm-loader")]


@pytest.mark.parametrize("workers", [1, 4])
def test_a_corrupt_image_is_replaced_by_the_next_one(workers: int) -> None:
    clean, faulty = opened(Numbers()), opened(Numbers(bad=(3, 4, 39)), max_corrupt=0.1, workers=workers)
    expected = {i: view for batch in clean for i, view in images_of(batch).items()}
    stand_in = {3: 5, 4: 5, 39: 0}
    for good, batch in zip(clean_again(clean), faulty, strict=True):
        assert batch.index.tolist() == [stand_in.get(i, i) for i in good.index.tolist()]
        assert torch.equal(batch.label, batch.index)
        assert all(torch.equal(view, expected[i]) for i, view in images_of(batch).items())
    assert faulty.faults == {i: f"{i}.jpg: cut short" for i in (3, 4, 39)}
    for loader in (clean, faulty):
        loader.close()


def clean_again(loader: Loader) -> Loader:
    loader.load_state_dict({"epoch": 0, "position": 0})
    return loader


def test_a_known_fault_is_not_read_again() -> None:
    source = Numbers(bad=(3,))
    loader = opened(source, max_corrupt=0.1)
    for epoch in range(3):
        loader.set_epoch(epoch)
        assert len(list(loader)) == 4
    assert source.reads.count(3) == 1
    loader.close()


def test_too_many_faults_stop_the_run() -> None:
    loader = opened(Numbers(bad=(3, 4, 5)), max_corrupt=0.05)  # 2 of 40 are tolerated
    with pytest.raises(
        ValueError, match=r"3 of 40 images cannot be read, above loader\.max_corrupt=0\.05; .*cut short"
    ):
        list(loader)
    loader.close()


def test_a_broken_disk_is_not_read_to_the_end() -> None:
    source = Numbers(bad=tuple(range(40)))
    loader = opened(source, max_corrupt=0.05, workers=1)
    for _ in range(2):
        with pytest.raises(ValueError, match="3 of 40 images cannot be read"):
            list(loader)
    assert len(source.reads) == 3
    loader.close()


def test_no_readable_image_at_all() -> None:
    loader = opened(Numbers(bad=tuple(range(40))), max_corrupt=1.0)
    with pytest.raises(ValueError, match="40 of 40 images cannot be read"):
        list(loader)
    loader.close()


def test_what_a_thread_raises_reaches_the_loop() -> None:
    loader = opened(Numbers(bug=7))
    with pytest.raises(ZeroDivisionError, match="a bug of the source"):
        list(loader)
    loader.close()
    assert threads() == []


def test_close_leaves_no_thread_and_does_not_finish_the_work() -> None:
    source, other = Numbers(wait=0.01), opened(Numbers(), workers=3)
    loader = opened(source, workers=1, prefetch=4)
    assert len(threads()) == 4
    iterator = iter(loader)
    next(iterator)
    loader.close()
    other.close()
    assert threads() == [] and len(source.reads) < 40


def test_batches_are_made_ahead_but_not_too_far() -> None:
    source = Numbers()
    loader = opened(source, prefetch=2)
    iterator = iter(loader)
    next(iterator)
    deadline = time.monotonic() + 5
    while len(source.reads) < 30 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(source.reads) == 30 and loader.state_dict()["position"] == 10
    loader.close()


def test_leaving_an_epoch_cancels_what_was_made_ahead() -> None:
    source = Numbers(wait=0.005)
    loader = opened(source, workers=1, prefetch=3)
    for _ in loader:
        break
    seen = len(source.reads)
    time.sleep(0.15)
    assert len(source.reads) <= seen + 20  # the task at hand, and no other
    assert [int(batch.index[0]) for batch in loader] and loader.state_dict()["position"] == 40
    loader.close()


def test_threads_keep_to_one_core_and_leave_ours_alone() -> None:
    mine = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        pool = start_threads(3, "test")
        assert {pool.submit(torch.get_num_threads).result() for _ in range(9)} == {1}
        pool.shutdown()
        with ThreadPoolExecutor(1) as other:
            assert torch.get_num_threads() == other.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(mine)


def test_corrupt_files_in_a_folder(tmp_path: Path) -> None:
    """The whole way from damaged files to names in `faults`."""
    from PIL import Image

    from fastrdm.loaders.sources.open import open_source

    for k in range(20):
        Image.new("RGB", (9, 8), (k, 0, 0)).save(tmp_path / f"{k:02}.jpg")
    whole = (tmp_path / "05.jpg").read_bytes()
    (tmp_path / "05.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "06.jpg").write_bytes(b"")
    (tmp_path / "only").mkdir()
    for file in tmp_path.glob("*.jpg"):
        file.rename(tmp_path / "only" / file.name)
    config = LoaderConfig(source="folder", root=str(tmp_path), batch_size=20, views=VIEWS, max_corrupt=0.1)
    loader = build_loader(config, open_source(config, "train"), seed=0)
    (batch,) = loader
    assert sorted(batch.index.tolist()) == [0, 1, 2, 3, 4, 7, 7, 7, *range(8, 20)]
    assert sorted(loader.faults) == [5, 6]
    assert "only/05.jpg: " in loader.faults[5] and loader.faults[6].endswith("only/06.jpg: the file is empty")
    loader.close()


class Large(Numbers):
    """Images of 30 kB, ragged."""

    def read(self, index: int) -> Pixels:
        self.reads.append(index)
        return np.full((100, 100 + index % 3, 3), index, np.uint8)


@pytest.mark.parametrize(("megabytes", "reads"), [(1, 30), (1024, 40)])
def test_batches_ahead_are_bounded_in_bytes(megabytes: int, reads: int) -> None:
    """Ten images are 0.3 MB: the batch at hand and two more fit into one MiB."""
    source = Large()
    loader = opened(source, prefetch=4, prefetch_mb=megabytes)
    iterator = iter(loader)
    next(iterator)
    deadline = time.monotonic() + 5
    while len(source.reads) < reads and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(source.reads) == reads
    loader.close()


def test_buffers_are_used_again() -> None:
    loader = opened(Large(), prefetch=2)
    for epoch in range(5):
        loader.set_epoch(epoch)
        assert len(list(loader)) == 4
    assert isinstance(loader, NativeLoader) and len(loader.ring.free) == 3
    loader.close()


def test_decoded_images_are_handed_out_as_they_are() -> None:
    """What a GPU gets when its own kernel cuts the views."""
    loader = opened(Large())
    assert isinstance(loader, NativeLoader)
    seen = []
    for pending in loader.decoded():
        images = pending.slot.images()
        for k, index in enumerate(pending.index.tolist()):
            image = images.image(k)
            assert tuple(image.shape) == (100, 100 + index % 3, 3) and (image == index).all()
        seen += pending.index.tolist()
        loader.ring.give(pending.slot)
    assert sorted(seen) == list(range(40))
    loader.close()


@pytest.mark.parametrize("augment", ["auto", "cpu", "reference"])
def test_views_of_the_device_are_those_of_the_threads(augment: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """TritonViews, as on a GPU, by Triton's interpreter where there is none."""
    pytest.importorskip("triton")
    views = (ViewSpec(size=9, blur=0.5, blur_kernel=5, solarize=0.5), ViewSpec(size=4, progressive=((1, 3),)))
    config = LoaderConfig(batch_size=10, views=views, augment=augment)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    if not cuda:
        monkeypatch.setattr("fastrdm.loaders.augment.reference.chosen", lambda name, device: name)
    by_threads = build_loader(config, Large(), seed=0)
    on_device = build_loader(replace(config, augment="auto"), Large(), seed=0, device=device)
    assert isinstance(on_device, NativeLoader)
    on_device.maker = TritonViews(device, torch.float32)
    std = torch.tensor(views[0].std)[:, None, None]
    for wanted, got in itertools.islice(zip(by_threads, on_device, strict=True), 1):
        assert torch.equal(wanted.index, got.index.cpu()) and torch.equal(wanted.label, got.label.cpu())
        assert [view.shape[-1] for view in got.views] == [9, 3]
        for a, b in zip(wanted.views, got.views, strict=True):
            error = ((a - b.cpu()) * std).abs()
            assert error.max() < 3 / 255 and error.mean() < 0.5 / 255  # crops of 8 bits are rounded
    by_threads.close()
    on_device.close()


RESIDENT = """
import gc, sys
import numpy as np
from fastrdm.loaders.build import build_loader
from fastrdm.loaders.spec import LoaderConfig, ViewSpec
from fastrdm.loaders.sources.open import open_source

def resident():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20

views = ViewSpec(size=32), ViewSpec(size=16)
epochs = int(sys.argv[1])
for source, root in zip(sys.argv[2::2], sys.argv[3::2]):
    config = LoaderConfig(source=source, root=root, batch_size=20, views=views)
    loader = build_loader(config, open_source(config, "train"), seed=0)
    sizes = []
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        for batch in loader:
            pass
        sizes.append(resident())
    loader.close()
    print(*sizes)
"""


def test_memory_does_not_grow_over_epochs(tmp_path: Path) -> None:
    """Resident memory after epochs 4 to 14, of 7 MB of pixels each: keeping one image in five would be seen."""
    from PIL import Image

    from fastrdm.loaders.packing.pack import main

    for k in range(60):
        path = tmp_path / "images" / "ab"[k % 2] / f"{k}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (230 - k, 170 + k), (k, 0, 0)).save(path)
    root, packed = str(tmp_path / "images"), str(tmp_path / "packed")
    main([root, packed, "--workers", "1"])
    command = [sys.executable, "-c", RESIDENT, "14", "folder", root, "packed", packed]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        sizes = [float(word) for word in line.split()]
        assert len(sizes) == 14 and max(sizes[4:]) - sizes[3] < 8, sizes
    assert len(done.stdout.splitlines()) == 2


def test_a_killed_run_leaves_no_shared_memory(tmp_path: Path) -> None:
    """Threads and private memory: nothing has a name that outlives the process."""
    shared = Path("/dev/shm")
    before = {path.name for path in shared.iterdir()}
    script = RESIDENT.replace("            pass", "            print('step', flush=True)")
    (tmp_path / "a").mkdir()
    from PIL import Image

    for k in range(40):
        Image.new("RGB", (30, 20), (k, 0, 0)).save(tmp_path / "a" / f"{k}.jpg")
    command = [sys.executable, "-c", script, "100000", "folder", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "step\n"
    process.kill()
    process.wait()
    left = {path.name for path in shared.iterdir()} - before
    assert not [name for name in left if str(process.pid) in name]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
