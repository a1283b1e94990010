"""Utilization of the device: arithmetic against the peak, memory, time in spectral filters, time to the first step."""

import copy
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch._dynamo.utils import counters

from fastrdm.config.run_config import Config
from fastrdm.efficiency.peak_flops import peak_tflops
from fastrdm.efficiency.step_cost import step_flops
from fastrdm.methods.dual_branch import DualBranch
from fastrdm.methods.spectral_filter import SpectralFilter
from fastrdm.methods.transform import BranchContext
from fastrdm.runtime import distributed
from fastrdm.runtime.distributed import Processes
from fastrdm.runtime.timers import Stopwatch
from fastrdm.schema import Horizon

REPEATS = 5  # of a filter that is timed


class UtilizationMeter:
    """Measures a process's use of its device. The time that this takes is left out of the training time."""

    def __init__(
        self, settings: Config, method: DualBranch, horizon: Horizon, classes: int, processes: Processes
    ) -> None:
        """`classes`: number of classes of the online probe, 0 without a probe."""
        self.settings, self.method, self.horizon, self.classes = settings, method, horizon, classes
        self.device = processes.device
        self.images = settings.loader.batch_size // (processes.world * settings.train.accumulate)
        self.first_step = 0.0  # seconds from the start of this process to the end of its first step
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "a CPU"
        self.name, self.peak = name, settings.log.peak_tflops or peak_tflops(name, settings.train.precision)
        self._flops: dict[tuple[int, ...], int] = {}
        self._filters: float | None = None

    def describe(self) -> str:
        """Line that says which peak the arithmetic is compared with."""
        if self.peak is None:
            return f"arithmetic: no peak known of {self.name}, so GFLOP/s and no share; log.peak_tflops sets one"
        return f"arithmetic: shares are of {self.peak:g} TFLOP/s, {self.name}, {self.settings.train.precision}"

    def after_step(self, say: Callable[[str], None]) -> None:
        """Call after each step. The first step is waited for, and its time is told through `say`."""
        if not self.first_step:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.first_step = age()
            say(f"first step: {self.first_step:.1f} s after the start of the process; {compile_cache()}")

    def read(self, epoch: int, steps: int, seconds: float) -> dict[str, float]:
        """Metrics of `steps` steps that took `seconds`.

        Call on every process. The first call counts operations and times the filters, and waits for the device.
        """
        gflops = self.step_flops(epoch) * steps / seconds / 1e9
        metrics = {"gflops": gflops} | ({"flop_utilization": gflops / 1e3 / self.peak} if self.peak else {})
        if self._filters is None:
            self._filters = self._time_of_filters()
        if self._filters:
            metrics["filter_share"] = self._filters * self.settings.train.accumulate * steps / seconds
        memory = torch.tensor(peak_memory(self.device), dtype=torch.float64, device=self.device)
        metrics["peak_memory_mib"] = distributed.max_over_processes(memory).item() / 2**20
        metrics["seconds_to_first_step"] = self.first_step
        return metrics

    def step_flops(self, epoch: int) -> int:
        """Floating-point operations of this process's share of a step in `epoch`."""
        sizes = tuple(view.at(epoch).size for view in self.settings.loader.views)
        if sizes not in self._flops:
            one = step_flops(self.settings, self.horizon, self.classes, self.images, sizes)
            self._flops[sizes] = one * self.settings.train.accumulate
        return self._flops[sizes]

    def _time_of_filters(self) -> float:
        """Seconds that the spectral filters take for one forward and backward pass, on their own, run eagerly."""
        method = self.method
        sides = (
            (method.online_transforms, len(self.settings.loader.views)),
            (method.target_transforms, method.config.target_views),
        )
        return sum(self._time_of(t, views) for ts, views in sides for t in ts if isinstance(t, SpectralFilter))

    def _time_of(self, transform: SpectralFilter, views: int) -> float:
        transform = copy.deepcopy(transform)  # a moving moment must not see these rows
        dtype = torch.float64 if self.settings.train.precision == "fp64" else torch.float32
        shape = views, self.images, self.method.config.projector.out
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.device, dtype).requires_grad_()
        branch, watch = BranchContext(x.detach().flip(0), None), Stopwatch(self.device, "spectral filter alone")
        laps = []
        for _ in range(1 + REPEATS):
            with watch:
                y = transform(x, branch)
                if y.requires_grad:
                    torch.autograd.grad(y, x, torch.ones_like(y))
            laps.append(watch.lap())
        return statistics.median(laps[1:])

    def summary(self, metrics: dict[str, float]) -> Iterator[str]:
        """Lines on speed and memory for the end of a run."""
        if "gflops" not in metrics:
            return  # nothing was trained since a checkpoint that has no such metrics
        f, where = metrics, "of a device" if self.device.type == "cuda" else "of a process"
        share = f" ({100 * f['flop_utilization']:.1f} % of the peak)" if "flop_utilization" in f else ""
        filters = f", spectral filters {100 * f['filter_share']:.1f} %" if "filter_share" in f else ""
        yield (
            f"speed at the end: {f['images_per_second']:,.0f} images/s, {f['gflops']:,.1f} GFLOP/s {where}{share}; "
            f"data wait {100 * f['data_wait']:.1f} %, monitor {100 * f['monitor_share']:.1f} %{filters} of the time"
        )
        yield (
            f"memory {where}: {f['peak_memory_mib']:,.0f} MiB at most; "
            f"first step {f['seconds_to_first_step']:.1f} s after the start"
        )


def age() -> float:
    """Seconds since this process was started."""
    began = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # proc_pid_stat(5), field 22
    return time.clock_gettime(time.CLOCK_BOOTTIME) - began / os.sysconf("SC_CLK_TCK")


def peak_memory(device: torch.device) -> int:
    """Peak memory so far in bytes: of tensors on a CUDA device, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def compile_cache() -> str:
    """Line that says how many compiled graphs came from torch.compile's cache on disk."""
    hits, misses = (counters["inductor"][f"fxgraph_cache_{kind}"] for kind in ("hit", "miss"))
    if not hits + misses:
        return "nothing was compiled"
    return f"{hits} of {hits + misses} compiled graphs were in the cache"
