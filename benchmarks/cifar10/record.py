"""The records of the CIFAR-10 runs of a budget: tables, figures and text, from rows and curves alone."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import NamedTuple

from scipy.special import stdtrit

from benchmarks import common
from benchmarks.cifar10.rows import BRANCHES, DIFFERENCE, METRICS, NULLS, Curves, Row
from benchmarks.plots import style
from fastrdm.analysis.spectral_analysis import PASSES
from fastrdm.methods.presets import PRESETS
from fastrdm.monitoring.rank_statistics import HEADLINE_CONVENTION

FEW_POINTS = 5.0  # points of k-NN below which a preset is named in the record
ALIASES = {"rdm_simsiam_target0.5": "rdm_simsiam", "rdm_byol_target0.5": "rdm_byol"}  # the same run by another name
BASE = ["simsiam", "byol", "swav", "dino", "symsimsiam"]
# presets that keep their rank in other ways than by a predictor or a filter of the batch
FAMILIES = ["symsimsiam", "vicreg", "barlow_twins", "lejepa", "w_mse", "directpred", "directcopy", "isoloss"]
FAMILIES += ["fastsiam", "simdino", "tico"]
HEAD = ["preset", "seeds", "random", "trained", "spread", "trained - random, points", "probe"]
HEAD += ["target - online rank", "null", "filter", "alarms"]
SMALLEST_SHARE = 1e-6  # share of the variance below which a spectrum is not drawn

GALLERY = {  # figures and what they show
    "gains": "k-NN accuracy before and after training",
    "ranks": "Effective ranks of both branches",
    "training": "Rank difference throughout training, published methods",
    "training_rdm_simsiam": "Rank difference throughout training, RDM variants of SimSiam",
    "training_rdm_byol": "Rank difference throughout training, RDM variants of BYOL",
    "training_families": "Rank of the target throughout training, other families",
    "filters": "Filters of the published methods",
    "filters_rdm_simsiam": "Filters of the RDM variants of SimSiam",
    "filters_rdm_byol": "Filters of the RDM variants of BYOL",
    "spectra": "Spectra of the published methods",
}


class Files(NamedTuple):
    """Where rows, curves and records of a budget lie."""

    rows: Path
    measured: Path
    curves: Path
    notes: Path  # what somebody read from the rows, taken into the record
    record: Path
    analysis: Path

    def figure(self, name: str) -> Path:
        return self.record.with_name(f"{self.record.stem}_{name}.svg")


def files(budget: str, folder: Path = common.FOLDER) -> Files:
    results, records = folder / "results", folder / "records"
    measured = results / f"analysis_cifar10_{budget}"
    return Files(
        results / f"cifar10_{budget}.csv",
        measured.with_suffix(".csv"),
        measured.with_suffix(".json"),
        results / f"cifar10_{budget}_notes.md",
        records / f"cifar10_{budget}.md",
        records / f"analysis_cifar10_{budget}.md",
    )


def present(rows: Sequence[Row]) -> list[str]:
    """Presets with rows, in the order of the table of methods."""
    return [preset for preset in PRESETS if any(row["preset"] == preset for row in rows)]


def of(rows: Sequence[Row], preset: str) -> list[Row]:
    return [row for row in rows if row["preset"] == preset]


def values(rows: Sequence[Row], key: str) -> list[float]:
    return [float(row[key]) for row in rows]


def gains(rows: Sequence[Row]) -> list[float]:
    """Points of k-NN that training adds, by seed."""
    return [100 * (t - r) for t, r in zip(values(rows, "trained"), values(rows, "random"), strict=True)]


def with_interval(found: Sequence[float]) -> str:
    """Mean with Student's 95 % interval over seeds, where there are several."""
    if len(found) < 2:
        return f"{mean(found):+.1f}"
    half = stdtrit(len(found) - 1, 0.975) * stdev(found) / math.sqrt(len(found))
    return f"{mean(found):+.1f} ± {half:.1f}"


def range_of(measured: Sequence[Row]) -> str:
    """Rank difference: mean over seeds, and from the lowest limit of their intervals to the highest."""
    low, high = min(values(measured, f"{DIFFERENCE}/low")), max(values(measured, f"{DIFFERENCE}/high"))
    return f"{mean(values(measured, DIFFERENCE)):+.2f} [{low:+.2f}, {high:+.2f}]"


def verdicts(measured: Sequence[Row]) -> str:
    return ", ".join(sorted({PASSES[int(v)] for v in values(measured, "filter/verdict")}))


def alarms(rows: Sequence[Row]) -> str:
    """Kinds of alarms, and of how many seeds."""
    kinds = sorted({kind for row in rows for kind in row["alarms"].split()})
    return ", ".join(f"{k.replace('_', ' ')} ({sum(k in row['alarms'] for row in rows)})" for k in kinds)


def table(rows: Sequence[Row], measured: Sequence[Row]) -> list[str]:
    """A Markdown line a preset: k-NN with its spread, what training added, rank difference, filter, alarms."""
    lines = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    for preset in present(rows):
        mine, found = of(rows, preset), of(measured, preset)
        spread = f"{100 * stdev(values(mine, 'trained')):.1f}" if len(mine) > 1 else "-"
        percent = {key: f"{100 * mean(values(mine, key)):.1f} %" for key in ("random", "trained", "probe")}
        cells = [preset, str(len(mine)), percent["random"], percent["trained"], spread, with_interval(gains(mine))]
        cells += [percent["probe"]]
        if found:
            null = max(abs(v) for key in NULLS for v in values(found, key))
            some = f" ({len(found)} of {len(mine)})" if len(found) < len(mine) else ""
            cells += [range_of(found) + some, f"{null:.2f}", verdicts(found)]
        else:
            cells += ["not measured", "-", "-"]
        lines.append(f"| {' | '.join([*cells, alarms(mine)])} |")
    return lines


def little(rows: Sequence[Row], measured: Sequence[Row]) -> list[str]:
    """The presets that add less than FEW_POINTS points, each with what the analysis says of it."""
    lines = []
    for preset in present(rows):
        gain, found = mean(gains(of(rows, preset))), of(measured, preset)
        if gain >= FEW_POINTS:
            continue
        told = f"- `{preset}`, {gain:+.1f}:"
        if found:
            online, target = (mean(values(found, key)) for key in BRANCHES)
            told += f" effective rank {online:.1f} online and {target:.1f} of the target, of"
            told += f" {float(found[0]['dimension']):.0f}; {verdicts(found)} over"
            told += f" {mean(values(found, 'filter/directions')):.0f} directions;"
        lines.append(f"{told} alarms: {alarms(of(rows, preset)) or 'none'}.")
    return lines


def record(found: Files, what: str, command: str) -> str:
    """The table with what it means, what somebody read from it, and where it was measured."""
    rows, measured, _ = load(found)
    if not rows:
        empty = [f"| {preset} | 0 |{' |' * (len(HEAD) - 2)}" for preset in PRESETS if preset not in ALIASES]
        said = f"# CIFAR-10, {what}\n\n`{command}` writes this record. No run has been made yet.\n"
        return "\n".join([said, *table([], []), *empty, ""])
    raw = 100 * mean(values(rows, "raw_pixels"))
    seconds = median(int(row["cpu_seconds"]) for row in rows)
    named = little(rows, measured)
    text = f"""# CIFAR-10, {what}

Made by `{command}`. k-NN accuracy (k=20, cosine, temperature 0.07)
on the 10,000 test images; raw pixels reach {raw:.1f} %. Spread: standard deviation over seeds, points. The interval of
trained minus random is Student's, 95 %, over seeds, each against the same encoder before training. SimSiam's presets
start with zero-initialized residual branches, as published, which makes their random encoder a weak one: compare with
raw pixels and with BYOL's too. Rank difference (`{HEADLINE_CONVENTION}`), null and filter are those of the analysis
at the end of a run, on new views with frozen weights: mean over seeds, and from the lowest limit to the highest of
their 95 % intervals over images ([all of them]({found.analysis.name})). Alarms, with the number of seeds, are those
of the monitor's defaults; unwatched: before there was a monitor. Median {seconds:.0f} CPU seconds a run.
"""
    parts = [text, *table(rows, measured), ""]
    parts += [f"`{alias}` is `{preset}` by another name and is not run twice." for alias, preset in ALIASES.items()]
    parts += ["", *([f"Training adds less than {FEW_POINTS:.0f} points to:", "", *named, ""] if named else [])]
    parts += [found.notes.read_text()] if found.notes.exists() else []
    parts += [f"![{title}]({found.figure(name).name})" for name, title in GALLERY.items() if name == "gains"]
    return "\n".join([*parts, "", *made(rows), ""])


def made(rows: Sequence[Row]) -> list[str]:
    """Commits, versions and devices of the rows."""
    groups: dict[str, set[str]] = {}
    for row in rows:
        groups.setdefault(f"torch {row['torch']}, {row['device']}", set()).add(row["commit"])
    return [f"{where}; commits {', '.join(sorted(commits))}." for where, commits in groups.items()]


def analysis_table(measured: Sequence[Row]) -> list[str]:
    """A Markdown line a preset: means over seeds, the range of the seeds' intervals."""
    out = ["| preset | seeds | online | target | target - online, all intervals | null | filter | directions |"]
    out[0] += " Spearman | null | tail | tilt | alignment | chance | crossed | ceiling |"
    out.append("|" + "---|" * out[0].count(" |"))
    for preset in present(measured):
        mine = of(measured, preset)
        m = {key: mean(values(mine, key)) for key in METRICS}
        null = max(abs(v) for key in NULLS for v in values(mine, key))
        ranks = f"{m[BRANCHES[0]]:.1f} | {m[BRANCHES[1]]:.1f} | {range_of(mine)} | {null:.2f}"
        spread = max(map(abs, values(mine, "filter/null")))
        passed = f"{verdicts(mine)} | {m['filter/directions']:.0f} | {m['filter/body']:+.2f} | {spread:.2f}"
        passed += f" | {m['filter/tail']:+.2f} | {m['filter/tilt']:.2g}"
        shared = " | ".join(f"{m[f'alignment/{x}']:.2f}" for x in ("value", "chance", "crossed", "ceiling"))
        out.append(f"| {preset} | {len(mine)} | {ranks} | {passed} | {shared} |")
    return out


def curves_of(
    curves: Curves, presets: Sequence[str], names: dict[str, str], smallest: float = -math.inf
) -> list[style.Curve]:
    """The curves `names` of each preset. A name stands for a stroke, or for the preset's own where it is empty.

    Values below `smallest` are left out.
    """
    drawn = []
    for i, preset in enumerate(preset for preset in presets if preset in curves):
        color, own = style.color_of(i)
        for j, (name, stroke) in enumerate(names.items()):
            points = [point for point in zip(*curves[preset].get(name, ([], [])), strict=True) if point[1] >= smallest]
            if points:
                x, y = zip(*points, strict=True)
                drawn.append(style.Curve("" if j else preset, x, y, color, stroke or own))
    return drawn


def figures(rows: Sequence[Row], measured: Sequence[Row], curves: Curves) -> dict[str, str]:
    """Drawings by name; those of which there is nothing are left out."""
    direction = "direction, largest variance first"
    passed = "square root of online\nover target variance"
    larger = "target minus online effective rank,\nin windows of a run"
    share = "share of the variance:\nonline solid, target dashed"
    out = {"gains": _gains(rows) if rows else "", "ranks": _ranks(measured) if measured else ""}
    for name, presets in {"": BASE, "_rdm_simsiam": _rdm("simsiam"), "_rdm_byol": _rdm("byol")}.items():
        filters = curves_of(curves, presets, {"filter/root": ""})
        title, level = GALLERY[f"filters{name}"], (1.0, "no filter")
        if filters:
            out[f"filters{name}"] = style.chart(filters, direction, passed, title=title, logs="xy", level=level)
        found = curves_of(curves, presets, {"training/difference": ""})
        if found:
            out[f"training{name}"] = style.chart(found, "epoch", larger, title=GALLERY[f"training{name}"])
    found = curves_of(curves, FAMILIES, {"training/target": ""})
    if found:
        title, rank = GALLERY["training_families"], "effective rank of the target,\nin windows of a run"
        out["training_families"] = style.chart(found, "epoch", rank, title=title, logs="y")
    spectra = curves_of(curves, BASE, {"spectrum/online": "", "spectrum/target": "--"}, SMALLEST_SHARE)
    if spectra:
        out["spectra"] = style.chart(spectra, direction, share, title=GALLERY["spectra"], logs="xy")
    return {name: drawing for name, drawing in out.items() if drawing}


def _rdm(base: str) -> list[str]:
    return [preset for preset in PRESETS if preset.startswith(f"rdm_{base}")]


def _pairs(rows: Sequence[Row], ring: str, disc: str, factor: float = 1.0) -> list[style.Pair]:
    """A row for each preset, a pair for each seed; of another color where the disc is not the larger one."""
    out = []
    for preset in present(rows):
        for i, row in enumerate(of(rows, preset)):
            a, b = factor * float(row[ring]), factor * float(row[disc])
            out.append(style.Pair("" if i else preset, a, b, style.COLORS[0 if b > a else 1]))
    return out


def _gains(rows: Sequence[Row]) -> str:
    axis = "k-NN accuracy, %; ring: random encoder, disc: trained; a stroke for each seed"
    return style.dumbbells(_pairs(rows, "random", "trained", 100.0), axis, title=GALLERY["gains"])


def _ranks(measured: Sequence[Row]) -> str:
    axis = f"effective rank ({HEADLINE_CONVENTION}); ring: online, disc: target; a stroke for each run"
    return style.dumbbells(_pairs(measured, BRANCHES[0], BRANCHES[1]), axis, title=GALLERY["ranks"], log=True)


def analysis_record(found: Files, what: str) -> str:
    """The table of the analyses with its figures, and where they were made."""
    _, measured, curves = load(found)
    seconds = mean(values(measured, "cpu_seconds"))
    drawn = [name for name in GALLERY if name != "gains" and found.figure(name).exists()]
    text = f"""# The analysis on CIFAR-10, {what}

From the last checkpoints of {len(measured)} runs of `benchmarks.cifar10.reproduce`, on new views of training images: by
the runs themselves, or by `benchmarks.cifar10.analyze`. What the columns mean, and what follows: docs/theory.md.
Ranks are `{HEADLINE_CONVENTION}` of what enters the loss. Intervals: from the lowest limit to the highest over seeds,
each 95 % over images. Null: the largest value, without sign, between the two views of one branch; presets with an EMA
target augment their views differently, so theirs is not chance alone.
"""
    parts = [text, *analysis_table(measured), ""]
    parts += [f"![{GALLERY[name]}]({found.figure(name).name})" for name in drawn]
    lacking = [preset for preset in present(measured) if "training/difference" not in curves.get(preset, {})]
    if lacking:
        parts += ["", f"No folders are left, and so no curves throughout training, of {', '.join(lacking)}."]
    return "\n".join([*parts, "", f"{seconds:.0f} CPU seconds an analysis.", *made(measured), ""])


def publish(found: Files, what: str, command: str) -> None:
    """Write both records and their figures from the rows and curves that there are."""
    found.record.parent.mkdir(parents=True, exist_ok=True)
    rows, measured, curves = load(found)
    for name, drawing in figures(rows, measured, curves).items():
        found.figure(name).write_text(drawing)
    found.record.write_text(record(found, what, command))
    if measured:
        found.analysis.write_text(analysis_record(found, what))


def load(found: Files) -> tuple[list[Row], list[Row], Curves]:
    """Rows and curves that there are."""
    curves = json.loads(found.curves.read_text()) if found.curves.exists() else {}
    return common.read_rows(found.rows), common.read_rows(found.measured), curves
