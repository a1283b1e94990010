"""`fastrdm train`, and `fastrdm.train` in Python: one run from its settings to its summary."""

import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from fastrdm.cli import EXIT_ALARM, EXIT_STOPPED
from fastrdm.config import run_config
from fastrdm.monitoring.monitor import HEADLINE_CONVENTION
from fastrdm.report import page
from fastrdm.runtime import checkpoint, distributed
from fastrdm.trainer import Trainer

USAGE = """usage: fastrdm train [CONFIG.yaml] [a.b=c ...] [--print-config] [--help]
       torchrun [--nproc-per-node N] fastrdm/train.py ...      the same on N processes

Without CONFIG.yaml: the quick start, on scikit-learn's digits. Shipped files are found by name, as in
`cifar10/cpu.yaml`. Durations are written 50ep (epochs), 2000st (steps) or 5% (of the run). Settings:
"""


class TrainResult(NamedTuple):
    """Folder, metrics and exit status of a call of `train`."""

    folder: Path
    """Folder of the run, with its checkpoints, metrics.jsonl and report.html."""

    metrics: dict[str, float]
    """Newest value of every metric, as in summary.json of a finished run; docs/monitoring.md has the names."""

    status: int
    """Exit status of `fastrdm train`: 0 finished, 75 asked to stop and saved, 3 stopped by an alarm."""


def train(arguments: Sequence[str] = (), /, **settings: Any) -> TrainResult:
    """Train one encoder as `fastrdm train` does, and return the run's folder and metrics.

    `arguments` are those of the command line: at most one configuration file, and settings `a.b=c`. Keyword arguments
    are sections of the configuration as nested dicts, laid over them: `train(preset="byol", train={"length": "5ep"})`.
    The same settings continue a run that was stopped. Raises ValueError for a setting that is refused, and
    fastrdm.errors.RunError for a run that fails.
    """
    return _run(run_config.load(arguments, settings))


def main(arguments: Sequence[str]) -> int:
    """Train as the command line says, and return the exit status."""
    flags = {a for a in arguments if a.startswith("-")}
    if flags & {"--help", "-h"}:
        print(USAGE + "\n".join(run_config.describe()))
        return 0
    if unknown := flags - {"--print-config"}:
        raise ValueError(f"unknown option {', '.join(sorted(unknown))}; settings are written a.b=c, see --help")
    settings = run_config.load([a for a in arguments if a not in flags])
    if flags:
        print(run_config.to_yaml(settings), end="")
        return 0
    return _run(settings).status


def _run(settings: run_config.Config) -> TrainResult:
    began = time.monotonic()
    try:
        trainer = Trainer(settings)
        if trainer.processes.main:
            print("\n".join(headline(trainer)), flush=True)
        with _signals_ask(trainer):
            finished = trainer.train()
        status = 0 if finished else EXIT_STOPPED if trainer.halt == "warn" else EXIT_ALARM
        if trainer.processes.main:
            _tell(trainer, status, time.monotonic() - began)
        return TrainResult(trainer.state.folder, dict(trainer.metrics), status)
    finally:
        distributed.stop()


@contextmanager
def _signals_ask(trainer: Trainer) -> Iterator[None]:
    """Let SIGTERM and SIGINT ask the trainer to save and stop. Only the main thread of a program can set handlers."""
    numbers = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    before = {n: signal.signal(n, lambda *_: trainer.stop.ask()) for n in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tell(trainer: Trainer, status: int, seconds: float) -> None:
    """Print how the run ended, and write its report unless it goes on later."""
    folder = trainer.state.folder
    if status == EXIT_ALARM:
        print(f"\nstopped by an alarm at step {trainer.step}: see {folder}/alarms.jsonl")
    elif status == EXIT_STOPPED:
        print(f"\nasked to stop: saved at step {trainer.step} in {folder}; the same command continues")
    else:
        print("\n".join(summary(trainer, seconds)))
    if trainer.settings.log.report and status != EXIT_STOPPED:
        print(_write_report(folder))
    sys.stdout.flush()


def _write_report(folder: Path) -> str:
    """Write the report and return a line that says where it is.

    A failure is told in that line instead of being raised: the run itself has finished.
    """
    try:
        return f"report: {page.write([folder])}"
    except Exception as error:
        return f"no report: {type(error).__name__}: {error}"


def headline(trainer: Trainer) -> list[str]:
    """First lines of a run: method, data, length, device, and notes on what was chosen."""
    c, total, world = trainer.settings, trainer.horizon.total, trainer.processes.world
    parameters = sum(p.numel() for p in trainer.method.online.parameters()) / 1e6
    engine = type(trainer.loader).__name__
    lines = [
        f"fastrdm: {c.preset}, {c.encoder.name} ({parameters:.2f} M parameters with its head)",
        f"data: {trainer.source.name}, {len(trainer.source):,} images, {len(trainer.test):,} for evaluation, {engine}",
        f"run: {total:,} steps of {c.loader.batch_size} images on {world} x {trainer.processes.device.type}, "
        f"{c.train.precision}, {'compiled' if c.train.compile else 'eager'}; folder {trainer.state.folder}",
        *trainer.monitor.describe(),
        trainer.utilization.describe(),
    ]
    lines += [f"note: {note}" for note in trainer.notes]
    if c.train.accumulate > 1:
        lines.append(
            f"note: train.accumulate={c.train.accumulate} saves memory, but BatchNorm, spectral filters, Sinkhorn and "
            f"the center see {c.loader.batch_size // c.train.accumulate} images at a time, not {c.loader.batch_size}"
        )
    return lines


def summary(trainer: Trainer, seconds: float) -> list[str]:
    """Last lines of a finished run: accuracies, ranks, speed, files, and what to try next."""
    f, folder = trainer.metrics, trainer.state.folder
    shown = {
        "raw pixels": "knn_raw_pixels",
        "random encoder": "knn_random_encoder",
        "trained encoder": "knn",
        "trained target encoder": "knn_target",
    }
    knn = [f"{name} {100 * f[key]:.1f} %" for name, key in shown.items() if key in f]
    online, target = (f[f"{branch}/{HEADLINE_CONVENTION}/batch"] for branch in ("online", "target"))
    lines = [
        f"\nfinished {trainer.step:,} steps in {seconds:.0f} s",
        f"k-NN accuracy on {len(trainer.test):,} images: {', '.join(knn) or 'not measured, there are no labels'}",
        f"effective rank of the last batch ({HEADLINE_CONVENTION}): online {online:.1f}, target {target:.1f}, "
        f"difference {target - online:+.1f}",
    ]
    if "probe" in f:
        lines.insert(2, f"linear probe: {100 * f['probe']:.1f} %")
    lines += trainer.utilization.summary(f)
    unread = {name for faults in (trainer.loader.faults, *trainer.unread.values()) for name in faults.values()}
    lines += [f"unreadable image {name}" for name in sorted(unread)]
    last = checkpoint.existing(folder)[0]
    return [
        *lines,
        f"files: {folder}: config.yaml, metrics.jsonl (all metrics), summary.json, {last.relative_to(folder)}",
        "next: other methods with preset=byol, preset=symsimsiam (watch its rank) or preset=rdm_simsiam; real images",
        "  with cifar10/cpu.yaml loader.root=FOLDER loader.download=true; every setting with --help",
    ]
