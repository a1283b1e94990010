"""Judge every figure by the labelled runs, and write records/verdict.md: `python -m benchmarks.verdict.record`.

Seeds 0 and 1 choose a threshold for each figure, seeds 2 and 3 judge it. The label of a run is its outcome (truth.py).
"""

import csv
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from statistics import median
from typing import NamedTuple

from benchmarks.verdict.arms import CHOOSE, JUDGE
from benchmarks.verdict.runs import HERE, ROWS, SERIES
from benchmarks.verdict.truth import Outcome, label
from fastrdm.monitoring.alarms import Alarms, AlarmsConfig, LossRange, replay
from fastrdm.monitoring.verdict import READINGS, judge
from fastrdm.schema import Horizon

RECORD = HERE / "records" / "verdict.md"
COLLAPSED = ("dimensional collapse", "complete collapse")
TAPS = ("online", "target", "online_scores", "target_scores", "hidden", "features")
CONVENTIONS = ("erank_l/unit/moment", "erank_l/unit/cov")
FIGURES = (*CONVENTIONS, "std", "participation_ratio", "stable_rank", "top_share", "slope")


class Labelled(NamedTuple):
    """A run: what it logged, and what became of it."""

    data: str
    arm: str
    seed: int
    expected: str
    outcome: Outcome
    state: str
    batch: int
    losses: LossRange
    horizon: Horizon
    series: dict[str, list[float | None]]

    @property
    def collapsed(self) -> bool:
        return self.state in COLLAPSED

    @property
    def lines(self) -> list[dict[str, float]]:
        """Its metrics.jsonl, without what was rounded away."""
        columns = self.series.items()
        count = len(self.series["step"])
        return [{key: v for key, values in columns if (v := values[i]) is not None} for i in range(count)]

    def last(self, key: str) -> float:
        """Median of the newest readings, NaN without any."""
        values = [v for v in self.series.get(key, []) if v is not None][-READINGS:]
        return median(values) if values else math.nan


def number(text: str) -> float:
    return float(text) if text else math.nan


def load() -> list[Labelled]:
    """All runs of the table, with their series."""
    records = [json.loads(line) for line in SERIES.read_text().splitlines()]
    found = {(r["data"], r["arm"], str(r["seed"])): r for r in records}
    runs = []
    with ROWS.open(newline="") as lines:
        for row in csv.DictReader(lines):
            outcome = Outcome(*(number(row[name]) for name in Outcome._fields))
            record = found[row["data"], row["arm"], row["seed"]]
            state = label(outcome)
            horizon = Horizon(record["steps_per_epoch"], record["total"])
            about = int(row["seed"]), row["expected"], outcome, state, record["batch"]
            losses = LossRange(*record["losses"])
            runs.append(Labelled(row["data"], row["arm"], *about, losses, horizon, record["series"]))
    return runs


class Score(NamedTuple):
    """How a threshold does on some runs: a collapse is what it should find."""

    hits: int
    misses: int
    false_alarms: int
    passed: int

    @property
    def right(self) -> float:
        return (self.hits + self.passed) / max(sum(self), 1)

    @property
    def balanced(self) -> float:
        """Mean share of right answers over collapsed runs and others."""
        found, let = (a / max(a + b, 1) for a, b in ((self.hits, self.misses), (self.passed, self.false_alarms)))
        return (found + let) / 2


def score(runs: Sequence[Labelled], alarm: Callable[[Labelled], bool]) -> Score:
    counts = Counter((run.collapsed, alarm(run)) for run in runs)
    return Score(counts[True, True], counts[True, False], counts[False, True], counts[False, False])


def thresholds(values: Sequence[float]) -> Iterator[float]:
    """Between neighbouring values."""
    ordered = sorted(set(values))
    yield from ((a + b) / 2 for a, b in pairwise(ordered))


class Judged(NamedTuple):
    """A figure with its best threshold."""

    figure: str
    low: bool  # a collapse lies below the threshold
    threshold: float
    chosen: Score
    judged: Score


def best(name: str, value: Callable[[Labelled], float], runs: Sequence[Labelled]) -> Judged | None:
    """The threshold and direction with the most right on the seeds that choose; judged on the others."""
    having = [run for run in runs if math.isfinite(value(run))]
    chosen = [run for run in having if run.seed in CHOOSE]
    judged = [run for run in having if run.seed in JUDGE]
    tried = []
    for threshold in thresholds([value(run) for run in chosen]):
        for low in (True, False):
            found = score(chosen, lambda run, t=threshold, low=low: (value(run) < t) == low)  # type: ignore[misc]
            tried.append((found.balanced, found.right, threshold, low, found))
    if not tried:
        return None
    _, _, threshold, low, found = max(tried, key=lambda row: row[:2])
    return Judged(name, low, threshold, found, score(judged, lambda run: (value(run) < threshold) == low))


def place(run: Labelled, tap: str) -> str:
    """`loss`: the scores of the target where there are prototypes, else its features; likewise for online."""
    return f"{tap}_scores" if f"{tap}_scores/std/batch" in run.series else tap


def candidates(runs: Sequence[Labelled]) -> list[Judged]:
    """Every figure at every tap, of batches and of windows."""
    out = []
    for source in ("batch", "window"):
        for figure in FIGURES:
            for tap in TAPS:

                def value(run: Labelled, tap: str = tap, figure: str = figure, source: str = source) -> float:
                    return run.last(f"{tap}/{figure}/{source}")

                out.append(best(f"{tap}/{figure}/{source}", value, runs))
    for key in ("loss", "rankme", "lidar", *(f"difference/{c}/window" for c in CONVENTIONS)):
        out.append(best(key, lambda run, key=key: run.last(key), runs))
    return sorted((j for j in out if j), key=lambda j: (-j.judged.balanced, -j.judged.right))


def table(found: Sequence[Judged]) -> list[str]:
    head = "| figure | collapse | chosen: hits, misses, false alarms | judged: the same | right | balanced |"
    rows = [head, "|---|---|---|---|---|---|"]
    for j in found:
        side = f"{'below' if j.low else 'above'} {j.threshold:.3g}"
        a, b = (f"{s.hits}, {s.misses}, {s.false_alarms} of {sum(s)}" for s in (j.chosen, j.judged))
        rows.append(f"| `{j.figure}` | {side} | {a} | {b} | {j.judged.right:.0%} | {j.judged.balanced:.0%} |")
    return rows


def alarmed(run: Labelled) -> list[str]:
    """The alarms that a run raises, as `kind at tap`."""
    alarms = Alarms(AlarmsConfig(), run.losses, run.horizon)
    return list(dict.fromkeys(f"{a.alarm.replace('_', ' ')} at {a.tap}" for _, a in replay(alarms, run.lines)))


def main() -> None:
    runs = load()
    print(Counter((run.expected, run.state) for run in runs))
    print(*table(candidates(runs)), sep="\n")
    confusion = Counter((run.state, judge(run.lines, run.batch).state) for run in runs)
    print(*confusion.items(), sep="\n")
    for run in runs:
        v = judge(run.lines, run.batch)
        if v.state != run.state:
            print(run.data, run.arm, run.seed, "label", run.state, "|", v.text, "|", run.outcome)
    for kind in sorted({a for run in runs for a in alarmed(run)}):
        print(
            kind,
            Counter(run.state for run in runs if kind in alarmed(run)),
            [(run.arm, run.seed) for run in runs if not run.collapsed and kind in alarmed(run)],
        )


if __name__ == "__main__":
    main()
