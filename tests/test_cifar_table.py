"""The table of benchmarks/records/cifar10_cpu.md can be made again: some 30 CPU minutes."""

import csv
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DATA = ROOT / "data" / "cifar10"


@pytest.mark.slow
@pytest.mark.skipif(not DATA.exists(), reason="needs CIFAR-10 in data/cifar10, which is no part of the repository")
def test_training_beats_the_random_encoder_by_five_points(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "reproduce_cifar.py"
    command = [
        sys.executable,
        str(script),
        "--root",
        str(DATA),
        "--runs",
        str(tmp_path / "runs"),
        "--out",
        str(tmp_path),
    ]
    subprocess.run(command, check=True)
    with (tmp_path / "results" / "cifar10_cpu.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for preset in ("simsiam", "byol", "rdm_simsiam", "rdm_simsiam_log1p"):
        gains = [float(r["trained"]) - float(r["random"]) for r in rows if r["preset"] == preset]
        assert len(gains) == 3
        mean, half = statistics.mean(gains), 4.303 * statistics.stdev(gains) / 3**0.5
        assert mean >= 0.05 and mean - half > 0, f"{preset}: {gains}"
