"""`fastrdm pack`: a set of images into a packed folder (packed.py), by several processes, resumable after a kill."""

import argparse
import hashlib
import io
import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stdout
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fastrdm.live_line import LiveLine
from fastrdm.loaders.packing.journal import Journal, digest
from fastrdm.loaders.packing.shard_writer import Settings
from fastrdm.loaders.packing.worker_processes import Span, make_shards
from fastrdm.loaders.sources.beton import check_ffcv, write_beton
from fastrdm.loaders.sources.decode import CorruptImage
from fastrdm.loaders.sources.index_cache import cache_folder
from fastrdm.loaders.sources.open import open_parts
from fastrdm.loaders.sources.packed import META, check_meta, read_meta, verify_all
from fastrdm.loaders.sources.remote import verify_remote
from fastrdm.loaders.sources.source import Source
from fastrdm.loaders.sources.store import Store, is_remote, upload_folder
from fastrdm.loaders.spec import LoaderConfig

MAX_LISTED = 100  # repaired or refused files printed; meta.json has all
NAMED = 5  # refused files named where they stop the work
ASSUMED_BYTES = 2**17  # of an image, where a source does not know how large its images are
BETON_PLAN = "plan"


def main(arguments: Sequence[str]) -> int:
    """`fastrdm pack`; the exit status."""
    options = _parser().parse_args(arguments)
    if options.out is None:
        if not options.verify:
            raise ValueError("fastrdm pack takes SRC and OUT, or one packed folder and --verify")
        _verify(options.src)
        return 0
    if not is_remote(options.src) and not is_remote(options.out):
        source, out = Path(options.src).resolve(), Path(options.out).resolve()
        if out == source or source in out.parents:
            raise ValueError(f"OUT must not lie in SRC, where the next command would take it for images: {options.out}")
    config = LoaderConfig(source=options.source, root=options.src, labels=options.labels)
    # every part is listed before one is written: what is refused is refused at once
    parts = [Part(source, name, options) for name, source in open_parts(config).items()]
    todo = [part for part in parts if not part.is_packed()]
    for part in parts:
        if part.source.note:
            print(f"note: {part.source.note}", flush=True)
        if part in todo:
            part.pack()
        else:
            print(f"{part.told_out} is packed already", flush=True)
        if options.verify:
            _verify(part.told_out)
    return 0


def pack_source(source: Source, out: Path, mode: str, workers: int) -> None:
    """Pack the images of `source` that can be read into the new folder `out`, as the command does by default, silently.

    ValueError and OSError as for the command.
    """
    words = [source.name, str(out), "--mode", mode, "--workers", str(workers), "--max-bad", "1"]
    with redirect_stdout(io.StringIO()):
        Part(source, "", _parser().parse_args(words)).pack()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastrdm pack", description="Pack a set of images into a few large files.")
    parser.add_argument("src", metavar="SRC", help="the images: a folder of any shape, or what --source reads")
    parser.add_argument("out", metavar="OUT", nargs="?", help="packed folder to make, or its URL on a store")
    parser.add_argument(
        "--mode", choices=("raw", "jpeg"), default="jpeg", help="jpeg keeps the encoded files (default)"
    )
    parser.add_argument(
        "--format", choices=("packed", "beton"), default="packed", help="packed (default), or beton for ffcv"
    )
    parser.add_argument("--size", type=_positive, default=256, help="pixels a side in mode raw (default 256)")
    parser.add_argument("--exif", choices=("ignore", "apply"), default="ignore", help="orientation (default ignore)")
    parser.add_argument("--source", default="folder", help="what SRC is, as in loader.source (default folder)")
    parser.add_argument("--labels", default="auto", help="auto (default), folders, none or a file, as in loader.labels")
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


def _verify(root: str) -> None:
    for part, size in (verify_remote(root) if is_remote(root) else verify_all(Path(root))).items():
        print(f"{part}: {size:,} bytes are what was written")


class Part:
    """One split of a set and the folder that it is packed into."""

    def __init__(self, source: Source, name: str, options: argparse.Namespace) -> None:
        self.source, self.options = source, options
        self.told_out = f"{options.out}/{name}".rstrip("/")
        # what goes to a store is made here first, and written there when it is complete
        self.url = self.told_out if is_remote(options.out) else None
        staged = hashlib.sha256(os.fsencode(self.told_out)).hexdigest()[:16]
        self.out = Path(self.told_out) if self.url is None else cache_folder(None) / "staged" / staged
        self.fixed = {"mode": options.mode, "size": options.size if options.mode == "raw" else None}
        self.fixed["exif"] = options.exif
        self.told = {**self.fixed, "source": name or Path(options.src).resolve().name, "classes": source.classes}
        sizes = source.sizes()
        self.sizes: list[int] = [ASSUMED_BYTES] * len(source) if sizes is None else sizes.tolist()
        self.shards = plan(self.sizes, options)

    @cached_property
    def plan(self) -> dict[str, Any]:
        """All that decides about the result."""
        keys = [self.source.key(k) for k in range(len(self.source))]
        labels = np.asarray(self.source.labels).tolist()
        told = {"shards": self.shards, "sizes": self.sizes, "keys": keys, "labels": labels}
        return {**self.fixed, **told, "classes": self.source.classes}

    def is_packed(self) -> bool:
        """Whether OUT is there and is what this command makes; ValueError if it is something else."""
        if self.url is not None:
            there = Store(self.url, "OUT").read(META)
            if there is None:
                return False
            made = check_meta(f"{self.url}/{META}", there).get("plan")
        elif not self.out.exists():
            return False
        elif self.options.format == "beton":
            mark = self.out / BETON_PLAN
            made = mark.read_text() if mark.is_file() else None
        else:
            made = read_meta(self.out).get("plan") if (self.out / META).is_file() else None
        if made != digest(self.plan):
            raise ValueError(
                f"OUT exists already: {self.told_out}, made with other files or options. To check it: fastrdm pack "
                f"{self.told_out} --verify"
            )
        return True

    def pack(self) -> None:
        """Make the packed folder; it appears when it is complete."""
        if self.options.format == "beton":
            self._pack_beton()
        elif self.url is None:
            self._pack(self.out)
        else:
            if not self.out.exists():
                self._pack(self.out)
            upload_folder(self.out, self.url, last=META)
            shutil.rmtree(self.out)
            print(f"{self.url}: written", flush=True)

    def _pack_beton(self) -> None:
        """By way of a packed folder, which is removed."""
        if self.options.mode != "jpeg" or self.options.verify or self.url is not None:
            raise ValueError(
                "--format beton takes --mode jpeg, a local OUT and no --verify: .beton files hold no checksums"
            )
        packed, made = (self.out.with_name(f"{self.out.name}.{kind}") for kind in ("packed", "unfinished"))
        check_ffcv("--format beton")
        if not packed.exists():
            self._pack(packed)
        shutil.rmtree(made, ignore_errors=True)
        write_beton(packed, made, self.options.workers)
        (made / BETON_PLAN).write_text(digest(self.plan))
        made.rename(self.out)
        shutil.rmtree(packed)

    def _pack(self, out: Path) -> None:
        options = self.options
        out.parent.mkdir(parents=True, exist_ok=True)
        with Journal(out, self.plan) as journal:
            if self.source.sizes() is not None or options.mode == "raw":
                _check_space(journal.folder, self.sizes, options)
            todo = {number: span for number, span in enumerate(self.shards) if number not in journal.records}
            progress = Progress(len(self.source), journal.records.values(), options.max_bad)
            settings = Settings(str(journal.pack.resolve()), options.mode, options.size, options.exif)
            for message in make_shards(settings, self.source, todo, options.workers):
                if message is None:
                    progress.show()
                elif "record" in message:
                    journal.add(message["record"])
                else:
                    progress.add(message["done"], message["bad"])
            progress.end()
            meta = journal.finish(self.told)
        print("\n".join(report(out, meta)), flush=True)


def plan(sizes: list[int], options: argparse.Namespace) -> list[Span]:
    """The images of each shard; from the set and the options alone, so that any number of workers makes the same."""
    limit = options.shard_mb * 2**20
    if options.mode == "raw":
        sizes = [3 * options.size**2] * len(sizes)
    starts, filled = [0], 0
    for index, size in enumerate(sizes):
        if index > starts[-1] and filled + size > limit:
            starts.append(index)
            filled = 0
        filled += size
    return list(pairwise([*starts, len(sizes)]))


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
        self.bad = [": ".join(pair) for record in records for pair in record["refused"]]
        self.done = self.before = sum(len(record["rows"]) for record in records) + len(self.bad)
        self.began, self.live = time.monotonic(), LiveLine()
        if self.before:
            self.live.say(f"going on: {self.before:,} of {total:,} images are packed")

    def add(self, done: int, bad: list[str]) -> None:
        """Count images that are done, among them those that were refused, with their reasons."""
        self.done, self.bad = self.done + done, self.bad + bad
        if len(self.bad) > self.max_bad * self.total:
            more = f"; and {len(self.bad) - NAMED} more" if len(self.bad) > NAMED else ""
            raise CorruptImage(
                f"{len(self.bad)} of {self.total} files cannot be read, above --max-bad {self.max_bad}: "
                f"{'; '.join(self.bad[:NAMED])}{more}. What is packed is kept: raise --max-bad to leave them out, and "
                "run the same command again; or repair them, remove OUT.partial and start anew"
            )
        self.show()

    def show(self) -> None:
        """Draw the live line."""
        self.live.advance(self.line(), self.done / max(self.total, 1))

    def line(self) -> str:
        rate = (self.done - self.before) / max(time.monotonic() - self.began, 1e-9)
        left = f"{(self.total - self.done) / rate:,.0f} s left" if rate else "no rate yet"
        return f"packed {self.done:,} of {self.total:,} images, {rate:,.0f} images/s, {left}, {len(self.bad):,} refused"

    def end(self) -> None:
        self.live.say(self.line())


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
