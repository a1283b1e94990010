"""WebDataset and plain tar files on a store: what the same files give here, by an index that is made once."""

import importlib.util
import pickle
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("fsspec", reason="needs fsspec")
pytest.importorskip("aiohttp", reason="needs aiohttp")

from fastrdm.config import run_config
from fastrdm.loaders.build import build_loader
from fastrdm.loaders.packing import pack
from fastrdm.loaders.sources import shard_cache, store
from fastrdm.loaders.sources.open import open_source
from fastrdm.loaders.sources.packed import PackedSource
from fastrdm.loaders.sources.source import Source
from fastrdm.loaders.sources.store import StoreError
from fastrdm.loaders.spec import LoaderConfig, ViewSpec
from fastrdm.trainer import Trainer


def program(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[2] / "programs" / f"{name}.py")
    assert spec and spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


forms, slow_store = program("forms"), program("slow_store")
VIEWS = (ViewSpec(size=8), ViewSpec(size=8))
SHARDS = 8
PATTERNS = {"webdataset": "set-{train,validation}-{0000..0007}.tar", "tar": "{train,val}-{0..7}.tar"}


@pytest.fixture(scope="module", params=["webdataset", "tar"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def here(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight shards of four photographs for training and eight of one to evaluate on."""
    root = tmp_path_factory.mktemp(f"remote-{name}")
    for split, each in (("train", 4), ("val", 1)):
        data = forms.photographs(SHARDS * each, each)
        for shard in range(SHARDS):
            members = []
            for k in range(shard * each, (shard + 1) * each):
                label = k % 3
                if name == "tar":
                    members.append((f"{forms.CLASSES[label]}/{k:02}.jpg", data[k]))
                else:
                    members += [(f"{k:02}.jpg", data[k]), (f"{k:02}.cls", str(label).encode())]
            file = (
                f"{split}-{shard}.tar" if name == "tar" else f"set-{split.replace('val', 'validation')}-{shard:04}.tar"
            )
            forms.put(root / file, forms.tar_of(members))
    if name == "webdataset":
        (root / "classes.txt").write_text("\n".join(forms.CLASSES) + "\n")
    return root


@pytest.fixture
def server(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(store, "FIRST_WAIT", 0.01)
    with slow_store.running(here) as running:
        yield running


def config(server: Any, name: str, tmp_path: Path, **more: Any) -> LoaderConfig:
    settings: dict[str, Any] = {
        "source": name,
        "root": f"{server.url}/{PATTERNS[name]}",
        "cache": str(tmp_path / "cache"),
    }
    settings |= {"order": "windowed", "window": 2, "batch_size": 4, "workers": 2, "views": VIEWS}
    return LoaderConfig(**(settings | more))  # type: ignore[arg-type]


def asked(server: Any) -> list[str]:
    """Shards that were fetched, in order; each is one request here."""
    return [path for path in server.asked if path.endswith(".tar")]


def content(source: Source) -> list[tuple[bytes, str]]:
    return [(source.fetch(k)[0], source.classes[source.labels[k]]) for k in range(len(source))]


def batches(settings: LoaderConfig, stop: int = 99, state: Any = None) -> tuple[list[Any], Any]:
    loader = build_loader(settings, open_source(settings, "train"), seed=3)
    if state:
        loader.load_state_dict(state)
    found = []
    for batch in loader:
        found.append((batch.index.tolist(), batch.label.tolist(), *batch.views))
        if len(found) == stop:
            break
    state = loader.state_dict()
    assert not loader.faults
    loader.close()
    return found, state


def same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        x[:2] == y[:2] and all(map(torch.equal, x[2:], y[2:])) for x, y in zip(a, b, strict=True)
    )


def test_images_labels_and_views_are_those_of_the_files_here(
    name: str, here: Path, server: Any, tmp_path: Path
) -> None:
    settings = config(server, name, tmp_path)
    local = replace(settings, root=str(here))
    for split in ("train", "test"):
        remote, own = open_source(settings, split), open_source(local, split)  # type: ignore[arg-type]
        assert content(remote) == content(own) and remote.classes == own.classes == list(forms.CLASSES)
        assert remote.stored_bytes == own.stored_bytes and remote.note == own.note
        assert len({remote.key(k) for k in range(len(remote))}) == len(remote)
    assert len(asked(server)) == 2 * SHARDS, "each shard comes once, to be indexed, and stays"
    assert same(batches(settings)[0], batches(local)[0])
    assert len(asked(server)) == 2 * SHARDS


def test_a_small_cache_holds_the_windows_and_a_restart_is_exact(
    name: str, here: Path, server: Any, tmp_path: Path
) -> None:
    largest = max(path.stat().st_size for path in here.glob("*.tar"))
    settings = config(server, name, tmp_path, cache_gb=5 * largest / 1e9)
    whole, _ = batches(settings)
    assert sorted(k for batch in whole for k in batch[0]) == list(range(4 * SHARDS))
    held = [p for p in (tmp_path / "cache" / "packs").glob("*/shards/*") if p.suffix != ".lock"]
    assert 0 < sum(path.stat().st_size for path in held) <= 5 * largest
    before = len(asked(server))
    first, state = batches(settings, stop=3)
    assert same([*first, *batches(settings, state=state)[0]], whole)
    assert len(asked(server)) > before, "what was evicted comes again"
    assert same(batches(replace(settings, root=str(here)))[0], whole)
    with pytest.raises(ValueError, match=r"loader\.cache_gb must be at least .*, two windows of 2 shards and one more"):
        open_source(replace(settings, cache_gb=largest / 1e9), "train")


@pytest.mark.parametrize("fault", ["failing", "cutting"])
def test_faults_of_the_server_are_got_over(name: str, here: Path, server: Any, tmp_path: Path, fault: str) -> None:
    setattr(server, fault, 2)
    settings = config(server, name, tmp_path)
    assert content(open_source(settings, "train")) == content(open_source(replace(settings, root=str(here)), "train"))


def test_a_shard_that_changes_is_named_and_indexed_anew(name: str, here: Path, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(here, tmp_path / "copy")
    with slow_store.running(copy) as server:
        settings = config(server, name, tmp_path)
        source = open_source(settings, "train")
        changed = sorted(copy.glob("*train*.tar"))[2]
        data = bytearray(changed.read_bytes())
        data[600] ^= 1
        changed.write_bytes(data)
        for path in (tmp_path / "cache" / "packs").glob("*/shards/*.tar"):
            path.unlink()
        number = int(np.flatnonzero(source.shards == 2)[0])  # type: ignore[arg-type]
        with pytest.raises(StoreError, match=rf"{changed.name} is not what was indexed: its checksum differs"):
            source.fetch(number)
        members = [("n00000001/new.jpg", forms.photographs(1, 9)[0])] if name == "tar" else []
        members += [] if members else [("new.jpg", forms.photographs(1, 9)[0]), ("new.cls", b"1")]
        changed.write_bytes(forms.tar_of(members))
        fresh = open_source(settings, "train")
        assert len(fresh) == 4 * SHARDS - 3 and forms.photographs(1, 9)[0] in [d for d, _ in content(fresh)]


def test_what_is_wrong_is_named_by_its_address(name: str, here: Path, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(here, tmp_path / "copy")
    first = sorted(copy.glob("*train*.tar"))[0]
    with slow_store.running(copy) as server:
        settings = config(server, name, tmp_path)
        first.write_bytes(first.read_bytes()[:-9000])
        with pytest.raises(ValueError, match=rf"^{server.url}/{first.name} cannot be read as a tar file: .*cut short"):
            open_source(settings, "train")
        first.unlink()
        with pytest.raises(
            ValueError, match=rf"loader\.root must name files .*: there is no {server.url}/{first.name}"
        ):
            open_source(settings, "train")
        with pytest.raises(
            ValueError, match=r"cannot be listed, give a pattern such as http.*/set-\{000\.\.012\}\.tar"
        ):
            open_source(replace(settings, root=server.url), "train")


def test_a_source_can_be_sent_to_another_process(name: str, here: Path, server: Any, tmp_path: Path) -> None:
    source = open_source(config(server, name, tmp_path), "train")
    part = pickle.loads(pickle.dumps(source.take(np.array([9, 3]))))
    assert [part.fetch(k)[0] for k in range(2)] == [source.fetch(k)[0] for k in (9, 3)]
    assert part.labels.tolist() == source.labels[[9, 3]].tolist()


def test_no_thread_of_a_plan_that_is_over_stays(name: str, server: Any, tmp_path: Path) -> None:
    import threading
    import time

    source = open_source(config(server, name, tmp_path), "train")
    assert source.cache is not None  # type: ignore[attr-defined]
    deadline = time.monotonic() + 10
    while any(thread.name == "fastrdm-shards" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_store_that_can_be_listed_trains_and_is_packed(name: str, here: Path, tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in here.iterdir():
        memory.pipe_file(f"/{name}/sets/{path.name}", path.read_bytes())
    root = f"memory://{name}/sets"
    words = [f"loader.source={name}", f"loader.root={root}", f"loader.cache={tmp_path / 'cache'}", "encoder.width=4"]
    words += ["loader.order=windowed", "loader.window=2", "loader.batch_size=8", "loader.views.*.size=8"]
    words += ["train.length=2st", "optim.warmup=1st", "method.projector.out=8", "log.report=false"]
    trainer = Trainer(run_config.load([*words, f"run={tmp_path / 'run'}"]))
    assert trainer.train() and {"knn", "loss"} <= trainer.metrics.keys()
    assert shard_cache.DOWNLOADS > 0
    assert pack.main([root, str(tmp_path / "out"), "--source", name, "--workers", "2"]) == 0
    own = open_source(LoaderConfig(source=name, root=str(here)), "train")
    packed = PackedSource(tmp_path / "out" / "train")
    assert sorted(content(packed)) == sorted(content(own))
