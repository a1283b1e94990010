"""The rank of both branches while a run goes on: metrics of each batch, and spectra of windows of many batches."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from fastrdm.kernels.batchnorm import ViewBatchNorm
from fastrdm.kernels.linalg.effective_rank import effective_ranks, unit_grams
from fastrdm.methods.dual_branch import DualBranch, Output
from fastrdm.monitoring.alarms import Alarms, loss_range
from fastrdm.monitoring.moments import unit_rows
from fastrdm.monitoring.rank_statistics import CENTERED_CONVENTION
from fastrdm.monitoring.rank_statistics import HEADLINE_CONVENTION as HEADLINE_CONVENTION
from fastrdm.monitoring.settings import MonitorConfig as MonitorConfig
from fastrdm.monitoring.window import GROUPED_WIDTH, Shape, Window, WindowReport, bytes_of, read
from fastrdm.runtime.distributed import Processes, gather_rows
from fastrdm.runtime.timers import Stopwatch
from fastrdm.schema import require, steps_of

# rows of a window for each dimension: a white spectrum of 512 then reads 487, of 512 rows only 310
ROWS_PER_DIMENSION = 10
# batches over which the rows of one are spread where moments are large: their products are then 1 to 2 % of a step
SPREAD = 4
# up to this width eigenvalues come from one CPU thread, above from a stream of their own on the GPU
MAX_CPU_WIDTH = 1024


def tap_widths(method: DualBranch) -> dict[str, int]:
    """Number of dimensions of every tap, by name."""
    network = method.online
    first, features = network.projector[network.projector.split], network.encoder.features
    hidden = first.num_features if isinstance(first, ViewBatchNorm) else first.in_features
    assert isinstance(hidden, int) and isinstance(features, int)
    out = network.projector.out if network.prototypes is None else len(network.prototypes.weight)
    scores = {} if network.prototypes is None else {"online_scores": out, "target_scores": out}
    return {"online": out, "target": out, "hidden": hidden, **scores, "features": features}


def taps(output: Output) -> dict[str, Tensor]:
    """Rows (2, B, D) of the two global views at every tap, without gradient."""
    found = {"online": output.online[:2], "target": output.target[:2], "hidden": output.hidden[:2]}
    if output.scores is not None:
        found |= {"online_scores": output.scores[0][:2], "target_scores": output.scores[1][:2]}
    return found | {"features": output.features[:2]}


def batch_metrics(output: Output) -> dict[str, Tensor]:
    """Effective rank in both headline conventions and standard deviation at every tap, over the rows of this step.

    Each is 0-d, a mean over views. Ranks of one batch are at most its number of rows, and low where rows are few. Call
    on every process.
    """
    rows = {name: gather_rows(x, dim=1) for name, x in taps(output).items()}
    conventions = {HEADLINE_CONVENTION: False, CENTERED_CONVENTION: True}
    # The Gram matrices of all taps together, because on CUDA every eigensolve makes the host wait.
    grams = unit_grams(list(rows.values()), list(conventions.values()))
    ranks = iter(effective_ranks([matrix for of_tap in grams for matrix in of_tap]))
    metrics = {}
    for name, x in rows.items():
        for convention in conventions:
            metrics[f"{name}/{convention}/batch"] = next(ranks).mean()
        metrics[f"{name}/std/batch"] = (unit_rows(x.double()).std(1, correction=0) * x.shape[-1] ** 0.5).mean()
    return metrics


class RankMonitor:
    """Fills windows with rows and reads their spectra; `push` and `poll` never wait for the device.

    On CUDA a window is read in a thread of its own. On CPU it is read at once: there, a run's metrics are reproducible.
    Only the main process keeps rows and reads; the others hand theirs over.
    """

    def __init__(
        self, config: MonitorConfig, method: DualBranch, views: int, images: int, processes: Processes
    ) -> None:
        """Watch `method`, which is given `views` views of each of `images` images at a time, over all processes."""
        self.processes, self.horizon, self.images = processes, method.horizon, images
        widths = tap_widths(method)
        some = steps_of(config.every, 2**32, 2**32) > 0
        self.every = max(self.horizon.steps(config.every), 1) if some else 0
        self.alarms = Alarms(config.alarms, loss_range(method.config, views), self.horizon)
        least = max((width for width in widths.values() if width <= config.max_width), default=config.max_width)
        rows = config.rows or ROWS_PER_DIMENSION * least
        require(
            rows >= least,
            "monitor.rows",
            f"at least {least}, the dimensions of the widest tap (a spectrum has no more values above 0 than rows)",
            rows,
        )
        groups = config.groups if images >= config.groups > 0 else 1
        spread = self._spread(rows, groups) if least > GROUPED_WIDTH else 1
        self.shape = Shape(rows, widths, config.max_width, groups, tuple(config.conventions), spread)
        self.window: Window | None = None
        self.clock = Stopwatch(processes.device, "monitor")
        self._ready: WindowReport | None = None
        self._pending: Future[WindowReport] | None = None
        self._thread: ThreadPoolExecutor | None = None

    def _spread(self, rows: int, groups: int) -> int:
        """SPREAD, or less where a window would then end after the next begins, or a batch give too few images."""
        batches = -(-rows // (2 * self.images))
        return max(min(SPREAD, min(self.every, self.horizon.total) // batches, self.images // groups), 1)

    def describe(self) -> list[str]:
        """Lines that say what is measured, and how much memory it takes on the main process."""
        if not self.every:
            return ["monitor: metrics of batches only"]
        size = f"{bytes_of(self.shape, self.processes.device) / 2**20:,.1f} MiB"
        lines = [f"monitor: a window of {self.shape.rows:,} rows every {self.every:,} steps, {size}"]
        wide = [tap for tap in self.shape.widths if self.shape.wide(tap)]
        if wide:
            cap = self.shape.max_width
            lines.append(f"note: {', '.join(wide)} above monitor.max_width={cap}: ranks of a sample, at most {cap}")
        taken = -(-self.images // self.shape.spread)
        if self.shape.rows > (total := 2 * taken * self.horizon.total):
            lines.append(
                f"note: the run has {total:,} rows, no window fills; ranks of batches are at most {self.images}"
            )
        return lines

    def batch(self, output: Output) -> dict[str, float]:
        """`batch_metrics` as numbers; waits for the device once after the eigensolve."""
        with self.clock:
            metrics = batch_metrics(output)
            return dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))

    def push(self, output: Output, step: int) -> None:
        """Take this step's rows, where a window is open or opens at this step (from 1). Call on every process."""
        if not self.every:
            return
        with self.clock:
            if self.window is None and (step - 1) % self.every == 0:
                self.window = Window(self.shape, self.processes.device)
            if self.window is None:
                return
            rows = {name: gather_rows(x, dim=1) for name, x in taps(output).items()}
            self.window.add(rows, keep=self.processes.main)
            if self.window.full:
                window, self.window = self.window, None
                if self.processes.main:
                    self._read(window, step)

    def poll(self) -> WindowReport | None:
        """Newest finished window report that was not returned before, else None.

        Never blocks. Always None off rank 0.
        """
        if self._pending is not None and self._pending.done():
            self._ready, self._pending = self._pending.result(), None
        ready, self._ready = self._ready, None
        return ready

    def finish(self) -> None:
        """Wait for the window report that is being computed."""
        if self._pending is not None:
            self._ready, self._pending = self._pending.result(), None

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown()

    def _read(self, window: Window, step: int) -> None:
        if self.processes.device.type == "cpu":
            self._ready = read(window, step)
        elif self._pending is None or self._pending.done():  # else skipped: the thread cannot keep up
            if self._pending is not None:
                self._ready = self._pending.result()
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, "monitor", torch.set_num_threads, (1,))
            event = torch.cuda.Event()
            event.record()
            self._pending = self._thread.submit(_read_on_cuda, window, step, event)

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint: the open window, the report not returned yet, the alarms.

        Waits for a report that is being computed.
        """
        self.finish()
        return {
            "alarms": self.alarms.state_dict(),
            "window": self.window.state_dict() if self.window else None,
            "ready": self._ready._asdict() if self._ready else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`, on any number of processes; a window of other settings is dropped."""
        self.alarms.load_state_dict(state["alarms"])
        self.window = None
        if state["window"] is not None and self.every:
            window = Window(self.shape, self.processes.device)
            self.window = window if window.load_state_dict(state["window"], keep=self.processes.main) else None
        self._ready = WindowReport(**state["ready"]) if state["ready"] and self.processes.main else None


def _read_on_cuda(window: Window, step: int, filled: torch.cuda.Event) -> WindowReport:
    """Read a window in the monitor's thread, on a CUDA stream of its own, so that the training loop does not wait."""
    filled.synchronize()
    with torch.cuda.stream(torch.cuda.Stream(window.device)):
        return read(window, step, torch.device("cpu") if window.width <= MAX_CPU_WIDTH else None)
