"""Figures of the analysis, all runs side by side: ranks of both branches, spectra, spectral filters, eigenspaces.

They are drawn from analyses with frozen weights, made while the runs went on or after their end (docs/theory.md).
"""

import math
from collections.abc import Sequence

from fastrdm.analysis.spectral_analysis import PASSES
from fastrdm.monitoring.rank_statistics import HEADLINE_CONVENTION
from fastrdm.report.run_files import Measurement, Run, Series
from fastrdm.report.run_set import Runs, figure
from fastrdm.report.svg.axes import Axis
from fastrdm.report.svg.dumbbell_chart import Pair, dumbbells
from fastrdm.report.svg.line_chart import GRAY, Level, Line, chart, color_at, color_of

DIFFERENCE, NULL = f"difference/{HEADLINE_CONVENTION}", f"null/{{branch}}/{HEADLINE_CONVENTION}"
SETS = {"": "what enters the loss", "scores/": "the scores"}  # names of metrics begin with the key
NUMBER = Axis("direction, largest variance first", log=True)
MIN_SHARE = 1e-6  # share of the variance below which a spectrum is not drawn
MAX_MOMENTS = 8  # filters drawn of a run, spread over its length
HEAD = "run,epoch,images,online,target,target - online,null,filter,directions,Spearman,tail,tilt,alignment,chance"
HEAD += ",crossed,ceiling"


def analysis_figures(all_runs: Runs) -> list[tuple[str, list[str]]]:
    """Titles and the figures below them; none where no run was measured."""
    if not any(run.analysis for run in all_runs.runs):
        return []
    ranks = [*_branches(all_runs), *_differences(all_runs), *(_last_ranks(all_runs, prefix) for prefix in SETS)]
    lacking = [run.name for run in all_runs.runs if not run.analysis]
    if lacking:
        why = "train with analysis.every=10ep, or call fastrdm analyze RUN"
        ranks.append(figure("Further runs", "", f"Not measured: {', '.join(lacking)} ({why})."))
    filters = [[_filters(all_runs, prefix), *_filters_over_time(all_runs, prefix)] for prefix in SETS]
    spectra = [drawing for prefix in SETS for drawing in _spectra(all_runs, prefix)]
    found = {
        "Theory: rank of both branches": ranks,
        "Theory: spectral filters": [drawing for drawings in filters for drawing in drawings],
        "Theory: spectra of both branches": spectra,
        "Theory: shared eigenspaces": [_alignment(all_runs, prefix) for prefix in SETS],
    }
    return [(title, [drawing for drawing in drawings if drawing]) for title, drawings in found.items()]


def rows(all_runs: Runs) -> list[list[str]]:
    """One table row for each run, under HEAD: the newest analysis in numbers."""
    return [[run.name, *_told(run.analysis[-1])] for run in all_runs.runs if run.analysis]


def _told(m: Measurement) -> list[str]:
    def shown(key: str, style: str) -> str:
        return format(m.metric(key), style) if math.isfinite(m.metric(key)) else "-"

    interval = f"[{shown(f'{DIFFERENCE}/low', '+.2f')}, {shown(f'{DIFFERENCE}/high', '+.2f')}]"
    verdict, null = m.metric("filter/verdict"), _null(m)
    return [
        f"{m.epoch:g}",
        shown("images", ",.0f") + (" (biased)" if m.metric("biased") else ""),
        *(shown(f"{branch}/{HEADLINE_CONVENTION}", ".1f") for branch in ("online", "target")),
        f"{shown(DIFFERENCE, '+.2f')} {interval}",
        f"{null:.2f}" if math.isfinite(null) else "-",
        PASSES[int(verdict)] if math.isfinite(verdict) else "-",
        shown("filter/directions", ".0f"),
        *(shown(f"filter/{part}", "+.2f") for part in ("body", "tail")),
        shown("filter/tilt", ".2g"),
        *(shown(f"alignment/{part}", ".2f") for part in ("value", "chance", "crossed", "ceiling")),
    ]


def _null(m: Measurement) -> float:
    """The larger of both branches' differences between view 2 and view 1, without sign."""
    return max(abs(m.metric(NULL.format(branch=branch))) for branch in ("online", "target"))


def _over_time(run: Run, key: str) -> Series:
    return [m.epoch for m in run.analysis], [m.metric(key) for m in run.analysis]


def _repeated(all_runs: Runs) -> list[tuple[Run, str]]:
    """Runs that were measured more than once, with their colors."""
    return [(run, color) for run, color, _ in all_runs.colors() if len(run.analysis) > 1]


def _branches(all_runs: Runs) -> list[str]:
    """The rank of both branches throughout training, a chart a run, on equal axes."""
    keys = {branch: f"{branch}/{HEADLINE_CONVENTION}" for branch in ("online", "target")}
    seen = [v for run, _ in _repeated(all_runs) for key in keys.values() for v in _over_time(run, key)[1]]
    axis = Axis("effective rank", log=True, limits=(min(seen, default=1.0), max(seen, default=10.0)))
    out = []
    for run, _ in _repeated(all_runs):
        lines = [Line(b, *_over_time(run, key), *color_of(i)) for i, (b, key) in enumerate(keys.items())]
        title = f"Rank of both branches throughout training, {run.name}"
        caption = f"{HEADLINE_CONVENTION}, weights frozen, {run.analysis[-1].metric('images'):,.0f} images."
        out.append(figure(title, chart(lines, all_runs.epochs(), axis, title=title), caption))
    return out


def _differences(all_runs: Runs) -> list[str]:
    """Target minus online with its interval, beside its null, a chart a run."""
    out, axis = [], Axis("difference of effective ranks", limits=(0.0,))
    for run, color in _repeated(all_runs):
        low, high = (_over_time(run, f"{DIFFERENCE}/{end}")[1] for end in ("low", "high"))
        null = [_null(m) for m in run.analysis]
        epochs, values = _over_time(run, DIFFERENCE)
        lines = [Line("null", epochs, null, GRAY, "5 3"), Line("difference", epochs, values, color, "", low, high)]
        title = f"Rank difference throughout training, {run.name}"
        caption = "Target minus online. Band: 95 % over images. Null: the larger difference, without sign, "
        caption += "between the two views of one branch."
        out.append(figure(title, chart(lines, all_runs.epochs(), axis, title=title), caption))
    return out


def _pairs(all_runs: Runs, ring: str, disc: str) -> list[Pair]:
    newest = [(run, color, run.analysis[-1]) for run, color, _ in all_runs.colors() if run.analysis]
    return [Pair(run.name, m.metric(ring), m.metric(disc), color) for run, color, m in newest if disc in m.metrics]


def _last_ranks(all_runs: Runs, prefix: str) -> str:
    pairs = _pairs(all_runs, *(f"{prefix}{branch}/{HEADLINE_CONVENTION}" for branch in ("online", "target")))
    title = f"Effective rank of both branches when last measured, of {SETS[prefix]}"
    axis = Axis("ring: online, disc: target", log=True)
    return figure(title, dumbbells(pairs, axis, title=title), f"{HEADLINE_CONVENTION}.") if pairs else ""


def _alignment(all_runs: Runs, prefix: str) -> str:
    pairs = _pairs(all_runs, f"{prefix}alignment/chance", f"{prefix}alignment/value")
    title = f"Eigenspace alignment beside chance, of {SETS[prefix]}"
    axis = Axis("ring: a random rotation, disc: measured", limits=(0.0, 1.0))
    caption = "Mean cosine of C v and v: C of the online branch, v the target's eigenvectors that hold 99 %."
    return figure(title, dumbbells(pairs, axis, title=title), caption) if pairs else ""


def _root(m: Measurement, prefix: str) -> Series:
    return m.curves.get(f"{prefix}filter/root", ([], []))


def _filter_chart(lines: Sequence[Line], title: str, key: tuple[str, str] | None = None) -> str:
    axis = Axis("square root of online over target variance", log=True, limits=(1.0,))
    return chart(lines, NUMBER, axis, title=title, levels=[Level(1.0, "no filter")], key=key)


def _filters(all_runs: Runs, prefix: str) -> str:
    """The estimated filters at the end, all runs in one chart."""
    lines = []
    for run, color, dash in all_runs.colors():
        x, y = _root(run.analysis[-1], prefix) if run.analysis else ([], [])
        if x:
            lines.append(Line(run.name, x, y, color, dash))
    title = f"Spectral filter when last measured, of {SETS[prefix]}"
    caption = "Online against target along common directions, cross-fitted. Falling: low-pass, rising: high-pass."
    return figure(title, _filter_chart(lines, title), caption) if lines else ""


def _spaced(run: Run) -> list[Measurement]:
    """Some of a run's measurements, the first and the last among them."""
    count = min(MAX_MOMENTS, len(run.analysis))
    return [run.analysis[round(i * (len(run.analysis) - 1) / max(count - 1, 1))] for i in range(count)]


def _filters_over_time(all_runs: Runs, prefix: str) -> list[str]:
    """The filter throughout training, a chart a run, early moments light and late ones dark."""
    out = []
    for run, _ in _repeated(all_runs):
        shown = [m for m in _spaced(run) if _root(m, prefix)[0]]
        if shown:
            end = max(shown[-1].epoch, 1e-9)
            lines = [Line(f"epoch {m.epoch:g}", *_root(m, prefix), color_at(m.epoch / end)) for m in shown]
            title = f"Spectral filter throughout training, of {SETS[prefix]}, {run.name}"
            key = (lines[0].label, lines[-1].label)
            out.append(figure(title, _filter_chart(lines, title, key), f"{len(lines)} moments from light to dark."))
    return out


def _spectra(all_runs: Runs, prefix: str) -> list[str]:
    """Eigenvalues of both branches at the end, a chart a run, on equal axes."""
    out = []
    axis = Axis("share of the variance", log=True, limits=(MIN_SHARE, 1.0))
    for run in (run for run in all_runs.runs if run.analysis):
        curves = run.analysis[-1].curves
        names = {b: f"{prefix}spectrum/{b}" for b in ("online", "target")}
        found = {b: _above(curves[name]) for b, name in names.items() if name in curves}
        lines = [Line(branch, *series, *color_of(i)) for i, (branch, series) in enumerate(found.items())]
        if lines:
            title = f"Spectra when last measured, of {SETS[prefix]}, {run.name}"
            out.append(figure(title, chart(lines, NUMBER, axis, title=title), "unit/moment, mean over both views."))
    return out


def _above(series: Series) -> Series:
    kept = [(x, y) for x, y in zip(*series, strict=True) if y >= MIN_SHARE]
    return [x for x, _ in kept], [y for _, y in kept]
