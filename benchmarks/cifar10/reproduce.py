"""Train every preset on CIFAR-10 over several seeds, best first, and write the record: what a method adds and why.

    python -m benchmarks.cifar10.reproduce --root FOLDER [--budget cpu] [--minutes 60]

A budget is a list of runs in order of priority, a recipe and a device. Each finished run becomes a row of
results/cifar10_BUDGET.csv and of results/analysis_cifar10_BUDGET.csv in benchmarks/, and is not run again; a run
that --minutes interrupts is saved and goes on at the next call. Tables and figures go to records/.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from benchmarks import common
from benchmarks.cifar10.record import ALIASES, Files, files, publish
from benchmarks.cifar10.rows import FIELDS, MEASURED, PUBLISHED_FIELDS, append, averaged, measured_row, trained_row
from fastrdm.commands.catalog import shipped
from fastrdm.methods.presets import PRESETS
from fastrdm.report.run_files import read_runs

FIRST = ["simsiam", "byol", "rdm_simsiam", "rdm_simsiam_log1p", "swav", "dino", "rdm_byol", "symsimsiam"]
ORDER = [*FIRST, *(preset for preset in PRESETS if preset not in FIRST and preset not in ALIASES)]
MINUTES_LEFT = 1.0  # minutes that must be left for a run to be started
STOPPED = (75, -signal.SIGTERM)  # exit status of a run that was asked to stop: saved, or before it had begun


class Budget(NamedTuple):
    """A list of runs: their settings, their device, and the time that each is sized for."""

    what: str  # for the record
    settings: tuple[str, ...]  # over the recipe
    device: str
    minutes: int  # that a run is sized for
    jobs: int  # runs at a time, one thread each
    published: bool = False  # runs of PUBLISHED alone, one seed each, on their own recipes
    first: tuple[str, ...] = ()  # budgets whose runs come before these


# presets that lightly's benchmark of CIFAR-10 has, and what makes each its run at batch 512
PUBLISHED = {
    "simsiam": ("cifar10/lightly_simsiam.yaml", "optim.lr=0.03"),
    "byol": ("cifar10/lightly_byol.yaml",),
    "swav": ("cifar10/lightly_swav.yaml",),
    "dino": ("cifar10/lightly_dino.yaml",),
}
_LIGHTLY = ("loader.batch_size=512", "analysis.every=25%", "analysis.replicates=20", "train.device=cuda")

BUDGETS = {
    "cpu": Budget(
        "5,000 training images, a small ResNet, on CPU",
        ("analysis.every=20%", "train.device=cpu"),
        "cpu",
        minutes=10,  # 3 to 5 CPU minutes on a core of its own
        jobs=2,
    ),
    "gpu": Budget(
        "ResNet-18, 100 epochs",
        ("train.length=100ep", "analysis.every=10ep", "analysis.replicates=20", "train.device=cuda"),
        "cuda",
        minutes=60,  # not measured
        jobs=1,
        first=("lightly200",),
    ),
    "lightly200": Budget(
        "ResNet-18, lightly's benchmark at batch 512, 200 epochs",
        ("train.length=200ep", *_LIGHTLY),
        "cuda",
        minutes=10,  # not measured
        jobs=1,
        published=True,
    ),
    "lightly800": Budget(
        "ResNet-18, lightly's benchmark at batch 512, 800 epochs",
        ("train.length=800ep", *_LIGHTLY),
        "cuda",
        minutes=40,  # not measured
        jobs=1,
        published=True,
    ),
    "gpu400": Budget(
        "ResNet-18, 400 epochs, as the published RDM scripts",
        ("train.length=400ep", "analysis.every=40ep", "analysis.replicates=20", "train.device=cuda"),
        "cuda",
        minutes=240,  # not measured
        jobs=1,
    ),
}


class Job(NamedTuple):
    """One run."""

    preset: str
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.preset}, seed {self.seed}"


def recipe(preset: str, device: str) -> str:
    """The shipped configuration for a preset."""
    if device == "cuda":
        return "cifar10/resnet18.yaml"
    files = {name: file.presets for name, file in shipped().items() if name.startswith("cifar10/cpu")}
    return next(name for name, presets in files.items() if any(fnmatchcase(preset, pattern) for pattern in presets))


def contestant(preset: str, budget: Budget) -> tuple[str, ...]:
    """The recipe of a run of `budget`, and what changes in it."""
    return PUBLISHED[preset] if budget.published else (recipe(preset, budget.device),)


def jobs(presets: Sequence[str], seeds: int, found: Files, runs: Path) -> Iterator[Job]:
    """The runs without a row, in order of priority: all seeds of the first presets, then the others seed by seed."""
    known = {(row["preset"], int(row["seed"])) for row in common.read_rows(found.rows)}
    head = [preset for preset in presets if preset in FIRST]
    tail = [preset for preset in presets if preset not in FIRST]
    for group in (head, tail):
        for preset, seed in ((preset, seed) for seed in range(seeds) for preset in group):
            if (preset, seed) not in known:
                yield Job(preset, seed, runs / f"{preset}-{seed}")


def start(job: Job, budget: Budget, root: str, settings: Sequence[str]) -> subprocess.Popen[bytes]:
    """Its run in a process of its own, on one thread."""
    command = [sys.executable, "-m", "fastrdm.cli", "train", *contestant(job.preset, budget)]
    command += [f"preset={job.preset}", f"train.seed={job.seed}", f"run={job.folder}", f"loader.root={root}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RANK": "0", "WORLD_SIZE": "1"}
    with Path(f"{job.folder}.log").open("a") as log:
        return subprocess.Popen(
            [*command, *budget.settings, *settings], stdout=log, stderr=subprocess.STDOUT, env=environment
        )


def spent(job: Job, seconds: float = 0.0) -> float:
    """CPU seconds of a run over all calls, `seconds` of them now."""
    file = Path(f"{job.folder}.seconds")
    total = seconds + (float(file.read_text()) if file.exists() else 0.0)
    file.write_text(str(total))
    return total


def finish(job: Job, budget: Budget, found: Files) -> None:
    """Its rows."""
    seconds = spent(job)
    row = trained_row(job.preset, job.seed, job.folder, seconds, budget.device)
    (run,) = read_runs([job.folder])
    if run.analysis:
        took = run.last("analysis/seconds")
        append(found.measured, measured_row(job.preset, job.seed, run.analysis[-1], took, budget.device), MEASURED)
    append(found.rows, row, PUBLISHED_FIELDS if budget.published else FIELDS)
    took_told = f"{seconds / 60:.1f} CPU minutes, sized for {budget.minutes}"
    print(f"{job.name}: k-NN {row['random']} -> {row['trained']}, {took_told}", flush=True)


def keep_curves(found: Files, runs: Path) -> None:
    """Means over seeds of the curves of every preset whose runs are there."""
    curves = json.loads(found.curves.read_text()) if found.curves.exists() else {}
    measured = common.read_rows(found.measured)
    for preset in dict.fromkeys(row["preset"] for row in measured):
        folders = [runs / f"{preset}-{row['seed']}" for row in measured if row["preset"] == preset]
        folders = [folder for folder in folders if (folder / "summary.json").exists()]
        if folders:
            curves[preset] = averaged(folders)
    found.curves.write_text(json.dumps(curves, separators=(",", ":")) + "\n")


def work(waiting: list[Job], budget: Budget, arguments: argparse.Namespace, found: Files, minutes: float) -> list[Job]:
    """Run them until `minutes` are over; those that failed."""
    end = time.monotonic() + 60 * minutes
    at_once = arguments.jobs or budget.jobs
    running: dict[int, tuple[Job, subprocess.Popen[bytes]]] = {}
    failed: list[Job] = []
    asked = False
    while running or (waiting and end - time.monotonic() > 60 * MINUTES_LEFT):
        left = end - time.monotonic()
        while waiting and len(running) < at_once and left > 60 * MINUTES_LEFT:
            job = waiting.pop(0)
            child = start(job, budget, arguments.root, arguments.settings)
            running[child.pid] = job, child
        if left <= 0 and not asked:
            asked = True
            for _, child in running.values():
                child.send_signal(signal.SIGTERM)
        pid, status, usage = os.wait4(-1, os.WNOHANG) if running else (0, 0, None)
        if pid == 0:
            time.sleep(1)
            continue
        job, child = running.pop(pid)
        code = child.returncode = os.waitstatus_to_exitcode(status)
        assert usage is not None
        spent(job, usage.ru_utime + usage.ru_stime)
        if code == 0:
            finish(job, budget, found)
        elif code in STOPPED:
            print(f"{job.name}: saved, goes on at the next call", flush=True)
        else:
            failed.append(job)
    return failed


def parser() -> argparse.ArgumentParser:
    p = common.parser(__doc__)
    p.add_argument("--root", required=True, help="folder of CIFAR-10")
    p.add_argument("--budget", default="cpu", choices=list(BUDGETS))
    p.add_argument("--minutes", type=float, default=float("inf"), help="that this call may take; no limit")
    p.add_argument("--presets", nargs="+", default=ORDER, choices=ORDER)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--jobs", type=int, help="runs at a time; the budget's")
    p.add_argument("--runs", help="folder of the runs; runs/cifar10_BUDGET")
    p.add_argument("--out", type=Path, default=common.FOLDER, help="folder of results/ and records/")
    p.add_argument("settings", nargs="*", help="further a.b=c")
    return p


def reproduce(name: str, arguments: argparse.Namespace, minutes: float) -> list[str]:
    """Make the runs of a budget that are missing, for at most `minutes`, and its record; a line for each failure."""
    budget, found = BUDGETS[name], files(name, arguments.out)
    runs = Path(arguments.runs or f"runs/cifar10_{arguments.budget}")
    runs = runs if name == arguments.budget else runs / name
    for folder in (runs, found.rows.parent, found.record.parent):
        folder.mkdir(parents=True, exist_ok=True)
    presets = [preset for preset in arguments.presets if not budget.published or preset in PUBLISHED]
    waiting = list(jobs(presets, 1 if budget.published else arguments.seeds, found, runs))
    failed = work(waiting, budget, arguments, found, minutes)
    keep_curves(found, runs)
    option = "" if name == "cpu" else f" --budget {name}"
    publish(found, budget.what, f"python -m benchmarks.cifar10.reproduce --root FOLDER{option}")
    print(f"{found.record}: {len(common.read_rows(found.rows))} rows, {len(waiting)} runs not begun")
    return [f"{job.name} failed: see {job.folder}.log" for job in failed]


def main() -> None:
    arguments = parser().parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    names = (*BUDGETS[arguments.budget].first, arguments.budget)
    failed = [line for name in names for line in reproduce(name, arguments, (end - time.monotonic()) / 60)]
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
