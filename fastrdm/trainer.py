"""The training run, readable from top to bottom: build, resume, train, log, evaluate, save."""

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from fastrdm.config import run_config
from fastrdm.config.run_config import Config
from fastrdm.efficiency.utilization import UtilizationMeter
from fastrdm.evaluation.features import FeatureSet, feature_sets, raw_pixels
from fastrdm.evaluation.knn import knn_accuracy
from fastrdm.evaluation.sets import open_sets
from fastrdm.kernels.cuda_graph import recorder
from fastrdm.loaders.build import build_loader
from fastrdm.loaders.engines.resident import ResidentLoader
from fastrdm.loaders.evaluation import evaluation_batches
from fastrdm.loaders.sources.checks import no_accuracy
from fastrdm.loaders.sources.source import Source
from fastrdm.loaders.spec import Batch
from fastrdm.methods.dual_branch import Output
from fastrdm.monitoring import alarms
from fastrdm.monitoring.monitor import RankMonitor
from fastrdm.monitoring.rank_statistics import CENTERED_CONVENTION
from fastrdm.monitoring.settings import Action
from fastrdm.monitoring.verdict import Judge
from fastrdm.runtime import checkpoint, distributed
from fastrdm.runtime.checkpoint import CheckpointError
from fastrdm.runtime.checkpoint_store import CheckpointStore
from fastrdm.runtime.host_memory import keep_freed_memory
from fastrdm.runtime.log import RunLog
from fastrdm.runtime.profiler import StepProfiler
from fastrdm.runtime.run_folder import RunFolder
from fastrdm.runtime.timers import LossTracker, NonFiniteLoss, TrainingClock, duration
from fastrdm.runtime.watchdog import StragglerDetector, Watchdog, mixed_devices
from fastrdm.schema import Horizon, require, steps_of
from fastrdm.training import automatic
from fastrdm.training.fingerprint import fingerprint
from fastrdm.training.fit import Given, evaluation_bank, fit_batch, fit_views, fit_warmup
from fastrdm.training.initial_weights import check, initialize
from fastrdm.training.learner import DTYPES, build_learner, build_method, dummy_batch
from fastrdm.training.periodic_analysis import PeriodicAnalysis
from fastrdm.training.run_state import RunState
from fastrdm.training.step import TrainStep, changes


class Trainer:
    """One process's part of a run."""

    def __init__(self, settings: Config, given: Given = lambda key: True) -> None:
        """`given` tells which keys the user set: only those are refused for a set or a run that they do not fit."""
        self.settings, self.given = settings, given
        self.notes: list[str] = []
        """Choices and changes that were made for this machine and this set, for the user to know."""

        folder = RunFolder(run_config.run_folder(settings))
        self.processes = distributed.start(settings.train.device, settings.train.hang_timeout + 60)
        if self.processes.device.type == "cpu":
            keep_freed_memory()
        distributed.agree(run_config.to_yaml(settings))
        distributed.on_main(folder.check)
        url = settings.checkpoint.store
        self.copies = CheckpointStore(url) if url and self.processes.main else None
        torch.manual_seed(settings.train.seed)
        distributed.together(self._open_data)
        self._choose(folder.path)
        self._build_loader()
        self._build_model()
        torch.manual_seed(settings.train.seed + 1 + self.processes.rank)  # dropout differs between processes
        self.step = 0
        self.metrics: dict[str, float] = {}  # the newest value of everything measured
        self.losses = LossTracker(self.processes.device)
        settings = self.settings
        views, images = len(settings.loader.views), settings.loader.batch_size // settings.train.accumulate
        self.monitor = RankMonitor(settings.monitor, self.method, views, images, self.processes)
        self.judge = Judge(images)
        self.analysis = PeriodicAnalysis(settings, self.method, self.source, self.test, self.processes)
        parts = self.stepper, self.loader, self.losses, self.monitor
        self.state = RunState(settings, folder, self.processes, *parts, self.data, self.judged_on, self.copies)
        classes = len(self.source.classes) if self.learner.probe else 0
        self.utilization = UtilizationMeter(settings, self.method, self.horizon, classes, self.processes)
        self.stop = distributed.StopSignal(settings.train.hang_timeout + 60)
        self.slow = StragglerDetector(self.processes)
        self.watch = Watchdog(self.processes, settings.train.hang_timeout)
        self.halt: Action = "warn"  # what an alarm asks for

    def _open_data(self) -> None:
        evaluate = self.settings.evaluate
        self.sets = open_sets(self.settings.loader, evaluate)
        self.source, self.test = self.sets.train, self.sets.test
        # where k-NN looks for neighbors
        self.bank, notes = evaluation_bank(self.sets.bank, evaluate.bank)
        self.notes += [*(f"note: {note}" for note in self.sets.notes), *notes]
        self.unread: dict[str, dict[int, str]] = {"bank": {}, "test": {}}  # images that evaluation could not read
        self.unmeasured = no_accuracy(self.sets.bank, self.test)
        self.labeled = self.unmeasured is None
        self.data = fingerprint(self.source)
        bank = self.data if self.sets.bank is self.source else fingerprint(self.sets.bank)
        self.judged_on = {"training": bank, "test": fingerprint(self.test)}

    def _choose(self, folder: Path) -> None:
        """Settle what is left at `auto`; a run that goes on keeps what its checkpoint says."""
        distributed.agree(self.data)
        stored = distributed.on_main(
            lambda: checkpoint.newest_settings(folder) or (self.copies.newest_settings() if self.copies else {})
        )
        if not stored and (init := self.settings.train.init):
            distributed.on_main(lambda: check(init))
        world, accumulate = self.processes.world, self.settings.train.accumulate
        self.settings, told = fit_batch(self.settings, len(self.source), world, self.given, stored)
        self.notes += told
        batch, whole = (
            self.settings.loader.batch_size,
            f"a multiple of {world} processes x train.accumulate={accumulate}",
        )
        require(batch % (world * accumulate) == 0, "loader.batch_size", whole, batch)
        self._may_run_eagerly = self.settings.train.compile == "auto"
        chosen, told = automatic.choose(self.settings, self.processes, self.source, stored)
        # Processors may differ from machine to machine: all processes compute in the main one's precision.
        precision = distributed.on_main(lambda: chosen.train.precision)
        self.settings = replace(chosen, train=replace(chosen.train, precision=precision))
        self.notes += told
        self.settings, told = fit_views(self.settings, self.source, self.given)
        self.notes += told
        self.dtype = DTYPES[self.settings.train.precision]

    def _build_loader(self) -> None:
        c, train, p = self.settings.loader, self.settings.train, self.processes
        self.loader = build_loader(
            c, self.source, seed=train.seed, rank=p.rank, world=p.world, device=p.device, dtype=self.dtype
        )
        epoch = len(self.loader)
        self.horizon = Horizon(epoch, steps_of(train.length, epoch))
        require(self.horizon.total >= 1, "train.length", f"at least a step (an epoch has {epoch})", train.length)
        last, epochs = max(e for v in c.views for e, _ in (*v.progressive, (0, 0))), self.horizon.total / epoch
        require(last < max(epochs, 1), "loader.views.*.progressive", f"below the run's {epochs:g} epochs", last)
        self.settings, told = fit_warmup(self.settings, self.horizon, self.given)
        self.notes += told

    def _build_model(self) -> None:
        c, train = self.settings, self.settings.train
        self.method = build_method(c, self.horizon)
        sizes = {n for v in c.loader.views for n in (v.size, *(size for _, size in v.progressive))}
        self.method.online.encoder.check_sizes(sorted(sizes))
        torch.backends.cudnn.benchmark = train.cudnn_benchmark is True
        layout = torch.channels_last if train.channels_last else torch.contiguous_format
        learner = build_learner(self.method, c, len(self.source.classes) if self.sets.probed else 0)
        self.learner = learner.to(self.processes.device).to(memory_format=layout)
        if train.compile is True:
            # a graph break would be a slow step that nobody asked for; each size of the views has a graph of its own
            self.method.compile(fullgraph=True, dynamic=False)
            limits = torch._dynamo.config
            limits.recompile_limit = max(limits.recompile_limit, 1 + len(changes(c, self.method)))
        self.stepper = TrainStep(c, self.learner, self.horizon, self.processes)
        if train.capture is True and isinstance(self.loader, ResidentLoader):
            self.loader.capture(recorder(self.processes.device, "train.capture"))
        self.optimizer = self.stepper.optimizer

    def train(self, introduction: Sequence[str] = ()) -> bool:
        """Train to the end, from the newest checkpoint where there is one; False when asked to stop before.

        `introduction`: lines that were printed before, for the run's train.log.
        """
        with contextlib.ExitStack() as held:
            if self.processes.main:
                home = self.state.home.held(lambda line: print(line, flush=True))
            distributed.on_main(lambda: held.enter_context(home))
            return self._train(introduction)

    def _train(self, introduction: Sequence[str]) -> bool:
        c, total = self.settings, self.horizon.total
        fetched = distributed.on_main(self.state.fetch)
        if self.processes.world > 1 and checkpoint.existing(self.state.folder):
            sizes, share = [view.size for view in c.loader.views], c.loader.batch_size // self.processes.world
            for _ in range(2):
                self.train_step(dummy_batch(share, sizes, self.processes.device, self.dtype))  # undone by what follows
        self.step, self.metrics, said = self.state.resume()
        self._open_log(introduction, [*fetched, *said])
        self.trace = self.step_trace()
        if self.step == 0:
            self._begin()
        try:
            self.state.describe()
        except OSError as error:
            self.log.say(f"training goes on, but {error.filename} could not be written: {error.strerror}")
        if self.step == 0 and self.analysis.due(0):
            self.observe()
        try:
            self._loop(total)
        except NonFiniteLoss as error:
            self.alarm([alarms.non_finite(str(error))])
            raise
        if self.trace:
            self.trace.close()
        self.stop.drain()
        self.loader.close()
        self.monitor.close()
        self.log.close()
        if self.step == total:
            verdict = self.judge.verdict()
            self.state.finish({**self.metrics, "verdict": verdict.state, "verdict_reason": verdict.reason})
        self.watch.close()
        distributed.agree(self.step)  # nobody leaves while the main process saves: torchrun ends the rest when one does
        return self.step == total

    def _open_log(self, introduction: Sequence[str], said: Sequence[str]) -> None:
        c = self.settings
        self.log = RunLog(c.log, self.state.folder, self.step, run_config.to_dict(c), self.processes.main)
        self.judge.replay(self.log.metrics())
        for line in introduction:
            self.log.note(line)
        notes = [*self.method.unfinished_durations(), *self.prepared(), *self.analysis.describe()]
        if self.unmeasured:
            notes.insert(0, f"note: k-NN and probe are not measured: {self.unmeasured}")
        for line in (*said, *notes, *mixed_devices(self.processes)):
            self.log.say(line)
        if self._may_run_eagerly:
            self.stepper.instead = self.log.say

    def _begin(self) -> None:
        """Do the work of a run that comes before its first step."""
        if self.settings.evaluate.baselines and self.labeled:
            self.measure_baselines()
        if self.settings.train.init:
            self.start_from_weights(self.settings.train.init)

    def start_from_weights(self, init: str) -> None:
        """Put the weights that train.init names in place of the random ones, and measure them where those were."""
        lines, self.state.origin = initialize(self.learner, init, self.settings.encoder)
        for line in lines:
            self.log.say(line)
        if self.settings.evaluate.baselines and self.labeled:
            self.record({"knn_initial_encoder": self.knn(*self.feature_sets(self.method.online.encoder))})

    def prepared(self) -> Iterator[str]:
        """A line for each step still to come at which compiled or captured work has to be made anew."""
        train = self.settings.train
        how = {"compiled": train.compile, "captured": train.capture}
        made = " and ".join(name for name, chosen in how.items() if chosen is True)
        for step, what in changes(self.settings, self.method) if made else ():
            if self.step < step < self.horizon.total:
                yield f"{made} anew from step {step:,}: {what}"

    def _loop(self, total: int) -> None:
        c, clock, stopped = self.settings, TrainingClock(self.processes.device), False
        evaluate, save = self.horizon.steps(c.evaluate.every), self.horizon.steps(c.checkpoint.every)
        while self.step < total and not stopped:
            self.loader.set_epoch(self.step // self.horizon.steps_per_epoch)
            for batch in clock.waiting(self.loader):
                if self.step % self.horizon.steps_per_epoch == 0:
                    self.log.show_views(self.step, batch.views, c.loader.views)
                output = self.train_step(batch)
                self.utilization.after_step(self.log.say)
                self.step += 1
                self.watch.heartbeat(self.step)
                self.losses.add(output.loss, self.step)
                self.monitor.push(output, self.step)
                stopped, last = self.stop.poll(), self.step == total
                if (evaluate and self.step % evaluate == 0) or last:
                    with clock.paused():
                        self.evaluate()
                if self.step % c.log.every == 0 or last:
                    self.report(output, clock)
                    stopped = stopped or self.halt != "warn"
                if self.analysis.due(self.step):
                    with clock.paused():
                        self.observe()
                if last or ((stopped or (save and self.step % save == 0)) and self.halt != "stop"):
                    with clock.paused():
                        self.save(must=last or stopped)
                if self.trace:
                    self.trace.step(self.step)
                if last or stopped:
                    break

    def train_step(self, batch: Batch) -> Output:
        """One optimizer step on this process's share of a batch."""
        with record_function("training step"):
            return self.stepper(batch, self.step)

    def step_trace(self) -> StepProfiler | None:
        """The profiler of the main process, where one is asked for."""
        profile = self.settings.log.profile
        if profile is None or not self.processes.main:
            return None
        first = self.horizon.steps(profile.start) + 1
        last = max(min(first + profile.steps - 1, self.horizon.total), first)
        return StepProfiler(first, last, self.step, self.state.folder, self.log.say)

    def terms(self, output: Output) -> dict[str, float]:
        """The summands of this step's loss, where it has regularizers, as means over processes; waits."""
        if not output.terms:
            return {}
        values = torch.stack(list(output.terms.values())).double()
        values = distributed.sum_over_processes(values) / self.processes.world
        return {f"loss/{name}": value for name, value in zip(output.terms, values.tolist(), strict=True)}

    def report(self, output: Output, clock: TrainingClock) -> None:
        """Log a line of metrics.

        With evaluation and saving, this is the only place of the loop where the host waits for the device.
        """
        steps, seconds, waited = clock.lap()
        metrics = {"loss": self.losses.mean(), **self.terms(output), **self.monitor.batch(output)}
        metrics["learning_rate"] = self.optimizer.param_groups[0]["lr"].item()
        metrics["images_per_second"] = steps * self.settings.loader.batch_size / seconds
        metrics["data_wait"] = waited / seconds
        metrics["unreadable_images"] = float(len(self.loader.faults))
        with clock.paused():
            metrics |= self.utilization.read((self.step - 1) // self.horizon.steps_per_epoch, steps, seconds)
        for line in filter(None, (self.loader.diagnosis(), *self.slow.update(waited / steps, seconds / steps))):
            self.log.say(line)
        if self.step == self.horizon.total:
            self.monitor.finish()
        window = self.monitor.poll()
        metrics |= window.metrics if window else {}
        metrics["monitor_seconds"] = self.monitor.clock.lap()
        metrics["monitor_share"] = metrics["monitor_seconds"] / seconds
        self.record(metrics)
        for spectrum in window.spectra if window else []:
            self.log.append("spectra", self.step, self.epoch, spectrum)
        last = self.step == self.horizon.total
        share = self.step / self.horizon.total
        self.log.say(self.line()) if last else self.log.progress(self.line(), share)
        self.alarm(self.monitor.alarms.update(self.step, metrics))

    def record(self, metrics: dict[str, float]) -> None:
        """Keep what was measured at this step, write it down, and let the verdict take account of it."""
        self.metrics |= metrics
        self.judge.update(metrics)
        self.log.write(self.step, self.epoch, metrics)

    def alarm(self, raised: list[alarms.Alarm]) -> None:
        """Note and tell alarms; all processes halt where one of them raised an alarm that asks for it."""
        for alarm in raised:
            self.log.append("alarms", self.step, self.epoch, alarm._asdict())
            self.log.say(alarm.told)
        count = torch.tensor(float(len(raised)), device=self.processes.device)
        if distributed.max_over_processes(count).item():
            self.halt = self.settings.monitor.alarms.action

    @property
    def epoch(self) -> float:
        return self.step / self.horizon.steps_per_epoch

    def line(self) -> str:
        """The live progress line."""
        f, epochs = self.metrics, self.horizon.total / self.horizon.steps_per_epoch
        online, target = (f[f"{branch}/{CENTERED_CONVENTION}/batch"] for branch in ("online", "target"))
        knn = f"{100 * f['knn']:.1f} %" if "knn" in f else "-"
        images = (self.horizon.total - self.step) * self.settings.loader.batch_size
        left = f"  {duration(images / f['images_per_second'])} left" if images else ""
        return (
            f"epoch {self.epoch:.1f}/{round(epochs, 2):g}{left}  {f['images_per_second']:,.0f} images/s  "
            f"data wait {100 * f['data_wait']:.0f} %  lr {f['learning_rate']:.2g}  loss {f['loss']:.4f}  "
            f"rank online {online:.1f} target {target:.1f}  deviation {f['target/std/batch']:.2f}  "
            f"k-NN {knn}  {self.judge.verdict().state}"
        )

    def measure_baselines(self) -> None:
        """Measure k-NN of raw pixels and of the untrained encoder, which training has to beat."""
        self.metrics["knn_raw_pixels"] = self.knn(*self.feature_sets(raw_pixels))
        self.metrics["knn_random_encoder"] = self.knn(*self.feature_sets(self.method.online.encoder))
        self.record(dict(self.metrics))

    def evaluate(self) -> None:
        """Measure k-NN of the online and the EMA encoder, and the probe's accuracy, on the test split."""
        self.losses.check()
        if not self.labeled:
            return
        encoders = [self.method.online.encoder, *([self.method.target.encoder] if self.method.target else [])]
        (bank, query), *of_target = self.features_of(encoders)
        metrics = {"knn": self.knn(bank, query), "knn_images": float(len(query.labeled().labels))}
        if self.learner.probe:
            metrics["probe"] = self.learner.probe.accuracy(query)
        for sets in of_target:
            metrics["knn_target"] = self.knn(*sets)
        self.record(metrics)

    def observe(self) -> None:
        """Analyze the method as it is. The run is not changed."""
        self.losses.check()
        seen = self.analysis.measure(self.step, lambda: self.watch.heartbeat(self.step))
        self.record(seen.metrics)
        self.log.append("analysis", self.step, self.epoch, seen.record)
        self.log.say(seen.summary)

    def save(self, must: bool) -> None:
        """Write a checkpoint. A full disk costs this checkpoint only, unless `must`, for the run's last one."""
        self.losses.check()
        try:
            self.state.save(self.step, self.metrics, last=must)
        except CheckpointError as error:
            if must:
                raise
            self.log.say(f"training goes on, but {error}")

    def feature_sets(self, encode: Any) -> tuple[FeatureSet, FeatureSet]:
        """Features of the train and the test split, the model in evaluation mode meanwhile."""
        return self.features_of([encode])[0]

    def features_of(self, encoders: Sequence[Any]) -> list[tuple[FeatureSet, FeatureSet]]:
        """As `feature_sets`, by each of some encoders; every image is decoded once."""
        device, precision = self.processes.device.type, self.method.precision
        self.learner.eval()
        with torch.autocast(device, precision) if precision else nullcontext():
            bank = feature_sets(encoders, self.center_views(self.bank, self.unread["bank"]))
            query = feature_sets(encoders, self.center_views(self.test, self.unread["test"]))
        self.learner.train()
        return list(zip(bank, query, strict=True))

    def center_views(self, source: Source, faults: dict[int, str]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(images, index, label) over this process's share of a source, each readable image once, not augmented."""
        c, size, p = self.settings.loader, self.settings.evaluate.batch_size, self.processes
        for batch in evaluation_batches(
            source,
            c.views[0],
            size,
            device=p.device,
            dtype=self.dtype,
            rank=p.rank,
            world=p.world,
            workers=c.threads,
            faults=faults,
        ):
            self.watch.heartbeat(self.step)
            yield batch

    def knn(self, bank: FeatureSet, query: FeatureSet) -> float:
        return knn_accuracy(bank, query, self.settings.evaluate.k, self.settings.evaluate.temperature)
