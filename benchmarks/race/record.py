"""Write the records of the race from their rows: `python -m benchmarks.race.record`.

records/race_proxy.md from the levers' rows, records/small_sets.md from those of the other sets, and the table of
entries in race/README.md from results/race.csv and from what others have published.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from scipy.special import stdtrit

from benchmarks import common
from benchmarks.cifar10.rows import Row
from benchmarks.race import proxy, run, sets
from benchmarks.race.levers import BASE, FIRST, SECOND, STEPS, TOGETHER

RECORDS = common.FOLDER / "records"
NOTES = common.FOLDER / "results" / "race_proxy_notes.md"
PAGE = Path(__file__).parent / "README.md"
START, END = "<!-- entries: python -m benchmarks.race.record -->", "<!-- end of entries -->"
OPTIONS = {  # of the evaluation, which cost no training: column against column of the same run
    "whitened features": ("knn10_whitened", "knn10"),
    "features of the moving average": ("knn10_target", "knn10"),
    "projection in place of features": ("knn10_projection", "knn10"),
    "200 neighbors in place of 10": ("knn200", "knn10"),
    "linear classifier in place of k-NN": ("linear", "knn10"),
}
PUBLISHED = [  # entry, hardware, minutes, k-NN of 10, k-NN of 200, linear, seeds, source
    ("SimCLR, 500 epochs: the challenge", "A100", "99", "90.3", "", "", "3", "dkobak/simclr-cifar10"),
    ("SimCLR, 100 epochs", "A100", "20", "83.2", "", "85.6", "3", "dkobak/simclr-cifar10"),
    ("SimCLR, 1,000 epochs", "A100", "198 (from 11.9 s an epoch)", "91.4", "", "91.7", "3", "dkobak/simclr-cifar10"),
    ("FastSiam, 200 epochs, batch 128", "A6000", "164.0", "", "90.6 (best epoch)", "", "1", "lightly"),
    ("BYOL, 200 epochs, batch 512", "A6000", "108.3", "", "86.8 (best epoch)", "", "1", "lightly"),
    ("SimSiam, 200 epochs, batch 512", "A6000", "87.8", "", "76.4 (best epoch)", "", "1", "lightly"),
    ("SimSiam, 800 epochs, batch 512", "A6000", "333.7", "", "90.4 (best epoch)", "", "1", "lightly"),
]


def differences(rows: Sequence[Row], name: str, column: str = "knn10") -> list[float]:
    """Points that a lever adds to the base, one for each seed that both have."""
    base = {row["seed"]: float(row[column]) for row in rows if row["lever"] == "base"}
    return [100 * (float(r[column]) - base[r["seed"]]) for r in rows if r["lever"] == name and r["seed"] in base]


def pooled(groups: Sequence[Sequence[float]]) -> tuple[float, int]:
    """Standard deviation within groups, as if all had the same, and its degrees of freedom; (nan, 0) without any."""
    degrees = sum(len(group) - 1 for group in groups)
    if not degrees:
        return math.nan, 0
    return math.sqrt(sum((x - mean(group)) ** 2 for group in groups for x in group) / degrees), degrees


def half_width(spread: float, degrees: int, count: int) -> float:
    """Half of the 95 % interval of the mean of `count` values, by Student's t."""
    return float(stdtrit(degrees, 0.975)) * spread / math.sqrt(count) if degrees else math.nan


def levers_table(rows: Sequence[Row]) -> list[str]:
    """A line for each lever with rows, the largest gain first."""
    levers = {lever.name: lever for lever in (*FIRST, *SECOND, *TOGETHER)}
    gains = {name: found for name in levers if name != "base" and (found := differences(rows, name))}
    spread, degrees = pooled(list(gains.values()))
    lines = ["| lever | group | seeds | steps | k-NN | k-NN against the base, points | linear, points |"]
    lines.append("|---" * 7 + "|")
    base = [row for row in rows if row["lever"] == "base"]
    accuracy = 100 * mean(float(row["knn10"]) for row in base)
    lines.append(f"| base | | {len(base)} | {base[0]['steps']} | {accuracy:.1f} % | | |")
    for name in sorted(gains, key=lambda name: -mean(gains[name])):
        mine = [row for row in rows if row["lever"] == name]
        half = half_width(spread, degrees, len(gains[name]))
        accuracy = 100 * mean(float(row["knn10"]) for row in mine)
        linear = mean(differences(rows, name, "linear"))
        told = f"{name}: {levers[name].what}" if levers[name].what else name
        lines.append(
            f"| {told} | {levers[name].group} | {len(mine)} | {mine[0]['steps']} | {accuracy:.1f} % "
            f"| {mean(gains[name]):+.1f} ± {half:.1f} | {linear:+.1f} |"
        )
    return lines


def options_table(rows: Sequence[Row]) -> list[str]:
    """A line for each way to evaluate: what it adds, over all runs that have both numbers."""
    lines = ["| evaluation | runs | points against k-NN of 10 on the online encoder's features |", "|---" * 3 + "|"]
    for name, (column, against) in OPTIONS.items():
        found = [100 * (float(row[column]) - float(row[against])) for row in rows if row[column]]
        half = half_width(stdev(found), len(found) - 1, len(found)) if len(found) > 1 else math.nan
        lines.append(f"| {name} | {len(found)} | {mean(found):+.1f} ± {half:.1f} |")
    return lines


def machine(rows: Sequence[Row]) -> str:
    """Where rows were measured."""
    told = [" and ".join(sorted({row[key] for row in rows})) for key in ("torch", "device", "commit")]
    return f"torch {told[0]}, {told[1]}; commits {told[2]}."


def proxy_record(rows: Sequence[Row], notes: str) -> str:
    """How the levers were compared, what somebody read from the rows, and the tables."""
    names = {row["lever"] for row in rows}
    spread, degrees = pooled([differences(rows, name) for name in names - {"base"}])
    seconds = [float(row["cpu_seconds"]) for row in rows]
    missing = [lever.name for lever in (*FIRST, *SECOND, *TOGETHER) if lever.name not in names]
    return f"""# What makes a short run better: levers at equal processor time

Made by `python -m benchmarks.race.proxy --data FOLDER` and `python -m benchmarks.race.record`.

{len(rows)} runs in {sum(seconds) / 60:.0f} CPU minutes of training. Each contestant is the base with some settings
changed, and gets as many optimizer steps as cost what the base's cost: steps of both are timed in turns, in processor
time, and the ratio of the medians is applied to the base's {STEPS} steps. Runs took {min(seconds):.0f} to
{max(seconds):.0f} CPU seconds, which differ because others used the machine too.

The base is `{" ".join(BASE[:4])}`: RDM's target filter of power
-1 on BYOL's terms, batch 128, SGD at 0.3 for a batch of 256, a momentum of the average from 0.95 to 1. Accuracies are
those of the online encoder's features on the 10,000 test images: k-NN of 10 neighbors by cosine, weighted at
temperature 0.07, and ridge regression.

Differences are paired: a seed has the same first weights and order of images in all runs. Intervals are 95 %, by
Student's t from one standard deviation for all levers: {spread:.2f} points of a paired difference, with {degrees}
degrees of freedom. They do not account for the number of levers: of twenty without effect, one is expected outside
its interval.

{notes.strip()}

## Levers

{chr(10).join(levers_table(rows))}

{f"Not run yet: {', '.join(missing)}." if missing else "All levers have been run."}

## Evaluation

Of all runs, each against itself:

{chr(10).join(options_table(rows))}

{machine(rows)}
"""


def sets_record(rows: Sequence[Row]) -> str:
    """The tables of the other sets."""
    lines = [
        "# Two more sets, with CIFAR-10's settings\n",
        "Made by `python -m benchmarks.race.sets --cifar100 FOLDER --photos FOLDER` and",
        "`python -m benchmarks.race.record`. One seed each, nothing tuned: what is chosen on CIFAR-10 is not to be",
        "believed where it fails here. Intervals are 95 % from the number of test images alone; seeds differ by more.",
        "k-NN of 20 neighbors by cosine, linear by ridge regression.",
    ]
    for name, told in (("cifar100", "a part of CIFAR-100"), ("photos", "photographs of ten classes at 64 px")):
        mine = [row for row in rows if row["set"] == name]
        if not mine:
            continue
        images, pixels = int(mine[0]["images"]), 100 * float(mine[0]["raw_pixels"])
        lines.append(f"\n## {told[0].upper() + told[1:]}\n")
        lines.append(
            f"{images:,} training images, {mine[0]['steps']} steps at batch 128. Raw pixels: {pixels:.1f} %.\n"
        )
        lines += ["| preset | random encoder | trained | 95 % | linear | rank | CPU s |", "|---" * 7 + "|"]
        for row in sorted(mine, key=lambda row: -float(row["knn"])):
            random, knn, low, high, linear = (
                f"{100 * float(row[key]):.1f}" for key in ("random", "knn", "low", "high", "linear")
            )
            lines.append(
                f"| {row['preset']} | {random} % | {knn} % | {low} to {high} | {linear} % "
                f"| {float(row['rank']):.1f} | {float(row['cpu_seconds']):.0f} |"
            )
    return "\n".join([*lines, f"\n{machine(rows)}\n"])


def spread_of(rows: Sequence[Row], column: str) -> str:
    """Mean of a share in percent, with its standard deviation over seeds where there are several."""
    values = [100 * float(row[column]) for row in rows]
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def entries_table(rows: Sequence[Row]) -> list[str]:
    """Our entries, those that have not been run as well, and those of others."""
    head = ["entry", "hardware", "minutes", "k-NN (10)", "k-NN (200)", "linear", "seeds", "commit or source"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, entry in run.ENTRIES.items():
        mine = [row for row in rows if row["entry"] == name]
        told = f"`{name}`: {entry.what}"
        if not mine:
            lines.append(f"| {told} | not yet run | | | | | 0 | |")
            continue
        minutes = mean(float(row["seconds"]) for row in mine) / 60
        accuracies = [spread_of(mine, column) for column in ("knn10", "knn200", "linear")]
        cells = [told, mine[0]["device"], f"{minutes:.1f}", *accuracies, str(len(mine)), mine[-1]["commit"]]
        lines.append(f"| {' | '.join(cells)} |")
    return lines + [f"| {' | '.join(row)} |" for row in PUBLISHED]


def main() -> None:
    common.parser(__doc__).parse_args()
    levers, others = common.read_rows(proxy.ROWS), common.read_rows(sets.ROWS)
    if levers:
        notes = NOTES.read_text() if NOTES.exists() else ""
        (RECORDS / "race_proxy.md").write_text(proxy_record(levers, notes))
    if others:
        (RECORDS / "small_sets.md").write_text(sets_record(others))
    before, _, rest = PAGE.read_text().partition(START)
    table = "\n".join(entries_table(common.read_rows(run.ROWS)))
    PAGE.write_text(f"{before}{START}\n\n{table}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
