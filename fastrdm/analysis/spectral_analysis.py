"""The theory's quantities of a model with frozen weights: spectra, rank difference, spectral filter, alignment.

docs/theory.md explains what each metric estimates, its bias and how to read it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from fastrdm.analysis.branch_comparison import (
    Interval,
    alignment_between,
    rank_differences,
    second_moment,
    spectral_filter_between,
    white_bound,
)
from fastrdm.analysis.settings import IMAGES_PER_DIMENSION
from fastrdm.analysis.settings import AnalysisConfig as AnalysisConfig
from fastrdm.kernels.collectives import process_count
from fastrdm.kernels.linalg.effective_rank import entropy_rank, spectrum
from fastrdm.methods.dual_branch import DualBranch
from fastrdm.monitoring.moments import unit_rows
from fastrdm.monitoring.rank_statistics import HEADLINE_CONVENTION
from fastrdm.runtime.distributed import gather_rows
from fastrdm.schema import require

PASSES = {1: "low-pass", 0: "no filter", -1: "high-pass"}


class Branches(NamedTuple):
    """Rows of both branches over the same images, on every process, and how many dimensions they can fill."""

    online: Tensor  # (2, N, K)
    target: Tensor  # (2, N, K)
    dimension: int  # K, or less where K scores come from fewer features


class Measured(NamedTuple):
    """Metrics by name, and curves over directions, largest variance first."""

    metrics: dict[str, float]
    curves: dict[str, list[float]]


@contextmanager
def untouched(method: DualBranch) -> Iterator[None]:
    """Context in which `method` is in training mode.

    Afterwards every buffer, mode and random state is as it was before.
    """
    buffers = [(buffer, buffer.clone()) for buffer in method.buffers()]
    modes = [(module, module.training) for module in method.modules()]
    devices = sorted({b.device.index or 0 for b, _ in buffers if b.is_cuda})
    with torch.random.fork_rng(devices):
        method.train()
        try:
            yield
        finally:
            for buffer, before in buffers:
                buffer.copy_(before)
            for module, mode in modes:
                module.training = mode


@torch.no_grad()
def collect(
    method: DualBranch,
    batches: Iterable[Sequence[Tensor]],
    *,
    batch_size: int,
    images: int | None = None,
    beat: Callable[[], object] = bool,
) -> dict[str, Branches]:
    """Rows of `outputs` (what enters the loss) and, with prototypes, `scores`, of the first `images` of the batches.

    A batch holds the views of this process's share of a training step of `batch_size` images: BatchNorm, filters and
    Sinkhorn then see what they see in training. The rows of all steps are joined before anything is measured, since a
    filtered batch has full rank by construction. Two global views of each image are measured. `beat` is called now and
    then, as a sign of life.
    """
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
    seen = 0
    with untouched(method):
        for views in batches:
            beat()
            rows = len(views[0]) * process_count()
            require(rows == batch_size, "analysis: a batch", f"the training step's {batch_size} images", rows)
            output = method(views)
            parts.setdefault("outputs", []).append((output.online, output.target))
            if output.scores is not None:
                parts.setdefault("scores", []).append(output.scores)
            seen += rows
            if images is not None and seen >= images:
                break
    require(seen > 0, "analysis: batches", "at least one", 0)
    found = {}
    for name, pairs in parts.items():
        online, target = (_joined([pair[i] for pair in pairs], images) for i in (0, 1))
        width = online.shape[2]
        found[name] = Branches(online, target, width if name == "outputs" else min(width, method.config.projector.out))
    return found


def _joined(parts: list[Tensor], images: int | None) -> Tensor:
    """(2, N, K) of the global views of all processes, of (V, B, K) each."""
    return torch.cat([gather_rows(part[:2], dim=1) for part in parts], dim=1)[:, :images]


def ranks(x: Tensor) -> dict[str, float]:
    """Effective rank of rows (V, N, K), mean over views, by convention: see docs/theory.md for the names."""
    metrics = {}
    for rows, scaled in {"raw": x, "unit": unit_rows(x)}.items():
        for about, center in {"moment": False, "cov": True}.items():
            values, _ = spectrum(second_moment(scaled, center))
            for letter, powers in {"s": values.sqrt(), "l": values}.items():
                metrics[f"erank_{letter}/{rows}/{about}"] = float(entropy_rank(powers).mean())
    return metrics


def _named(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.value, f"{name}/low": interval.low, f"{name}/high": interval.high}


def verdict(filtered: Interval, null: Interval) -> int:
    """Verdict on a filter: 1 low-pass, -1 high-pass, 0 where its interval holds 0 or the null's reaches as far."""
    return filtered.sign if abs(filtered.value) > max(map(abs, null)) else 0


def compare(branches: Branches, replicates: int, beat: Callable[[], object] = bool) -> Measured:
    """All metrics and curves of one pair of branches. ValueError for fewer images than dimensions."""
    online, target, dimension = branches
    images = online.shape[1]
    needed = f"at least the {dimension} dimensions, and {IMAGES_PER_DIMENSION} times that for a figure without bias"
    require(images >= dimension, "analysis: images", needed, images)
    f: dict[str, float] = {
        "images": images,
        "dimension": dimension,
        "bound": white_bound(images, dimension),
        "biased": float(images < IMAGES_PER_DIMENSION * dimension),
    }
    curves = {}
    for name, x in {"online": online, "target": target}.items():
        f |= {f"{name}/{convention}": rank for convention, rank in ranks(x).items()}
        curves[f"spectrum/{name}"] = spectrum(second_moment(unit_rows(x)))[0].mean(0)
    for about, center in {"moment": False, "cov": True}.items():
        beat()
        for name, interval in rank_differences(online, target, center=center, replicates=replicates).items():
            f |= _named(f"{name}/erank_l/unit/{about}", interval)
    beat()
    between = spectral_filter_between(online, target, replicates=replicates)
    null = spectral_filter_between(target[1:], target[:1], replicates=replicates)
    f |= _named("filter/body", between.body) | _named("filter/tail", between.tail) | _named("filter/null", null.body)
    f |= {"filter/verdict": verdict(between.body, null.body), "filter/tilt": between.tilt}
    f["filter/directions"] = between.directions
    f |= {f"alignment/{k}": v for k, v in alignment_between(online, target)._asdict().items()}
    curves |= {"filter/online": between.online, "filter/target": between.target}
    curves |= {"filter/ratio": between.ratio, "filter/root": between.ratio.sqrt()}
    return Measured(f, {name: values.tolist() for name, values in curves.items()})


@torch.no_grad()
def measure(
    method: DualBranch,
    batches: Iterable[Sequence[Tensor]],
    *,
    batch_size: int,
    images: int | None = None,
    replicates: int = 100,
    beat: Callable[[], object] = bool,
) -> Measured:
    """Analyze `method`, which is left as it was.

    Names of metrics of prototype scores begin with `scores/`. See `collect`.


    Call it on every process: each gets all rows and the same metrics.
    """
    found = collect(method, batches, batch_size=batch_size, images=images, beat=beat)
    metrics: dict[str, float] = {}
    curves: dict[str, list[float]] = {}
    for name, branches in found.items():
        prefix = "" if name == "outputs" else f"{name}/"
        measured = compare(branches, replicates, beat)
        metrics |= {prefix + key: value for key, value in measured.metrics.items()}
        curves |= {prefix + key: value for key, value in measured.curves.items()}
    return Measured(metrics, curves)


def headline(metrics: dict[str, float]) -> str:
    """Summary of the metrics of what enters the loss, in one line."""
    f, difference = metrics, f"difference/{HEADLINE_CONVENTION}"
    null = max(abs(f[f"null/{branch}/{HEADLINE_CONVENTION}"]) for branch in ("online", "target"))
    bias = f", biased: a white spectrum reads {f['bound']:.0f} of {f['dimension']:.0f}" if f["biased"] else ""
    return (
        f"rank online {f[f'online/{HEADLINE_CONVENTION}']:.1f} "
        f"target {f[f'target/{HEADLINE_CONVENTION}']:.1f}, difference "
        f"{f[difference]:+.2f} [{f[f'{difference}/low']:+.2f}, {f[f'{difference}/high']:+.2f}] null {null:.2f}; "
        f"{PASSES[int(f['filter/verdict'])]}, Spearman {f['filter/body']:+.2f} over "
        f"{f['filter/directions']:.0f} directions; alignment {f['alignment/value']:.2f} chance "
        f"{f['alignment/chance']:.2f}; {f['images']:,.0f} images{bias}"
    )


def summary_lines(metrics: dict[str, float], prefix: str = "") -> list[str]:
    """Summary lines for the metrics of one pair of branches: those whose names begin with `prefix`."""
    f = {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}
    difference = f"difference/{HEADLINE_CONVENTION}"
    null = max(abs(f[f"null/{branch}/{HEADLINE_CONVENTION}"]) for branch in ("online", "target"))
    bias = f", biased: with so few images a white spectrum reads {f['bound']:.0f}" if f["biased"] else ""
    return [
        f"{f['images']:,.0f} images in {f['dimension']:.0f} dimensions{bias}",
        f"effective rank ({HEADLINE_CONVENTION}): online {f[f'online/{HEADLINE_CONVENTION}']:.1f}, target "
        f"{f[f'target/{HEADLINE_CONVENTION}']:.1f}, difference {f[difference]:+.2f} "
        f"[{f[f'{difference}/low']:+.2f}, {f[f'{difference}/high']:+.2f}], null {null:.2f}",
        f"filter of online against target: {PASSES[int(f['filter/verdict'])]}, Spearman {f['filter/body']:+.2f} "
        f"[{f['filter/body/low']:+.2f}, {f['filter/body/high']:+.2f}] over "
        f"{f['filter/directions']:.0f} directions, in the tail {f['filter/tail']:+.2f}, "
        f"tilt {f['filter/tilt']:.1f}",
        f"eigenspaces: alignment {f['alignment/value']:.2f}, chance {f['alignment/chance']:.2f}; from two halves "
        f"{f['alignment/crossed']:.2f}, where a shared eigenspace reads {f['alignment/ceiling']:.2f}",
    ]
