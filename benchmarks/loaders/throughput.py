"""Speed of loading: each contestant in turns with the one it is compared with, a CSV row as each is done.

    python -m benchmarks.loaders.throughput decode FOLDER --out benchmarks/results/loader_decode.csv
    python -m benchmarks.loaders.throughput views FOLDER --out benchmarks/results/loader_views.csv
    python -m benchmarks.loaders.throughput memory CIFAR --out benchmarks/results/loader_memory.csv

decode: files to decoded images of their own sizes. The engine's part before any view is cut, from the files, from a
packed folder of them (jpeg), and from one of 256 px squares (raw), against plain loops over as many threads: read a
file, call a decoder, drop the result, or keep those of two batches as the engine does; and against copies of the
squares, each image eight times. views: files to finished batches of two 224 px views, those of
benchmarks.loaders.augment. memory: CIFAR-10 held in memory to two views of 32 px. FOLDER holds one folder of images a
class, CIFAR is what loader.root takes. Everybody gets our order and our parameters, but for DALI's own operators and
albumentations, which draw theirs, and the order of kornia's jitter. A contestant has a process of its own with
`workers` threads or child processes.

first: images a second of the first epoch, making the loader included (files lie in the page cache). rate, p20, p80: of
the epochs after it, median and percentiles over rounds; of a GPU where device is one. views: of finished views.
cpu_ms: processor time of an image over all threads and processes; core: images a second of processor time; core_views:
views. mib: largest memory of all its processes over an epoch, shared pages once (that of `synthetic` is what torch
takes). levels: difference of its views from the reference's, in levels of 255: the mean over pixels, or where it
draws its own, that of the means and spreads of the batch. times, times_p20, times_p80: its rate over that of `plain`
in the same round; times_core: the same by processor time.

With --out, contestants that have a row there are not run again, and --minutes ends a call between two of them.
--plain compares with another contestant, as in `views FOLDER --only DALI --plain "native files"`.
"""

import contextlib
import csv
import multiprocessing as mp
import os
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import common
from benchmarks.loaders.contestants import Contestant, Epoch, Setup, decode_table
from benchmarks.loaders.views import EPOCH, LARGE, SMALL, cifar, memory_table, views_table
from fastrdm.loaders.augment.parameters import sample_parameters
from fastrdm.loaders.augment.reference import augment
from fastrdm.loaders.packing import pack
from fastrdm.loaders.sources.folder import FolderSource
from fastrdm.runtime.host_memory import keep_freed_memory

TABLES = {"decode": decode_table, "views": views_table, "memory": memory_table}
FIELDS = ["contestant", "workers", "rounds", "first", "rate", "p20", "p80", "views", "cpu_ms", "core", "core_views"]
FIELDS += ["mib", "levels", "plain", "times", "times_p20", "times_p80", "times_core"]
FIELDS += common.MACHINE
CHECKED = 64  # images of the first batch


def serve(pipe: Connection, table: str, name: str, setup: Setup) -> None:
    """A contestant's process: its first epoch and its views, then an epoch for each number of seconds it is sent."""
    torch.set_num_threads(setup.workers)
    # As `fastrdm train` does, and for all contestants: pages of the last batch are not asked for again.
    keep_freed_memory()
    entry, began = TABLES[table]()[name], time.perf_counter()
    epoch = entry.build(setup)
    images, views, first = once(epoch, setup.device, keep=True)
    rate = images / (time.perf_counter() - began)
    levels = difference(table, setup, first[0], first[1], entry.own) if entry.bar is not None and first else 0.0
    pipe.send((rate, views, levels, peak(epoch, setup.device)))
    while least := pipe.recv():
        images, wall, cpu = 0, time.perf_counter(), processor_time()
        while images == 0 or time.perf_counter() - wall < least:
            images += once(epoch, setup.device)[0]
        pipe.send((images / (time.perf_counter() - wall), images / (processor_time() - cpu)))
    pipe.close()
    os._exit(0)  # loaders that hold threads and processes of their own have nothing left to say


def once(epoch: Epoch, device: torch.device, keep: bool = False) -> tuple[int, int, tuple[Any, ...]]:
    """An epoch: its images, the views of each, and the first batch where it is to be kept and has views."""
    images, count, first = 0, 0, tuple[Any, ...]()
    for views, numbers in epoch():
        images += len(numbers)
        if keep and views and not first:
            first = [view.clone() for view in views], numbers  # the memory may be the contestant's, to be used again
        count = len(views)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return images, count, first


def difference(table: str, setup: Setup, views: Any, numbers: Any, own: bool) -> float:
    """Levels between the first images of a batch and the reference's, the larger one of all views."""
    index, specs = torch.as_tensor(numbers)[:CHECKED].cpu(), SMALL if table == "memory" else LARGE
    source = cifar(setup.folder) if table == "memory" else FolderSource(setup.folder)
    pixels = [torch.from_numpy(np.array(source.read(int(k)))) for k in index]
    height, width = torch.tensor([image.shape[:2] for image in pixels]).unbind(1)
    found = []
    for number, (spec, made) in enumerate(zip(specs, views, strict=True)):
        drawn = sample_parameters(spec, 0, EPOCH, index, number, height, width)
        wanted = levels_of(augment(pixels, drawn, spec, implementation="reference"), spec.std)
        got = levels_of(made[:CHECKED].float().cpu(), spec.std)
        if own:
            found += [float((f(got) - f(wanted)).abs()) for f in (torch.mean, torch.std)]
        else:
            found.append(float((got - wanted).abs().mean()))
    return max(found)


def levels_of(views: Tensor, std: tuple[float, ...]) -> Tensor:
    return views * 255 * torch.tensor(std)[:, None, None]


def processor_time() -> float:
    """Seconds of this process and its children, living or ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    living = 0
    for child in mp.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        living += int(fields[11]) + int(fields[12])
    return time.process_time() + ended.ru_utime + ended.ru_stime + living / os.sysconf("SC_CLK_TCK")


def peak(epoch: Epoch, device: torch.device) -> float:
    """MiB of this process and its children at most over an epoch, looked at twenty times a second."""
    largest, done = 0.0, threading.Event()

    def look() -> None:
        nonlocal largest
        while not done.wait(0.05):
            largest = max(largest, sum(map(memory, (os.getpid(), *(child.pid for child in mp.active_children())))))

    watcher = threading.Thread(target=look)
    watcher.start()
    began = time.monotonic()
    while time.monotonic() - began < 0.5:
        once(epoch, device)
    done.set()
    watcher.join()
    return largest


def memory(process: int | None) -> float:
    """MiB of a process, pages that several share divided among them."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
    return 0.0


class Child:
    """A contestant in its process."""

    def __init__(self, table: str, name: str, setup: Setup) -> None:
        context = mp.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, table, name, setup))
        self.process.start()
        theirs.close()
        self.first, self.views, self.levels, self.mib = self._answer(name)

    def _answer(self, name: str = "a contestant") -> Any:
        try:
            return self.pipe.recv()
        except EOFError:
            raise SystemExit(f"{name} failed: see above") from None

    def rates(self, least: float) -> tuple[float, float]:
        """(images a second, images a processor second) of epochs of `least` seconds in all."""
        self.pipe.send(least)
        wall, core = self._answer()
        return wall, core

    def end(self) -> None:
        self.pipe.send(0)
        self.process.join()


def measured(name: str, entry: Contestant, child: Child, plain: Child, rounds: int, least: float) -> dict[str, Any]:
    """The row of a contestant, timed in turns with `plain`."""
    if entry.bar is not None and not child.levels <= entry.bar:
        raise SystemExit(f"{name} makes other views: {child.levels:.2f} levels from the reference, at most {entry.bar}")
    both = []
    for _ in range(rounds):
        reference = plain.rates(least)
        both.append((child.rates(least) if child is not plain else reference, reference))
    rates, references = np.array(both).transpose(1, 0, 2)
    p20, rate, p80 = common.percentiles(rates[:, 0])
    low, times, high = common.percentiles(rates[:, 0] / references[:, 0])
    core, times_core = np.median(rates[:, 1]), np.median(rates[:, 1] / references[:, 1])
    return {
        "contestant": name,
        "rounds": rounds,
        "first": f"{child.first:.0f}",
        "rate": f"{rate:.0f}",
        "p20": f"{p20:.0f}",
        "p80": f"{p80:.0f}",
        "views": f"{rate * child.views:.0f}",
        "cpu_ms": f"{1e3 / core:.3f}",
        "core": f"{core:.0f}",
        "core_views": f"{core * child.views:.0f}",
        "mib": f"{child.mib:.0f}",
        "levels": f"{child.levels:.2f}" if entry.bar is not None else "",
        "plain": entry.plain,
        "times": f"{times:.3f}",
        "times_p20": f"{low:.3f}",
        "times_p80": f"{high:.3f}",
        "times_core": f"{times_core:.3f}",
    }


def prepare(table: str, folder: Path, packs: Path) -> None:
    """The packed folders that a table needs."""
    with contextlib.redirect_stdout(sys.stderr):
        if table != "memory":
            pack.main([str(folder), f"{packs}/jpeg", "--mode", "jpeg"])
        if table == "views" and common.import_error("ffcv") is None:
            pack.main([str(folder), f"{packs}/beton", "--format", "beton", "--workers", "1"])
        if table == "decode":
            (packs / "many").mkdir()
            for kind, number in product(folder.resolve().iterdir(), range(8)):
                (packs / "many" / f"{kind.name}-{number}").symlink_to(kind)
            pack.main([f"{packs}/many", f"{packs}/raw", "--mode", "raw"])


def table_of(table: str, against: str | None) -> dict[str, Contestant]:
    """The contestants of a table, compared with `against` where it names one of them."""
    entries = TABLES[table]()
    if against is None:
        return entries
    if against not in entries:
        raise SystemExit(f"--plain must be one of {', '.join(entries)}, got {against}")
    return {name: entry._replace(plain=against) for name, entry in entries.items()}


def run(
    table: str, against: str | None, setup: Setup, names: list[str], rounds: int, least: float, until: float
) -> Iterator[dict[str, Any]]:
    """A row of each of `names`, as it is done."""
    entries, plains = table_of(table, against), dict[str, Child]()
    for name in names:
        if time.monotonic() > until:
            break
        entry = entries[name]
        plain = plains[entry.plain] = plains.get(entry.plain) or Child(table, entry.plain, setup)
        child = plain if name == entry.plain else Child(table, name, setup)
        yield {**measured(name, entry, child, plain, rounds, least), "workers": setup.workers}
        if child is not plain:
            child.end()
    for plain in plains.values():
        plain.end()


def wanted(entries: dict[str, Contestant], only: list[str] | None) -> list[str]:
    """Names of the contestants that are asked for and can run; what cannot is named on stderr with the reason."""
    names = [name for name in entries if not only or any(word in name for word in only)]
    errors = {name: common.import_error(*entries[name].needs, *entries[entries[name].plain].needs) for name in names}
    for name, error in errors.items():
        if error:
            print(f"{name}: skipped, {error}", file=sys.stderr)
    return [name for name in names if errors[name] is None]


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads or workers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="least time of a contestant in a round")
    parser.add_argument("--only", nargs="+", help="words of contestants' names")
    parser.add_argument("--plain", help="the contestant to compare with, in place of each table's own")
    parser.add_argument("--out", type=Path, help="CSV that rows are added to")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no contestant is begun after these")
    parser.add_argument("--device", default=common.available_device().type)
    args = parser.parse_args()
    until, where = time.monotonic() + 60 * args.minutes, common.machine(torch.device(args.device))
    known = common.read_rows(args.out) if args.out else []
    done = {(row["contestant"], row["workers"], row["plain"], row["device"]) for row in known}
    entries = table_of(args.table, args.plain)
    chosen = wanted(entries, args.only)
    writers: list[csv.DictWriter[Any]] = [csv.DictWriter(sys.stdout, FIELDS, lineterminator="\n")]
    writers[0].writeheader()
    with contextlib.ExitStack() as stack:
        if args.out:
            writers.append(stack.enter_context(common.added_rows(args.out, FIELDS)))
        packs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        prepare(args.table, args.folder, packs)
        for workers in args.threads:
            names = [n for n in chosen if (n, str(workers), entries[n].plain, where["device"]) not in done]
            setup = Setup(args.folder, packs, workers, torch.device(args.device))
            for row in run(args.table, args.plain, setup, names, args.rounds, args.seconds, until):
                for writer in writers:
                    writer.writerow({**row, **where})
                sys.stdout.flush()


if __name__ == "__main__":
    main()
