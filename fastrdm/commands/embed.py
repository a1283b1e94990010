"""`fastrdm embed`: features of every image of a source, with their names and labels."""

import argparse
import csv
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from fastrdm.commands import parsers
from fastrdm.commands.evaluate import opened as open_foreign
from fastrdm.commands.pretrained import Pretrained, from_path, load_projector
from fastrdm.commands.source_word import loader_of
from fastrdm.evaluation.embedding import FEATURES, Embedded, blocks, complete, embed, tap_features, unit_length, whiten
from fastrdm.evaluation.evaluator import Machine, sized
from fastrdm.files import whole, write_whole
from fastrdm.live_line import LiveLine
from fastrdm.loaders.sources.open import open_source
from fastrdm.loaders.sources.source import Source
from fastrdm.loaders.spec import LoaderConfig
from fastrdm.runtime import distributed
from fastrdm.schema import require

FORMAT = "fastrdm-embed-1"
TABLE, PARQUET, ABOUT = "images.csv", "features.parquet", "embed.json"
OWN_TAPS = ("features", "hidden", "projection")


def encode_function(pretrained: Pretrained, tap: str, machine: Machine) -> Callable[[Tensor], Tensor]:
    """The function from center views (B, 3, S, S) to the rows (B, D) of `tap`."""
    encoder = pretrained.encoder.to(machine.device).to(memory_format=torch.channels_last)
    projector = load_projector(pretrained).to(machine.device) if tap in OWN_TAPS[1:] else None
    if tap not in OWN_TAPS:
        names = [name for name, _ in encoder.named_modules() if name]
        known = ", ".join((*OWN_TAPS, *(name for name in names if "." not in name)))
        require(tap in names, "--tap", f"one of {known}, or a module below one of them", tap)

    def encode(images: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(machine.device.type, torch.bfloat16, enabled=machine.bf16):
            if tap not in OWN_TAPS:
                return tap_features(encoder, tap, images).float()
            features: Tensor = encoder(images)
            if projector is None:
                return features.float()
            hidden = projector.body(features)
        with torch.no_grad():
            return hidden.float() if tap == "hidden" else projector.tail(hidden.float())

    return encode


def main(arguments: Sequence[str]) -> int:
    """Embed what `arguments` ask for; the exit status."""
    options = parsers.embed().parse_intermixed_args(arguments)
    for key in ("size", "batch_size", "workers"):
        value = getattr(options, key)
        require(value is None or value > 0, f"--{key.replace('_', '-')}", "above 0", value)
    if options.parquet and find_spec("pyarrow") is None:
        raise ValueError("--parquet needs pyarrow: pip install 'fastrdm[parquet]'")
    if options.weights is not None:
        pretrained, words = open_foreign(None, options), options.words
    else:
        require(bool(options.words), "RUN", "a run folder or an exported file", None)
        words = options.words[1:]
        given = loader_of(words[0], options.root, None).source if words else None
        path = Path(options.words[0])
        pretrained = from_path(path, options.branch, options.encoder, given, trust=options.trust)
    require(len(words) <= 1, "SOURCE", "one folder or name", words)
    data = loader_of(words[0] if words else None, options.root, pretrained.loader)
    require(not (options.out / FEATURES).exists(), "-o", "a folder without features.npy", str(options.out))
    source = open_source(data, options.split)
    require(len(source) > 0, "SOURCE", f"images in its {options.split} split", data.root or data.source)
    try:
        processes = distributed.start(options.device)
        _embed(pretrained, source, data, options, processes)
    finally:
        distributed.stop()
    return 0


def _embed(
    pretrained: Pretrained,
    source: Source,
    data: LoaderConfig,
    options: argparse.Namespace,
    processes: distributed.Processes,
) -> None:
    began, live = time.monotonic(), LiveLine()
    machine = Machine(processes.device, options.precision == "bf16", options.batch_size, options.workers)
    view = sized(pretrained.view, options.size)
    about = {
        "format": FORMAT,
        "encoder": pretrained.origin,
        "tap": options.tap,
        "precision": options.precision,
        "view": {k: v for k, v in asdict(view).items() if k in ("size", "interpolation", "mean", "std")},
        "source": {"name": data.source, "root": data.root and os.path.abspath(data.root), "split": options.split},
        "images": len(source),
        "labels_sha256": hashlib.sha256(source.labels.astype("<i8").tobytes()).hexdigest(),
    }
    encode = encode_function(pretrained, options.tap, machine)
    found = embed(encode, source, view, options.out, about, machine, processes, live.tell)
    if found is None:
        return
    if options.whiten:
        whiten(found.features)
    if options.unit:
        unit_length(found.features)
    write_tables(found, source, options.out, parquet=options.parquet)
    done = {"whiten": options.whiten, "unit": options.unit, "rows": len(found.numbers), "unreadable": found.faults}
    done |= {"seconds": time.monotonic() - began, "fastrdm": version("fastrdm")}
    write_whole(options.out / ABOUT, json.dumps({**about, **done}, indent=1, default=str))
    complete(options.out)
    for reason in list(found.faults.values())[:5]:
        live.say(f"left out, cannot be read: {reason}")
    rows, width = found.features.shape
    left = f", {len(found.faults)} unreadable images left out" if found.faults else ""
    live.say(f"{options.out / FEATURES}: {rows:,} rows of {width}{left}, {done['seconds']:.0f} s")


def write_tables(found: Embedded, source: Source, out: Path, *, parquet: bool) -> None:
    """Write the table of images, one line for each row of the features, and on request both in one parquet file."""
    names = [source.key(index) for index in found.numbers.tolist()]
    numbers = source.labels[found.numbers].tolist()
    labels = [source.classes[n] if 0 <= n < len(source.classes) else None for n in numbers]
    with (
        whole(out / TABLE) as partial,
        partial.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(("index", "name", "label"))
        writer.writerows(zip(found.numbers.tolist(), names, (label or "" for label in labels), strict=True))
    if parquet:
        _write_parquet(found, names, labels, out / PARQUET)


def _write_parquet(found: Embedded, names: list[str], labels: list[str | None], file: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    width = found.features.shape[1]
    vector = pa.list_(pa.float32(), width)
    columns = [("index", pa.int64()), ("name", pa.string()), ("label", pa.string()), ("features", vector)]
    schema = pa.schema(columns)
    # parquet has no text but UTF-8: bytes of names that are none are escaped
    shown, classes = (
        [text and text.encode("utf-8", "backslashreplace").decode() for text in t] for t in (names, labels)
    )
    # opened here, since pyarrow takes no path that is not UTF-8
    with whole(file, pa.ArrowException) as partial, partial.open("wb") as out, pq.ParquetWriter(out, schema) as writer:
        for part in blocks(len(names)):
            rows = pa.FixedSizeListArray.from_arrays(pa.array(found.features[part].ravel()), width)
            table = [pa.array(found.numbers[part]), shown[part], pa.array(classes[part], pa.string()), rows]
            writer.write_table(pa.table(dict(zip(schema.names, table, strict=True)), schema=schema))
