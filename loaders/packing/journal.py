"""Journal of the finished shards of a pack, so that a killed one goes on.

The packed folder appears in one step at the end.
"""

import fcntl
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from fastrdm.files import flush, sha256, whole
from fastrdm.loaders.sources.packed import FORMAT, INDEX, seal


def digest(plan: dict[str, Any]) -> str:
    """Checksum of all that decides about a pack's content; meta.json keeps it, so that a repeated command sees it."""
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


class Journal:
    """OUT.partial: the folder to be, and one record for each finished shard; held by one process at a time."""

    def __init__(self, out: Path, plan: dict[str, Any]) -> None:
        """`plan` says all that decides about the result; a journal of another plan is refused."""
        self.out, self.folder = out, out.with_name(f"{out.name}.partial")
        self.pack = self.folder / "pack"
        self.count = len(plan["shards"])
        (self.pack / "shards").mkdir(parents=True, exist_ok=True)
        (self.folder / "records").mkdir(exist_ok=True)
        self._lock = (self.folder / "lock").open("a")  # the system lets it go when the process ends, however it does
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise ValueError(f"another process is packing into {out}") from None
        self.digest = digest(plan)
        known = self.folder / "plan"
        if known.exists() and known.read_text() != self.digest:
            self._lock.close()
            raise ValueError(
                f"{self.folder} holds a pack begun with other files or options: remove it, or repeat that command"
            )
        _write(known, self.digest)
        self.records = dict(filter(None, map(self._read, range(self.count))))

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def _read(self, number: int) -> tuple[int, dict[str, Any]] | None:
        """A finished shard, if its file is there with the length that the record tells."""
        try:
            record = json.loads(self._record(number).read_bytes())
            whole = (self.pack / record["name"]).stat().st_size == record["bytes"]
        except (OSError, ValueError, KeyError):
            return None
        return (number, record) if whole else None

    def _record(self, number: int) -> Path:
        return self.folder / "records" / f"{number:05}.json"

    def add(self, record: dict[str, Any]) -> None:
        """Note a finished shard."""
        _write(self._record(record["shard"]), json.dumps(record))
        self.records[record["shard"]] = record

    def finish(self, told: dict[str, Any]) -> dict[str, Any]:
        """Write index and meta.json of all shards and give the folder its name; the content of meta.json."""
        records = [self.records[number] for number in range(self.count)]
        rows = [tuple(row) for record in records for row in record["rows"]]
        if not rows:
            raise ValueError(f"none of the files of {told['source']} can be read")
        index = self.pack / "index.npy"
        with whole(index) as partial, partial.open("wb") as file:
            np.save(file, np.array(rows, INDEX))
        files = {record["name"]: {key: record[key] for key in ("bytes", "sha256")} for record in records}
        files["index.npy"] = {"bytes": index.stat().st_size, "sha256": sha256(index)}
        meta = {
            "format": FORMAT,
            "count": len(rows),
            **told,
            "plan": self.digest,
            "files": files,
            "repaired": [pair for record in records for pair in record["repaired"]],
            "refused": [pair for record in records for pair in record["refused"]],
        }
        _write(self.pack / "meta.json", json.dumps({**meta, "seal": seal(meta)}, indent=1))
        for left in self.pack.rglob("*.partial"):
            left.unlink()
        flush(index)
        self.pack.rename(self.out)
        flush(self.out.parent)
        shutil.rmtree(self.folder)
        return meta


def _write(path: Path, text: str) -> None:
    """Write a file that is whole or not there."""
    with whole(path) as partial:
        partial.write_text(text)
        flush(partial)
