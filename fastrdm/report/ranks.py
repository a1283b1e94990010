"""Figures of rank: both branches, their difference beside its null, the spectra that they come from."""

import math
from collections.abc import Sequence

from fastrdm.config.tree import Tree
from fastrdm.monitoring.rank_statistics import CENTERED_CONVENTION, HEADLINE_CONVENTION
from fastrdm.report.run_files import Run, Series
from fastrdm.report.run_set import Runs, curve, figure
from fastrdm.report.svg.axes import Axis
from fastrdm.report.svg.line_chart import GRAY, Line, chart, color_at, color_of

TAPS = ("online", "target", "online_scores", "target_scores", "hidden", "features")
TAP_NAMES = {
    "online_scores": "the online scores",
    "target_scores": "the target scores",
    "hidden": "the projector before its last BatchNorm",
    "features": "the encoder's features",
}
KINDS = {  # where a figure of rank comes from, the best first
    "window": "over a window of at least 10 rows a dimension",
    "sample": "of a sample of rows, at most their number",
    "batch": "of single batches, at most their number of rows",
}
MAX_MOMENTS = 8  # spectra drawn of a run, spread over its length
RANKS = 60  # points of a drawn spectrum
RANK_KEYS = {  # what has its place in these figures
    *(f"{tap}/{HEADLINE_CONVENTION}/{kind}" for tap in TAPS for kind in KINDS),
    *(
        f"{what}/{convention}/window"
        for what in ("difference", "null")
        for convention in (HEADLINE_CONVENTION, CENTERED_CONVENTION)
    ),
}


def rank_key(run: Run, tap: str) -> str:
    """Key of the best rank that was logged of a tap, else of the windowed one."""
    keys = [f"{tap}/{HEADLINE_CONVENTION}/{kind}" for kind in KINDS]
    return next((key for key in keys if run.series(key)[0]), keys[0])


def ranks(all_runs: Runs) -> list[str]:
    """Effective rank: both branches of a single run in one chart, else a chart a tap, the branches on equal axes."""
    alone = len(all_runs.runs) == 1
    groups = [TAPS[:2], *((tap,) for tap in TAPS[2:])] if alone else [(tap,) for tap in TAPS]
    both = [v for run in all_runs.runs for tap in TAPS[:2] for v in run.series(rank_key(run, tap))[1]]
    highest = max((v for v in both if math.isfinite(v)), default=1.0)
    out = []
    for group in groups:
        title = f"Effective rank of {'both branches' if len(group) > 1 else tap_name(group[0])}"
        lines, kinds = [], []
        for tap in group:
            for run, color, dash in all_runs.colors():
                key = rank_key(run, tap)
                if run.series(key)[0]:
                    style = color_of(TAPS.index(tap)) if alone else (color, dash)
                    lines.append(curve(run, key, tap if alone else run.name, *style))
                    kinds.append((KINDS[key.split("/")[-1]], run.name))
        branch = group[0] in TAPS[:2]
        axis = Axis("effective rank", limits=(0.0, highest) if branch else (0.0,))
        drawing = chart(lines, all_runs.epochs(), axis, title=title, marks=all_runs.marks()) if lines else ""
        if lines or branch:
            out.append(
                figure(title, drawing, _origin(kinds) if lines else f"Not logged: {group[0]}/{HEADLINE_CONVENTION}/...")
            )
    return out


def tap_name(tap: str) -> str:
    return TAP_NAMES.get(tap, f"the {tap} branch")


def _origin(kinds: Sequence[tuple[str, str]]) -> str:
    """Caption that names what the drawn ranks were computed from; `kinds` holds (kind, run's name) of each line."""
    names = {kind: list(dict.fromkeys(name for k, name in kinds if k == kind)) for kind, _ in kinds}
    if len(names) == 1:
        return f"{HEADLINE_CONVENTION}, {kinds[0][0]}."
    parts = [f"{kind} ({', '.join(runs)})" for kind, runs in names.items()]
    return f"{HEADLINE_CONVENTION}, {'; '.join(parts)}."


def _difference(run: Run, convention: str) -> tuple[list[Line], str]:
    """Lines of the rank difference and its null, and what they are."""
    key, null = f"difference/{convention}/window", f"null/{convention}/window"
    if run.series(key)[0]:
        lines = [curve(run, key, "difference", "")]
        if not run.series(null)[0]:
            return lines, f"{KINDS['window']}. Not logged: {null}."
        return [curve(run, null, "null", GRAY, "5 3"), *lines], f"{KINDS['window']}."
    online, target = (run.series(f"{branch}/{convention}/batch") for branch in ("online", "target"))
    if online[0] and online[0] == target[0]:
        values = [b - a for a, b in zip(online[1], target[1], strict=True)]
        return [
            Line("difference", online[0], values, "")
        ], f"{KINDS['batch']}. Not logged: {key}, its interval and its null."
    return [], f"Not logged: {key}."


def differences(all_runs: Runs, convention: str) -> list[str]:
    """Target minus online: all runs in one chart, then each beside its null; nothing where no run has `convention`."""
    found = [(run, color, *_difference(run, convention)) for run, color, _ in all_runs.colors()]
    if convention != HEADLINE_CONVENTION and not any(lines for _, _, lines, _ in found):
        return []
    together = [lines[-1]._replace(label=run.name, color=color) for run, color, lines, _ in found if lines]
    axis, out = Axis("difference of effective ranks", limits=(0.0,)), []
    if len(together) > 1:
        title = "Rank difference of all runs"
        drawing = chart(together, all_runs.epochs(), axis, title=title, marks=all_runs.marks())
        out.append(figure(title, drawing, f"Target minus online, {convention}; each by itself in the next charts."))
    for run, color, lines, what in found:
        drawn = [line._replace(color=line.color or color) for line in lines]
        title = f"Rank difference of {run.name}"
        marks = [mark for mark, alarm in zip(all_runs.marks(), all_runs.alarms, strict=True) if alarm.run is run]
        drawing = chart(drawn, all_runs.epochs(), axis, title=title, marks=marks) if drawn else ""
        caption = f"Target minus online, {convention}, {what}" if drawn else what
        if any(line.low for line in drawn):
            caption += " Bands: intervals."
        if len(drawn) > 1:
            caption += " Null: view 2 minus view 1 of the same branch, where no difference is expected."
        out.append(figure(title, drawing, caption))
    return out


def spectra(all_runs: Runs) -> list[str]:
    """Eigenvalues over their rank, a chart a run and tap with equal axes, early moments light and late ones dark."""
    panels = {}
    for run in all_runs.runs:
        for tap, convention in sorted({(str(line["tap"]), line["convention"]) for line in run.spectra}, key=_place):
            found = [line for line in run.spectra if (line["tap"], line["convention"]) == (tap, convention)]
            panels[run.name, tap, convention] = _moments(found)
    if not panels:
        return [figure("Eigenvalue spectra over time", "", "No spectra.jsonl in these runs.")]
    drawn = [v for lines in panels.values() for line in lines for v in line.y if v > 0]
    axis = Axis("eigenvalue, share of the sum", log=True, limits=(min(drawn, default=1e-3), max(drawn, default=1.0)))
    out = []
    for (name, tap, convention), lines in panels.items():
        title = f"Spectrum of {tap_name(tap)}, {name}"
        key = (lines[0].label, lines[-1].label) if lines else None
        across = Axis("rank of the eigenvalue", log=True)
        caption = f"{convention}; {len(lines)} moments from light to dark."
        out.append(figure(title, chart(lines, across, axis, title=title, key=key), caption))
    lacking = [run.name for run in all_runs.runs if run.name not in {name for name, *_ in panels}]
    return [*out, *([figure("Further spectra", "", f"No spectra.jsonl in {', '.join(lacking)}.")] if lacking else [])]


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
        lines.append(Line(f"epoch {line['epoch']:g}", x, y, color_at(share)))
    return lines


def _log_spaced(ranks: Sequence[float], values: Sequence[float]) -> Series:
    """About RANKS of the points, evenly over the logarithm of the rank, both ends among them."""
    points = [(float(r), float(v)) for r, v in zip(ranks, values, strict=False) if r > 0]
    width = math.log(points[-1][0] + 1) / RANKS if points else 1.0
    kept = {int(math.log(r) / width): (r, v) for r, v in reversed(points)}
    shown = sorted({*kept.values(), *points[-1:]})
    return [r for r, _ in shown], [v for _, v in shown]
