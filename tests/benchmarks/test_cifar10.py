"""benchmarks/cifar10/reproduce.py: the list of its runs, what it writes, and that it goes on where it stopped."""

import csv
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.cifar10 import reproduce
from benchmarks.cifar10.record import ALIASES, files, present, publish, table
from benchmarks.cifar10.reproduce import BUDGETS, FIRST, ORDER, PUBLISHED, Budget, Job, contestant, jobs
from benchmarks.cifar10.rows import DIFFERENCE, FIELDS, MEASURED, METRICS, append, at, over_directions
from benchmarks.common import read_rows
from fastrdm.config import run_config
from fastrdm.methods.presets import PRESETS

ROOT = Path(__file__).parents[2]
DATA = ROOT / "data" / "cifar10"


def test_names_that_are_not_run_mean_the_same_run() -> None:
    for alias, preset in ALIASES.items():
        assert PRESETS[alias] == PRESETS[preset]
    assert sorted([*ORDER, *ALIASES]) == sorted(PRESETS)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_run_is_a_configuration(preset: str) -> None:
    for budget in (budget for budget in BUDGETS.values() if not budget.published or preset in PUBLISHED):
        c = run_config.load([*contestant(preset, budget), f"preset={preset}", *budget.settings])
        assert c.preset == preset and c.train.device == budget.device and c.analysis.every != "0st"
        assert (c.encoder.name, c.loader.subset) == (
            ("resnet18", None) if budget.device == "cuda" else ("resnet_small", 5000)
        )
    lengths = {name: b.settings[0] for name, b in BUDGETS.items() if name != "cpu"}
    epochs = {"gpu": 100, "gpu400": 400, "lightly200": 200, "lightly800": 800}
    assert lengths == {name: f"train.length={n}ep" for name, n in epochs.items()}


def test_a_gpu_starts_with_the_published_schedules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []

    def work(waiting: list[Job], budget: Budget, *others: Any) -> list[Job]:
        begun.extend(" ".join(contestant(job.preset, budget)) for job in waiting)
        return []

    monkeypatch.setattr(reproduce, "work", work)
    command = ["reproduce", "--root", "x", "--budget", "gpu", "--out", str(tmp_path), "--runs", str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", command)
    reproduce.main()
    assert begun[:4] == [" ".join(found) for found in PUBLISHED.values()]
    assert begun[4:] == ["cifar10/resnet18.yaml"] * 3 * len(ORDER)
    assert (tmp_path / "records" / "cifar10_lightly200.md").exists()


def test_runs_come_in_order_of_priority_and_none_twice(tmp_path: Path) -> None:
    found = files("cpu", tmp_path)
    found.rows.parent.mkdir()
    whole = [(job.preset, job.seed) for job in jobs(ORDER, 3, found, tmp_path)]
    assert len(set(whole)) == len(whole) == 3 * len(ORDER)
    assert whole[: len(FIRST)] == [(preset, 0) for preset in FIRST] and {p for p, _ in whole[: 3 * len(FIRST)]} == {
        *FIRST
    }
    append(found.rows, {"preset": "byol", "seed": 1}, FIELDS)
    assert [(job.preset, job.seed) for job in jobs(ORDER, 3, found, tmp_path)] == [w for w in whole if w != ("byol", 1)]


def row(preset: str, seed: int, trained: float, **more: Any) -> dict[str, Any]:
    metrics = {"random": 0.25, "trained": trained, "probe": 0.5, "rank_online": 2.0, "rank_target": 4.0, "loss": 1.0}
    where = {"alarms": "", "cpu_seconds": 100, "commit": "abc", "torch": "2", "device": "a CPU"}
    return {"preset": preset, "seed": seed, **metrics, "raw_pixels": 0.375, **where, **more}


def test_the_record_holds_mean_spread_rank_difference_and_alarms(tmp_path: Path) -> None:
    found = files("cpu", tmp_path)
    found.rows.parent.mkdir()
    for seed, trained in enumerate((0.375, 0.40, 0.425)):
        append(found.rows, row("simsiam", seed, trained), FIELDS)
        measured = dict.fromkeys(METRICS, 1.0) | {DIFFERENCE: 2.0 + seed, f"{DIFFERENCE}/low": 1.5 + seed}
        measured |= {f"{DIFFERENCE}/high": 2.5 + seed, "null/online/erank_l/unit/moment": -0.25 * seed}
        where = {"cpu_seconds": 8, "commit": "abc", "torch": "2", "device": "a CPU"}
        append(found.measured, {"preset": "simsiam", "seed": seed, **measured, **where}, MEASURED)
    append(found.rows, row("symsimsiam", 0, 0.26, alarms="dimensional_collapse"), FIELDS)
    found.notes.write_text("What somebody read.\n")
    publish(found, "a title", "the command")
    text = found.record.read_text()
    gain = 4.3027 * 2.5 / 3**0.5
    line = f"| simsiam | 3 | 25.0 % | 40.0 % | 2.5 | +15.0 ± {gain:.1f} | 50.0 % | +3.00 [+1.50, +4.50] | 1.00 |"
    assert f"{line} low-pass |  |" in text.splitlines()
    assert (
        "| symsimsiam | 1 | 25.0 % | 26.0 % | - | +1.0 | 50.0 % | not measured | - | - | dimensional collapse (1) |"
        in text
    )
    assert "- `symsimsiam`, +1.0: alarms: dimensional collapse (1)." in text and "`simsiam`, +" not in text
    assert "What somebody read." in text and "`rdm_byol_target0.5` is `rdm_byol` by another name" in text
    assert "torch 2, a CPU; commits abc." in text
    assert "| simsiam | 3 | 1.0 | 1.0 | +3.00 [+1.50, +4.50] | 1.00 |" in found.analysis.read_text()
    drawn = {path.name for path in found.record.parent.glob("*.svg")}
    assert drawn == {"cifar10_cpu_gains.svg", "cifar10_cpu_ranks.svg"}
    assert all(f"({name})" in text + found.analysis.read_text() for name in drawn)


def test_a_budget_without_runs_has_an_empty_record(tmp_path: Path) -> None:
    found = files("gpu", tmp_path)
    publish(found, "ResNet-18", "the command")
    assert "No run has been made yet" in found.record.read_text()
    assert not found.analysis.exists()


def test_rows_of_the_record_are_read_as_they_are() -> None:
    """Files of earlier versions of the script."""
    found = files("cpu")
    rows, measured = read_rows(found.rows), read_rows(found.measured)
    assert list(rows[0]) == FIELDS and list(measured[0]) == MEASURED
    assert len({(r["preset"], r["seed"]) for r in rows}) == len(rows)
    assert len(table(rows, measured)) == 2 + len(present(rows))
    assert table(rows, measured) == [
        line for line in found.record.read_text().splitlines() if line in table(rows, measured)
    ]


def test_curves_are_joined_over_seeds() -> None:
    assert at(([1.0, 4.0], [1.0, 16.0]), 2) == pytest.approx(4.0)
    x, y = over_directions([([1.0, 2.0, 4.0], [1.0, 1.0, 1.0]), ([1.0, 4.0, 8.0], [4.0, 16.0, 1.0])])
    assert x == [1.0, 2.0, 3.0, 4.0] and y[0] == 2.0 and y[1] == pytest.approx(8**0.5, rel=1e-3) and y[-1] == 4.0


def tiny(root: Path) -> None:
    """CIFAR-10 of noise: enough for the smallest of runs."""
    images = np.random.default_rng(0).integers(0, 256, (200, 32, 32, 3), np.uint8)
    for split, part in (("train", images[:160]), ("test", images[160:])):
        np.save(root / f"{split}.images.npy", part)
        np.save(root / f"{split}.labels.npy", (np.arange(len(part)) % 10).astype(np.uint8))


def test_a_run_is_interrupted_goes_on_and_becomes_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(tmp_path)
    run = "from benchmarks.cifar10 import reproduce as r; r.MINUTES_LEFT = 0.0; r.main()"
    call = [sys.executable, "-c", run, "--root", str(tmp_path), "--seeds", "1", "--jobs", "1"]
    call += ["--presets", "rdm_simsiam_log1p", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path)]
    call += ["train.length=3ep", "loader.subset=160", "loader.batch_size=32", "encoder.width=8"]
    call += ["loader.views.*.size=16", "method.projector.hidden=16", "method.projector.out=16"]
    call += ["analysis.every=50%", "analysis.replicates=10"]
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    short = subprocess.run([*call, "--minutes", "0.02"], capture_output=True, text=True, timeout=900)
    assert short.returncode == 0, short.stderr
    assert "rdm_simsiam_log1p, seed 0: saved, goes on at the next call" in short.stdout
    assert "0 rows, 0 runs not begun" in short.stdout
    done = subprocess.run(call, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "results" / "cifar10_cpu.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    (found,) = rows
    assert found["preset"] == "rdm_simsiam_log1p" and float(found["cpu_seconds"]) > 0
    with (tmp_path / "results" / "analysis_cifar10_cpu.csv").open(newline="") as file:
        (measured,) = csv.DictReader(file)
    assert (measured["preset"], measured["images"]) == ("rdm_simsiam_log1p", "160")
    curves = json.loads((tmp_path / "results" / "analysis_cifar10_cpu.json").read_text())["rdm_simsiam_log1p"]
    assert curves["filter/root"][0][0] == 1 and curves["training/difference"][0] == [3.0]
    again = subprocess.run(call, capture_output=True, text=True, timeout=300)
    assert "1 rows, 0 runs not begun" in again.stdout


@pytest.mark.slow
@pytest.mark.skipif(not DATA.exists(), reason="needs CIFAR-10 in data/cifar10, which is no part of the repository")
def test_training_beats_the_random_encoder_by_five_points(tmp_path: Path) -> None:
    presets = ["simsiam", "byol", "rdm_simsiam", "rdm_simsiam_log1p"]
    command = [sys.executable, "-m", "benchmarks.cifar10.reproduce", "--root", str(DATA), "--presets", *presets]
    subprocess.run([*command, "--runs", str(tmp_path / "runs"), "--out", str(tmp_path)], check=True, cwd=ROOT)
    with (tmp_path / "results" / "cifar10_cpu.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for preset in presets:
        gains = [float(r["trained"]) - float(r["random"]) for r in rows if r["preset"] == preset]
        assert len(gains) == 3
        mean, half = statistics.mean(gains), 4.303 * statistics.stdev(gains) / 3**0.5
        assert mean >= 0.05 and mean - half > 0, f"{preset}: {gains}"
