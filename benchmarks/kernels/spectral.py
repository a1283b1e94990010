"""Time and error of spectral filters and effective ranks against SVD routes, interleaved in one run; CSV to stdout.

    python -m benchmarks.kernels.spectral > benchmarks/results/spectral_cpu.csv

ms, p20, p80: median, 20th and 80th percentile of a call; with --clock cpu the processor time of this process, over all
its threads, for a machine that others use too. error: against a float64 SVD with the same cutoff, the larger of rms row
direction and rms relative row length (value, and gradient where there is one); for ranks the relative error.
speedup: the SVD route's median over this one's. floor_gflop, floor_mb: the least arithmetic of any route through the
Gram matrix (its lower half, and one product to apply) and the bytes of reading the input and writing the output once.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.common import Clock, Row
from fastrdm.kernels.linalg.effective_rank import effective_rank
from fastrdm.kernels.linalg.gram import gram
from fastrdm.kernels.spectral.spectral_filter import spectral_filter

Call = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]  # (x, g) -> value, gradient
Outcome = dict[str, tuple[list[float], tuple[Tensor, Tensor | None]]]  # provider -> times in ms, results
FIELDS = ["task", "provider", "views", "rows", "width", "repeats", "clock", "ms", "p20", "p80", "speedup", "error"]
FIELDS += ["floor_gflop", "floor_mb", *common.ENVIRONMENT]
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
    ("power", -0.5, "target"),  # the target filter of the presets
    ("log1p", None, "target"),  # forward only
    ("log1p", None, "online"),  # forward and backward
]


def features(views: int, rows: int, width: int, device: torch.device) -> Tensor:
    """Gaussian rows whose covariance has eigenvalues 1/k, mean square 1, float32."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(views, rows, width, generator=generator) * torch.arange(1, width + 1) ** -0.5
    return (x / x.square().mean().sqrt()).to(device)


def svd_weights(x: Tensor, kind: str, power: float | None, cutoff: float = 0.0) -> Tensor:
    """V f(S) V^T (..., width, width) of x = U S V^T by a full SVD, the route of the authors' code.

    Directions whose singular value is at most `cutoff` times the largest have weight 0; by default none are left out.
    """
    _, s, vh = torch.linalg.svd(x, full_matrices=False)
    weights = s**power if power is not None else FUNCTIONS[kind](s)
    if cutoff:
        weights = torch.where(s > cutoff * s[..., :1], weights, 0.0)
    w: Tensor = (vh.mT * weights.unsqueeze(-2)) @ vh
    return w


def by_svd(
    x: Tensor, g: Tensor, kind: str, power: float | None, side: str, exact: bool = False
) -> tuple[Tensor, Tensor | None]:
    """x W and, online, g W, with W by a full SVD; `exact`: in float64, without directions below 1e-4."""
    x, g = (x.double(), g.double()) if exact else (x, g)
    w = svd_weights(x, kind, power, 1e-4 if exact else 0.0)
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
        out["newton_schulz triton"] = partial(ours, **task, solver="newton_schulz", precision="fp16x3-triton")
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


# What a monitor leaves on the main stream.
GRAMS: dict[str, Call] = {name: partial(gram_of, precision=name) for name in ("fp32", "half", "fp16x3")}
GRAMS_CUDA: dict[str, Call] = {"fp16x3-triton": partial(gram_of, precision="fp16x3-triton")}


def row_error(got: Tensor, want: Tensor) -> float:
    """The larger of the rms difference of row directions and of relative row lengths."""
    got = got.double()
    a, b = (y.norm(dim=-1, keepdim=True) for y in (got, want))
    direction, length = (got / a - want / b).norm(dim=-1), (a / b - 1).squeeze(-1)
    return torch.stack((direction, length)).square().flatten(1).mean(-1).sqrt().max().item()


def compare(providers: Mapping[str, Call], x: Tensor, repeats: int, clock: Clock) -> Outcome:
    """Times and results of each provider, in turns."""
    g = random_like(x)
    results = {name: call(x, g) for name, call in providers.items()}  # also warms up
    times = common.in_turns({name: partial(call, x, g) for name, call in providers.items()}, repeats, clock, x.is_cuda)
    return {name: (times[name], results[name]) for name in providers}


def random_like(x: Tensor) -> Tensor:
    """Standard normal numbers in the shape of x, the same in every call: the gradient that a filter receives."""
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.device)


def task_name(kind: str, power: float | None, side: str) -> str:
    """The column `task` of a filter."""
    return f"{kind if power is None else f'power {power:g}'} {'forward+backward' if side == 'online' else 'forward'}"


def floors(task: str, x: Tensor) -> tuple[float, float]:
    """GFLOP and MB that any route through the Gram matrix needs at least."""
    views, rows, width = x.shape
    n = min(rows, width)
    # Products of n x n x d after half of the Gram matrix's.
    passes = 3 if "backward" in task else 1 if "forward" in task else 0
    gflop = views * (rows * width * n + 2 * passes * rows * width * n) / 1e9
    return gflop, views * rows * width * 4 * (1 + min(passes, 1) + (passes == 3) * 2) / 1e6


def largest_error(task: str, result: tuple[Tensor, Tensor | None], exact: tuple[Tensor, Tensor | None]) -> float:
    """The error of a provider's results against `exact`, as the module's docstring defines it."""
    if task == "effective rank":
        return (result[0].double() / exact[0] - 1).abs().max().item()
    pairs = [(a, b) for a, b in zip(result, exact, strict=True) if a is not None and b is not None]
    return max(row_error(a, b) for a, b in pairs)


def rows_of(task: str, outcome: Outcome, exact: tuple[Tensor, Tensor | None], x: Tensor) -> Iterator[Row]:
    """One row for each provider; the first one's median is what `speedup` refers to."""
    views, rows, width = x.shape
    gflop, mb = floors(task, x)
    first = statistics.median(next(iter(outcome.values()))[0])
    for name, (times, result) in outcome.items():
        yield {
            "task": task,
            "provider": name,
            "views": views,
            "rows": rows,
            "width": width,
            "repeats": len(times),
            **common.times(times, 3),
            "speedup": f"{first / statistics.median(times):.2f}",
            "error": f"{largest_error(task, result, exact):.1e}",
            "floor_gflop": f"{gflop:.2f}",
            "floor_mb": f"{mb:.1f}",
        }


def rows(shapes: list[tuple[int, int, int]], device: torch.device, repeats: int, clock: Clock) -> Iterator[Row]:
    """Rows of all tasks at all shapes."""
    for shape in shapes:
        x = features(*shape, device)
        for kind, power, side in TASKS:
            outcome = compare(filters(kind, power, side, x.is_cuda), x, repeats, clock)
            exact = by_svd(x, random_like(x), kind, power, side, exact=True)
            yield from rows_of(task_name(kind, power, side), outcome, exact, x)
        yield from rows_of("effective rank", compare(RANKS, x, repeats, clock), rank_by_svd(x, x, torch.float64), x)
        if x.is_cuda:
            outcome = compare({**GRAMS, **GRAMS_CUDA}, x, repeats, clock)
            yield from rows_of("gram", outcome, gram_of(x.double(), x, "fp64"), x)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--shapes", help="rows x width, as 256x2048,512x2048; default: those of the report")
    parser.add_argument("--clock", choices=common.CLOCKS, default="wall")
    args = parser.parse_args()
    device = common.available_device()
    shapes = CUDA_SHAPES if device.type == "cuda" else SHAPES
    if args.shapes:
        shapes = [(1, int(rows), int(width)) for rows, width in (shape.split("x") for shape in args.shapes.split(","))]
    where = {"clock": args.clock, **common.environment(device)}
    found = rows(shapes, device, args.repeats, common.CLOCKS[args.clock])
    common.print_rows(FIELDS, ({**row, **where} for row in found))


if __name__ == "__main__":
    main()
