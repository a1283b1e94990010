"""Windows: sums over the rows of many batches at every tap, or a sample of wide rows, and their report."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrdm.kernels.linalg import gram
from fastrdm.kernels.linalg.effective_rank import statistics
from fastrdm.monitoring import paired_rows, rank_statistics
from fastrdm.monitoring.moments import Moments, add, join_views, panel_rows, pooled, unit_rows, zeros
from fastrdm.monitoring.paired_rows import PairedRows
from fastrdm.monitoring.rank_statistics import CENTERED_CONVENTION, HEADLINE_CONVENTION, Eigen

# dimensions up to which moments are kept apart in groups; above, a sample of paired rows takes their place
GROUPED_WIDTH = 1024


class Shape(NamedTuple):
    """Size of a window: rows, widths of the taps, groups and conventions."""

    rows: int  # it is full with
    widths: dict[str, int]  # dimensions of every tap
    max_width: int  # of taps kept as moments; wider ones: a sample of so many rows
    groups: int  # for intervals; 1: none
    conventions: tuple[str, ...]
    spread: int = 1  # of each batch every so many-th image is taken

    def wide(self, tap: str) -> bool:
        return self.widths[tap] > self.max_width

    @property
    def paired(self) -> bool:
        """Whether rows of both branches are sampled, because moments in groups would take too much memory."""
        return GROUPED_WIDTH < self.widths["online"] <= self.max_width

    def groups_of(self, tap: str) -> int:
        """Groups in which a tap's moments are kept."""
        return self.groups if tap in ("online", "target") and not self.paired else 1


class WindowReport(NamedTuple):
    """Metrics and spectra of one full window."""

    step: int  # of its last rows
    metrics: dict[str, float]
    spectra: list[dict[str, Any]]  # lines of spectra.jsonl, without step and epoch


class Window:
    """Moments of every tap's rows on the rows' device; of wide taps the first `max_width` rows themselves.

    In float32, and in float64 where the rows are. Both branches keep their moments in groups up to GROUPED_WIDTH, and a
    sample of paired rows above.
    """

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape, self.device, self.seen = shape, device, 0
        self.moments: dict[str, Moments] = {}
        self.samples: dict[str, Tensor] = {}
        self.pairs: PairedRows | None = None

    @property
    def full(self) -> bool:
        return self.seen >= self.shape.rows

    @property
    def width(self) -> int:
        """Side of the largest matrix that is decomposed."""
        return max(min(width, self.shape.max_width) for width in self.shape.widths.values())

    def add(self, rows: dict[str, Tensor], keep: bool = True) -> None:
        """Count rows (2, B, D) of every tap, and `keep` them unless another process does; the host does not wait.

        Groups are of whole batches, whose rows BatchNorm ties together; of images where a window has too few batches.
        """
        rows = {tap: x[:, :: self.shape.spread] for tap, x in rows.items()}
        count = rows["online"].shape[:2].numel()
        turn = self.seen // count if self.shape.rows >= self.shape.groups * count else None
        self.seen += count
        if not keep:
            return
        for tap, x in rows.items():
            if self.shape.wide(tap):
                if tap not in self.samples:
                    self.samples[tap] = torch.empty(
                        self.shape.max_width, x.shape[-1], dtype=_wide(x).dtype, device=self.device
                    )
                place = self.samples[tap][self.seen - count : self.seen]
                place.copy_(x.flatten(0, 1)[: len(place)])
        units = {tap: gram.unit_rows(_wide(x)) for tap, x in rows.items() if not self.shape.wide(tap)}
        if self.shape.paired:
            self.pairs = self.pairs or PairedRows(self.shape.widths["online"], self.device)
            self.pairs.add(units["online"], units["target"], self.shape.rows, self.shape.groups, turn)
        for name, (x, y, groups) in self._kinds(rows, units):
            if name not in self.moments:
                self.moments[name] = zeros(
                    x.shape[-1],
                    groups,
                    self.device,
                    x.dtype,
                    panel_rows(self.device, x.shape[-1]) if y is None else None,
                )
            add(self.moments[name], x, y, turn)

    def _kinds(
        self, rows: dict[str, Tensor], units: dict[str, Tensor]
    ) -> Iterator[tuple[str, tuple[Tensor, Tensor | None, int]]]:
        """Every kind of rows whose moments are kept: its name, rows, what they are multiplied with, groups."""
        raw = any("/raw/" in convention for convention in self.shape.conventions)
        narrow = {tap: _wide(x) for tap, x in rows.items() if not self.shape.wide(tap)}
        for tap, x in narrow.items():
            unit = units[tap]
            if tap == "target":
                yield "target/view1", (unit[:1], None, self.shape.groups_of(tap))
                yield "target/view2", (unit[1:], None, self.shape.groups_of(tap))
            else:
                yield f"{tap}/unit", (unit, None, self.shape.groups_of(tap))
            if tap == "features":
                a, b = (x / 2).chunk(2)
                yield "features/sum", (a + b, None, 1)
                yield "features/difference", (a - b, None, 1)
            elif raw:
                yield f"{tap}/raw", (x, None, 1)
        if "online" in narrow and not self.shape.paired:
            yield "cross", (units["online"], units["target"], 1)

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint, made of tensors, numbers and lists only."""
        return {
            "shape": self._kept,
            "seen": self.seen,
            "moments": {name: [m.rows, m.first, *m.panels] for name, m in self.moments.items()},
            "samples": {name: x[: self.seen].clone() for name, x in self.samples.items()},
            "pairs": self.pairs.state_dict() if self.pairs else None,
        }

    def load_state_dict(self, state: dict[str, Any], keep: bool) -> bool:
        """Go on from `state_dict`, without its rows unless `keep`; False if it has another shape."""
        if state["shape"] != self._kept:
            return False
        self.seen = state["seen"]
        if keep:
            self.moments = {
                name: Moments(rows, first, tuple(panels)).to(self.device)
                for name, (rows, first, *panels) in state["moments"].items()
            }
            for name, x in state["samples"].items():
                self.samples[name] = x.new_empty(self.shape.max_width, x.shape[1], device=self.device)
                self.samples[name][: len(x)] = x
            if self.shape.paired and state["pairs"] is not None:
                self.pairs = PairedRows(self.shape.widths["online"], self.device)
                self.pairs.load_state_dict(state["pairs"])
        return True

    @property
    def _kept(self) -> str:
        """Description of what a window keeps; one of another description is not gone on with."""
        return f"{self.shape!r}{', paired rows' if self.shape.paired else ''}"


def bytes_of(shape: Shape, device: torch.device, size: int = 4) -> int:
    """Memory of a full window in bytes, for numbers of `size` bytes: 8 in a run in fp64, else 4."""
    total = 0
    for tap, width in shape.widths.items():
        if shape.wide(tap):
            total += size * shape.max_width * width
            continue
        symmetric = zeros(width, 1, torch.device("meta"), block=panel_rows(device, width))
        held = sum(panel.numel() for panel in symmetric.panels)
        matrices = {"target": 2, "features": 3}.get(tap, 1) * shape.groups_of(tap)
        matrices += tap != "features" and any("/raw/" in convention for convention in shape.conventions)
        total += matrices * (size * held + 8 * width)
        if tap == "online":
            # with the target's rows
            total += paired_rows.bytes_of(width) if shape.paired else (size * width + 8) * width
    return total


def read(window: Window, step: int, device: torch.device | None = None) -> WindowReport:
    """Decompose a full window, on `device` where given, and empty it; waits.

    Rows that are not finite give no metrics. Where rows are paired, taps beside the branches are read first, so that
    their moments are gone when the branches' eigenvectors need room.
    """
    moments = {name: m.to(device) if device else m for name, m in window.moments.items()}
    window.moments = {}
    sums = [*(panel.sum() for m in moments.values() for panel in m.panels), *(x.sum() for x in window.samples.values())]
    if not all(x.isfinite().item() for x in sums):
        return WindowReport(step, {}, [])
    if "target/view1" in moments:
        moments["target/unit"] = pooled(moments["target/view1"], moments["target/view2"])
    if "features/sum" in moments:
        moments["features/raw"] = join_views(moments["features/sum"], moments["features/difference"])

    found: dict[tuple[str, bool], Eigen] = {}
    spectrum = _spectrum_of(moments, found)
    reports: dict[str, _Report] = {}
    pairs: dict[str, float] = {}
    if window.pairs is not None:
        for tap in window.shape.widths.keys() - {"online", "target", "features"}:
            reports[tap] = _report(window, tap, moments, spectrum)
            for name in [name for name in moments if name.startswith(f"{tap}/")]:
                del moments[name]
        pairs, of_pairs = paired_rows.read(window.pairs, moments, intervals=window.shape.groups > 1)
        found |= of_pairs
    metrics: dict[str, float] = {}
    spectra = []
    for tap in window.shape.widths:
        own, line = reports.get(tap) or _report(window, tap, moments, spectrum)
        metrics |= own
        spectra.append(line)
    return WindowReport(step, metrics | pairs | _of_pairs(moments, spectrum), spectra)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


Spectrum = Callable[[str, bool], Eigen]  # of the moments of that name, about the mean or not
_Report = tuple[dict[str, float], dict[str, Any]]  # metrics of a tap, its line of spectra.jsonl


def _spectrum_of(moments: dict[str, Moments], found: dict[tuple[str, bool], Eigen]) -> Spectrum:
    """Spectra of `moments` by name, each decomposed once; those `found` already are taken from there."""

    @cache
    def spectrum(name: str, center: bool) -> Eigen:
        if (name, center) in found:
            return found[name, center]
        if moments[name].first.shape[-1] > GROUPED_WIDTH:
            return rank_statistics.lean_eigen(moments[name], center, vectors=False)
        return rank_statistics.eigen(moments[name], center)

    return spectrum


def _report(window: Window, tap: str, moments: dict[str, Moments], spectrum: Spectrum) -> _Report:
    """Metrics of one tap, and its line of spectra.jsonl without step and epoch."""
    if window.shape.wide(tap):
        own, headline = _of_sample(tap, window.samples[tap].double(), window.shape.conventions)
        rows = len(window.samples[tap])
    else:
        own, headline = _of_moments(tap, moments[f"{tap}/unit"], spectrum, window.shape.conventions)
        rows = window.seen
    points = rank_statistics.spectrum_points(headline)
    return own, {"rows": rows, "tap": tap, "convention": "unit/moment", **points}


def _of_moments(
    tap: str, unit: Moments, spectrum: Spectrum, conventions: tuple[str, ...]
) -> tuple[dict[str, float], Eigen]:
    """Metrics of one tap from its moments, and its headline spectrum."""
    metrics = {}
    for convention in conventions:
        kind, scale, about = convention.split("/")
        metrics[f"{tap}/{convention}/window"] = rank_statistics.rank(spectrum(f"{tap}/{scale}", about == "cov"), kind)
    headline = spectrum(f"{tap}/unit", False)
    deviation = unit.deviations.mean() * unit.first.shape[-1] ** 0.5
    return metrics | _shape_of(tap, headline, "window") | {f"{tap}/std/window": deviation.item()}, headline


def _of_sample(tap: str, rows: Tensor, conventions: tuple[str, ...]) -> tuple[dict[str, float], Eigen]:
    """Metrics of one tap whose rows (N, D) were sampled, and its headline spectrum. Ranks are at most N."""

    def spectrum(convention: str) -> Eigen:
        _, scale, about = convention.split("/")
        values = torch.linalg.eigvalsh(gram.gram(rows, center=about == "cov", normalize=scale == "unit")).flip(-1)
        noise = 8 * torch.finfo(values.dtype).eps * values.sum()
        return Eigen(torch.where(values > noise, values, 0.0), values)

    metrics = {f"{tap}/{c}/sample": rank_statistics.rank(spectrum(c), c.split("/")[0]) for c in conventions}
    headline = spectrum(HEADLINE_CONVENTION)
    deviation = (unit_rows(rows).std(0, correction=0) * rows.shape[-1] ** 0.5).mean()
    return metrics | _shape_of(tap, headline, "sample") | {f"{tap}/std/sample": deviation.item()}, headline


def _shape_of(tap: str, spectrum: Eigen, source: str) -> dict[str, float]:
    stats = statistics(spectrum.values, torch.ones((), dtype=torch.bool))
    return {
        f"{tap}/participation_ratio/{source}": stats.participation_ratio.item(),
        f"{tap}/stable_rank/{source}": stats.stable_rank.item(),
        f"{tap}/top_share/{source}": stats.topk[0].item(),
        f"{tap}/slope/{source}": stats.slope.item(),
    }


def _of_pairs(moments: dict[str, Moments], spectrum: Spectrum) -> dict[str, float]:
    """Metrics of pairs: rank differences with their null, the filter between branches, RankMe, LiDAR."""
    metrics: dict[str, float] = {}
    if "cross" in moments:
        for name, a, b in (
            ("difference", "target/unit", "online/unit"),
            ("null", "target/view2", "target/view1"),
        ):
            for convention, center in ((HEADLINE_CONVENTION, False), (CENTERED_CONVENTION, True)):
                key = f"{name}/{convention}/window"
                pair = (moments[a], spectrum(a, center)), (moments[b], spectrum(b, center))
                metrics |= rank_statistics.difference(*pair, center, key)
        share = rank_statistics.negative_share(spectrum("target/unit", False), moments["cross"])
        metrics["filter/negative_share/window"] = share
    if "features/raw" in moments:
        metrics["rankme"] = rank_statistics.rank(spectrum("features/raw", False), "erank_s")
        metrics["lidar"] = rank_statistics.lidar(moments["features/sum"], moments["features/difference"])
    return metrics
