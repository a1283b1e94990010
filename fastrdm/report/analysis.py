"""Figures of the analysis, all runs side by side: ranks of both branches, spectra, spectral filters, eigenspaces.

They are drawn from analyses with frozen weights, made while the runs went on or after their end (docs/theory.md).
"""

import math
from collections.abc import Sequence
from html import escape

from fastrdm.analysis.spectral_analysis import PASSES
from fastrdm.monitoring.rank_statistics import HEADLINE_CONVENTION
from fastrdm.report.chart import MUTED, Axis, Chart, Figure, Level, Line, color_at, color_of, table
from fastrdm.report.run_files import Measurement, Run, Series
from fastrdm.report.run_set import Runs

DIFFERENCE, NULL = f"difference/{HEADLINE_CONVENTION}", f"null/{{branch}}/{HEADLINE_CONVENTION}"
SETS = {"": "what enters the loss", "scores/": "the scores"}  # names of metrics begin with the key
NUMBER = Axis("direction, largest variance first", log=True)
MIN_SHARE = 1e-6  # share of the variance below which a spectrum is not drawn
MAX_MOMENTS = 8  # filters drawn of a run, spread over its length
HEAD = "run,epoch,images,online,target,target - online,null,filter,directions,Spearman,tail,tilt,alignment,chance"
HEAD += ",crossed,ceiling"


def analysis_figures(all_runs: Runs) -> list[tuple[str, list[Figure]]]:
    """Titles and the figures below them; none where no run was measured."""
    if not any(run.analysis for run in all_runs.runs):
        return []
    ranks = [_newest(all_runs), *_branches(all_runs), *_differences(all_runs)]
    lacking = [run.name for run in all_runs.runs if not run.analysis]
    if lacking:
        why = "train with analysis.every=10ep, or call fastrdm analyze RUN"
        ranks.append(Figure("Further runs", f"Not measured: {', '.join(lacking)} ({why})."))
    ranks += [figure for prefix in SETS for figure in _last_values(all_runs, prefix)]
    filters = [figure for prefix in SETS for figure in (*_filters(all_runs, prefix), *_moments(all_runs, prefix))]
    spectra = [figure for prefix in SETS for figure in _spectra(all_runs, prefix)]
    return [
        ("Theory: rank of both branches", ranks),
        ("Theory: spectral filters", filters),
        ("Theory: spectra of both branches", spectra),
    ]


def _newest(all_runs: Runs) -> Figure:
    """The newest analysis in numbers."""
    head = HEAD.split(",")
    cells = [[escape(cell) for cell in row] for row in rows(all_runs)]
    caption = "With frozen weights. In brackets: the 95 % interval over images. Filter: what the online branch is to "
    caption += "the target. Tail and tilt describe the filter's shape, alignment and what follows shared eigenspaces."
    return Figure("Newest analysis of each run", caption, table=table(head, cells, range(1, len(head))))


def rows(all_runs: Runs) -> list[list[str]]:
    """One table row for each run, under HEAD: the newest analysis in numbers."""
    return [[run.name, *_cells(run.analysis[-1])] for run in all_runs.runs if run.analysis]


def _cells(m: Measurement) -> list[str]:
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


def _repeated(all_runs: Runs) -> list[tuple[int, Run, str]]:
    """Number, run and color of the runs that were measured more than once."""
    return [(i, run, color) for i, (run, color, _) in enumerate(all_runs.colors()) if len(run.analysis) > 1]


def _branches(all_runs: Runs) -> list[Figure]:
    """The rank of both branches throughout training, a chart a run, on equal axes."""
    keys = {branch: f"{branch}/{HEADLINE_CONVENTION}" for branch in ("online", "target")}
    seen = [v for _, run, _ in _repeated(all_runs) for key in keys.values() for v in _over_time(run, key)[1]]
    axis = Axis("effective rank", log=True, limits=(min(seen, default=1.0), max(seen, default=10.0)))
    out = []
    for number, run, _ in _repeated(all_runs):
        lines = [Line(b, *_over_time(run, key), *color_of(i)) for i, (b, key) in enumerate(keys.items())]
        title = f"Rank of both branches throughout training, {run.name}"
        caption = f"{HEADLINE_CONVENTION}, weights frozen, {run.analysis[-1].metric('images'):,.0f} images."
        out.append(Figure(title, caption, Chart(lines, all_runs.epochs(), axis), run=number))
    return out


def _differences(all_runs: Runs) -> list[Figure]:
    """Target minus online with its interval, beside its null, a chart a run."""
    out, axis = [], Axis("difference of effective ranks", limits=(0.0,))
    for number, run, color in _repeated(all_runs):
        low, high = (_over_time(run, f"{DIFFERENCE}/{end}")[1] for end in ("low", "high"))
        null = [_null(m) for m in run.analysis]
        epochs, values = _over_time(run, DIFFERENCE)
        lines = [Line("null", epochs, null, MUTED, "5 3"), Line("difference", epochs, values, color, "", low, high)]
        title = f"Rank difference throughout training, {run.name}"
        caption = "Target minus online. Band: 95 % over images. Null: the larger difference, without sign, "
        caption += "between the two views of one branch."
        out.append(Figure(title, caption, Chart(lines, all_runs.epochs(), axis), run=number))
    return out


def _last_values(all_runs: Runs, prefix: str) -> list[Figure]:
    """Ranks and alignment of what a prefix names, as the newest analysis of each run has them."""
    if not prefix:
        return []  # they stand in the table of all runs
    keys = [f"{prefix}{branch}/{HEADLINE_CONVENTION}" for branch in ("online", "target")]
    keys += [f"{prefix}alignment/{part}" for part in ("value", "chance")]
    found = [(run.name, run.analysis[-1]) for run in all_runs.runs if run.analysis]
    cells = [[escape(name), *(f"{m.metric(key):.4g}" for key in keys)] for name, m in found if keys[0] in m.metrics]
    head = ["run", "rank online", "rank target", "alignment", "chance"]
    caption = f"{HEADLINE_CONVENTION}. Alignment: mean cosine of C v and v, with C of the online branch and v the "
    caption += "target's eigenvectors that hold 99 %. Chance: of a random rotation."
    title = f"Ranks and eigenspace alignment when last measured, of {SETS[prefix]}"
    return [Figure(title, caption, table=table(head, cells, range(1, 5)))] if cells else []


def _root(m: Measurement, prefix: str) -> Series:
    return m.curves.get(f"{prefix}filter/root", ([], []))


def _filter_chart(lines: Sequence[Line]) -> Chart:
    axis = Axis("square root of online over target variance", log=True, limits=(1.0,))
    return Chart(lines, NUMBER, axis, levels=[Level(1.0, "no filter")])


def _filters(all_runs: Runs, prefix: str) -> list[Figure]:
    """The estimated filters at the end, all runs in one chart."""
    lines = []
    for i, (run, color, dash) in enumerate(all_runs.colors()):
        x, y = _root(run.analysis[-1], prefix) if run.analysis else ([], [])
        if x:
            lines.append(Line(run.name, x, y, color, dash, run=i))
    title = f"Spectral filter when last measured, of {SETS[prefix]}"
    caption = "Online against target along common directions, cross-fitted. Falling: low-pass, rising: high-pass."
    return [Figure(title, caption, _filter_chart(lines))] if lines else []


def _spaced(run: Run) -> list[Measurement]:
    """Some of a run's measurements, the first and the last among them."""
    count = min(MAX_MOMENTS, len(run.analysis))
    return [run.analysis[round(i * (len(run.analysis) - 1) / max(count - 1, 1))] for i in range(count)]


def _moments(all_runs: Runs, prefix: str) -> list[Figure]:
    """The filter throughout training, a chart a run, early and late moments in their colors."""
    out = []
    for number, run, _ in _repeated(all_runs):
        shown = [m for m in _spaced(run) if _root(m, prefix)[0]]
        if shown:
            end = max(shown[-1].epoch, 1e-9)
            lines = [Line(f"epoch {m.epoch:.4g}", *_root(m, prefix), color_at(m.epoch / end)) for m in shown]
            title = f"Spectral filter throughout training, of {SETS[prefix]}, {run.name}"
            out.append(Figure(title, f"{len(lines)} moments from early to late.", _filter_chart(lines), run=number))
    return out


def _spectra(all_runs: Runs, prefix: str) -> list[Figure]:
    """Eigenvalues of both branches at the end, a chart a run, on equal axes."""
    out = []
    axis = Axis("share of the variance", log=True, limits=(MIN_SHARE, 1.0))
    for number, run in ((i, run) for i, run in enumerate(all_runs.runs) if run.analysis):
        curves = run.analysis[-1].curves
        names = {b: f"{prefix}spectrum/{b}" for b in ("online", "target")}
        found = {b: _above(curves[name]) for b, name in names.items() if name in curves}
        lines = [Line(branch, *series, *color_of(i)) for i, (branch, series) in enumerate(found.items())]
        if lines:
            title = f"Spectra when last measured, of {SETS[prefix]}, {run.name}"
            out.append(Figure(title, "unit/moment, mean over both views.", Chart(lines, NUMBER, axis), run=number))
    return out


def _above(series: Series) -> Series:
    kept = [(x, y) for x, y in zip(*series, strict=True) if y >= MIN_SHARE]
    return [x for x, _ in kept], [y for _, y in kept]
