"""`python fuzz.py TARGET CORPUS [libFuzzer's options]`: coverage-guided fuzzing of what reads files of others.

Needs atheris. Anything but the one error that a reader promises, and anything that takes longer than the limit of
libFuzzer (`-timeout=10`) or more memory (`-rss_limit_mb=2048`), ends the run with the input in `crash-*`.
"""

import csv
import hashlib
import inspect
import json
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

FOLDER = Path(tempfile.mkdtemp())
REFUSED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError)  # as plain_pickle says


def module(name: str) -> Any:
    """A module of fastrdm, imported when a target first needs it."""
    return import_module(f"fastrdm.{name}")


def image(data: bytes) -> None:
    reader = module("loaders.sources.decode")
    try:
        pixels = reader.decode(data, "x")
    except reader.CorruptImage as error:
        assert str(error).startswith("x: ") and "\n" not in str(error)
    else:
        assert pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype.name == "uint8"


def pickled(data: bytes) -> None:
    try:
        module("loaders.sources.plain_pickle").read_pickle(data)
    except REFUSED:
        return


def config(data: bytes) -> None:
    file = FOLDER / "c.yaml"
    file.write_bytes(data)
    try:
        module("config.run_config").load([str(file)])
    except ValueError:
        return


def metrics(data: bytes) -> None:
    file = FOLDER / "metrics.jsonl"
    file.write_bytes(data)
    for name in ("alarms", "spectra", "analysis"):
        (FOLDER / f"{name}.jsonl").write_bytes(data)
    jsonl = module("report.jsonl")
    jsonl.read_lines(file, lambda tree: True)
    jsonl.first_lines(file, lambda tree: True, ("alarm", "tap"))
    module("report.run_files").read_runs([FOLDER])


def labels(data: bytes) -> None:
    file = FOLDER / "labels.csv"
    file.write_bytes(data)
    try:
        module("loaders.sources.label_file").read_labels(file, ["a/1.jpg", "2.jpg"])
    except (ValueError, csv.Error):
        return


def pack(data: bytes) -> None:
    """meta.json and index.npy out of the input, sealed so that the checks behind the checksums are reached."""
    reader = module("loaders.sources.packed")
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


def opened(name: str, file: Path, opener: str, where: str = "") -> None:
    """Open a file as a source of images and read the first of them; ValueError in one line is what may come of it."""
    settings = module("loaders.spec").LoaderConfig(source=name, root=str(file), cache=str(FOLDER / "cache"))
    try:
        source = getattr(module(f"loaders.sources.{where or name}"), opener)(settings, "train")
        for number in range(min(len(source), 3)):
            source.key(number)
            source.fetch(number)
    except ValueError as error:
        assert "\n" not in str(error)


def webdataset(data: bytes) -> None:
    file = FOLDER / "train.tar"
    file.write_bytes(data)
    opened("webdataset", file, "open_webdataset")


def tar(data: bytes) -> None:
    file = FOLDER / "set.tar"
    file.write_bytes(data)
    opened("tar", file, "open_tar", "tar_folders")


def parquet(data: bytes) -> None:
    """The input between the marks that begin and end a parquet file: columns, footer, length of the footer."""
    file = FOLDER / "train.parquet"
    file.write_bytes(b"PAR1" + data + b"PAR1")
    opened("parquet", file, "open_parquet")


TARGETS: dict[str, tuple[Callable[[bytes], None], tuple[str, ...]]] = {  # and modules whose functions are instrumented
    "image": (image, ("loaders.sources.decode",)),
    "pickle": (pickled, ("loaders.sources.plain_pickle",)),
    "config": (config, ("config.tree", "config.run_config")),
    "metrics": (metrics, ("report.jsonl", "report.run_files")),
    "labels": (labels, ("loaders.packing.pack",)),
    "tar": (tar, ("loaders.sources.tar_folders", "loaders.sources.tar")),
    "webdataset": (webdataset, ("loaders.sources.webdataset", "loaders.sources.tar", "loaders.sources.shard_files")),
    "parquet": (parquet, ("loaders.sources.parquet",)),
    "pack": (pack, ("loaders.sources.pack_fields", "loaders.sources.packed")),
}


if __name__ == "__main__":
    import atheris

    target, names = TARGETS[sys.argv.pop(1)]
    for found in (vars(module(name)) for name in names):
        for function in filter(inspect.isfunction, list(found.values())):
            if function.__module__ == found["__name__"]:
                atheris.instrument_func(function)  # in place: whoever imported it runs it with its branches told
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()
