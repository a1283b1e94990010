"""`fastrdm report RUN...`: one HTML page on one run or several, complete in itself."""

import argparse
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from fastrdm.config import tree
from fastrdm.files import write_whole
from fastrdm.monitoring.rank_statistics import HEADLINE_CONVENTION
from fastrdm.report.analysis import HEAD, rows
from fastrdm.report.figures import sections
from fastrdm.report.ranks import rank_key
from fastrdm.report.run_files import Run, number, read_runs
from fastrdm.report.run_set import Alarm, Runs, with_alarms

FOLDED = 24  # figures of a section above which it is shown on a click
STYLE = """
body { font: 15px/1.45 system-ui, Helvetica, Arial, sans-serif; color: #222; background: #fff;
  max-width: 1360px; margin: 0 auto; padding: 1rem 1.5rem 3rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; border-bottom: 1px solid #ccc; }
.figures { display: grid; gap: 1.2rem 2rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); }
figure { margin: 0; break-inside: avoid; } svg { width: 100%; height: auto; display: block; }
figcaption { font-size: .85rem; color: #444; margin-top: .2rem; overflow-wrap: anywhere; }
.missing { border: 1px dashed #999; padding: .6rem .8rem; align-self: start; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; }
th, td { text-align: left; padding: .25rem .7rem .25rem 0; border-bottom: 1px solid #ddd; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td:first-child { white-space: nowrap; } .verdict td:nth-child(2) { min-width: 12em; }
code { font-size: .85em; overflow-wrap: anywhere; } ul { padding-left: 1.2rem; }
.swatch { display: inline-block; width: .8em; height: .8em; margin-right: .4em; }
@page { margin: 14mm; }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  h1, h2 { break-after: avoid; } tr { break-inside: avoid; }
  .wide { overflow: visible; }
  .figures { display: block; } figure { margin: 0 auto 6mm; max-width: 140mm; } table { font-size: 7.5pt; }
  th, td { padding-right: .4rem; }
}
"""


def main(arguments: Sequence[str]) -> int:
    """`fastrdm report`; the exit status."""
    parser = argparse.ArgumentParser(prog="fastrdm report", description="A page of HTML on one run or several.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, finished or not")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page; RUN/report.html, for several report.html")
    options = parser.parse_args(arguments)
    out = write(options.runs, options.out)
    print(f"report: {out} ({out.stat().st_size / 1e6:.1f} MB)")
    return 0


def write(paths: Sequence[str | Path], out: Path | None = None) -> Path:
    """Write the page on these runs and say where; ValueError names a path that is no run or cannot be written."""
    runs = read_runs(paths)
    place = out or (runs[0].folder if len(runs) == 1 else Path()) / "report.html"
    try:
        write_whole(place, page(runs).encode("utf-8", "backslashreplace"))  # a folder's name may be no UTF-8
    except OSError as error:
        raise ValueError(f"--out must be a file that can be written, got {str(place)!r}: {error.strerror}") from None
    return place


def page(runs: Sequence[Run]) -> str:
    """The whole page as HTML. It loads nothing from elsewhere."""
    all_runs = with_alarms(runs)
    names = ", ".join(run.name for run in runs)
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(names)}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
        f"<h1>fastrdm: {escape(names)}</h1>",
        _overview(all_runs),
        *_measured(all_runs),
        *(_section(title, found) for title, found in sections(all_runs) if found),
        f"<h2>Alarms</h2>{_alarms(all_runs)}",
        f"<h2>Configuration</h2>{_configuration(runs)}",
        f"<h2>Environment</h2>{_environment(runs)}",
        f"<h2>Missing or unreadable</h2>{_problems(runs)}",
        "</body>\n</html>\n",
    ]
    return "\n".join(parts)


def _section(title: str, found: Sequence[str]) -> str:
    """Figures below their title; where they are very many, behind a click."""
    figures = f'<div class="figures">{"".join(found)}</div>'
    if len(found) > FOLDED:
        figures = f"<details><summary>{len(found)} figures</summary>{figures}</details>"
    return f"<h2>{title}</h2>\n{figures}"


def verdict(run: Run, alarms: Sequence[Alarm]) -> str:
    """Verdict on a run in plain words, from its files."""
    if not run.metrics:
        return "no metrics yet"
    own = [a for a in alarms if a.run is run]
    rang = [
        f"{alarm_name(kind)} at epoch "
        + ", ".join(f"{a.first['epoch']:g}{f' ({a.tap})' if a.tap else ''}" for a in own if a.first["alarm"] == kind)
        for kind in dict.fromkeys(a.first["alarm"] for a in own)
    ]
    end = "" if run.summary else f"unfinished, {progress(run)} epochs"
    if rang:
        return "; ".join([*rang, *([end] if end else [])])
    state = "healthy: no alarm" if "monitor" in run.config else "not watched for alarms"
    return f"{state}; {end}" if end else state


def alarm_name(kind: str) -> str:
    """Name of an alarm as it is written in prose."""
    return kind.replace("_", " ")


def progress(run: Run) -> str:
    """Epochs done, and the run's length where it is given in epochs."""
    done = max((number(line["epoch"]) for line in run.metrics), default=0.0)
    length = str(run.setting("train.length") or "")
    return f"{done:g} of {length.removesuffix('ep')}" if length.endswith("ep") else f"{done:g}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numeric: Iterable[int] = ()) -> str:
    """Rows of HTML cells below a head of plain words."""
    kind = [' class="n"' if i in set(numeric) else "" for i in range(len(head))]
    top = "".join(f"<th{k}>{escape(word)}</th>" for k, word in zip(kind, head, strict=True))
    body = "\n".join(
        f"<tr>{''.join(f'<td{k}>{cell}</td>' for k, cell in zip(kind, row, strict=True))}</tr>" for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def _figure(value: float, style: str) -> str:
    return format(value, style) if math.isfinite(value) else "-"


def _overview(all_runs: Runs) -> str:
    """A line a run: headline numbers and verdict."""
    head = "run,verdict,preset,epochs,loss,k-NN,random encoder,probe,rank online,rank target,difference,images/s"
    rows = []
    for run, color, _ in all_runs.colors():
        online, target = (run.last(rank_key(run, tap)) for tap in ("online", "target"))
        difference = run.last(f"difference/{HEADLINE_CONVENTION}/window")
        shown = difference if math.isfinite(difference) else target - online
        rows.append(
            [
                f'<span class="swatch" style="background:{color}"></span>{escape(run.name)}',
                escape(verdict(run, all_runs.alarms)),
                escape(str(run.setting("preset") or "-")),
                escape(progress(run)),
                _figure(run.last("loss"), ".4f"),
                *(_figure(run.last(key), ".1%") for key in ("knn", "knn_random_encoder", "probe")),
                _figure(online, ".1f"),
                _figure(target, ".1f"),
                _figure(shown, "+.1f"),
                _figure(run.last("images_per_second"), ",.0f"),
            ]
        )
    return f'<div class="verdict">{_table(head.split(","), rows, range(4, 12))}</div>'


def _measured(all_runs: Runs) -> list[str]:
    """Section with the newest analysis of each run, one row a run; empty if no run was analyzed."""
    found = [[escape(cell) for cell in row] for row in rows(all_runs)]
    head = HEAD.split(",")
    return [f"<h2>Theory, measured with frozen weights</h2>{_table(head, found, range(1, len(head)))}"] if found else []


def _alarms(all_runs: Runs) -> str:
    """A line for each kind of alarm at each tap of each run; its number stands in the charts."""
    if not all_runs.alarms:
        return "<p>None.</p>"
    head = ["no.", "run", "alarm", "tap", "first at epoch", "step", "times", "value", "threshold", "action", "text"]
    rows = []
    for a in all_runs.alarms:
        line = a.first
        value, threshold = (_figure(number(line.get(key)), ".4g") for key in ("value", "threshold"))
        cells = [
            a.run.name,
            alarm_name(line["alarm"]),
            a.tap or "-",
            f"{line['epoch']:g}",
            line.get("step", "-"),
            a.times,
            value,
            threshold,
        ]
        cells += [line.get("action") or "-", line.get("text") or "-"]
        number_cell = f'<b style="color:{a.color}">{a.number}</b>'
        rows.append([number_cell, *(escape(str(cell)) for cell in cells)])
    return _table(head, rows)


def _configuration(runs: Sequence[Run]) -> str:
    """List of the settings in which each run differs from the first."""
    first, *rest = runs
    if not rest:
        return f"<p>One run, nothing to compare: see {escape(first.name)}/config.yaml.</p>"
    out = []
    for run in rest:
        lines = (
            tree.differences(first.config, run.config) if first.config and run.config else ["config.yaml is missing"]
        )
        items = "".join(f"<li><code>{escape(line)}</code></li>" for line in lines) or "<li>none</li>"
        out.append(f"<p>{escape(first.name)} -&gt; {escape(run.name)}:</p><ul>{items}</ul>")
    return "\n".join(out)


def _environment(runs: Sequence[Run]) -> str:
    """Versions and device, as the newest checkpoint of each run names them."""
    keys = list(dict.fromkeys(key for run in runs for key in run.versions))
    if not keys:
        return "<p>No checkpoint names it.</p>"
    rows = [[escape(run.name), *(escape(str(run.versions.get(key, "-"))) for key in keys)] for run in runs]
    return _table(["run", *keys], rows)


def _problems(runs: Sequence[Run]) -> str:
    lines = [f"<li>{escape(run.name)}: {escape(problem)}</li>" for run in runs for problem in run.problems]
    return f"<ul>{''.join(lines)}</ul>" if lines else "<p>Nothing.</p>"
