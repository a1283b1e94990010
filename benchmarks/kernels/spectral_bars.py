"""Every bar that the spectral kernels have on an H100, measured in one run; CSV to stdout. Needs a CUDA device.

    python -m benchmarks.kernels.spectral_bars > benchmarks/results/spectral_h100.csv

ms, p20, p80: device time of one replay of a CUDA graph that holds the whole call (forward, or forward and backward),
between two events, the L2 cache overwritten before each. eager_ms: the same call without a graph, with its launches.
bar_ms: the aim; met: whether the median keeps it. svd_ms: one `torch.linalg.svd` call for all views and what the
authors do with it; eigh64_ms: the solver of that name (batched float64 eigh); times_*: how many times slower they are
(aims: 200 and 5, at two views of 512 x 2048). error: against the float64 SVD, as in bench_spectral.py; for the Gram
matrices of the monitor the largest difference as a share of the largest entry.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.kernels.spectral import by_svd, environment, features, ours, row_error
from fastrdm.kernels.linalg.gram import gram

Call = Callable[[], tuple[Tensor, Tensor | None]]
Shape = tuple[int, int, int]  # views, rows, width
Task = tuple[str, float | None, str]  # kind, power, side
LOGS: list[Task] = [(kind, None, "online") for kind in ("log", "log1p", "log1p_sq")]
TWO, LARGE, MONITORED = (2, 512, 2048), (1, 4096, 2048), (8, 512, 2048)
BARS: list[tuple[Shape, Task, float]] = [  # milliseconds a call
    (TWO, ("power", 2.0, "target"), 0.06),
    (TWO, ("power", -1.0, "target"), 0.25),
    (TWO, ("power", -0.7, "target"), 0.45),
    *[(TWO, task, 0.6) for task in LOGS],
    (LARGE, ("power", -1.0, "target"), 3.0),
    *[(LARGE, task, 7.0) for task in LOGS],
]
MONITOR_BAR = 0.025  # milliseconds on the main stream: the Gram matrices; their spectra are taken elsewhere
FLUSH_BYTES = 128 << 20  # more than the L2 cache holds


def graphed(call: Call) -> tuple[Callable[[], None], tuple[Tensor, Tensor | None]]:
    """A replay of `call`, and the tensors that it fills."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles kernels and fills the caches of constants
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph.replay, results


def device_times(call: Callable[[], object], repeats: int) -> list[float]:
    """Milliseconds between two events around each call, after a first that is not counted."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(repeats + 1):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return times[1:]


def row(
    name: str, shape: Shape, call: Call, bar: float, error: Callable[[Tensor, Tensor | None], float], slow: list[float]
) -> str:
    """One CSV row; `slow`: milliseconds of the SVD route and of eigh."""
    replay, results = graphed(call)
    times = device_times(replay, 50)
    ms, p20, p80 = (torch.tensor(times).quantile(q).item() for q in (0.5, 0.2, 0.8))
    eager = statistics.median(device_times(call, 10))
    ratios = ",".join(f"{t:.3f}" for t in slow) + "," + ",".join(f"{t / ms:.1f}" for t in slow) if slow else ",,,"
    where = ",".join(map(str, shape))
    return (
        f"{name},{where},{ms:.4f},{p20:.4f},{p80:.4f},{eager:.4f},{bar},{ms <= bar},{ratios},"
        f"{error(*results):.1e},{environment(torch.device('cuda'))}"
    )


def filter_rows(shape: Shape, task: Task, bar: float) -> None:
    """Print one row for the products of the library and one for the kernels."""
    kind, power, side = task
    x = features(*shape, torch.device("cuda"))
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.device)
    exact = by_svd(x, g, kind, power, side, exact=True)

    def error(value: Tensor, grad: Tensor | None) -> float:
        pairs = [(a, b) for a, b in zip((value, grad), exact, strict=True) if a is not None and b is not None]
        return max(row_error(a, b) for a, b in pairs)

    slow = [
        statistics.median(device_times(partial(by_svd, x, g, kind, power, side), 3)),
        statistics.median(device_times(partial(ours, x, g, kind, power, side, "eigh"), 5)),
    ]
    name = f"{kind if power is None else f'power {power:g}'} {'forward+backward' if side == 'online' else 'forward'}"
    solver = "gram_power" if power == 2 else "newton_schulz"
    for precision in ("fp16x3", "fp16x3-triton"):
        call = partial(ours, x, g, kind, power, side, solver, precision)
        print(row(f"{name},{solver} {precision}", shape, call, bar, error, slow), flush=True)


def monitor_rows() -> None:
    """Print the rows of the monitor's share of the main stream."""
    x = features(*MONITORED, torch.device("cuda")).bfloat16()
    exact = gram(x.double(), center=True, normalize=True)

    def call(precision: str) -> tuple[Tensor, None]:
        return gram(x, center=True, normalize=True, precision=precision), None

    def error(value: Tensor, grad: Tensor | None) -> float:
        return ((value.double() - exact).abs().max() / exact.abs().max()).item()

    for precision in ("half", "half-triton"):
        name = f"monitor of 8 matrices,gram {precision}"
        print(row(name, MONITORED, partial(call, precision), MONITOR_BAR, error, []), flush=True)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if not torch.cuda.is_available():
        sys.exit("spectral_bars.py needs a CUDA device: bench_spectral.py runs without one")
    print(
        "task,provider,views,rows,width,ms,p20,p80,eager_ms,bar_ms,met,svd_ms,eigh64_ms,times_svd,times_eigh64,"
        "error,device,threads,torch,commit"
    )
    monitor_rows()
    for shape, task, bar in BARS:
        filter_rows(shape, task, bar)


if __name__ == "__main__":
    main()
