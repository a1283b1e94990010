"""Every bar that the spectral kernels have on an H100, measured in one run; CSV to stdout. Needs a CUDA device.

    python -m benchmarks.kernels.spectral_bars > benchmarks/results/spectral_h100.csv

ms, p20, p80: device time of one replay of a CUDA graph that holds the whole call (forward, or forward and backward),
between two events, the L2 cache overwritten before each. eager_ms: the same call without a graph, with its launches.
bar_ms: the aim; met: whether the median keeps it. svd_ms: one `torch.linalg.svd` call for all views and what the
authors do with it; eigh_ms: the solver of that name (batched, float64); times_*: how many times slower they are
(aims: 200 and 5, at two views of 512 x 2048). error: against the float64 SVD, as in benchmarks.kernels.spectral; for
the Gram matrices of the monitor the largest difference as a share of the largest entry.
"""

import statistics
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.common import Row
from benchmarks.kernels.spectral import by_svd, features, largest_error, ours, random_like, task_name
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
    (TWO, ("power", -0.5, "target"), 0.33),  # the target filter of the presets
    *[(TWO, task, 0.6) for task in LOGS],
    (LARGE, ("power", -1.0, "target"), 3.0),
    *[(LARGE, task, 7.0) for task in LOGS],
]
MONITOR_BAR = 0.025  # milliseconds on the main stream: the Gram matrices; their spectra are taken elsewhere
FLUSH_BYTES = 128 << 20  # more than the L2 cache holds
FIELDS = ["task", "provider", "views", "rows", "width", "ms", "p20", "p80", "eager_ms", "bar_ms", "met"]
FIELDS += ["svd_ms", "eigh_ms", "times_svd", "times_eigh", "error", *common.ENVIRONMENT]


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
    shape: Shape,
    call: Call,
    bar: float,
    error: Callable[[tuple[Tensor, Tensor | None]], float],
    slower: dict[str, float],
) -> dict[str, object]:
    """One row without its names; `slower`: milliseconds of the SVD route and of eigh, where they are compared."""
    replay, results = graphed(call)
    times = device_times(replay, 50)
    ms = statistics.median(times)
    return {
        **dict(zip(("views", "rows", "width"), shape, strict=True)),
        **common.times(times, 4),
        "eager_ms": f"{statistics.median(device_times(call, 10)):.4f}",
        "bar_ms": bar,
        "met": ms <= bar,
        **{f"{name}_ms": f"{t:.3f}" for name, t in slower.items()},
        **{f"times_{name}": f"{t / ms:.1f}" for name, t in slower.items()},
        "error": f"{error(results):.1e}",
    }


def filter_rows(shape: Shape, task: Task, bar: float) -> Iterator[Row]:
    """One row for the products of the library and one for the kernels."""
    kind, power, side = task
    x = features(*shape, torch.device("cuda"))
    g = random_like(x)
    exact = by_svd(x, g, kind, power, side, exact=True)
    name = task_name(kind, power, side)
    slower = {
        "svd": statistics.median(device_times(partial(by_svd, x, g, kind, power, side), 3)),
        "eigh": statistics.median(device_times(partial(ours, x, g, kind, power, side, "eigh"), 5)),
    }
    solver = "gram_power" if power == 2 else "newton_schulz"
    for precision in ("fp16x3", "fp16x3-triton"):
        call = partial(ours, x, g, kind, power, side, solver, precision)
        found = row(shape, call, bar, lambda result: largest_error(name, result, exact), slower)
        yield {"task": name, "provider": f"{solver} {precision}", **found}


def monitor_rows() -> Iterator[Row]:
    """The monitor's share of the main stream."""
    x = features(*MONITORED, torch.device("cuda")).bfloat16()
    exact = gram(x.double(), center=True, normalize=True)

    def call(precision: str) -> tuple[Tensor, None]:
        return gram(x, center=True, normalize=True, precision=precision), None

    def error(result: tuple[Tensor, Tensor | None]) -> float:
        return ((result[0].double() - exact).abs().max() / exact.abs().max()).item()

    for precision in ("half", "fp16x3-triton", "half-triton"):
        found = row(MONITORED, partial(call, precision), MONITOR_BAR, error, {})
        yield {"task": "monitor of 8 matrices", "provider": f"gram {precision}", **found}


def rows() -> Iterator[Row]:
    """All rows, the monitor's first."""
    where = common.environment(torch.device("cuda"))
    for found in (monitor_rows(), *(filter_rows(shape, task, bar) for shape, task, bar in BARS)):
        yield from ({**row, **where} for row in found)


def main() -> None:
    common.parser(__doc__).parse_args()
    common.require_cuda("benchmarks.kernels.spectral_bars")
    common.print_rows(FIELDS, rows())


if __name__ == "__main__":
    main()
