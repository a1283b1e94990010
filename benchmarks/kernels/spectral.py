"""Time and error of spectral filters and effective ranks against SVD routes, interleaved in one run; CSV to stdout.

    python -m benchmarks.kernels.spectral > benchmarks/results/spectral_cpu.csv

ms, p20, p80: median, 20th and 80th percentile of a call; with --clock cpu the processor time of this process, over all
its threads, for a machine that others use too. error: against a float64 SVD with the same cutoff, the larger of rms row
direction and rms relative row length (value, and gradient where there is one); for ranks the relative error.
speedup: the SVD route's median over this one's. floor_gflop, floor_mb: the least arithmetic of any route through the
Gram matrix (its lower half, and one product to apply) and the bytes of reading the input and writing the output once.
"""

import argparse
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastrdm.kernels.linalg.effective_rank import effective_rank
from fastrdm.kernels.linalg.gram import gram
from fastrdm.kernels.spectral.spectral_filter import spectral_filter

Call = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]  # (x, g) -> value, gradient
Outcome = dict[str, tuple[list[float], tuple[Tensor, Tensor | None]]]  # provider -> times in ms, results
SHAPES = [(1, 256, 2048), (1, 512, 2048), (1, 2048, 512)]
CUDA_SHAPES = [*SHAPES, (2, 512, 2048), (8, 512, 2048), (1, 4096, 2048)]
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "log": torch.log,
    "log1p": torch.log1p,
    "log1p_sq": lambda s: torch.log1p(s * s),
}
TASKS: list[tuple[str, float | None, str]] = [
    ("power", 2.0, "target"),
    ("power", -1.0, "target"),
    ("power", -0.7, "target"),
    ("log1p", None, "target"),  # forward only
    ("log1p", None, "online"),  # forward and backward
]


def features(views: int, rows: int, width: int, device: torch.device) -> Tensor:
    """Gaussian rows whose covariance has eigenvalues 1/k, mean square 1, float32."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(views, rows, width, generator=generator) * torch.arange(1, width + 1) ** -0.5
    return (x / x.square().mean().sqrt()).to(device)


def by_svd(
    x: Tensor, g: Tensor, kind: str, power: float | None, side: str, exact: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The authors' route: a full SVD, W explicitly, x W and g W; W without directions below 1e-4 where `exact`."""
    x, g = (x.double(), g.double()) if exact else (x, g)
    _, s, vh = torch.linalg.svd(x, full_matrices=False)
    weights = s**power if power is not None else FUNCTIONS[kind](s)
    if exact:
        weights = torch.where(s > 1e-4 * s[..., :1], weights, 0.0)
    w = (vh.mT * weights.unsqueeze(-2)) @ vh
    return x @ w, g @ w if side == "online" else None


def by_gram_eigh(x: Tensor, g: Tensor, kind: str, power: float | None, side: str) -> tuple[Tensor, Tensor | None]:
    """The textbook short cut in float32: eigh of the float32 Gram matrix of the smaller side."""
    wide = x.shape[-2] <= x.shape[-1]
    values, vectors = torch.linalg.eigh(x @ x.mT if wide else x.mT @ x)
    keep: Tensor = values > 1e-6 * values[..., -1:]
    s = torch.where(keep, values, 1.0).sqrt()
    vh = (vectors / s.unsqueeze(-2)).mT @ x if wide else vectors.mT
    weights = torch.where(keep, s**power if power is not None else FUNCTIONS[kind](s), 0.0)

    def apply(y: Tensor) -> Tensor:
        out: Tensor = ((y @ vh.mT) * weights.unsqueeze(-2)) @ vh
        return out

    return apply(x), apply(g) if side == "online" else None


def ours(
    x: Tensor, g: Tensor, kind: str, power: float | None, side: str, solver: str, precision: str = "auto"
) -> tuple[Tensor, Tensor | None]:
    """This package's filter with one of its solvers."""
    leaf = x.detach().requires_grad_(side == "online")
    how = {"side": side, "solver": solver, "precision": precision}
    out = spectral_filter(leaf, kind, power, **how)  # type: ignore[arg-type]
    if side == "online":
        return out.detach(), torch.autograd.grad(out, leaf, g)[0]
    return out, None


def filters(kind: str, power: float | None, side: str, cuda: bool) -> dict[str, Call]:
    """Providers of one task; the SVD route first."""
    task: dict[str, Any] = {"kind": kind, "power": power, "side": side}
    torch.compiler.reset()  # else the tasks would count as recompilations of one function
    out: dict[str, Call] = {
        "svd": partial(by_svd, **task),
        "svd torch.compile": partial(torch.compile(by_svd), **task),
        "gram eigh fp32": partial(by_gram_eigh, **task),
        "eigh": partial(ours, **task, solver="eigh"),
    }
    if power == 2:
        out["gram_power"] = partial(ours, **task, solver="gram_power")
    else:
        out["newton_schulz"] = partial(ours, **task, solver="newton_schulz")
    if cuda and power != 2:
        out["ladder triton"] = partial(ours, **task, solver="newton_schulz", precision="fp16x3-triton")
    return out


def rank_by_svd(x: Tensor, g: Tensor, dtype: torch.dtype) -> tuple[Tensor, None]:
    """Effective rank of the eigenvalues from torch.linalg.svdvals."""
    values = torch.linalg.svdvals(x.to(dtype)) ** 2
    q = values / values.sum(-1, keepdim=True)
    return torch.exp(-torch.special.xlogy(q, q).sum(-1)), None


def rank_by_gram(x: Tensor, g: Tensor, precision: str) -> tuple[Tensor, None]:
    return effective_rank(x, precision=precision), None  # type: ignore[arg-type]


RANKS: dict[str, Call] = {
    "svdvals": partial(rank_by_svd, dtype=torch.float32),
    "svdvals fp64": partial(rank_by_svd, dtype=torch.float64),
    "gram eigvalsh fp64": partial(rank_by_gram, precision="fp64"),
    "gram eigvalsh fp32": partial(rank_by_gram, precision="fp32"),
}


def gram_of(x: Tensor, g: Tensor, precision: str) -> tuple[Tensor, None]:
    return gram(x, center=True, normalize=True, precision=precision), None


# what a monitor leaves on the main stream
GRAMS: dict[str, Call] = {name: partial(gram_of, precision=name) for name in ("fp32", "half", "fp16x3")}
GRAMS_CUDA: dict[str, Call] = {name: partial(gram_of, precision=name) for name in ("half-triton", "fp16x3-triton")}


def row_error(got: Tensor, want: Tensor) -> float:
    """The larger of the rms difference of row directions and of relative row lengths."""
    got = got.double()
    a, b = (y.norm(dim=-1, keepdim=True) for y in (got, want))
    direction, length = (got / a - want / b).norm(dim=-1), (a / b - 1).squeeze(-1)
    return torch.stack((direction, length)).square().flatten(1).mean(-1).sqrt().max().item()


def clock(call: Callable[[], object], cuda: bool, now: Callable[[], float]) -> float:
    """Milliseconds of one call, finished on the device."""
    if cuda:
        torch.cuda.synchronize()
    start = now()
    call()
    if cuda:
        torch.cuda.synchronize()
    return 1e3 * (now() - start)


def compare(providers: dict[str, Call], x: Tensor, repeats: int, now: Callable[[], float]) -> Outcome:
    """Times and results of each provider; one call of each in turn, so that what slows the machine slows all."""
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.device)
    results = {name: call(x, g) for name, call in providers.items()}  # also warms up
    times: dict[str, list[float]] = {name: [] for name in providers}
    for _ in range(repeats):
        for name, call in providers.items():
            times[name].append(clock(lambda call=call: call(x, g), x.is_cuda, now))  # type: ignore[misc]
    return {name: (times[name], results[name]) for name in providers}


def rows_of(clock_name: str, task: str, outcome: Outcome, errors: dict[str, float], x: Tensor) -> Iterator[str]:
    """One CSV row a provider."""
    views, rows, width = x.shape
    n = min(rows, width)
    passes = (
        3 if "backward" in task else 1 if "forward" in task else 0
    )  # products of n x n x d after half of the Gram's
    gflop = views * (rows * width * n + 2 * passes * rows * width * n) / 1e9
    mb = views * rows * width * 4 * (1 + min(passes, 1) + (passes == 3) * 2) / 1e6
    first = statistics.median(next(iter(outcome.values()))[0])
    for name, (times, _) in outcome.items():
        p20, ms, p80 = (torch.tensor(times).quantile(q).item() for q in (0.2, 0.5, 0.8))
        where = f"{views},{rows},{width},{len(times)},{clock_name}"
        yield (
            f"{task},{name},{where},{ms:.3f},{p20:.3f},{p80:.3f},{first / ms:.2f},"
            f"{errors[name]:.1e},{gflop:.2f},{mb:.1f},{environment(x.device)}"
        )


def report(clock_name: str, task: str, outcome: Outcome, exact: tuple[Tensor, Tensor | None], x: Tensor) -> None:
    """Print the rows of one task, with errors against `exact`."""
    errors = {}
    for name, (_, result) in outcome.items():
        pairs = [(a, b) for a, b in zip(result, exact, strict=True) if a is not None and b is not None]
        if task == "effective rank":
            errors[name] = (result[0].double() / exact[0] - 1).abs().max().item()
        else:
            errors[name] = max(row_error(a, b) for a, b in pairs)
    print(*rows_of(clock_name, task, outcome, errors, x), sep="\n", flush=True)


def environment(device: torch.device) -> str:
    """Device, threads, versions and commit, for the last columns."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        with open("/proc/cpuinfo") as file:
            models = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        name = models[0] if models else platform.processor()
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    return f"{name},{torch.get_num_threads()},{torch.__version__},{commit or 'unknown'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--shapes", help="rows x width, as 256x2048,512x2048; default: those of the report")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    now = time.process_time if args.clock == "cpu" else time.perf_counter
    shapes = CUDA_SHAPES if device.type == "cuda" else SHAPES
    if args.shapes:
        shapes = [(1, int(rows), int(width)) for rows, width in (shape.split("x") for shape in args.shapes.split(","))]
    print(
        "task,provider,views,rows,width,repeats,clock,ms,p20,p80,speedup,error,floor_gflop,floor_mb,device,threads,torch,commit"
    )
    for shape in shapes:
        x = features(*shape, device)
        for kind, power, side in TASKS:
            name = kind if power is None else f"power {power:g}"
            task = f"{name} {'forward+backward' if side == 'online' else 'forward'}"
            outcome = compare(filters(kind, power, side, x.is_cuda), x, args.repeats, now)
            g = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(device)
            report(args.clock, task, outcome, by_svd(x, g, kind, power, side, exact=True), x)
        report(args.clock, "effective rank", compare(RANKS, x, args.repeats, now), rank_by_svd(x, x, torch.float64), x)
        if x.is_cuda:
            report(
                args.clock,
                "gram",
                compare({**GRAMS, **GRAMS_CUDA}, x, args.repeats, now),
                gram_of(x.double(), x, "fp64"),
                x,
            )


if __name__ == "__main__":
    main()
