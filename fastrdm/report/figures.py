"""The figures of a report, drawn from the metrics of runs. Each caption says what is shown and what is missing."""

import math
from collections.abc import Sequence

from fastrdm.monitoring.rank_statistics import HEADLINE_CONVENTION
from fastrdm.report.analysis import analysis_figures
from fastrdm.report.chart import POINTS, Axis, Chart, Figure, Level, Line, color_of
from fastrdm.report.ranks import (
    CONVENTIONS,
    RANK_KEYS,
    TAPS,
    branch_ranks,
    convention_of,
    difference_of_all,
    differences,
    spectra,
    tap_ranks,
)
from fastrdm.report.run_set import Runs, curve, curves, missing

OTHER_POINTS = 100  # points of a line in the section of everything else
ANALYSIS_PREFIX = "analysis/"  # its metrics are drawn from analysis.jsonl
DRAWN = {  # what has its place in a figure or in the table at the top
    *("knn", "knn_target", "knn_raw_pixels", "knn_random_encoder", "knn_images", "probe"),
    *("loss", "learning_rate", "images_per_second", "data_wait", "unreadable_images"),
    *("flop_utilization", "gflops", "monitor_share", "filter_share", "peak_memory_mib", "seconds_to_first_step"),
    *RANK_KEYS,
}
USE = {  # what a run took of its device: title, axis and caption of each figure that was logged
    "flop_utilization": ("Model FLOP utilization", Axis("share of the peak", percent=True, limits=(0.0,)), ""),
    "gflops": (
        "Arithmetic of a device",
        Axis("GFLOP/s", limits=(0.0,)),
        "Matrix products and convolutions of the step.",
    ),
    "monitor_share": ("Time in the monitor", Axis("share of time", percent=True, limits=(0.0,)), ""),
    "filter_share": (
        "Time in spectral filters",
        Axis("share of time", percent=True, limits=(0.0,)),
        "As long as they take alone, forward and backward, run eagerly.",
    ),
    "peak_memory_mib": ("Memory", Axis("MiB", limits=(0.0,)), "Of the process that had most, at most until then."),
}


def first(all_runs: Runs) -> list[Figure]:
    """The figures that a reader sees at once, at most a dozen: accuracy, rank, rank difference, loss, speed."""
    convention = convention_of(all_runs)
    together = difference_of_all(all_runs, HEADLINE_CONVENTION) or differences(all_runs, HEADLINE_CONVENTION)
    return [_accuracy(all_runs), *branch_ranks(all_runs, convention), *together, _loss(all_runs), _speed(all_runs)]


def folded(all_runs: Runs) -> list[tuple[str, list[Figure]]]:
    """Titles of topics and their figures, which are shown when asked for."""
    shown, several = convention_of(all_runs), len(all_runs.runs) > 1
    others = [convention for convention in CONVENTIONS if convention != shown]
    ranks = [*tap_ranks(all_runs, shown)]
    for convention in others:
        ranks += [f for f in (*branch_ranks(all_runs, convention), *tap_ranks(all_runs, convention)) if f.chart]
    beside_null = differences(all_runs, HEADLINE_CONVENTION) if several else []
    for convention in CONVENTIONS:
        if convention != HEADLINE_CONVENTION:
            beside_null += difference_of_all(all_runs, convention) + differences(all_runs, convention)
    return [
        *analysis_figures(all_runs),
        ("Rank at every tap", ranks),
        ("Rank difference beside its null", beside_null),
        ("Spectra", spectra(all_runs)),
        ("Linear probe and learning rate", [_probe(all_runs), _rate(all_runs)]),
        ("Use of the device", [_wait(all_runs), *_use(all_runs)]),
        ("Everything else that was logged", _others(all_runs)),
    ]


def _plot(
    all_runs: Runs,
    title: str,
    key: str,
    axis: Axis,
    caption: str,
    extra: Sequence[Line] = (),
    levels: Sequence[Level] = (),
    points: int = POINTS,
) -> Figure:
    """The figure of one key over epochs, a line a run."""
    lines = [*curves(all_runs, key), *extra]
    chart = Chart(lines, all_runs.epochs(), axis, levels, all_runs.marks(), points) if lines else None
    return Figure(title, (caption + missing(all_runs, key)).strip(), chart)


def _baselines(all_runs: Runs) -> list[Level]:
    """k-NN of raw pixels and of the untrained encoder, one line for runs that agree."""
    levels = []
    for key, name in (("knn_raw_pixels", "raw pixels"), ("knn_random_encoder", "random encoder")):
        values = {run.name: run.last(key) for run in all_runs.runs if math.isfinite(run.last(key))}
        for value in dict.fromkeys(values.values()):
            names = [name for name, v in values.items() if v == value]
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            of = "" if len(names) == len(values) else f" ({names[0]}{more})"
            levels.append(Level(value, f"{name} {100 * value:.1f} %{of}"))
    return levels


def _accuracy(all_runs: Runs) -> Figure:
    target = curves(all_runs, "knn_target", dash="5 3", suffix=" (EMA)")
    caption = "Of the online encoder on the test split, the model in evaluation mode."
    if target:
        caption += " Dashed: of the EMA target's encoder."
    levels = _baselines(all_runs)
    title, axis = "k-NN accuracy", Axis("accuracy", percent=True)
    return _plot(all_runs, title, "knn", axis, caption, target, levels)


def _probe(all_runs: Runs) -> Figure:
    caption = "A linear classifier trained beside the encoder, on the test split. The dashed lines are k-NN accuracies."
    axis, levels = Axis("accuracy", percent=True), _baselines(all_runs)
    return _plot(all_runs, "Accuracy of the linear probe", "probe", axis, caption, levels=levels)


def _loss(all_runs: Runs) -> Figure:
    kinds = {str(run.setting("method.alignment.name")) for run in all_runs.runs if run.config}
    caption = "Mean since the line before."
    if len(kinds) > 1:
        caption += f" Losses of different alignments ({', '.join(sorted(kinds))}) lie on different scales."
    return _plot(all_runs, "Loss", "loss", Axis("loss"), caption)


def _rate(all_runs: Runs) -> Figure:
    axis, caption = Axis("learning rate", limits=(0.0,)), "Of the encoder."
    return _plot(all_runs, "Learning rate", "learning_rate", axis, caption)


def _speed(all_runs: Runs) -> Figure:
    caption = "All processes together, evaluation and saving not counted."
    starts = {run.name: run.last("seconds_to_first_step") for run in all_runs.runs}
    times = [f"{seconds:.1f} s ({name})" for name, seconds in starts.items() if math.isfinite(seconds)]
    caption += f" From the start to the first step: {', '.join(times)}." if times else ""
    return _plot(all_runs, "Throughput", "images_per_second", Axis("images/s", limits=(0.0,)), caption)


def _wait(all_runs: Runs) -> Figure:
    axis, caption = Axis("share of time", percent=True, limits=(0.0,)), "Time in which a step waited for its images."
    return _plot(all_runs, "Data wait", "data_wait", axis, caption)


def _use(all_runs: Runs) -> list[Figure]:
    found = ((key, *drawn) for key, drawn in USE.items() if curves(all_runs, key))
    return [_plot(all_runs, title, key, axis, caption) for key, title, axis, caption in found]


def _others(all_runs: Runs) -> list[Figure]:
    """Charts of every metric that has none yet; of a single run, the metrics of all taps together."""
    keys = dict.fromkeys(key for run in all_runs.runs for key in run.names())
    rest = [
        k for k in keys if k not in DRAWN and not k.endswith(("/low", "/high")) and not k.startswith(ANALYSIS_PREFIX)
    ]
    if len(all_runs.runs) > 1:
        return [_plot(all_runs, key, key, Axis(""), "", points=OTHER_POINTS) for key in rest]
    (run,) = all_runs.runs
    groups: dict[str, list[str]] = {}
    for key in rest:
        tap, _, what = key.partition("/")
        groups.setdefault(what if tap in TAPS else key, []).append(key)
    out = []
    for title, members in groups.items():
        names = [key.removesuffix(f"/{title}") if key != title else run.name for key in members]
        lines = [curve(run, key, name, *color_of(i)) for i, (key, name) in enumerate(zip(members, names, strict=True))]
        chart = Chart(lines, all_runs.epochs(), Axis(""), marks=all_runs.marks(), points=OTHER_POINTS)
        out.append(Figure(title, "", chart))
    return out
