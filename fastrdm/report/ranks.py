"""Figures of rank: both branches, their difference beside its null, the spectra that they come from."""

import math
from collections.abc import Sequence

from fastrdm.config.tree import Tree
from fastrdm.monitoring.rank_statistics import CENTERED_CONVENTION, HEADLINE_CONVENTION
from fastrdm.report.chart import MUTED, Axis, Chart, Figure, Line, color_at, color_of
from fastrdm.report.run_files import Run, Series
from fastrdm.report.run_set import Runs, curve

TAPS = ("online", "target", "online_scores", "target_scores", "hidden", "features")
TAP_NAMES = {
    "online_scores": "the online scores",
    "target_scores": "the target scores",
    "hidden": "the projector before its last BatchNorm",
    "features": "the encoder's features",
}
CONVENTIONS: dict[str, str] = {  # what an effective rank was computed of
    CENTERED_CONVENTION: "of rows of unit length about their mean",
    HEADLINE_CONVENTION: "of rows of unit length about 0, where a common mean counts as a direction",
}
KINDS = {  # where a metric of rank comes from, the best first
    "window": "over a window of at least 10 rows a dimension",
    "sample": "of a sample of rows, at most their number",
    "batch": "of single batches, at most their number of rows",
}
MAX_MOMENTS = 8  # spectra drawn of a run, spread over its length
RANKS = 60  # points of a drawn spectrum
RANK_KEYS = {  # what has its place in these figures
    *(f"{tap}/{convention}/{kind}" for tap in TAPS for convention in CONVENTIONS for kind in KINDS),
    *(f"{what}/{convention}/window" for what in ("difference", "null") for convention in CONVENTIONS),
}


def rank_key(run: Run, tap: str, convention: str) -> str:
    """Key of the best rank that was logged of a tap, else of the windowed one."""
    keys = [f"{tap}/{convention}/{kind}" for kind in KINDS]
    return next((key for key in keys if run.series(key)[0]), keys[0])


def convention_of(all_runs: Runs) -> str:
    """The convention by which ranks are shown first: about the mean, unless no run logged that."""
    logged = any(run.series(rank_key(run, "online", CENTERED_CONVENTION))[0] for run in all_runs.runs)
    return CENTERED_CONVENTION if logged else HEADLINE_CONVENTION


def branch_ranks(all_runs: Runs, convention: str) -> list[Figure]:
    """Effective rank of both branches: of a single run in one chart, else a chart a branch on equal axes."""
    both = [v for run in all_runs.runs for tap in TAPS[:2] for v in run.series(rank_key(run, tap, convention))[1]]
    axis = Axis("effective rank", log=True, limits=(1.0, max((v for v in both if math.isfinite(v)), default=10.0)))
    groups = [TAPS[:2]] if len(all_runs.runs) == 1 else [(tap,) for tap in TAPS[:2]]
    return [_ranks(all_runs, group, convention, axis) for group in groups]


def tap_ranks(all_runs: Runs, convention: str) -> list[Figure]:
    """Effective rank of what lies between encoder and loss, a chart for each tap that was logged."""
    axis = Axis("effective rank", log=True, limits=(1.0,))
    drawn = [_ranks(all_runs, (tap,), convention, axis) for tap in TAPS[2:]]
    return [figure for figure in drawn if figure.chart]


def _ranks(all_runs: Runs, taps: Sequence[str], convention: str, axis: Axis) -> Figure:
    title = f"Effective rank of {'both branches' if len(taps) > 1 else tap_name(taps[0])}"
    lines, kinds = [], []
    for tap in taps:
        for i, (run, color, dash) in enumerate(all_runs.colors()):
            key = rank_key(run, tap, convention)
            if run.series(key)[0]:
                # Of a single run, the target is dashed: the branches of a method without a predictor are equal.
                style = (color_of(TAPS.index(tap))[0], "7 3" * (tap == "target")) if len(taps) > 1 else (color, dash)
                lines.append(curve(run, key, tap if len(taps) > 1 else run.name, *style, index=i))
                kinds.append((KINDS[key.split("/")[-1]], run.name))
    if not lines:
        return Figure(title, f"Not logged: {taps[0]}/{convention}/...")
    return Figure(title, _origin(kinds, convention), Chart(lines, all_runs.epochs(), axis, marks=all_runs.marks()))


def tap_name(tap: str) -> str:
    return TAP_NAMES.get(tap, f"the {tap} branch")


def _origin(kinds: Sequence[tuple[str, str]], convention: str) -> str:
    """Caption that names what the drawn ranks were computed from; `kinds` holds (kind, run's name) of each line."""
    names = {kind: list(dict.fromkeys(name for k, name in kinds if k == kind)) for kind, _ in kinds}
    if len(names) == 1:
        return f"Computed {CONVENTIONS[convention]}, {kinds[0][0]}. 1 is a single direction."
    parts = [f"{kind} ({', '.join(runs)})" for kind, runs in names.items()]
    return f"Computed {CONVENTIONS[convention]}, {'; '.join(parts)}. 1 is a single direction."


def _difference(run: Run, convention: str) -> tuple[list[Line], str]:
    """Lines of the rank difference and its null, and what they are."""
    key, null = f"difference/{convention}/window", f"null/{convention}/window"
    if run.series(key)[0]:
        lines = [curve(run, key, "difference", "")]
        if not run.series(null)[0]:
            return lines, f"{KINDS['window']}. Not logged: {null}."
        return [curve(run, null, "null", MUTED, "5 3"), *lines], f"{KINDS['window']}."
    online, target = (run.series(f"{branch}/{convention}/batch") for branch in ("online", "target"))
    if online[0] and online[0] == target[0]:
        values = [b - a for a, b in zip(online[1], target[1], strict=True)]
        return [
            Line("difference", online[0], values, "")
        ], f"{KINDS['batch']}. Not logged: {key}, its interval and its null."
    return [], f"Not logged: {key}."


def difference_of_all(all_runs: Runs, convention: str) -> list[Figure]:
    """Target minus online, all runs in one chart; nothing for a single run or where no run has `convention`."""
    lines = []
    for i, (run, color, dash) in enumerate(all_runs.colors()):
        lines += [
            line._replace(label=run.name, color=color, dash=dash, run=i)
            for line in _difference(run, convention)[0][-1:]
        ]
    if len(all_runs.runs) == 1 or not lines:
        return []
    chart = Chart(lines, all_runs.epochs(), Axis("difference of effective ranks"), marks=all_runs.marks())
    caption = f"Target minus online, {CONVENTIONS[convention]}. Each run stands beside its null below."
    return [Figure("Rank difference of all runs", caption, chart)]


def differences(all_runs: Runs, convention: str) -> list[Figure]:
    """Target minus online beside its null, a chart a run; nothing where no run has `convention`."""
    found = [(run, color, *_difference(run, convention)) for run, color, _ in all_runs.colors()]
    if convention != HEADLINE_CONVENTION and not any(lines for _, _, lines, _ in found):
        return []
    out = []
    for i, (run, color, lines, what) in enumerate(found):
        drawn = [line._replace(color=line.color or color) for line in lines]
        caption = f"Target minus online, {CONVENTIONS[convention]}, {what}" if drawn else what
        if any(line.low for line in drawn):
            caption += " Bands: intervals."
        if len(drawn) > 1:
            caption += " Null: view 2 minus view 1 of the same branch, where no difference is expected."
        axis = Axis("difference of effective ranks", limits=(0.0,))
        chart = Chart(drawn, all_runs.epochs(), axis, marks=all_runs.marks(run)) if drawn else None
        out.append(Figure(f"Rank difference of {run.name}", caption, chart, run=i))
    return out


def spectra(all_runs: Runs) -> list[Figure]:
    """Eigenvalues over their rank, a chart a run and tap with equal axes, early and late moments in their colors."""
    panels = {}
    for i, run in enumerate(all_runs.runs):
        for tap, convention in sorted({(str(line["tap"]), line["convention"]) for line in run.spectra}, key=_place):
            found = [line for line in run.spectra if (line["tap"], line["convention"]) == (tap, convention)]
            panels[i, tap, convention] = _moments(found)
    if not panels:
        return [Figure("Eigenvalue spectra over time", "No spectra.jsonl in these runs.")]
    drawn = [v for lines in panels.values() for line in lines for v in line.y if v > 0]
    axis = Axis("eigenvalue, share of the sum", log=True, limits=(min(drawn, default=1e-3), max(drawn, default=1.0)))
    out = []
    for (i, tap, convention), lines in panels.items():
        title = f"Spectrum of {tap_name(tap)}, {all_runs.runs[i].name}"
        caption = f"{convention}; {len(lines)} moments from early to late."
        out.append(Figure(title, caption, Chart(lines, Axis("rank of the eigenvalue", log=True), axis), run=i))
    lacking = [run.name for i, run in enumerate(all_runs.runs) if i not in {number for number, *_ in panels}]
    return [*out, *([Figure("Further spectra", f"No spectra.jsonl in {', '.join(lacking)}.")] if lacking else [])]


def _place(panel: tuple[str, str]) -> tuple[int, str]:
    tap, convention = panel
    return TAPS.index(tap) if tap in TAPS else len(TAPS), convention


def _moments(spectra: Sequence[Tree]) -> list[Line]:
    """Some of the spectra, the first and the last among them, colored by their epoch."""
    count = min(MAX_MOMENTS, len(spectra))
    chosen = [spectra[round(i * (len(spectra) - 1) / max(count - 1, 1))] for i in range(count)]
    first, last = spectra[0]["epoch"], spectra[-1]["epoch"]
    lines = []
    for line in chosen:
        x, y = _log_spaced(line["ranks"], line["eigenvalues"])
        share = (line["epoch"] - first) / (last - first) if last > first else 1.0
        lines.append(Line(f"epoch {line['epoch']:.4g}", x, y, color_at(share)))
    return lines


def _log_spaced(ranks: Sequence[float], values: Sequence[float]) -> Series:
    """About RANKS of the points, evenly over the logarithm of the rank, both ends among them."""
    points = [(float(r), float(v)) for r, v in zip(ranks, values, strict=False) if r > 0]
    width = math.log(points[-1][0] + 1) / RANKS if points else 1.0
    kept = {int(math.log(r) / width): (r, v) for r, v in reversed(points)}
    shown = sorted({*kept.values(), *points[-1:]})
    return [r for r, _ in shown], [v for _, v in shown]
