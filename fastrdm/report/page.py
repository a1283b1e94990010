"""`fastrdm report RUN...`: one HTML page on one run or several, complete in itself.

The first screen is a verdict on each run and at most a dozen charts; the rest is folded by topic. uPlot, which lies in
assets/ with its license, draws the charts in the browser, from the data that stand in the page.
"""

import math
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from html import escape
from importlib.resources import files
from pathlib import Path

from fastrdm.config import run_config
from fastrdm.config.tree import Tree
from fastrdm.files import write_whole
from fastrdm.monitoring.rank_statistics import CENTERED_CONVENTION
from fastrdm.report.chart import Figure, color_of, html, table, to_json
from fastrdm.report.figures import first, folded
from fastrdm.report.ranks import convention_of, rank_key
from fastrdm.report.run_files import Run, number, read_runs
from fastrdm.report.run_set import Alarm, Runs, alarm_name, with_alarms

CHART_LIBRARY = "uplot-1.6.32"
MOST_NAMED = 3  # runs whose names make the heading, and which have a full row each above the charts
OVERVIEW = (
    *("run", "verdict", "k-NN", "best", "raw pixels", "random encoder", "probe"),
    *("rank online", "rank target", "deviation", "images/s", "loss", "epochs"),
)
BRIEF = ("run", "verdict", "k-NN", "best", "raw pixels", "random encoder", "rank online", "rank target", "images/s")


def write(paths: Sequence[str | Path], out: Path | None = None) -> Path:
    """Write the page on these runs and say where; ValueError names a path that is no run or cannot be written."""
    runs = read_runs(paths)
    place = out or (runs[0].folder if len(runs) == 1 else Path()) / "report.html"
    try:
        write_whole(place, page(runs))
    except OSError as error:
        raise ValueError(f"--out must be a file that can be written, got {str(place)!r}: {error.strerror}") from None
    return place


def asset(name: str) -> str:
    """The text of a file of assets/."""
    return (files("fastrdm.report") / "assets" / name).read_text(encoding="utf-8")


def page(runs: Sequence[Run], stamp: str = "") -> str:
    """The whole page as HTML. It loads nothing from elsewhere. With the stamp of its server (watch.py), it asks the
    server whether a run went on, and then loads itself again.
    """
    all_runs = with_alarms(runs)
    # of more runs than these, the names stand on their buttons
    names = ", ".join(run.name for run in runs) if len(runs) <= MOST_NAMED else f"{len(runs)} runs"
    charts: list[dict[str, object]] = []
    shown = "".join(html(figure, charts) for figure in first(all_runs))
    topics = "\n".join(_topic(title, found, charts) for title, found in folded(all_runs) if found)
    data = {"runs": [run.name for run in runs], "charts": charts, "stamp": stamp}
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="color-scheme" content="light dark">\n'
            f"<title>{escape(names)}</title>",
            f"<style>{asset(f'{CHART_LIBRARY}.min.css')}{asset('report.css')}</style>\n</head>\n<body>",
            f"<h1>{escape(names)}</h1>",
            f'<p class="about">{escape(_about(all_runs))}</p>',
            "<noscript><p>The charts of this page are drawn by a script. The tables need none.</p></noscript>",
            _switches(all_runs),
            _brief(all_runs) if len(runs) > MOST_NAMED else _overview(all_runs),
            f'<div class="figures">{shown}</div>',
            _fold("Verdicts and numbers in full", _overview(all_runs)) if len(runs) > MOST_NAMED else "",
            _fold(f"Alarms ({len(all_runs.alarms)})", _alarms(all_runs), bool(all_runs.alarms)),
            topics,
            _fold("Configuration", _configuration(runs)),
            _fold("Where the runs come from", _provenance(runs), len(runs) == 1),
            _fold("Missing or unreadable", _problems(runs)),
            f'<script type="application/json" id="data">{to_json(data)}</script>',
            f"<script>/*\n{asset('uplot-LICENSE.txt')}*/\n{asset(f'{CHART_LIBRARY}.min.js')}</script>",
            f"<script>{asset('report.js')}</script>",
            "</body>\n</html>\n",
        ]
    )


def _fold(title: str, content: str, opened: bool = False) -> str:
    return f"<details{' open' if opened else ''}><summary>{escape(title)}</summary>{content}</details>"


def _topic(title: str, found: Sequence[Figure], charts: list[dict[str, object]]) -> str:
    figures = "".join(html(figure, charts) for figure in found)
    return _fold(f"{title} ({len(found)})", f'<div class="figures">{figures}</div>')


def _about(all_runs: Runs) -> str:
    """Return the line at the top of the page: how many runs, when it was written, and how to use it."""
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    runs = "one run" if len(all_runs.runs) == 1 else f"{len(all_runs.runs)} runs"
    return f"fastrdm, {runs}, written {now}. Point at a chart for values, drag to zoom, double-click to zoom out."


def _switches(all_runs: Runs) -> str:
    """A button a run, which hides it and shows it again everywhere."""
    if len(all_runs.runs) == 1:
        return ""
    buttons = "".join(
        f'<button type="button" data-switch="{i}" aria-pressed="true">{_swatch(i)}{escape(run.name)}</button>'
        for i, run in enumerate(all_runs.runs)
    )
    return f'<div class="switches" role="group" aria-label="Runs">{buttons}</div>'


def _swatch(index: int) -> str:
    color, dash = color_of(index)
    return f'<span class="swatch{" dashed" if dash else ""}" style="--color:var(--{color})"></span>'


def verdict(run: Run, alarms: Sequence[Alarm]) -> str:
    """Verdict on a run as HTML: the state in a badge, then its reason, cause and remedy, the page of the documentation
    that shows such runs, the alarms, and how far the run came.
    """
    found = run.verdict()
    rang = [f"{a.words} at epoch {_epoch(a.first['epoch'])}" for a in alarms if a.run is run]
    alarmed = f"Alarms: {'; '.join(rang)}." if rang else ""
    unfinished = "" if run.summary else f"Unfinished, {progress(run)} epochs."
    advice = f"{found.cause} {found.remedy} See {found.page}." if found.cause else ""
    told = " ".join(filter(None, (f"{found.reason}.", advice, alarmed, unfinished)))
    return f'<span class="state" data-state="{found.state}">{found.state}</span> {escape(told)}'


def progress(run: Run) -> str:
    """Epochs done, and the run's length where it is given in epochs."""
    done = max((number(line["epoch"]) for line in run.metrics), default=0.0)
    length = str(run.setting("train.length") or "")
    return f"{_epoch(done)} of {length.removesuffix('ep')}" if length.endswith("ep") else _epoch(done)


def _epoch(value: float) -> str:
    """The number of an epoch with one decimal, unless that is 0."""
    return f"{value:,.1f}".removesuffix(".0")


def _figure(value: float, style: str) -> str:
    return format(value, style) if math.isfinite(value) else "-"


def _best(run: Run, key: str) -> float:
    return max((v for v in run.series(key)[1] if math.isfinite(v)), default=math.nan)


def _overview(all_runs: Runs) -> str:
    """A row a run: verdict, accuracy beside what it has to beat, ranks, deviation of the target, speed."""
    return table(OVERVIEW, _overview_rows(all_runs), range(2, len(OVERVIEW)), "runs") + _rank_note(all_runs)


def _brief(all_runs: Runs) -> str:
    """How many runs are in which state, and a line a run: most of the overview's columns, and as much of each verdict
    as there is room for. The charts of many runs then begin on the first screen.
    """
    states: dict[str, list[str]] = {}
    for run in all_runs.runs:
        states.setdefault(run.verdict().state, []).append(run.name)
    tally = "; ".join(
        f"{len(names)} {state}{'' if state == 'healthy' else f' ({_some(names)})'}" for state, names in states.items()
    )
    kept = [OVERVIEW.index(column) for column in BRIEF]
    rows = [[row[i] for i in kept] for row in _overview_rows(all_runs)]
    return f"<p>{escape(tally)}</p>" + table(BRIEF, rows, range(2, len(BRIEF)), "runs brief") + _rank_note(all_runs)


def _some(names: Sequence[str]) -> str:
    """The first few of `names`."""
    return ", ".join(names[:MOST_NAMED]) + (", ..." if len(names) > MOST_NAMED else "")


def _rank_note(all_runs: Runs) -> str:
    about = "about the mean" if convention_of(all_runs) == CENTERED_CONVENTION else "about 0"
    return f"<p class=note>Accuracies are of the test split. Ranks are effective ranks of unit rows {about}.</p>"


def _overview_rows(all_runs: Runs) -> list[list[str]]:
    """The cells of OVERVIEW for each run, as HTML."""
    convention = convention_of(all_runs)
    rows = []
    for i, run in enumerate(all_runs.runs):
        online, target = (run.last(rank_key(run, tap, convention)) for tap in ("online", "target"))
        accuracies = (run.last("knn"), _best(run, "knn"))
        baselines = (run.last(key) for key in ("knn_raw_pixels", "knn_random_encoder", "probe"))
        rows.append(
            [
                f"<b>{_swatch(i)}{escape(run.name)}</b> <small>{escape(str(run.setting('preset') or ''))}</small>",
                verdict(run, all_runs.alarms),
                *(_figure(value, ".1%") for value in (*accuracies, *baselines)),
                _figure(online, ".1f"),
                _figure(target, ".1f"),
                _figure(run.last(rank_key(run, "target", "std")), ".2f"),
                _figure(run.last("images_per_second"), ",.0f"),
                _figure(run.last("loss"), ".4f"),
                progress(run),
            ]
        )
    return rows


def _alarms(all_runs: Runs) -> str:
    """A line for each kind of alarm at each tap of each run."""
    if not all_runs.alarms:
        return "<p>None.</p>"
    head = ["run", "alarm", "tap", "first at epoch", "step", "times", "value", "threshold", "action", "text"]
    rows = []
    for a in all_runs.alarms:
        line = a.first
        value, threshold = (_figure(number(line.get(key)), ".4g") for key in ("value", "threshold"))
        cells = [alarm_name(line["alarm"]), a.tap or "-", _epoch(line["epoch"]), line.get("step", "-"), a.times]
        cells += [value, threshold, line.get("action") or "-", line.get("text") or "-"]
        rows.append([f"{_swatch(a.place)}{escape(a.run.name)}", *(escape(str(cell)) for cell in cells)])
    return table(head, rows)


def _configuration(runs: Sequence[Run]) -> str:
    """Table of the settings in which the runs differ, a column a run."""
    if len(runs) == 1:
        return f"<p>One run, nothing to compare: see {escape(runs[0].name)}/config.yaml.</p>"
    lacking = [run.name for run in runs if not run.config]
    settings = [dict(run_config.flat(run.config)) for run in runs if run.config]
    keys = [k for k in dict.fromkeys(key for s in settings for key in s) if len({str(s.get(k)) for s in settings}) > 1]
    rows = [[f"<code>{escape(key)}</code>", *(escape(_written(s, key)) for s in settings)] for key in keys]
    same = "" if keys else "<p>No setting differs.</p>"
    note = f"<p>No config.yaml in {escape(', '.join(lacking))}.</p>" if lacking else ""
    return (table(["setting", *(run.name for run in runs if run.config)], rows) if rows else same) + note


def _written(settings: Tree, key: str) -> str:
    value = settings.get(key)
    return "-" if value is None else str(value)


def _provenance(runs: Sequence[Run]) -> str:
    """Version, command, device, date and duration of each run."""
    keys = list(dict.fromkeys(key for run in runs for key in run.versions))
    rows = [
        [escape(run.name), *_times(run), *(escape(str(run.versions.get(key, "-"))) for key in keys)] for run in runs
    ]
    return table(["run", "began", "duration", *(key.replace("_", " ") for key in keys)], rows)


def _times(run: Run) -> list[str]:
    """When the run wrote its first line of metrics, and the time from there to its last line, pauses included."""
    times = [t for t in (number(line.get("time")) for line in run.metrics) if math.isfinite(t)]
    if not times:
        return ["-", "-"]
    began = datetime.fromtimestamp(times[0], timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return [began, str(timedelta(seconds=round(times[-1] - times[0])))]


def _problems(runs: Sequence[Run]) -> str:
    lines = [f"<li>{escape(run.name)}: {escape(problem)}</li>" for run in runs for problem in run.problems]
    return f"<ul>{''.join(lines)}</ul>" if lines else "<p>Nothing.</p>"
