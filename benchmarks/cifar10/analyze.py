"""Analyze finished CIFAR-10 runs that have no analysis of their own, and write the records anew.

    python -m benchmarks.cifar10.analyze FOLDER [--again PRESET ...]

FOLDER holds runs named PRESET-SEED, as benchmarks.cifar10.reproduce leaves them. A run without a row becomes one of
results/analysis_cifar10_cpu.csv; its rows of before are replaced where --again names its preset. One process, one
thread: about 12 CPU seconds a run.
"""

import json
import time
from pathlib import Path

import torch

from benchmarks import common
from benchmarks.cifar10.record import ALIASES, files, publish
from benchmarks.cifar10.reproduce import BUDGETS, keep_curves
from benchmarks.cifar10.rows import MEASURED, append, measured_row
from fastrdm.analysis.spectral_analysis import summary_lines
from fastrdm.commands.analyze import FILE, analyze_run
from fastrdm.methods.presets import PRESETS
from fastrdm.report.run_files import read_runs

COMMAND = "python -m benchmarks.cifar10.reproduce --root FOLDER"


def finished(folder: Path) -> list[tuple[str, int, Path]]:
    """Preset, seed and folder of every run that is complete."""
    runs = [file.parent for file in sorted(folder.glob("*/summary.json"))]
    named = [(*run.name.rpartition("-")[::2], run) for run in runs]
    return [(preset, int(seed), run) for preset, seed, run in named if preset in PRESETS and seed.isdecimal()]


def measure(preset: str, seed: int, run: Path) -> dict[str, object]:
    """The row of a run; its curves stay in its folder."""
    began = time.process_time()
    found = analyze_run(run)
    (run / FILE).write_text(json.dumps(found._asdict()))
    seconds = time.process_time() - began
    print(f"{preset} seed {seed}, {seconds:.1f} CPU s", *summary_lines(found.metrics), sep="\n  ", flush=True)
    (read,) = read_runs([run])
    return measured_row(preset, seed, read.analysis[-1], seconds, "cpu")


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--again", nargs="+", default=[], choices=[p for p in PRESETS if p not in ALIASES])
    parser.add_argument("--out", type=Path, default=common.FOLDER, help="folder of results/ and records/")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = files("cpu", arguments.out)
    known = {(row["preset"], int(row["seed"])) for row in common.read_rows(found.measured)}
    for preset, seed, run in finished(arguments.folder):
        fresh = preset in arguments.again and not (run / FILE).exists()
        if fresh or (preset, seed) not in known:
            append(found.measured, measure(preset, seed, run), MEASURED)
    keep_curves(found, arguments.folder)
    publish(found, BUDGETS["cpu"].what, COMMAND)


if __name__ == "__main__":
    main()
