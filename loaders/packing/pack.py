"""`fastrdm pack`: a folder of images into a packed folder (packed.py), by several processes, resumable after a kill."""

import argparse
import csv
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from fastrdm.loaders.packing.journal import Journal
from fastrdm.loaders.packing.shard_writer import Settings
from fastrdm.loaders.packing.worker_processes import make_shards
from fastrdm.loaders.sources.beton import check_ffcv, write_beton
from fastrdm.loaders.sources.decode import CorruptImage
from fastrdm.loaders.sources.folder import FolderSource, is_image
from fastrdm.loaders.sources.packed import verify

MAX_LISTED = 100  # repaired or refused files printed; meta.json has all
PARTS = "train", "val", "test"


@dataclass(frozen=True)
class Listing:
    """The files of a set, in the order of their numbers."""

    files: list[tuple[str, int]]  # path below the source, label
    classes: list[str]


def main(arguments: Sequence[str]) -> int:
    """`fastrdm pack`; the exit status."""
    options = _parser().parse_args(arguments)
    if options.out is None:
        if not options.verify:
            raise ValueError("fastrdm pack takes SRC and OUT, or one packed folder and --verify")
        _verify(options.src)
        return 0
    if not options.src.is_dir():
        raise ValueError(f"SRC must be a folder of images, got {options.src}")
    parts = [part for part in PARTS if (options.src / part).is_dir()] if options.labels == "folders" else []
    left = [part for part in parts if not (options.out / part).exists()]
    for part in parts or [""]:
        if left and part not in left:
            print(f"{options.out / part} is packed already", flush=True)
        else:
            pack(options.src / part, options.out / part, options)
        if options.verify:
            _verify(options.out / part)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastrdm pack", description="Pack a folder of images into a few large files.")
    parser.add_argument("src", type=Path, metavar="SRC", help="one folder a class, or train, val, test of such folders")
    parser.add_argument("out", type=Path, metavar="OUT", nargs="?", help="packed folder to make; must not exist")
    parser.add_argument(
        "--mode", choices=("raw", "jpeg"), default="jpeg", help="jpeg keeps the encoded files (default)"
    )
    parser.add_argument(
        "--format", choices=("packed", "beton"), default="packed", help="packed (default), or beton for ffcv"
    )
    parser.add_argument("--size", type=_positive, default=256, help="pixels a side in mode raw (default 256)")
    parser.add_argument("--exif", choices=("ignore", "apply"), default="ignore", help="orientation (default ignore)")
    parser.add_argument("--labels", default="folders", help="folders (default), none, or a CSV file with file,label")
    parser.add_argument("--shard-mb", type=_positive, default=512, help="MiB a shard, about (default 512)")
    parser.add_argument("--workers", type=_positive, default=_cores(), help="processes (default: one a core)")
    parser.add_argument(
        "--max-bad", type=float, default=0.01, help="share of unreadable files that stops (default 0.01)"
    )
    parser.add_argument("--verify", action="store_true", help="read everything back and compare checksums")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _verify(root: Path) -> None:
    print(f"{root}: {verify(root):,} bytes are what was written")


def pack(source: Path, out: Path, options: argparse.Namespace) -> None:
    """Make packed folder `out` of the images of `source`; it appears when it is complete."""
    if out.exists():
        raise ValueError(f"OUT exists already: {out}. To check it: fastrdm pack {out} --verify")
    if options.format == "beton":
        _pack_beton(source, out, options)
    else:
        _pack(source, out, options)


def _pack_beton(source: Path, out: Path, options: argparse.Namespace) -> None:
    """By way of a packed folder, which is removed."""
    if options.mode != "jpeg" or options.verify:
        raise ValueError("--format beton takes --mode jpeg and no --verify: .beton files hold no checksums")
    packed, made = (out.with_name(f"{out.name}.{kind}") for kind in ("packed", "unfinished"))
    check_ffcv("--format beton")
    if not packed.exists():
        _pack(source, packed, options)
    shutil.rmtree(made, ignore_errors=True)
    write_beton(packed, made, options.workers)
    made.rename(out)
    shutil.rmtree(packed)


def _pack(source: Path, out: Path, options: argparse.Namespace) -> None:
    """Make packed folder `out`."""
    listing = list_images(source, options.labels)
    sizes = [(source / file).stat().st_size for file, _ in listing.files]
    fixed = {"mode": options.mode, "size": options.size if options.mode == "raw" else None, "exif": options.exif}
    shards = plan(listing.files, sizes, options)
    with Journal(out, {**fixed, "shards": shards, "sizes": sizes, "classes": listing.classes}) as journal:
        _check_space(journal.folder, sizes, options)
        todo = {number: files for number, files in enumerate(shards) if number not in journal.records}
        progress = Progress(len(listing.files), journal.records.values(), options.max_bad)
        settings = Settings(
            str(source.resolve()), str(journal.pack.resolve()), options.mode, options.size, options.exif
        )
        for message in make_shards(settings, todo, options.workers):
            if message is None:
                progress.show()
            elif "record" in message:
                journal.add(message["record"])
            else:
                progress.add(message["done"], message["bad"])
        progress.end()
        meta = journal.finish({**fixed, "source": source.resolve().name, "classes": listing.classes})
    print("\n".join(report(out, meta)), flush=True)


def list_images(source: Path, labels: str) -> Listing:
    """The images of a folder: labeled by their class folders, by a CSV file, or not at all."""
    if labels == "folders":
        found = FolderSource(source)
        names = [found.classes[label] for label in found.labels]
        return Listing(
            [(f"{n}/{f}", int(k)) for n, f, k in zip(names, found.files, found.labels, strict=True)], found.classes
        )
    files = sorted(
        (Path(folder) / file).relative_to(source).as_posix()
        for folder, below, found_files in os.walk(source)
        for file in filter(is_image, found_files)
    )
    if not files:
        raise ValueError(f"SRC holds no image: {source}")
    told = {} if labels == "none" else read_labels(Path(labels))
    if absent := sorted(told.keys() - set(files)):
        raise ValueError(f"--labels {labels} names {len(absent)} files that are not in {source}, such as {absent[0]}")
    classes = sorted(set(told.values()), key=lambda name: (len(name), name) if name.isdecimal() else (0, name))
    number = {name: k for k, name in enumerate(classes)}
    return Listing([(file, number[told[file]] if file in told else -1) for file in files], classes)


def read_labels(path: Path) -> dict[str, str]:
    """Label of each file from a CSV file with the columns file and label."""
    if not path.is_file():
        raise ValueError(f"--labels must be folders, none or a CSV file, got {path}, which is no file")
    with path.open(newline="", encoding="utf-8-sig") as lines:
        rows = csv.DictReader(lines)
        if not {"file", "label"} <= set(rows.fieldnames or ()):
            raise ValueError(f"{path} must have the columns file and label in its first line, got {rows.fieldnames}")
        return {row["file"]: row["label"] for row in rows}


def plan(files: list[tuple[str, int]], sizes: list[int], options: argparse.Namespace) -> list[list[tuple[str, int]]]:
    """The files of each shard; from the set and the options alone, so that any number of workers makes the same."""
    limit = options.shard_mb * 2**20
    if options.mode == "raw":
        sizes = [3 * options.size**2] * len(files)
    starts, filled = [], 0
    number = -1
    for size in sizes:
        if number < 0 or filled + size > limit:
            number, filled = number + 1, 0
        filled += size
        starts.append(number)
    return [[file for _, file in group] for _, group in groupby(zip(starts, files, strict=True), key=lambda x: x[0])]


def _check_space(folder: Path, sizes: list[int], options: argparse.Namespace) -> None:
    needed = 3 * options.size**2 * len(sizes) if options.mode == "raw" else sum(sizes)
    held = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    free = shutil.disk_usage(folder).free
    if needed - held > free:
        raise ValueError(f"OUT needs {needed - held:,} bytes more, {free:,} are free there")


class Progress:
    """The line that tells how far the work is; stops it when too many files are bad."""

    def __init__(self, total: int, records: Any, max_bad: float) -> None:
        self.total, self.max_bad = total, max_bad
        self.bad = sum(len(record["refused"]) for record in records)
        self.done = self.before = sum(len(record["rows"]) for record in records) + self.bad
        self.began = self.shown = time.monotonic()
        self.live = sys.stdout.isatty()
        if self.before:
            print(f"going on: {self.before:,} of {total:,} images are packed", flush=True)

    def add(self, done: int, bad: int) -> None:
        self.done, self.bad = self.done + done, self.bad + bad
        if self.bad > self.max_bad * self.total:
            raise CorruptImage(
                f"{self.bad} of {self.total} files cannot be read, above --max-bad {self.max_bad}. What is packed is "
                "kept: repair them or raise --max-bad, and run the same command again"
            )
        self.show()

    def show(self) -> None:
        """At most once a second on a terminal, every ten seconds elsewhere."""
        now = time.monotonic()
        if now - self.shown >= (1 if self.live else 10):
            self.shown = now
            print(
                "\r\x1b[K" + self.line(now) if self.live else self.line(now), end="" if self.live else "\n", flush=True
            )

    def line(self, now: float) -> str:
        rate = (self.done - self.before) / max(now - self.began, 1e-9)
        left = f"{(self.total - self.done) / rate:,.0f} s left" if rate else "no rate yet"
        return f"packed {self.done:,} of {self.total:,} images, {rate:,.0f} images/s, {left}, {self.bad:,} refused"

    def end(self) -> None:
        print(("\r\x1b[K" if self.live else "") + self.line(time.monotonic()), flush=True)


def report(out: Path, meta: dict[str, Any]) -> list[str]:
    """Summary for the terminal: size of the pack, then the first repaired and the first refused files."""
    size = sum(told["bytes"] for told in meta["files"].values())
    lines = [f"{out}: {meta['count']:,} images of {len(meta['classes']):,} classes, {size / 1e9:,.2f} GB"]
    for kind in ("repaired", "refused"):
        listed = meta[kind]
        lines += [f"{kind}: {file}: {what}" for file, what in listed[:MAX_LISTED]]
        if len(listed) > MAX_LISTED:
            lines.append(f"{kind}: {len(listed) - MAX_LISTED:,} more, all of them in {out / 'meta.json'}")
    reasons = Counter(what for _, what in meta["repaired"])
    return lines + [f"repaired in all: {count:,} x {what}" for what, count in reasons.most_common()]
