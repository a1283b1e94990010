"""Packed folders on a store: meta.json and index.npy are kept in the cache, shards come into it as they are used."""

import hashlib
import os
from pathlib import Path
from typing import Any

from fastrdm.files import sha256, write_whole
from fastrdm.loaders.sources.archives import Split
from fastrdm.loaders.sources.index_cache import cache_folder
from fastrdm.loaders.sources.packed import INDEX_FILE, META, PackedSource, check_meta
from fastrdm.loaders.sources.shard_cache import Shard, ShardCache
from fastrdm.loaders.sources.source import NoImages, Source
from fastrdm.loaders.sources.store import Store, StoreError
from fastrdm.loaders.spec import LoaderConfig

PARTS: dict[Split, tuple[str, ...]] = {"train": ("", "train"), "test": ("val", "test")}


def open_remote(config: LoaderConfig, split: Split) -> Source:
    """The pack at the URL `config.root`, or its part train, val or test."""
    store = Store(str(config.root))
    whole = store.size(META) is not None
    if split == "test" and whole:
        return NoImages("packed")
    for part in ("",) if whole else PARTS[split]:
        if store.size(f"{part}/{META}".lstrip("/")) is not None:
            return RemotePack(f"{store.url}/{part}".rstrip("/"), config)
    if split == "test":
        return NoImages("packed")
    raise ValueError(f"loader.root must be a packed folder, got {store.url}, which has neither {META} nor train/{META}")


def verify_remote(url: str) -> dict[str, int]:
    """As verify_all, of a pack on a store, which is read as a whole."""
    found = {}
    for part in dict.fromkeys(name for names in PARTS.values() for name in names):
        store = Store(f"{url}/{part}".rstrip("/"), "SRC")
        if (data := store.read(META)) is None:
            continue
        files = check_meta(f"{store.url}/{META}", data)["files"]
        with open(os.devnull, "wb") as nowhere:
            damaged = [n for n, told in files.items() if store.download(n, told["bytes"], nowhere) != told["sha256"]]
        if damaged:
            raise ValueError(f"{store.url}: damaged files, to be copied or packed again: {', '.join(damaged)}")
        found[store.url] = sum(told["bytes"] for told in files.values())
    if not found:
        raise ValueError(f"SRC must be a packed folder, got {url}, which has no {META}")
    return found


class RemotePack(PackedSource):
    """A pack on a store, whose shards are read from the cache of this machine."""

    cache: ShardCache

    def __init__(self, url: str, config: LoaderConfig) -> None:
        self.url = url
        store = Store(url)
        data = store.read(META) or b""
        digest = hashlib.sha256(url.encode() + data).hexdigest()[:16]
        self.folder = cache_folder(config.cache) / "packs" / digest
        self._keep(META, data)
        files = check_meta(f"{url}/{META}", data)["files"]
        index, told = self.folder / INDEX_FILE, files[INDEX_FILE]
        if not (index.is_file() and sha256(index) == told["sha256"]):
            self._keep(INDEX_FILE, store.read(INDEX_FILE) or b"")
            if sha256(index) != told["sha256"]:
                raise StoreError(f"{url}/{INDEX_FILE} is not what was written: its checksum differs")
        names = sorted(name for name in files if name.startswith("shards/"))
        shards = [Shard(name, files[name]["bytes"], files[name]["sha256"]) for name in names]
        self.cache = ShardCache(store, self.folder, shards, int(config.cache_gb * 1e9))
        super().__init__(self.folder)
        self.cache.check_room(config)

    def _keep(self, name: str, data: bytes) -> None:
        """Put a small file into the cache, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / name, data)

    def _read_meta(self, root: Path) -> dict[str, Any]:
        return check_meta(f"{self.url}/{META}", (root / META).read_bytes())

    def called(self, index: int) -> str:
        return f"{self.url}/{self.cache.shards[self.shards.item(index)].name}, image {index}"

    def _mend(self, shard: int) -> bool:
        mended = self.cache.mend(shard)
        if mended:
            self._opening()
        return mended
