"""`fastrdm plan CONFIG --gpus N`: what a run will do, hold and take, before it starts."""

import csv
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from fastrdm.commands import bench, parsers
from fastrdm.config import run_config, tree
from fastrdm.config.layers import user_sets
from fastrdm.config.run_config import Config
from fastrdm.efficiency.step_cost import CPU, Footprint, build, measure
from fastrdm.evaluation.sets import open_sets
from fastrdm.models.settings import find_encoder
from fastrdm.monitoring.monitor import RankMonitor
from fastrdm.monitoring.window import bytes_of
from fastrdm.report.run_files import read_runs
from fastrdm.runtime.distributed import Processes
from fastrdm.schema import Horizon, require, steps_of
from fastrdm.training import automatic
from fastrdm.training.fit import fit_batch, fit_warmup
from fastrdm.training.learner import Learner
from fastrdm.training.step import changes

# settings that decide the time of a step
TIMED = (
    *("encoder.", "method.", "loader.batch_size", "loader.views", "loader.engine", "optim.name", "train.precision"),
    *("train.compile", "train.capture", "train.accumulate", "train.channels_last", "train.device"),
)


class Data(NamedTuple):
    """The images that are trained on."""

    images: int
    origin: str
    classes: int  # 0 where labels are not known
    resident: int  # bytes, where the set is held in memory


class Throughput(NamedTuple):
    """Images per second of all processes together, and where that number comes from."""

    rate: float
    origin: str


def main(arguments: Sequence[str]) -> int:
    """`fastrdm plan`; the exit status."""
    options = parsers.plan().parse_intermixed_args(arguments)
    for name in ("gpus", "images", "images_per_second"):
        value = getattr(options, name)
        require(value is None or value > 0, f"--{name.replace('_', '-')}", "above 0", value)
    loaded = run_config.compose(options.config, trust=options.trust)
    cuda = options.gpus is not None or torch.cuda.is_available()
    here = torch.device("cuda" if cuda and loaded.config.train.device != "cpu" else "cpu")
    gpus = options.gpus or 1
    settings, chosen = automatic.choose(loaded.config, Processes(0, gpus, here))
    images = data(settings, options.images)
    given = user_sets(loaded.layers)
    settings, notes = fit_batch(settings, images.images, gpus, given)
    epoch = max(images.images // settings.loader.batch_size, 1)
    horizon = Horizon(epoch, max(steps_of(settings.train.length, epoch), 1))
    settings, told = fit_warmup(settings, horizon, given)
    notes += told
    if options.bench:
        for name in ("gpus", "images", "images_per_second", "run", "table"):
            option = {"run": "--from"}.get(name, f"--{name.replace('_', '-')}")
            require(getattr(options, name) is None, option, "left out with --bench", getattr(options, name))
        speed: Throughput | None = measured(loaded)
    else:
        speed = throughput(settings, options.images_per_second, options.run, options.table)
    print("\n".join([*summary_lines(settings, gpus, images, speed), *loaded.assumed, *chosen, *notes]))
    return 0


def data(settings: Config, images: int | None) -> Data:
    """Number of images, classes and resident bytes, from the source if it is on this machine, else from `images`.

    Nothing is downloaded.
    """
    loader = replace(settings.loader, download=False)
    if images is not None:
        return Data(loader.subset or images, "as given; without labels, so without the probe", 0, 0)
    try:
        sets = open_sets(loader, settings.evaluate)
    except ValueError as error:
        raise ValueError(f"{error}; or give --images N") from None
    source = sets.train
    held = source.images is not None and loader.engine in ("auto", "resident")
    resident = source.images.nbytes if held and source.images is not None else 0
    return Data(len(source), "read from the source", len(source.classes) if sets.probed else 0, resident)


def horizon_of(settings: Config, images: int, gpus: int) -> Horizon:
    """Steps of an epoch and of the run; ValueError where the trainer would refuse as well."""
    c, parts = settings, gpus * settings.train.accumulate
    expected = f"a multiple of {gpus} processes x train.accumulate={c.train.accumulate}"
    require(c.loader.batch_size % parts == 0, "loader.batch_size", expected, c.loader.batch_size)
    most = f"at most the {images} images of the set"
    require(c.loader.batch_size <= images, "loader.batch_size", most, c.loader.batch_size)
    epoch = images // c.loader.batch_size
    horizon = Horizon(epoch, steps_of(c.train.length, epoch))
    require(horizon.total >= 1, "train.length", f"at least a step (an epoch has {epoch})", c.train.length)
    fits = horizon.steps(c.optim.warmup) <= horizon.total
    require(fits, "optim.warmup", f"no longer than the run of {horizon.total} steps", c.optim.warmup)
    return horizon


def table_row(settings: Config, table: str) -> Throughput:
    """The row of a table of benchmarks.training.step that has the step of this configuration; ValueError without."""
    c, encoder = settings, settings.encoder
    wanted: dict[str, object] = {"contestant": "step", "preset": c.preset, "encoder": encoder.name}
    network = find_encoder(encoder.name)
    wanted |= {"width": encoder.width or network.width} if "width" in network.takes else {}
    wanted |= {"stem": encoder.stem} if "stem" in network.takes else {}
    wanted |= {"size": c.loader.views[0].size, "views": len(c.loader.views), "batch": c.loader.batch_size}
    made = {"compile": c.train.compile, "capture": c.train.capture}
    wanted |= {"precision": c.train.precision, **{how: "yes" if chosen else "no" for how, chosen in made.items()}}
    crops = [view.size for view in c.loader.views[2:]]
    wanted |= {"crops": f"{len(crops)}x{crops[0]}" if crops else "", "processes": 1}
    require(Path(table).is_file(), "--table", "a file", table)
    with open(table, newline="") as file:
        rows = [row for row in csv.DictReader(file) if all(row.get(key) == str(v) for key, v in wanted.items())]
    description = ", ".join(f"{key} {value}" for key, value in wanted.items())
    require(bool(rows), "--table", f"a table of benchmarks.training.step with {description}", table)
    row = rows[-1]
    origin = f"a step on {row['device']}, {row['clock']} clock, one process, loading not counted"
    return Throughput(float(row["images_per_second"]), origin)


def throughput(settings: Config, rate: float | None, run: str | None, table: str | None = None) -> Throughput | None:
    """Measured training speed, or None.

    It is `rate` where given, else a row of the CSV `table`, else the median over the logged lines of `run` without the
    first.
    """
    if rate is not None:
        return Throughput(rate, "as given")
    if table is not None:
        return table_row(settings, table)
    if run is None:
        return None
    (record,) = read_runs([run])
    rates = [r for r in record.series("images_per_second")[1] if r > 0]
    require(bool(rates), "--from", "a run that logged images_per_second", run)
    lines = tree.differences(record.config, run_config.to_dict(settings))
    other = [line for line in lines if line.startswith(TIMED) and ": None -> " not in line]  # None: not a setting then
    device = record.versions.get("device", "an unknown device")
    origin = f"median of {record.name} on {device}, as a whole, not scaled to another number of GPUs"
    if other:
        more = f" and {len(other) - 3} more" if len(other) > 3 else ""
        origin += f"; that run differs in {'; '.join(other[:3])}{more}"
    return Throughput(statistics.median(rates[1:] or rates), origin)


def measured(loaded: run_config.Loaded) -> Throughput:
    """Images per second of training here and now, by `fastrdm bench`; ValueError where nothing could be trained."""
    found = bench.measure(loaded)
    if found.training is None:
        raise ValueError(f"--bench found no rate: {bench.advice(found)}")
    images, batch = found.training.images, found.batch
    fewer = f", which stand for the {batch:,} of the run" if images < batch else ""
    origin = f"measured here just now, one process, eager steps of {images:,} images{fewer}"
    return Throughput(found.training.images_per_second, origin)


def phases(settings: Config, learner: Learner, horizon: Horizon) -> list[tuple[int, str]]:
    """The steps at which something changes, in order, and what."""
    found = [(horizon.steps(settings.optim.warmup), "learning rate: warm-up ends")]
    method = learner.method
    for transform in (*method.online_transforms, *method.target_transforms):
        found += transform.ramps()
    found += changes(settings, method)
    return sorted((step, what) for step, what in found if step)


def summary_lines(settings: Config, gpus: int, images: Data, speed: Throughput | None) -> Iterator[str]:
    """The plan, line by line."""
    c, horizon = settings, horizon_of(settings, images.images, gpus)
    learner, optimizer = build(c, horizon, images.classes)
    share = c.loader.batch_size // (gpus * c.train.accumulate)
    parts = f" in {c.train.accumulate} parts of {share}" if c.train.accumulate > 1 else ""
    seen, epoch = horizon.total * c.loader.batch_size, horizon.steps_per_epoch
    yield f"plan: {c.preset}, {c.encoder.name}, {c.train.precision}, {gpus} process{'es' if gpus > 1 else ''}"
    yield f"images: {images.images:,} ({images.origin})"
    yield f"run: {horizon.total:,} steps = {horizon.total / epoch:.4g} epochs of {epoch:,}; {seen:,} images are seen"
    yield f"step: {c.loader.batch_size:,} images, {c.loader.batch_size // gpus:,} a process{parts}"
    for step, what in phases(c, learner, horizon):
        beyond = ", beyond the run" if step >= horizon.total else ""
        yield f"  step {step:,} (epoch {step / epoch:.4g}{beyond}): {what}"
    for what, every in (("evaluation", c.evaluate.every), ("checkpoint", c.checkpoint.every)):
        yield f"  {what} every {horizon.steps(every):,} steps and at the end"
    encoder = sum(p.numel() for p in learner.method.online.encoder.parameters())
    trained = sum(p.numel() for p in learner.parameters() if p.requires_grad)
    yield f"parameters: {encoder:,} of the encoder, {trained:,} trained in all"
    monitor = RankMonitor(c.monitor, learner.method, len(c.loader.views), c.loader.batch_size, Processes(0, 1, CPU))
    window = bytes_of(monitor.shape, monitor.processes.device) if monitor.every else 0
    yield from _memory(c, measure(c, learner, optimizer, share), images, window)
    yield _time(seen, speed)


def _memory(settings: Config, f: Footprint, images: Data, window: int) -> Iterator[str]:
    rows = {
        "weights": f.weights,
        "gradients": f.gradients,
        "optimizer": f.optimizer,
        "buffers": f.buffers,
        "activations, an estimate": f.activations,
        "data set": images.resident,
        "monitor's window, main process": window,
    }
    yield f"memory of a process: about {_size(sum(rows.values()))}, and what workspaces and the allocator take"
    for name, size in rows.items():
        if size:
            yield f"  {name}: {_size(size)}"
    if f.target:
        yield f"  (of the weights, {_size(f.target)} are the EMA target's)"
    size, count = f.state_dict + f.optimizer, settings.checkpoint.keep + settings.checkpoint.best + 1
    yield f"disk: {_size(size)} a checkpoint, at most {count} at a time, each with a begun window of the monitor"
    yield f"arithmetic: {f.flops / 1e9:.3g} GFLOP an image, all views forward and backward"


def _size(count: int) -> str:
    unit, name = next(((u, n) for u, n in ((2**30, "GiB"), (2**20, "MiB")) if count >= u), (2**10, "KiB"))
    return f"{count / unit:.3g} {name}" if count < 1000 * unit else f"{count / unit:,.0f} {name}"


def _time(seen: int, speed: Throughput | None) -> str:
    if speed is None:
        return "time: no measurement for this: give --bench, --from RUN, --table CSV or --images-per-second X"
    hours = seen / speed.rate / 3600
    duration = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
    return f"time: {duration} at {speed.rate:,.0f} images/s ({speed.origin}), evaluation and saving not counted"
