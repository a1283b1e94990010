"""`fastrdm.train` in Python, and what `fastrdm train` does with its settings: one run, to its summary."""

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from fastrdm.cli import EXIT_ALARM, EXIT_STOPPED, STOP_SIGNALS
from fastrdm.config import run_config
from fastrdm.config.layers import user_sets
from fastrdm.live_line import show
from fastrdm.models.foreign_weights import check_export
from fastrdm.monitoring.rank_statistics import CENTERED_CONVENTION
from fastrdm.report import page
from fastrdm.runtime import checkpoint, distributed
from fastrdm.trainer import Trainer


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
    return run(run_config.compose(arguments, settings))


def run(loaded: run_config.Loaded) -> TrainResult:
    """Train as these settings say."""
    began = time.monotonic()
    try:
        trainer = Trainer(loaded.config, user_sets(loaded.layers))
        opening = [*headline(trainer), *loaded.assumed, *_export_notes(trainer.settings)]
        if trainer.processes.main:
            show("\n".join(opening))
        with _signals_ask(trainer):
            finished = trainer.train(opening)
        status = 0 if finished else EXIT_STOPPED if trainer.halt == "warn" else EXIT_ALARM
        if trainer.processes.main:
            _tell(trainer, status, time.monotonic() - began)
        distributed.agree()  # an agent ends the other workers when one has ended: the main process writes its report
        return TrainResult(trainer.state.folder, dict(trainer.metrics), status)
    finally:
        distributed.stop()


@contextmanager
def _signals_ask(trainer: Trainer) -> Iterator[None]:
    """Let the signals that ask a program to end ask the trainer to save and stop after its step.

    SIGHUP stays ignored where it was, as `nohup` has it. Only the main thread of a program can set handlers.
    """
    main = threading.current_thread() is threading.main_thread()
    numbers = [n for n in STOP_SIGNALS if main and signal.getsignal(n) is not signal.SIG_IGN]
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
        trainer.log.say(f"\nstopped by an alarm at step {trainer.step}: see {folder}/alarms.jsonl")
    elif status == EXIT_STOPPED:
        trainer.log.say(f"\nasked to stop: saved at step {trainer.step} in {folder}; the same command continues")
    else:
        trainer.log.say("\n".join(summary(trainer, seconds)))
    if trainer.settings.log.report and status != EXIT_STOPPED:
        trainer.log.say(_write_report(folder))


def _write_report(folder: Path) -> str:
    """Write the report and return a line that says where it is.

    A failure is told in that line instead of being raised: the run itself has finished.
    """
    try:
        return f"report: {page.write([folder])}"
    except Exception as error:
        return f"no report: {type(error).__name__}: {error}"


def _export_notes(settings: run_config.Config) -> list[str]:
    """Warn of a network that other libraries know by this name with another width, so that no export holds it."""
    encoder = settings.encoder
    if encoder.width is None or encoder.name == "resnet_small":
        return []
    try:
        check_export(encoder, "torchvision")
    except ValueError as error:
        if "encoder.width" in str(error):
            return [f"note: {error}; leave encoder.width out for one that torchvision and timm can load"]
    return []


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
        *trainer.notes,
        *trainer.monitor.describe(),
        trainer.utilization.describe(),
    ]
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
        "initial encoder": "knn_initial_encoder",
        "trained encoder": "knn",
        "trained target encoder": "knn_target",
    }
    knn = [f"{name} {100 * f[key]:.1f} %" for name, key in shown.items() if key in f]
    online, target = (f[f"{branch}/{CENTERED_CONVENTION}/batch"] for branch in ("online", "target"))
    verdict = trainer.judge.verdict()
    lines = [
        f"\nfinished {trainer.step:,} steps in {seconds:.0f} s",
        f"k-NN accuracy on {len(trainer.test):,} images: {', '.join(knn)}"
        if knn
        else f"k-NN accuracy: not measured, {trainer.unmeasured}",
        f"effective rank of the last batch ({CENTERED_CONVENTION}): online {online:.1f}, target {target:.1f}, "
        f"difference {target - online:+.1f}, deviation of the target {f['target/std/batch']:.2f}",
        f"verdict: {verdict.text}",
        *([f"  {verdict.cause}", f"  {verdict.remedy} See {verdict.page}."] if verdict.cause else []),
    ]
    if "probe" in f:
        lines.insert(2, f"linear probe: {100 * f['probe']:.1f} %")
    lines += trainer.utilization.summary(f)
    unread = {name for faults in (trainer.loader.faults, *trainer.unread.values()) for name in faults.values()}
    lines += [f"unreadable image {name}" for name in sorted(unread)]
    last = checkpoint.existing(folder)[0]
    return [
        *lines,
        f"files: {folder}: config.yaml, metrics.jsonl (all metrics), train.log, {last.relative_to(folder)}",
        *_next(trainer),
    ]


def _next(trainer: Trainer) -> list[str]:
    """Suggest what to do next with this run, one line each."""
    c, folder = trainer.settings, trainer.state.folder
    if c.loader.source == "digits":
        return [
            "next: another method with fastrdm train quickstart.yaml preset=byol; your own images with",
            "  fastrdm train loader.source=folder loader.root=FOLDER; all recipes with fastrdm recipes",
        ]
    measured = "" if trainer.labeled else " --source folder --root LABELED"
    return [
        f"next: fastrdm eval {folder}{measured} measures the features; fastrdm export {folder} writes the encoder's",
        f"  weights; fastrdm train train.init={folder} run=NEW ... goes on from them",
    ]
