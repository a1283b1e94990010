"""Packs on a store: pixels, order and restart of a local pack, whatever the network does, from a bounded cache."""

import contextlib
import hashlib
import importlib.util
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("fsspec", reason="needs fsspec")
pytest.importorskip("aiohttp", reason="needs aiohttp")

from fastrdm.config import run_config
from fastrdm.loaders.build import build_loader
from fastrdm.loaders.evaluation import evaluation_batches
from fastrdm.loaders.packing import pack
from fastrdm.loaders.sources import shard_cache, store
from fastrdm.loaders.sources.open import open_source
from fastrdm.loaders.sources.packed import PackedSource
from fastrdm.loaders.sources.remote import RemotePack
from fastrdm.loaders.sources.shard_cache import Plan, Shard, ShardCache
from fastrdm.loaders.sources.store import Store, StoreError
from fastrdm.loaders.spec import LoaderConfig, ViewSpec
from fastrdm.trainer import Trainer

spec = importlib.util.spec_from_file_location("slow_store", Path(__file__).parents[2] / "programs" / "slow_store.py")
assert spec and spec.loader
slow_store = importlib.util.module_from_spec(spec)
sys.modules["slow_store"] = slow_store
spec.loader.exec_module(slow_store)

COUNT, EACH = 40, 4  # images, and images a shard
VIEWS = (ViewSpec(size=8), ViewSpec(size=8))


@pytest.fixture(scope="module", params=["jpeg", "raw"])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train` of ten shards and `val` of one, in the folder `pack`."""
    root = tmp_path_factory.mktemp("remote")
    random = np.random.default_rng(0)
    for split, count in (("train", COUNT), ("val", EACH)):
        for k in range(count):
            path = root / "set" / split / "ab"[k % 2] / f"{k:02}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (24, 30, 3), dtype=np.uint8)).save(path)
    whole, pack.plan = pack.plan, lambda sizes, _: [(k, k + EACH) for k in range(0, len(sizes), EACH)]
    try:
        more = ["--mode", request.param, "--size", "16", "--workers", "1"]
        pack.main([str(root / "set"), str(root / "pack"), *more])
    finally:
        pack.plan = whole
    return root / "pack"


@pytest.fixture
def server(packed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(store, "FIRST_WAIT", 0.01)
    with slow_store.running(packed) as running:
        yield running


def config(server: Any, tmp_path: Path, **more: Any) -> LoaderConfig:
    settings = {"source": "packed", "root": server.url, "cache": str(tmp_path / "cache"), "views": VIEWS}
    return LoaderConfig(**(settings | {"batch_size": 8, "workers": 2, "window": 2} | more))  # type: ignore[arg-type]


def shard_bytes(packed: Path) -> int:
    return max(path.stat().st_size for path in (packed / "train" / "shards").iterdir())


def held(tmp_path: Path) -> int:
    """Bytes of all shards in the cache, whole and on their way, while nobody makes room or renames."""
    packs, total = tmp_path / "cache" / "packs", 0
    if packs.is_dir():
        with shard_cache.locked(packs / "lock", wait=True):
            for path in packs.glob("*/shards/*"):
                with contextlib.suppress(FileNotFoundError):
                    total += path.stat().st_size if path.suffix != ".lock" else 0
    return total


def batches(settings: LoaderConfig, stop: int = 99, **how: Any) -> list[Any]:
    source = open_source(settings, "train")
    loader = build_loader(settings, source, seed=3, **how)
    found = []
    for batch in loader:
        found.append((batch.index.tolist(), batch.label.tolist(), *batch.views))
        if len(found) == stop:
            break
    found.append(loader.state_dict())  # type: ignore[arg-type]
    loader.close()
    return found


def same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        x[:2] == y[:2] and all(map(torch.equal, x[2:], y[2:])) for x, y in zip(a[:-1], b[:-1], strict=True)
    )


@pytest.mark.parametrize("order", ["full", "windowed"])
def test_views_are_those_of_the_local_pack(packed: Path, server: Any, tmp_path: Path, order: Any) -> None:
    settings = config(server, tmp_path, order=order)
    local = batches(replace(settings, root=str(packed)))
    assert same(batches(settings), local) and len(local) == 6
    asked = [path for path in server.asked if "shards" in path]
    assert len(asked) == 10, "each shard came once"
    assert same(batches(settings), local) and len([p for p in server.asked if "shards" in p]) == 10


def test_both_splits_are_found(packed: Path, server: Any, tmp_path: Path) -> None:
    train, test = (open_source(config(server, tmp_path), split) for split in ("train", "test"))  # type: ignore[arg-type]
    assert len(train) == COUNT and len(test) == EACH and train.classes == ["a", "b"] == test.classes
    whole = replace(config(server, tmp_path), root=f"{server.url}/train")
    assert len(open_source(whole, "train")) == COUNT and len(open_source(whole, "test")) == 0
    with pytest.raises(ValueError, match=r"loader\.root must be a packed folder, got http.*nowhere, which has neither"):
        open_source(replace(whole, root=f"{server.url}/nowhere"), "train")
    local = PackedSource(packed / "val")
    found = list(evaluation_batches(test, VIEWS[0], 4))
    expected = list(evaluation_batches(local, VIEWS[0], 4))
    assert all(torch.equal(a, b) for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True))


def test_the_cache_stays_within_its_limit(packed: Path, server: Any, tmp_path: Path) -> None:
    limit = 5 * shard_bytes(packed)
    settings = config(server, tmp_path, order="windowed", cache_gb=limit / 1e9)
    largest, watching = 0, True

    def watch() -> None:
        nonlocal largest
        while watching:
            largest = max(largest, held(tmp_path))
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    source = open_source(settings, "train")
    loader = build_loader(settings, source, seed=3)
    seen = []
    for epoch in range(3):
        loader.set_epoch(epoch)
        seen += [k for batch in loader for k in batch.index.tolist()]
    loader.close()
    watching = False
    thread.join()
    assert sorted(seen) == sorted(list(range(COUNT)) * 3)
    assert 0 < largest <= limit
    assert not loader.faults


def test_a_reader_waits_for_room_that_downloads_hold(tmp_path: Path) -> None:
    data = b"shard"
    shards = [Shard(f"shards/{k}", len(data), hashlib.sha256(data).hexdigest()) for k in range(3)]
    slow, arrived = threading.Event(), []

    class Slow:
        def download(self, name: str, size: int, file: Any) -> str:
            arrived.append(name)
            assert slow.wait(20)
            file.write(data)
            return hashlib.sha256(data).hexdigest()

    cache = ShardCache(Slow(), tmp_path / "cache" / "packs" / "one", shards, 2 * len(data))  # type: ignore[arg-type]
    readers = [threading.Thread(target=cache.get, args=[k], daemon=True) for k in range(3)]
    for reader in readers[:2]:
        reader.start()
    while len(arrived) < 2:
        time.sleep(0.001)
    readers[2].start()
    time.sleep(0.1)
    assert held(tmp_path) == 2 * len(data) and len(arrived) == 2, "the third shard has no room yet"
    slow.set()
    for reader in readers:
        reader.join(20)
        assert not reader.is_alive()
    assert len(arrived) >= 3 and held(tmp_path) <= 2 * len(data)


def test_a_cache_that_is_too_small_is_refused(packed: Path, server: Any, tmp_path: Path) -> None:
    small = 4 * shard_bytes(packed) / 1e9
    with pytest.raises(ValueError, match=r"cache_gb must be at least .*, two windows of 2 shards and one more"):
        open_source(config(server, tmp_path, order="windowed", cache_gb=small), "train")
    with pytest.raises(ValueError, match=r"cache_gb must be at least .*, all shards; loader\.order=windowed"):
        open_source(config(server, tmp_path, cache_gb=small), "train")


def test_shards_come_ahead_of_the_order(packed: Path, server: Any, tmp_path: Path) -> None:
    settings = config(server, tmp_path, order="windowed", cache_gb=6 * shard_bytes(packed) / 1e9, prefetch=1)
    source = open_source(settings, "train")
    loader = build_loader(settings, source, seed=3)
    position = iter(loader)
    first = next(position).index
    deadline = time.monotonic() + 20
    while held(tmp_path) < 5 * min(p.stat().st_size for p in (packed / "train" / "shards").iterdir()):
        assert time.monotonic() < deadline, "the next windows do not come before they are read"
        time.sleep(0.01)
    assert source.shards is not None and len(set(source.shards[first].tolist())) == 2
    loader.close()


@pytest.mark.parametrize("fault", ["failing", "cutting", "damaging"])
def test_faults_of_the_server_are_got_over_and_told(packed: Path, server: Any, tmp_path: Path, fault: str) -> None:
    settings = config(server, tmp_path, order="windowed")
    local = batches(replace(settings, root=str(packed)))
    source = open_source(settings, "train")
    setattr(server, fault, 3 if fault != "damaging" else 1)
    loader = build_loader(settings, source, seed=3)
    found = [(batch.index.tolist(), batch.label.tolist(), *batch.views) for batch in loader]
    assert same([*found, {}], local) and not loader.faults
    if fault != "damaging":
        told = str(loader.diagnosis())
        assert server.url in told and "attempt 2 of 8 in 0.0 s" in told
    loader.close()


def test_a_server_without_ranges_will_do(packed: Path, server: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(store, "PIECE", 700)
    server.ranges = False
    settings = config(server, tmp_path)
    assert same(batches(settings), batches(replace(settings, root=str(packed))))


def test_a_store_that_stays_away_ends_in_one_line(server: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(store, "ATTEMPTS", 3)
    source = open_source(config(server, tmp_path), "train")
    server.failing = 10**9
    with pytest.raises(
        StoreError, match=r"http://.*/train/shards/0000\d\..* cannot be reached after 3 attempts: .*500"
    ):
        source.read(0)
    server.failing, server.damaging = 0, 10**9
    with pytest.raises(StoreError, match=r"shards/0000\d\..* is not what was packed: its checksum differs"):
        source.read(5)
    server.damaging = 0
    assert source.read(5).ndim == 3, "nothing of the failure stays"


def test_damage_in_the_cache_is_mended(packed: Path, server: Any, tmp_path: Path) -> None:
    settings = config(server, tmp_path)
    local = batches(replace(settings, root=str(packed)))
    batches(settings)
    for path in (tmp_path / "cache" / "packs").glob("*/shards/*"):
        if path.suffix != ".lock":
            path.write_bytes(bytes(path.stat().st_size))
    for path in (tmp_path / "cache" / "packs").glob("*/index.npy"):
        path.write_bytes(b"no index")
    assert same(batches(settings), local)


def test_what_is_not_allowed_or_known_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"loader\.root=nothing://bucket/pack cannot be opened: .*nothing"):
        Store("nothing://bucket/pack")
    with pytest.raises(ValueError, match=r"loader\.root must be a folder of images, got 's3://bucket'"):
        open_source(LoaderConfig(source="folder", root="s3://bucket"), "train")


def test_a_pack_that_was_damaged_on_the_store(packed: Path, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(packed, tmp_path / "copy")
    with slow_store.running(copy) as server:
        (copy / "train" / "index.npy").write_bytes(bytes(900))
        with pytest.raises(StoreError, match=r"train/index\.npy is not what was written: its checksum differs"):
            open_source(config(server, tmp_path), "train")
        (copy / "train" / "meta.json").write_text((copy / "train" / "meta.json").read_text().replace("a", "b", 1))
        with pytest.raises(ValueError, match=r"http://.*/train/meta\.json is damaged"):
            open_source(config(server, tmp_path), "train")


def test_a_restart_in_mid_epoch_is_exact(packed: Path, server: Any, tmp_path: Path) -> None:
    settings = config(server, tmp_path, order="windowed", cache_gb=5 * shard_bytes(packed) / 1e9)
    whole, first = batches(settings), batches(settings, stop=2)
    loader = build_loader(settings, open_source(settings, "train"), seed=3)
    loader.load_state_dict(first[-1])
    rest = [(batch.index.tolist(), batch.label.tolist(), *batch.views) for batch in loader]
    loader.close()
    assert same([*first[:-1], *rest, {}], whole)


READER = """
import sys, torch
from fastrdm.loaders.build import build_loader
from fastrdm.loaders.sources.open import open_source
from fastrdm.loaders.spec import LoaderConfig, ViewSpec
url, cache, gb, rank = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
views = (ViewSpec(size=8), ViewSpec(size=8))
config = LoaderConfig(source="packed", root=url, cache=cache, cache_gb=gb, order="windowed", window=2, batch_size=8,
                      views=views, workers=2)
loader = build_loader(config, open_source(config, "train"), seed=3, rank=rank, world=2)
for epoch in range(2):
    loader.set_epoch(epoch)
    for batch in loader:
        print(*batch.index.tolist(), float(batch.views[0].double().sum()), flush=True)
assert not loader.faults
loader.close()
"""


@pytest.mark.parametrize("room", [5, 12])
def test_processes_share_the_cache_and_survive_each_others_death(
    packed: Path, server: Any, tmp_path: Path, room: int
) -> None:
    server.latency = 0.01
    gb = str(room * shard_bytes(packed) / 1e9)

    def start(rank: int) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", READER, server.url, str(tmp_path / "cache"), gb, str(rank)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    doomed = start(0)
    assert doomed.stdout and doomed.stdout.readline()
    doomed.send_signal(signal.SIGKILL)  # perhaps with downloads and locks in its hands
    doomed.communicate()
    before = len([path for path in server.asked if "shards" in path])
    pair = [start(0), start(1)]
    told = [process.communicate(timeout=120) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], told
    settings = config(server, tmp_path)
    seen: dict[int, list[str]] = {}
    for rank, (out, _) in enumerate(told):
        reference = build_loader(
            replace(settings, root=str(packed), order="windowed"),
            PackedSource(packed / "train"),
            seed=3,
            rank=rank,
            world=2,
        )
        expected = []
        for epoch in range(2):
            reference.set_epoch(epoch)
            expected += [
                " ".join(map(str, [*batch.index.tolist(), float(batch.views[0].double().sum())])) for batch in reference
            ]
        reference.close()
        seen[rank] = out.splitlines()
        assert seen[rank] == expected
    count = len([path for path in server.asked if "shards" in path]) - before
    assert room < 10 or count <= 10, "two processes fetch a shard once between them"


def test_a_plan_knows_what_comes_next() -> None:
    plan = Plan([[4, 2], [0, 1], [3]])
    assert list(plan.ahead()) == [4, 2, 0, 1, 3]
    plan.reached({0})
    assert list(plan.ahead()) == [4, 2, 0, 1, 3], "the window before may still be in use"
    plan.reached({3})
    assert list(plan.ahead()) == [0, 1, 3]
    plan.reached({4})
    assert list(plan.ahead()) == [0, 1, 3], "it never goes back"


def test_a_remote_pack_can_be_sent_to_another_process(packed: Path, server: Any, tmp_path: Path) -> None:
    source = open_source(config(server, tmp_path), "train")
    assert isinstance(source, RemotePack) and isinstance(source.cache, ShardCache)
    part = pickle.loads(pickle.dumps(source.take(np.array([9, 3]))))
    local = PackedSource(packed / "train")
    assert (
        len(part) == 2 and np.array_equal(part.read(0), local.read(9)) and np.array_equal(part.read(1), local.read(3))
    )


@pytest.fixture(scope="module")
def bucket() -> Iterator[dict[str, str]]:
    """moto's S3 server with an empty bucket; the variables that lead s3fs there."""
    for name in ("moto.server", "s3fs", "flask"):
        pytest.importorskip(name, reason=f"needs {name}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        values = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        values["AWS_SECRET_ACCESS_KEY"] = "b"
        try:
            deadline = time.monotonic() + 60
            while True:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.1)
            yield values
        finally:
            process.terminate()


def test_pack_and_training_on_s3(
    packed: Path, bucket: dict[str, str], tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    import fsspec

    for name, value in {**bucket, "XDG_CACHE_HOME": str(tmp_path / "home")}.items():
        monkeypatch.setenv(name, value)
    fs = fsspec.filesystem("s3", use_listings_cache=False)
    mode = json.loads((packed / "train" / "meta.json").read_text())["mode"]
    fs.mkdir(f"set-{mode}")
    url = f"s3://set-{mode}/packs"
    arguments = [str(packed.parent / "set"), url, "--mode", mode, "--size", "16", "--workers", "1"]
    assert pack.main(arguments) == 0
    told = capsys.readouterr().out
    assert f"{url}/train: written" in told and not list((tmp_path / "home" / "fastrdm" / "staged").iterdir())
    assert pack.main(arguments) == 0 and f"{url}/val is packed already" in capsys.readouterr().out
    assert pack.main([url, "--verify"]) == 0 and f"{url}/train: " in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"OUT exists already: s3://.*/train, made with other files or options"):
        pack.main([*arguments, "--exif", "apply"])
    trained = ["loader.source=packed", f"loader.root={url}", f"loader.cache={tmp_path / 'cache'}", "encoder.width=4"]
    trained += ["loader.batch_size=8", "loader.views.*.size=8", "train.length=2st", "optim.warmup=1st"]
    trained += ["method.projector.out=8", "log.report=false", f"run={tmp_path / 'run'}"]
    trained += [f"checkpoint.store=s3://set-{mode}/run"]
    trainer = Trainer(run_config.load(trained))
    assert trainer.train() and "knn" in trainer.metrics
    names = {Path(path).name for path in fs.find(f"set-{mode}/run/step-00000002")}
    assert names == {"meta.json", "model.safetensors", "state.pt"}
    elsewhere = Trainer(run_config.load([*trained, f"run={tmp_path / 'elsewhere'}"]))
    assert elsewhere.train() and elsewhere.step == 2
    assert f"fetched from s3://set-{mode}/run/step-00000002" in capsys.readouterr().out
    local = PackedSource(packed / "train")
    source = open_source(LoaderConfig(source="packed", root=url, cache=str(tmp_path / "cache")), "train")
    assert all(np.array_equal(source.read(k), local.read(k)) for k in range(COUNT))
    assert os.environ["AWS_ENDPOINT_URL"].startswith("http://127.0.0.1") and shard_cache.DOWNLOADS > 0
