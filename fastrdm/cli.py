"""The command line: `fastrdm train`, what it tells, and the way to the other commands."""

import signal
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from fastrdm.config import run_config
from fastrdm.loaders.sources.decode import CorruptImage
from fastrdm.monitoring.monitor import HEADLINE_CONVENTION
from fastrdm.report import page
from fastrdm.runtime import checkpoint, distributed
from fastrdm.runtime.checkpoint import CheckpointError
from fastrdm.runtime.timers import NonFiniteLoss
from fastrdm.trainer import Trainer

EXIT_FAILED, EXIT_REFUSED, EXIT_ALARM = 1, 2, 3  # 3: an alarm stopped the run, monitor.alarms.action
EXIT_STOPPED = 75  # asked to stop, saved; the same command continues

# name: the module below fastrdm whose `main(arguments)` gives the exit status
COMMANDS = {
    "train": "cli",
    "pack": "loaders.packing.pack",
    "eval": "commands.evaluate",
    "export": "commands.export",
    "report": "report.page",
    "doctor": "commands.doctor",
    "plan": "commands.plan",
    "theory": "commands.analyze",
}

USAGE = """usage: torchrun [--nproc-per-node N] fastrdm/train.py [CONFIG.yaml] [a.b=c ...] [--print-config] [--help]
       fastrdm train ...                  the same on one process

Without CONFIG.yaml: the quick start, on scikit-learn's digits. Shipped files are found by name, as in
`cifar10/cpu.yaml`. Durations are written 50ep (epochs), 2000st (steps) or 5% (of the run). Settings:
"""


def guarded(command: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """The exit status of a command; what a user can set right is told in a line instead of a traceback."""
    try:
        return command(arguments)
    except (CheckpointError, CorruptImage, NonFiniteLoss) as error:
        print(f"fastrdm: {error}", file=sys.stderr)
        return EXIT_FAILED
    except ValueError as error:
        print(f"fastrdm: {error}", file=sys.stderr)
        return EXIT_REFUSED
    finally:
        distributed.stop()


def main(arguments: Sequence[str]) -> int:
    """Train as `arguments` say; the exit status."""
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
    return _run(settings)


def train(arguments: Sequence[str]) -> int:
    """`fastrdm train`; the exit status."""
    return guarded(main, arguments)


def _run(settings: run_config.Config) -> int:
    began = time.monotonic()
    trainer = Trainer(settings)
    if trainer.processes.main:
        print("\n".join(introduction(trainer)), flush=True)
    before = {n: signal.signal(n, lambda *_: trainer.stop.ask()) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        finished = trainer.train()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    status = 0 if finished else EXIT_STOPPED if trainer.halt == "warn" else EXIT_ALARM
    if not trainer.processes.main:
        return status
    if status == EXIT_ALARM:
        print(f"\nstopped by an alarm at step {trainer.step}: see {trainer.state.folder}/alarms.jsonl")
    elif not finished:
        print(f"\nasked to stop: saved at step {trainer.step} in {trainer.state.folder}; the same command continues")
    else:
        print("\n".join(summary(trainer, time.monotonic() - began)))
    if settings.log.report and status != EXIT_STOPPED:
        print(_write_report(trainer.state.folder))
    sys.stdout.flush()
    return status


def _write_report(folder: Path) -> str:
    """Where the report is; what went wrong instead, for a finished run has not failed because of it."""
    try:
        return f"report: {page.write([folder])}"
    except Exception as error:
        return f"no report: {type(error).__name__}: {error}"


def introduction(trainer: Trainer) -> list[str]:
    """What is about to run, and what was chosen for it."""
    c, total, world = trainer.settings, trainer.horizon.total, trainer.processes.world
    parameters = sum(p.numel() for p in trainer.method.online.parameters()) / 1e6
    engine = type(trainer.loader).__name__
    lines = [
        f"fastrdm: {c.preset}, {c.encoder.name} ({parameters:.2f} M parameters with its head)",
        f"data: {trainer.source.name}, {len(trainer.source):,} images, {len(trainer.test):,} for evaluation, {engine}",
        f"run: {total:,} steps of {c.loader.batch_size} images on {world} x {trainer.processes.device.type}, "
        f"{c.train.precision}, {'compiled' if c.train.compile else 'eager'}; folder {trainer.state.folder}",
        *trainer.monitor.introduction(),
        trainer.utilization.introduction(),
    ]
    lines += [f"note: {note}" for note in trainer.notes]
    if c.train.accumulate > 1:
        lines.append(
            f"note: train.accumulate={c.train.accumulate} saves memory, but BatchNorm, spectral filters, Sinkhorn and "
            f"the center see {c.loader.batch_size // c.train.accumulate} images at a time, not {c.loader.batch_size}"
        )
    return lines


def summary(trainer: Trainer, seconds: float) -> list[str]:
    """What came out, where it is, what to try next."""
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


def entry() -> None:
    """Entry of the `fastrdm` command."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name not in COMMANDS:
        print(f"usage: fastrdm {{{','.join(COMMANDS)}}} ...", file=sys.stderr)
        sys.exit(0 if name in ("--help", "-h") else EXIT_REFUSED)
    sys.exit(guarded(import_module(f"fastrdm.{COMMANDS[name]}").main, arguments))


if __name__ == "__main__":
    entry()
