"""Parquet files as Hugging Face's hub has them: a column of encoded images, a column of labels; needs pyarrow."""

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastrdm.loaders.sources.archives import Split
from fastrdm.loaders.sources.decode import CorruptImage
from fastrdm.loaders.sources.index_cache import stamp
from fastrdm.loaders.sources.label_file import sort_classes
from fastrdm.loaders.sources.shard_files import shard_files
from fastrdm.loaders.sources.source import NoImages, Source
from fastrdm.loaders.sources.store import is_remote
from fastrdm.loaders.spec import LoaderConfig

MISSING = "loader.source=parquet needs pyarrow: pip install 'fastrdm[parquet]'"
IMAGE_COLUMNS = ("image", "img", "images", "jpg", "jpeg", "png", "bytes")
LABEL_COLUMNS = ("label", "labels", "fine_label", "cls", "class", "target")
LARGE = 2 << 30  # bytes of decompressed row groups held, above which the user is told


class Columns(NamedTuple):
    """Where a file keeps its images and labels."""

    image: str
    nested: bool  # the image is a struct of bytes and path
    label: str | None
    names: list[str] | None  # of the classes 0, 1, ..., where the schema tells them


def open_parquet(config: LoaderConfig, split: Split) -> Source:
    """The rows of `split`; row groups are the shards of the windowed order."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ValueError(MISSING) from error
    if is_remote(config.root):
        raise ValueError(
            f"loader.root must be on this machine for loader.source=parquet, got {config.root!r}: tar, webdataset and "
            "packs are read from a store too"
        )
    paths = shard_files(config.root, ".parquet", "parquet", split)
    if not paths:
        return NoImages("parquet")
    others = shard_files(config.root, ".parquet", "parquet", "test" if split == "train" else "train")
    # in the windowed order two windows overlap; in any other one, rows are read in their order at best
    groups = 2 * config.window if config.order == "windowed" else 2
    source = ParquetSource(paths, groups, others if config.labels != "none" else (), config.labels != "none")
    if config.order != "windowed" and split == "train" and len(source.groups) > groups:
        advice = (
            f"one image costs the reading of its row group, {source.group_bytes / 1e6:,.0f} MB: "
            "loader.order=windowed reads each of them once"
        )
        source.note = "; ".join(filter(None, (source.note, advice)))
    return source


class ParquetSource(Source):
    """Encoded images in row groups of parquet files; a row group is read as a whole, and the last few are kept."""

    name = "parquet"
    shards: NDArray[np.int64]

    def __init__(self, paths: Sequence[Path], keep: int, others: Sequence[Path] = (), labeled: bool = True) -> None:
        """`keep`: row groups held in memory at most. `others`: files of other splits, for the names of classes."""
        self.paths, self.stamps = [str(path) for path in paths], [stamp(path) for path in paths]
        self.columns = _columns(paths[0])
        footers = [_footer(path, self.columns) for path in paths]
        self.groups = [(number, k) for number, footer in enumerate(footers) for k in range(footer.num_row_groups)]
        counts = [footers[number].row_group(k).num_rows for number, k in self.groups]
        _check_counts(paths, self.groups, counts)
        self.first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.shards = np.repeat(np.arange(len(counts)), counts)
        self.group_bytes = max(footers[number].row_group(k).total_byte_size for number, k in self.groups)
        self.stored_bytes = sum(path.stat().st_size for path in paths)
        self.keep = keep
        if self.group_bytes * keep > LARGE:
            self.note = f"{keep} row groups in memory take {self.group_bytes * keep / 1e9:.1f} GB: lower loader.window"
        self._label(paths, others if labeled else (), labeled)
        self._opening()

    def _label(self, paths: Sequence[Path], others: Sequence[Path], labeled: bool) -> None:
        column = self.columns.label if labeled else None
        if column is None:
            self.classes, self.labels = [], np.full(int(self.first[-1]), -1)
            return
        values = [_values(path, column) for path in paths]
        if sum(map(len, values)) != self.first[-1]:
            raise ValueError(f"{paths[0]} and the like hold other numbers of rows than their footers tell of")
        if self.columns.names is not None:
            self.classes = self.columns.names
            for path, part in zip(paths, values, strict=True):
                _check_range(path, part, len(self.classes))
            self.labels = np.concatenate(values).astype(np.int64)
            return
        told = [[None if value in (None, -1) else str(value) for value in part.tolist()] for part in values]
        elsewhere = [str(v) for path in others for v in _values(path, column).tolist() if v not in (None, -1)]
        self.classes = sort_classes([*(v for part in told for v in part if v is not None), *elsewhere])
        number: dict[str | None, int] = {name: k for k, name in enumerate(self.classes)}
        self.labels = np.array([number.get(value, -1) for part in told for value in part], np.int64)

    def _opening(self) -> None:
        self._held: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()
        self._reading: dict[int, threading.Lock] = {}

    def fetch(self, index: int) -> tuple[bytes, str]:
        group = self.shards.item(index)
        data = self._rows(group)[index - self.first.item(group)].as_py()
        if data is None:
            raise CorruptImage(f"{self.called(index)}: the row holds no bytes of an image")
        return data, self.called(index)

    def called(self, index: int) -> str:
        """File and row of an image."""
        number, row = self._place(index)
        return f"{self.paths[number]}, row {row}"

    def key(self, index: int) -> str:
        number, row = self._place(index)
        return f"{Path(self.paths[number]).name}:{row}"

    def _place(self, index: int) -> tuple[int, int]:
        """Number of the file, and row in it, of an image."""
        number, group = self.groups[self.shards.item(index)]
        return number, index - self.first.item(self.shards.item(index) - group)

    def _rows(self, group: int) -> Any:
        """The encoded images of a row group, read once however many threads ask for it."""
        with self._lock:
            if group in self._held:
                self._held.move_to_end(group)
                return self._held[group]
            reading = self._reading.setdefault(group, threading.Lock())
        with reading:
            with self._lock:
                if group in self._held:
                    return self._held[group]
            rows = self._read(group)
            with self._lock:
                self._held[group] = rows
                while len(self._held) > self.keep:
                    self._held.popitem(last=False)
                self._reading.pop(group, None)
            return rows

    def _read(self, group: int) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        number, k = self.groups[group]
        column = f"{self.columns.image}.bytes" if self.columns.nested else self.columns.image
        try:
            if stamp(Path(self.paths[number])) != self.stamps[number]:
                raise CorruptImage(f"{self.paths[number]}, row group {k}: the file has changed since it was opened")
            with pq.ParquetFile(self.paths[number]) as file:
                rows = file.read_row_group(k, columns=[column], use_threads=False).column(0).combine_chunks()
        except (OSError, pa.ArrowException) as error:
            raise CorruptImage(f"{self.paths[number]}, row group {k}: {_reason(error)}") from error
        told = int(self.first[group + 1] - self.first[group])
        if len(rows) != told:
            raise CorruptImage(
                f"{self.paths[number]}, row group {k}: holds {len(rows)} rows, its footer tells of {told}"
            )
        return rows.field("bytes") if self.columns.nested else rows

    def __getstate__(self) -> dict[str, Any]:
        return {name: v for name, v in vars(self).items() if name not in ("_held", "_lock", "_reading")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._opening()


def _columns(path: Path) -> Columns:
    """The columns of a file; ValueError where none holds encoded images."""
    import pyarrow as pa

    schema = _schema(path)
    nested = {field.name for field in schema if pa.types.is_struct(field.type) and "bytes" in _fields(field.type)}
    binary = {field.name for field in schema if pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type)}
    image = _choose(IMAGE_COLUMNS, nested | binary)
    if image is None:
        raise ValueError(f"{path} must have a column image of bytes, or of bytes and path, got {schema.names}")
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        features = {}
    named = {name: told["names"] for name, told in features.items() if isinstance(told, dict) and told.get("names")}
    label = _choose(LABEL_COLUMNS, set(schema.names) & set(named)) or _choose(LABEL_COLUMNS, set(schema.names), False)
    return Columns(image, image in nested, label, named.get(label or ""))


def _fields(struct: Any) -> list[str]:
    return [struct.field(k).name for k in range(struct.num_fields)]


def _choose(names: Sequence[str], there: set[str], only: bool = True) -> str | None:
    """The first of `names` that is there, or, with `only`, the one that is there."""
    return next((name for name in names if name in there), next(iter(there)) if only and len(there) == 1 else None)


def _schema(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be read as parquet: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """What pyarrow says, on one line."""
    return " ".join(str(error).split())


def _check_counts(paths: Sequence[Path], groups: Sequence[tuple[int, int]], counts: Sequence[int]) -> None:
    """Refuse files without a row, and those that claim more rows than they have bits: memory is needed for each."""
    if not sum(counts):
        raise ValueError(f"loader.root must hold images, got none in {paths[0]} and the like")
    for (number, group), count in zip(groups, counts, strict=True):
        size = paths[number].stat().st_size
        if not 0 <= count <= 8 * size:
            raise ValueError(f"{paths[number]}, row group {group}: {count} rows cannot be in {size} bytes")


def _footer(path: Path, columns: Columns) -> Any:
    """Row groups of a file; ValueError where its columns are not those of the first file."""
    import pyarrow.parquet as pq

    other = _columns(path)
    if other != columns:
        raise ValueError(
            f"{path} has images in {other.image} and labels in {other.label}, unlike the other files, which have "
            f"{columns.image} and {columns.label} with the same names of classes"
        )
    return pq.read_metadata(path)


def _values(path: Path, column: str) -> NDArray[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        values = pq.read_table(path, columns=[column]).column(0)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path}, column {column}: {_reason(error)}") from None
    if pa.types.is_integer(values.type):
        return values.fill_null(-1).to_numpy()  # type: ignore[no-any-return]
    return np.array(values.to_pylist(), object)


def _check_range(path: Path, labels: NDArray[Any], classes: int) -> None:
    wrong = np.flatnonzero((labels < -1) | (labels >= classes))
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(f"{path}, row {row}: label {labels[row]} is not among the {classes} classes, -1 for unknown")
