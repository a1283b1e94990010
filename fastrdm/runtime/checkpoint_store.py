"""Copies of a run's checkpoints on an object store, written while training goes on, complete or not there at all.

URL/step-00000100/model.safetensors, state.pt    written first
                  meta.json                      written last and removed first: without it there is no checkpoint
"""

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastrdm.files import flush
from fastrdm.loaders.sources.store import Store, StoreError
from fastrdm.runtime import checkpoint
from fastrdm.runtime.checkpoint import META, CheckpointError

Meta = dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run below one URL. Used by the main process alone."""

    def __init__(self, url: str) -> None:
        """ValueError, naming checkpoint.store, where the URL cannot be opened."""
        self.store = Store(url, "checkpoint.store")
        self.pool = ThreadPoolExecutor(1, "fastrdm-checkpoints")
        self.pending: Future[None] | None = None

    def start(self, path: Path, keep: int, best: Path | None) -> None:
        """Copy the checkpoint `path` in the background, then keep the newest `keep` and `best` alone on the store."""
        assert self.pending is None, "one copy at a time: finish comes first"
        self.pending = self.pool.submit(self._copy, path, keep, best.name if best else None)

    def finish(self) -> CheckpointError | None:
        """Wait for the copy that was started, if any; why it failed."""
        pending, self.pending = self.pending, None
        try:
            if pending is not None:
                pending.result()
        except (StoreError, OSError) as error:
            return CheckpointError(f"a checkpoint was not copied to checkpoint.store: {error}")
        return None

    def newest_settings(self) -> Meta:
        """The configuration of the newest checkpoint; {} without one."""
        for _, meta in self._complete():
            return dict(meta.get("config", {}))
        return {}

    def fetch(self, run: Path, check: Callable[[Meta], None]) -> list[str]:
        """Bring the newest usable checkpoint into `run` unless that holds one as new; lines on what was done.

        `check` raises ValueError for the description of a checkpoint of another run.
        """
        said = []
        newest = checkpoint.existing(run)
        for name, meta in self._complete():
            if newest and newest[0].name >= name:
                break
            check(meta)
            try:
                self._download(name, meta, checkpoint.folder(run, int(meta["step"])))
            except (CheckpointError, KeyError, TypeError) as error:
                said.append(f"checkpoint not used: {self.store.url}/{name}: {checkpoint.reason(error)}")
                continue
            said.append(f"fetched from {self.store.url}/{name}")
            break
        return said

    def _complete(self) -> Iterator[tuple[str, Meta]]:
        """Name and description of each complete checkpoint, the newest first."""
        for name in self._steps():
            if (data := self.store.read(f"{name}/{META}")) is not None:
                try:
                    meta = json.loads(data)
                except ValueError:  # as one that is not there: its checksums are lost
                    continue
                if isinstance(meta, dict):
                    yield name, meta

    def _steps(self) -> list[str]:
        """Names of the folders of checkpoints, whole or not, the newest first."""
        return sorted((name for name in self.store.names() if name.startswith("step-")), reverse=True)

    def _copy(self, path: Path, keep: int, best: str | None) -> None:
        self.store.remove(f"{path.name}/{META}")  # of a checkpoint of this step that an earlier start wrote
        names = sorted(file.name for file in path.iterdir() if file.name != META)
        for name in (*names, META):
            self.store.upload(path / name, f"{path.name}/{name}", replace=True)
        steps = self._steps()
        whole = [name for name in steps if self.store.size(f"{name}/{META}") is not None]
        for name in set(steps) - {*whole[:keep], best}:
            self.store.remove(f"{name}/{META}")
            self.store.remove(name)

    def _download(self, name: str, meta: Meta, final: Path) -> None:
        """Bring a checkpoint to the folder `final`, which appears when it is whole and checked."""
        partial = final.with_name(f".partial-{final.name}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for file, told in meta["files"].items():
            if Path(file).name != file:
                raise CheckpointError(f"{META} names the file {file!r}")
            with (partial / file).open("wb") as target:
                self.store.download(f"{name}/{file}", int(told["bytes"]), target)
        (partial / META).write_text(json.dumps(meta, indent=1))
        try:
            checkpoint.read(partial)
        except CheckpointError:
            shutil.rmtree(partial)
            raise
        for path in (*partial.iterdir(), partial):
            flush(path)
        partial.rename(final)
        flush(final.parent)
