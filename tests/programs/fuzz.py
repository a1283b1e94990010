"""`python fuzz.py TARGET CORPUS [libFuzzer's options]`: coverage-guided fuzzing of what reads files of others.

Needs atheris. Anything but the one error that a reader promises, and anything that takes longer than the limit of
libFuzzer (`-timeout=10`) or more memory (`-rss_limit_mb=2048`), ends the run with the input in `crash-*`.
"""

import csv
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

FOLDER = Path(tempfile.mkdtemp())
REFUSED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError)  # as plain_pickle says


def instrumented(name: str) -> Any:
    """A module of fastrdm; while fuzzing its branches are told to libFuzzer, those of what it imports are not."""
    return import_module(f"fastrdm.{name}")


def image(data: bytes) -> None:
    reader = instrumented("loaders.sources.decode")
    try:
        pixels = reader.decode(data, "x")
    except reader.CorruptImage as error:
        assert str(error).startswith("x: ") and "\n" not in str(error)
    else:
        assert pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype.name == "uint8"


def pickled(data: bytes) -> None:
    try:
        instrumented("loaders.sources.plain_pickle").read_pickle(data)
    except REFUSED:
        return


def config(data: bytes) -> None:
    try:
        instrumented("config.run_config").resolve(
            instrumented("config.tree").parse(data.decode("utf-8", "replace"), "x.yaml")
        )
    except ValueError:
        return


def metrics(data: bytes) -> None:
    file = FOLDER / "metrics.jsonl"
    file.write_bytes(data)
    for name in ("alarms", "spectra", "analysis"):
        (FOLDER / f"{name}.jsonl").write_bytes(data)
    jsonl = instrumented("report.jsonl")
    jsonl.read_lines(file, lambda tree: True)
    jsonl.first_lines(file, lambda tree: True, ("alarm", "tap"))
    instrumented("report.run_files").read_runs([FOLDER])


def labels(data: bytes) -> None:
    file = FOLDER / "labels.csv"
    file.write_bytes(data)
    try:
        instrumented("loaders.packing.pack").read_labels(file)
    except (ValueError, csv.Error):
        return


def pack(data: bytes) -> None:
    """meta.json and index.npy out of the input, sealed so that the checks behind the checksums are reached."""
    reader = instrumented("loaders.sources.packed")
    meta, _, index = data.partition(b"\n\n")
    (FOLDER / "shards").mkdir(exist_ok=True)
    (FOLDER / "shards" / "00000.bin").write_bytes(bytes(100))
    (FOLDER / "index.npy").write_bytes(index)
    try:
        told = json.loads(meta)
        told["files"]["index.npy"] = {"bytes": len(index), "sha256": hashlib.sha256(index).hexdigest()}
        told["seal"] = reader.seal(told)
        (FOLDER / "meta.json").write_text(json.dumps(told))
    except (ValueError, TypeError, LookupError, RecursionError):
        return
    try:
        source = reader.PackedSource(FOLDER)
        for number in range(min(len(source), 3)):
            source.read(number)
    except ValueError as error:
        assert "\n" not in str(error)


TARGETS: dict[str, tuple[Callable[[bytes], None], tuple[str, ...]]] = {  # and the modules that are instrumented
    "image": (image, ("loaders.sources.decode",)),
    "pickle": (pickled, ("loaders.sources.plain_pickle",)),
    "config": (config, ("config.tree", "config.run_config")),
    "metrics": (metrics, ("report.jsonl", "report.run_files")),
    "labels": (labels, ("loaders.packing.pack",)),
    "pack": (pack, ("loaders.sources.pack_fields", "loaders.sources.packed")),
}


if __name__ == "__main__":
    import atheris

    target, names = TARGETS[sys.argv.pop(1)]
    with atheris.instrument_imports(include=[f"fastrdm.{name}" for name in names]):
        for name in names:
            instrumented(name)
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()
