"""`python fuzz.py TARGET CORPUS [libFuzzer's options]`: coverage-guided fuzzing of what reads files of others.

Needs atheris. Anything but the one error that a reader promises, and anything that takes longer than the limit of
libFuzzer (`-timeout=10`) or more memory (`-rss_limit_mb=2048`), ends the run with the input in `crash-*`.
"""

import csv
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["fastrdm", "PIL", "yaml"]):
    from fastrdm.config import run_config, tree
    from fastrdm.loaders.packing.pack import read_labels
    from fastrdm.loaders.sources.decode import CorruptImage, decode
    from fastrdm.loaders.sources.packed import PackedSource, seal
    from fastrdm.loaders.sources.plain_pickle import read_pickle
    from fastrdm.report.jsonl import first_lines, read_lines
    from fastrdm.report.run_files import read_runs

FOLDER = Path(tempfile.mkdtemp())
REFUSED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError)  # as plain_pickle says


def image(data: bytes) -> None:
    try:
        pixels = decode(data, "x")
    except CorruptImage as error:
        assert str(error).startswith("x: ") and "\n" not in str(error)
    else:
        assert pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype.name == "uint8"


def pickled(data: bytes) -> None:
    try:
        read_pickle(data)
    except REFUSED:
        return


def config(data: bytes) -> None:
    try:
        run_config.resolve(tree.parse(data.decode("utf-8", "replace"), "x.yaml"))
    except ValueError:
        return


def metrics(data: bytes) -> None:
    file = FOLDER / "metrics.jsonl"
    file.write_bytes(data)
    for name in ("alarms", "spectra", "analysis"):
        (FOLDER / f"{name}.jsonl").write_bytes(data)
    read_lines(file, lambda tree: True)
    first_lines(file, lambda tree: True, ("alarm", "tap"))
    read_runs([FOLDER])


def labels(data: bytes) -> None:
    file = FOLDER / "labels.csv"
    file.write_bytes(data)
    try:
        read_labels(file)
    except (ValueError, csv.Error):
        return


def pack(data: bytes) -> None:
    """meta.json and index.npy out of the input, sealed so that the checks behind the checksums are reached."""
    meta, _, index = data.partition(b"\n\n")
    (FOLDER / "shards").mkdir(exist_ok=True)
    (FOLDER / "shards" / "00000.bin").write_bytes(bytes(100))
    (FOLDER / "index.npy").write_bytes(index)
    try:
        told = json.loads(meta)
        told["seal"] = seal(told)
        (FOLDER / "meta.json").write_text(json.dumps(told))
    except (ValueError, TypeError, RecursionError):
        return
    try:
        source = PackedSource(FOLDER)
        for number in range(min(len(source), 3)):
            source.read(number)
    except ValueError as error:
        assert "\n" not in str(error)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "image": image,
    "pickle": pickled,
    "config": config,
    "metrics": metrics,
    "labels": labels,
    "pack": pack,
}


if __name__ == "__main__":
    target = sys.argv.pop(1)
    atheris.Setup(sys.argv, TARGETS[target])
    atheris.Fuzz()
