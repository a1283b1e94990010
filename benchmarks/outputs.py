"""What comes out of a run: how long embed, explore and report take, and how large their pages are.

    python -m benchmarks.outputs FOLDER [--images 10000] [--parts explore embed report]

Squares of 224 px are cut from the JPEG files in FOLDER. Part `explore` makes the page of all of them as the command
line does, by a small ResNet that sees 64 px, and opens it in a headless Chromium. Part `embed` reads some of them by
the loader alone, by encoders alone and by `fastrdm embed`, in turns, which all use two threads; its ratio is of
processor times, loader alone / (embed - encoder alone). Part `report` is a page on ten runs of 2,000 lines each.
"""

import json
import resource
import runpy
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch

from benchmarks import common
from benchmarks.verdict.record import load
from fastrdm.commands import embed, parsers
from fastrdm.commands.pretrained import from_path
from fastrdm.config import run_config
from fastrdm.evaluation.evaluator import sized
from fastrdm.loaders.evaluation import evaluation_batches
from fastrdm.loaders.sources.decode import decode
from fastrdm.loaders.sources.folder import FolderSource
from fastrdm.trainer import Trainer

RESULT = common.FOLDER / "results" / "outputs_cpu.csv"
FIELDS = ["what", "seconds", "cpu_seconds", "megabytes", "ratio", "p20", "p80"]
PARTS = ("explore", "embed", "report")
SIDE, CLASSES = 224, 10
ENCODERS = {"ResNet-18 of width 4": 4, "ResNet-18": 64}


class Spent(NamedTuple):
    """Time of a call or a command."""

    seconds: float
    cpu: float


def cut(folder: Path, out: Path, count: int) -> None:
    """Write `count` squares of SIDE px as JPEG files of quality 90, in class folders."""
    files = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg")]
    random, written = np.random.default_rng(0), 0
    while written < count:
        path = files[int(random.integers(len(files)))]
        pixels = decode(path.read_bytes(), str(path))
        for _ in range(3 if min(pixels.shape[:2]) > SIDE else 0):
            top, left = (int(random.integers(side - SIDE)) for side in pixels.shape[:2])
            target = out / f"{written % CLASSES}" / f"{written:05}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            square = np.ascontiguousarray(pixels[top : top + SIDE, left : left + SIDE])
            target.write_bytes(simplejpeg.encode_jpeg(square, quality=90))
            written += 1


def trained(run: Path, images: Path, width: int, side: int) -> str:
    """A run of one step on these images."""
    settings = ["preset=simsiam", f"run={run}", "loader.source=folder", f"loader.root={images}", "loader.subset=64"]
    settings += [f"encoder.width={width}", f"loader.views.*.size={side}", "loader.batch_size=16", "train.length=1st"]
    settings += ["optim.warmup=1st", "evaluate.baselines=false", "evaluate.probe=false", "evaluate.every=0st"]
    assert Trainer(run_config.load([*settings, "log.report=false"])).train()
    return str(run)


def command(*words: str) -> Spent:
    """Run fastrdm in a process of its own."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-m", "fastrdm.cli", *words], check=True, stdout=subprocess.DEVNULL)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return Spent(seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def measure(call: Callable[[], object]) -> Spent:
    """Time of a call in this process, over all its threads."""
    began, cpu = time.perf_counter(), time.process_time()
    call()
    return Spent(time.perf_counter() - began, time.process_time() - cpu)


def row(what: str, spent: Spent, **more: str) -> dict[str, object]:
    return {"what": what, "seconds": f"{spent.seconds:.1f}", "cpu_seconds": f"{spent.cpu:.1f}", **more}


def explored(root: Path, images: Path, options: Namespace) -> list[dict[str, object]]:
    """The page of all images, and how long a browser takes to show it."""
    page = root / "explore.html"
    run = trained(root / "small", images, 16, 64)
    spent = command("explore", run, str(images), "-o", str(page), "--images", str(parsers.MOST_IMAGES))
    size = f"{page.stat().st_size / 1e6:.1f}"
    rows = [row(f"explore, {options.images:,} images of {SIDE} px seen at 64 by a small ResNet", spent, megabytes=size)]
    found = runpy.run_path(str(common.ROOT / "tests" / "explore" / "chromium.py"))
    if found["CHROMIUM"]:
        browser = found["Browser"](root / "chromium")
        opened = [browser.show(page, 1280, 900) for _ in range(options.turns)]
        browser.process.terminate()
        browser.process.wait()
        low, middle, high = common.percentiles(opened)
        name = f"opening the page of {options.images:,} images in headless Chromium, {low:.1f} to {high:.1f} s"
        rows.append({"what": name, "seconds": f"{middle:.1f}"})
    return rows


def embedded(root: Path, images: Path, options: Namespace) -> list[dict[str, object]]:
    """The share of the loader's rate that embed keeps, beside encoders of two sizes."""
    rows = []
    for (name, width), count in zip(ENCODERS.items(), (2000, 200), strict=True):
        some = root / f"some{width}"
        for path in sorted(images.rglob("*.jpg"))[:count]:
            (some / path.parent.name).mkdir(parents=True, exist_ok=True)
            (some / path.parent.name / path.name).symlink_to(path)
        run = trained(root / f"run{width}", some, width, SIDE)
        one = from_path(Path(run), "online")
        source, view = FolderSource(some), sized(one.view, SIDE)
        kept = [x for x, _, _ in evaluation_batches(source, view, 100)]
        encoder = one.encoder.eval().to(memory_format=torch.channels_last)

        def encode(encoder: torch.nn.Module = encoder, kept: Sequence[torch.Tensor] = kept) -> None:
            with torch.no_grad():
                for x in kept:
                    encoder(x)

        def loading(source: FolderSource = source, view: object = view) -> None:
            for _ in evaluation_batches(source, view, 100):  # type: ignore[arg-type]
                pass

        spent: dict[str, list[Spent]] = {"loader alone": [], "encoder alone": [], "embed": []}
        for turn in range(options.turns + 1):  # the first is not counted
            out = root / f"features{width}-{turn}"
            words = [run, str(some), "-o", str(out), "--size", str(SIDE), "--batch-size", "100", "--device", "cpu"]
            calls: dict[str, Callable[[], object]] = {"loader alone": loading, "encoder alone": encode}
            calls["embed"] = partial(embed.main, words)
            for what, call in calls.items():
                found = measure(call)
                spent[what] += [found] if turn else []
        for what, times in spent.items():
            seconds, cpu = (float(np.median(values)) for values in zip(*times, strict=True))
            rows.append(row(f"{what}, {count:,} images of {SIDE} px, {name}", Spent(seconds, cpu)))
        shares = [
            a.cpu / (c.cpu - b.cpu)
            for a, b, c in zip(spent["loader alone"], spent["encoder alone"], spent["embed"], strict=True)
        ]
        low, middle, high = (f"{share:.3f}" for share in common.percentiles(shares))
        rows[-1] |= {"ratio": middle, "p20": low, "p80": high}
    return rows


def reported(root: Path, lines: int = 2000) -> dict[str, object]:
    """A report of ten runs: those of the record, their lines repeated."""
    folders: list[str] = []
    for run in load()[:10]:
        folder = root / f"{run.arm}-{run.seed}-{len(folders)}"
        folder.mkdir()
        long = [{**run.lines[i * len(run.lines) // lines], "step": i, "epoch": i / 10, "time": i} for i in range(lines)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in long))
        (folder / "config.yaml").write_text(f"loader: {{batch_size: {run.batch}}}\n")
        folders.append(str(folder))
    spent = command("report", *folders, "--out", str(root / "report.html"))
    size = (root / "report.html").stat().st_size / 1e6
    return row(f"report of 10 runs of {lines:,} lines", spent, megabytes=f"{size:.2f}")


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path, default=RESULT, help="CSV that rows are added to")
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        images = root / "images"
        if {"explore", "embed"} & {*options.parts}:
            cut(options.folder, images, options.images)
        if "report" in options.parts:
            rows.append(reported(root))
        if "embed" in options.parts:
            rows += embedded(root, images, options)
        if "explore" in options.parts:
            rows += explored(root, images, options)
    common.print_rows(FIELDS, rows)
    with common.added_rows(options.out, [*FIELDS, *common.MACHINE]) as table:
        for found in rows:
            table.writerow({**found, **common.machine(torch.device("cpu"))})


if __name__ == "__main__":
    main()
