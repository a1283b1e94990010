"""The files of a set that comes in many, here or on a store, and the index of each, which is made once."""

import hashlib
import posixpath
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np

from fastrdm.files import sha256
from fastrdm.loaders.sources.archives import Split
from fastrdm.loaders.sources.index_cache import Arrays, cache_folder, indexed, indexed_at, read_index
from fastrdm.loaders.sources.label_file import decode_text, read_text
from fastrdm.loaders.sources.shard_cache import Shard, ShardCache
from fastrdm.loaders.sources.shard_files import expand_braces, of_split, shard_files
from fastrdm.loaders.sources.store import Store, is_remote
from fastrdm.loaders.spec import LoaderConfig

ASKED = 16  # files whose sizes are asked for at a time
Build = Callable[[Path], Arrays]


class ShardSet:
    """Files of this machine."""

    cache: ShardCache | None = None
    """Where the files come from; set by `indexes` for those on a store."""

    def __init__(self, names: Sequence[str], config: LoaderConfig) -> None:
        """`names`: paths or URLs of the files."""
        self.names, self.config = names, config

    def indexes(self, kind: str, build: Build) -> list[Arrays]:
        """What `build` makes of each file, kept for the next time under the name `kind`."""
        paths = map(Path, self.names)
        return [indexed(path, kind, self.config.cache, partial(build, path)) for path in paths]

    def beside(self, name: str) -> tuple[str, str] | None:
        """Path and text of a file beside the first one, None where there is none."""
        path = Path(self.names[0]).parent / name
        return (str(path), read_text(path)) if path.is_file() else None


class RemoteShardSet(ShardSet):
    """Files on a store. Each is fetched once to be indexed, and then comes into the cache as it is used."""

    def __init__(self, store: Store, files: Sequence[str], config: LoaderConfig) -> None:
        """`files`: names below the store's URL."""
        super().__init__([f"{store.url}/{file}" for file in files], config)
        self.store, self.files = store, files

    def indexes(self, kind: str, build: Build) -> list[Arrays]:
        with ThreadPoolExecutor(ASKED) as pool:
            stamps = list(pool.map(self.store.stamp, self.files))
        known = [stamp for stamp in stamps if stamp is not None]
        if len(known) < len(stamps):
            missing = self.names[stamps.index(None)]
            raise ValueError(
                f"loader.root must name files that are there, got {self.config.root!r}: there is no {missing}"
            )
        folder, content = cache_folder(self.config.cache), repr([*zip(self.names, known, strict=True)])
        here = folder / "packs" / hashlib.sha256(content.encode()).hexdigest()[:16]
        shards = [Shard(file, size, "") for file, (size, _) in zip(self.files, known, strict=True)]
        self.cache = cache = ShardCache(self.store, here, shards, int(self.config.cache_gb * 1e9), made="indexed")
        cache.check_room(self.config)
        digests = [hashlib.sha256(name.encode()).hexdigest()[:16] for name in self.names]
        places = [
            folder / "index" / f"{posixpath.basename(file)}-{digest}.{kind}.npz"
            for file, digest in zip(self.files, digests, strict=True)
        ]
        found = {k: read_index(place, stamp) for k, (place, stamp) in enumerate(zip(places, known, strict=True))}
        unknown = [k for k, index in found.items() if index is None]
        with cache.following([[k] for k in unknown]) if unknown else nullcontext():
            for k in unknown:
                found[k] = indexed_at(places[k], known[k], partial(self._build, cache, k, build))
        whole = [index for index in found.values() if index is not None]
        cache.shards = [shard._replace(sha256=str(index["sha256"])) for shard, index in zip(shards, whole, strict=True)]
        return whole

    def _build(self, cache: ShardCache, number: int, build: Build) -> Arrays:
        """Index a file from the cache, and tell its checksum."""
        while True:
            path = Path(cache.get(number))
            try:
                return {**build(path), "sha256": np.array(sha256(path))}
            except (OSError, ValueError) as error:
                if path.exists():
                    raise ValueError(str(error).replace(str(path), self.names[number])) from None
                # another process made room just now

    def beside(self, name: str) -> tuple[str, str] | None:
        file = posixpath.join(posixpath.dirname(self.files[0]), name)
        data, name = self.store.read(file), f"{self.store.url}/{file}"
        return None if data is None else (name, decode_text(data, name))


def open_shards(config: LoaderConfig, suffix: str, source: str, split: Split) -> ShardSet:
    """The files ending in `suffix` that hold `split` of the set at `config.root`; none where "test" has none.

    The rules are those of shard_files. On a store, a pattern needs no listing; a folder has to be listed, which a plain
    web server does not offer.
    """
    root = str(config.root)
    if not is_remote(root):
        return ShardSet([str(path) for path in shard_files(config.root, suffix, source, split)], config)
    named = expand_braces(root) if root.endswith(suffix) else []
    url = (
        posixpath.commonprefix([posixpath.dirname(name) + "/" for name in named]).rpartition("/")[0] if named else root
    )
    store = Store(url)
    files = [name.removeprefix(f"{url}/") for name in named] or [
        file for file in store.files() if file.endswith(suffix)
    ]
    if not files:
        raise ValueError(
            f"loader.root must hold {suffix} files for loader.source={source}, got none in {root}: where a store "
            f"cannot be listed, give a pattern such as {root}/set-{{000..012}}{suffix}"
        )
    return RemoteShardSet(store, of_split(files, files, root, split), config)
