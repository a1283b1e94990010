"""Files of a run's folder, read as far as they go. A half-written run is a run, and missing files are named."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from fastrdm.config import tree as trees
from fastrdm.config.tree import Tree
from fastrdm.monitoring.verdict import Verdict, judge
from fastrdm.report.jsonl import first_lines, read_lines

METRICS, SPECTRA, ALARMS = "metrics.jsonl", "spectra.jsonl", "alarms.jsonl"
ANALYSIS, ANALYSIS_AT_END = "analysis.jsonl", "analysis.json"
SUMMARY, CONFIG = "summary.json", "config.yaml"
FILES = (METRICS, CONFIG, SUMMARY, ALARMS, SPECTRA, ANALYSIS, ANALYSIS_AT_END)
OPTIONAL = (SPECTRA, ALARMS, ANALYSIS, ANALYSIS_AT_END)
Series = tuple[list[float], list[float]]  # epochs and values


class Measurement(NamedTuple):
    """One analysis of a run with frozen weights."""

    epoch: float
    metrics: Tree
    curves: dict[str, Series]  # over the number of the direction, from 1

    def metric(self, key: str) -> float:
        return number(self.metrics.get(key))


@dataclass(frozen=True, eq=False)
class Run:
    """One run as its files tell it."""

    name: str
    folder: Path
    metrics: list[Tree]  # lines of metrics.jsonl: step, epoch, time and metrics
    spectra: list[Tree]
    alarms: list[Tree]
    analysis: list[Measurement]
    config: Tree
    summary: Tree | None  # none: the run did not finish
    versions: Tree  # of the newest checkpoint
    problems: list[str]  # what is missing or could not be read

    def series(self, key: str) -> Series:
        """Epochs and values of one metric. A value that is no number is a gap."""
        return self._series.get(key, ([], []))

    @cached_property
    def _series(self) -> dict[str, Series]:
        """Every series, gathered in one pass."""
        found: dict[str, Series] = {}
        for line in self.metrics:
            for key, value in line.items():
                epochs, values = found.setdefault(key, ([], []))
                epochs.append(line["epoch"])
                values.append(number(value))
        return found

    def last(self, key: str) -> float:
        """The newest finite value, NaN without one."""
        return next((v for v in reversed(self.series(key)[1]) if math.isfinite(v)), math.nan)

    def names(self) -> list[str]:
        """Names of all metrics, in the order in which they appear."""
        return list(dict.fromkeys(key for line in self.metrics for key in line if key not in ("step", "epoch", "time")))

    def verdict(self) -> Verdict:
        """The state of the run, from its metrics and from what stopped it."""
        return self._verdict

    @cached_property
    def _verdict(self) -> Verdict:
        batch, parts = self.setting("loader.batch_size"), self.setting("train.accumulate") or 1
        images = batch // parts if isinstance(batch, int) and isinstance(parts, int) else None
        stopped = [{"loss": math.nan} for alarm in self.alarms if alarm["alarm"] == "non_finite_loss"]
        return judge([*self.metrics, *stopped], images)

    def setting(self, key: str) -> Any:
        """The value of a setting such as `train.length`, None where it is not known."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value


def number(value: object) -> float:
    """The value as a float; NaN if it is no number."""
    return float(value) if isinstance(value, int | float) else math.nan


def is_run(folder: Path) -> bool:
    return any((folder / file).is_file() for file in FILES)


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """The runs in these folders; ValueError names a path that is none."""
    folders = [Path(path) for path in paths]
    for folder in folders:
        if not is_run(folder):
            raise ValueError(f"RUN must be the folder of a run, got {str(folder)!r}, {_what_else(folder)}")
    return [_read(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def _what_else(folder: Path) -> str:
    if not folder.is_dir():
        return "which is no folder" if folder.exists() else "which does not exist"
    inside = sorted(str(f) for f in folder.iterdir() if f.is_dir() and is_run(f))
    if inside:
        return f"which holds runs: did you mean {' '.join(inside[:4])}{' ...' if len(inside) > 4 else ''}?"
    return f"which holds none of {', '.join(FILES)}"


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' last parts, as many as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    longest = max(map(len, parts))
    for count in range(1, longest + 1):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(set(parts)):
            break
    return [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names, 1)]


def _read(folder: Path, name: str) -> Run:
    problems: list[str] = []
    metrics = _lines(folder / METRICS, problems, needed=("step", "epoch"))
    spectra = _lines(folder / SPECTRA, problems, needed=("epoch", "tap", "convention", "ranks", "eigenvalues"))
    alarms = _lines(folder / ALARMS, problems, needed=("epoch", "alarm"), first_of=("alarm", "tap"))
    analysis = _analysis(folder, metrics[-1]["epoch"] if metrics else 0.0, problems)
    config = _tree(folder / CONFIG, problems) or {}
    summary = _tree(folder / SUMMARY, problems)
    metas = sorted(folder.glob("checkpoints/step-*/meta.json"))
    versions = (_tree(metas[-1], problems) or {}).get("versions") if metas else None
    if not isinstance(versions, dict):
        problems.append("no checkpoint that names versions and device")
        versions = {}
    return Run(name, folder, metrics, spectra, alarms, analysis, config, summary, versions, problems)


def _analysis(folder: Path, end: float, problems: list[str]) -> list[Measurement]:
    """Analyses made while the run went on; without any, the one that `fastrdm analyze` made after its end."""
    lines = _lines(folder / ANALYSIS, problems, needed=("epoch", "metrics", "curves"))
    if not lines and (folder / ANALYSIS_AT_END).is_file():
        tree = _tree(folder / ANALYSIS_AT_END, problems) or {}
        if all(_usable(tree, key) for key in ("metrics", "curves")):
            lines = [{"epoch": end, **tree}]
    return [Measurement(line["epoch"], line["metrics"], _curves(line["curves"])) for line in lines]


def _curves(found: Tree) -> dict[str, Series]:
    """Curves by name, from lists of [number, value] or of values alone."""
    curves = {}
    for name, values in found.items():
        pairs = [v if isinstance(v, list) else (i, v) for i, v in enumerate(values, 1)]
        curves[name] = [number(i) for i, _ in pairs], [number(v) for _, v in pairs]
    return curves


def _lines(file: Path, problems: list[str], needed: Sequence[str], first_of: Sequence[str] = ()) -> list[Tree]:
    """The objects of a file of JSON lines that have all `needed` keys, thinned; what else stands there is counted.

    `first_of`: names of values; only the first object of each combination of them is given, with their number.
    """

    def usable(line: Tree) -> bool:
        return all(_usable(line, key) for key in needed)

    try:
        found = first_lines(file, usable, first_of) if first_of else read_lines(file, usable)
    except OSError as error:
        _missing(file, error, problems)
        return []
    if found.unread:
        cut = ", the last one cut off" if found.cut else ""
        problems.append(f"{file.name}: {found.unread} of {found.total} lines could not be read{cut}")
    if not found.trees and file.name == METRICS:
        problems.append(f"{file.name}: no metrics yet")
    return found.trees


def _usable(line: Tree, key: str) -> bool:
    if key in ("step", "epoch"):
        return math.isfinite(number(line.get(key)))
    if key in ("ranks", "eigenvalues"):
        return isinstance(line.get(key), list)
    if key in ("metrics", "curves"):
        return isinstance(line.get(key), dict)
    return isinstance(line.get(key), str)


def _missing(file: Path, error: OSError, problems: list[str]) -> None:
    """Note a file that is not there, unless it may be missing, or that cannot be read."""
    if not isinstance(error, FileNotFoundError):
        problems.append(f"{file.name}: {error.strerror}")
    elif file.name not in OPTIONAL:
        problems.append(f"no {file.name}{': the run has not finished' if file.name == SUMMARY else ''}")


def _tree(file: Path, problems: list[str]) -> Tree | None:
    """The keys and values of a JSON or YAML file."""
    try:
        content = file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        _missing(file, error, problems)
        return None
    try:
        tree = json.loads(content) if file.suffix == ".json" else trees.parse(content, file.name)
    except (ValueError, RecursionError):
        tree = None
    if not isinstance(tree, dict):
        problems.append(f"{file.name}: could not be read")
        return None
    return tree
