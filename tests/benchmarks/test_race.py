"""benchmarks/race: equal processor time, paired seeds, the clock, and records that are what their rows say."""

import csv
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from benchmarks.common import read_rows
from benchmarks.race import levers, proxy, record, run, sets
from benchmarks.race.levers import BASE, FIRST, SECOND, TOGETHER, Lever
from fastrdm.config import run_config
from fastrdm.evaluation.features import FeatureSet
from fastrdm.evaluation.knn import knn_accuracy
from fastrdm.trainer import Trainer

ROOT = Path(__file__).parents[2]
ALL = (*FIRST, *TOGETHER, *SECOND)
SMALL = ("encoder.width=8", "loader.subset=160", "loader.batch_size=32", "loader.views.*.size=16")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """CIFAR-10 of noise."""
    images = np.random.default_rng(0).integers(0, 256, (200, 32, 32, 3), np.uint8)
    for split, part in (("train", images[:160]), ("test", images[160:])):
        np.save(tmp_path / f"{split}.images.npy", part)
        np.save(tmp_path / f"{split}.labels.npy", (np.arange(len(part)) % 10).astype(np.uint8))
    return tmp_path


def test_the_base_leads_the_short_table() -> None:
    rows = read_rows(ROOT / "benchmarks" / "results" / "cifar10_cpu.csv")
    seeds = Counter(row["preset"] for row in rows)
    presets = [preset for preset in seeds if seeds[preset] >= 3]  # one seed says little
    trained = {preset: mean(float(r["trained"]) for r in rows if r["preset"] == preset) for preset in presets}
    assert f"preset={max(trained, key=lambda preset: trained[preset])}" in BASE


def test_a_lever_is_a_configuration_of_its_own_on_the_same_images_and_encoder() -> None:
    assert len({lever.name for lever in ALL}) == len(ALL) == len({lever.settings for lever in ALL})
    for lever in ALL:
        c = run_config.load([*lever.settings, "train.length=500st"])
        assert (c.loader.subset, c.encoder.width, c.encoder.stem) == (10_000, 16, "imagenet"), lever.name
        assert c.loader.views[0].size == 32, "accuracies are measured on views of this size"


def test_first_levers_come_seed_by_seed_and_no_run_twice() -> None:
    found = [(lever.name, seed) for lever, seed in levers.jobs(3)]
    assert len(set(found)) == len(found) == 3 * len(ALL)
    assert found[: len(FIRST)] == [(lever.name, 0) for lever in FIRST]
    assert found[len(FIRST)] == ("base", 1)


@pytest.mark.parametrize(("progressive", "expected"), [("[]", 250), ("[[3, 8]]", 15 + 240)])
def test_equal_time_is_counted_in_steps_of_each_size(
    progressive: str, expected: int, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 16 px a step costs two of the base's, at 8 px 4/3: the first three epochs of 5 steps take 20 of its 500."""

    def costs(trainers: Sequence[Trainer]) -> list[float]:
        size = next(proxy.batches(trainers[1])).views[0].shape[-1]
        return [1.0, {16: 2.0, 8: 4 / 3}[size]]

    monkeypatch.setattr(proxy, "step_costs", costs)
    base = (*BASE, *SMALL)
    assert proxy.affordable((*base, f"loader.views.*.progressive={progressive}"), base, data, 500) == expected


def test_whitened_features_have_unit_covariance_and_the_banks_mean() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 5, generator=draw) @ torch.randn(5, 5, generator=draw) + 3
    labels = torch.zeros(4000, dtype=torch.int64)
    bank, query = proxy.whitened(FeatureSet(x, labels), FeatureSet(x[:7], labels[:7]))
    assert bank.features.mean(0).abs().max() < 1e-5
    values = torch.linalg.eigvalsh(bank.features.T.cov())
    assert values.max() <= 1 + 1e-4 and values.max() > 0.9  # what is small keeps less than one, by the floor
    torch.testing.assert_close(query.features, bank.features[:7])


def test_a_lever_becomes_a_row_and_is_not_run_again(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = [
        Lever("base", "base", (*BASE, *SMALL)),
        Lever("batch", "batch 16", (*BASE, *SMALL, "loader.batch_size=16")),
    ]
    monkeypatch.setattr(proxy, "BASE", small[0].settings)
    monkeypatch.setattr(proxy, "STEPS", 4)
    monkeypatch.setattr(proxy, "jobs", lambda seeds: [(lever, seed) for lever in small for seed in range(2)])
    file = data / "rows.csv"
    monkeypatch.setattr(sys, "argv", ["proxy", "--data", str(data), "--out", str(file), "--cpu-minutes", "1e9"])
    proxy.main()
    rows = read_rows(file)
    assert [(r["lever"], r["seed"]) for r in rows] == [
        ("base", "0"),
        ("base", "1"),
        ("batch 16", "0"),
        ("batch 16", "1"),
    ]
    assert list(rows[0]) == proxy.FIELDS and rows[0]["steps"] == rows[1]["steps"] == "4"
    assert rows[2]["steps"] == rows[3]["steps"], "settled once for all seeds"
    assert all(0 <= float(rows[0][key]) <= 1 for key in (*proxy.ACCURACIES, "knn10_target", "knn10_projection"))
    monkeypatch.setattr(proxy, "run", lambda *a: pytest.fail("a row that is there was made again"))
    proxy.main()
    assert read_rows(file) == rows


def lever_row(lever: str, seed: int, knn: float, linear: float = 0.5) -> dict[str, str]:
    found = {
        "lever": lever,
        "group": "rate",
        "seed": seed,
        "steps": 500,
        "batch": 128,
        "cpu_seconds": 30.0,
        "knn10": knn,
    }
    found |= {"knn200": knn, "linear": linear, "knn10_whitened": knn + 0.01, "knn10_target": "", "linear_target": ""}
    found |= {"knn10_projection": knn, "rank": 2, "commit": "abc", "torch": "2", "device": "a CPU", "settings": ""}
    return {key: str(value) for key, value in found.items()}


def test_the_record_pairs_seeds_and_pools_the_spread() -> None:
    rows = [lever_row("base", seed, knn) for seed, knn in enumerate((0.40, 0.42, 0.41))]
    rows += [lever_row("lr x 2", seed, knn, 0.52) for seed, knn in enumerate((0.42, 0.43, 0.44))]  # +2, +1, +3
    rows += [lever_row("adamw", 0, 0.37)]  # -3, one seed: its interval is from the others' spread
    lines = record.levers_table(rows)
    half = 4.3027 * 1.0 / 3**0.5
    assert f"| lr x 2 | rate | 3 | 500 | 43.0 % | +2.0 ± {half:.1f} | +2.0 |" in lines
    assert f"| adamw | optimizer | 1 | 500 | 37.0 % | -3.0 ± {4.3027:.1f} | +0.0 |" in lines
    assert lines.index(next(line for line in lines if "lr x 2" in line)) == 3, "the largest gain first"
    assert "| whitened features | 7 | +1.0 ± 0.0 |" in record.options_table([r | {"knn10_target": "0.1"} for r in rows])
    text = record.proxy_record([r | {"knn10_target": "0.1"} for r in rows], "What somebody read.")
    assert "What somebody read." in text and "1.00 points of a paired difference, with 2\ndegrees" in text


def test_records_are_what_their_rows_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "README.md"
    page.write_text(record.PAGE.read_text())
    folder, stored = tmp_path / "records", record.RECORDS
    folder.mkdir()
    monkeypatch.setattr(record, "RECORDS", folder)
    monkeypatch.setattr(record, "PAGE", page)
    monkeypatch.setattr(sys, "argv", ["record"])
    record.main()
    assert page.read_text() == (ROOT / "benchmarks" / "race" / "README.md").read_text()
    assert {p.name for p in folder.iterdir()} == {"race_proxy.md", "small_sets.md"}
    assert all(p.read_text() == (stored / p.name).read_text() for p in folder.iterdir())


def test_every_row_is_of_a_known_contestant() -> None:
    rows = read_rows(proxy.ROWS)
    assert list(rows[0]) == proxy.FIELDS and {r["lever"] for r in rows} <= {lever.name for lever in ALL}
    settings = {lever.name: " ".join(lever.settings) for lever in ALL}
    assert all(row["settings"] == settings[row["lever"]] for row in rows), "rows of settings that have changed since"
    others = read_rows(sets.ROWS)
    assert list(others[0]) == sets.FIELDS
    assert all(r["preset"] in sets.SETS[r["set"]].presets for r in others)


@pytest.mark.parametrize("name", run.ENTRIES)
def test_every_entry_is_a_configuration(name: str) -> None:
    c = run_config.load(list(run.ENTRIES[name].settings))
    assert c.train.init is None and c.loader.source == "cifar10", "no other data and no pretrained weights"
    assert (c.loader.subset is None) == (run.ENTRIES[name].budget != "cpu")


def test_the_races_recipe_is_what_its_head_says() -> None:
    joined = next(lever.settings for lever in TOGETHER if lever.name.startswith("no average, lr x 2"))
    race, short, lever, lightly = (
        run_config.load(names)
        for names in (["cifar10/race.yaml"], ["cifar10/race_cpu.yaml"], [*joined], ["cifar10/lightly_byol.yaml"])
    )
    for c in (race, short):
        assert (c.preset, c.optim.name, c.optim.lr) == (lever.preset, lever.optim.name, lever.optim.lr)
        assert (c.optim.schedule, c.method.bn_views) == (lever.optim.schedule, lever.method.bn_views)
        assert c.method.ema is None is lever.method.ema
        assert [(v.size, v.scale, v.solarize) for v in c.loader.views] == [
            (v.size, v.scale, v.solarize) for v in lever.loader.views
        ]
    assert race.optim.lr * race.optim.weight_decay == pytest.approx(lightly.optim.lr * lightly.optim.weight_decay)


def test_the_score_is_scikit_learns() -> None:
    draw = torch.Generator().manual_seed(0)
    bank, query = (
        FeatureSet(torch.randn(n, 4, generator=draw), torch.randint(5, (n,), generator=draw)) for n in (300, 200)
    )
    theirs = KNeighborsClassifier(10, metric="cosine").fit(bank.features.numpy(), bank.labels.numpy())
    expected = float((theirs.predict(query.features.numpy()) == query.labels.numpy()).mean())
    assert knn_accuracy(bank, query, 10, math.inf) == pytest.approx(expected, abs=1e-9)


def test_an_entry_is_timed_from_the_start_of_its_process(data: Path) -> None:
    """The time of the process before the benchmark's first line counts as well."""
    program = f"""
import sys, time
time.sleep(2)
from benchmarks.race import run
from benchmarks.race.run import Entry
run.ENTRIES["cpu"] = Entry("cpu", {(*BASE, *SMALL, "train.length=3st")!r}, "")
sys.argv = ["run", "cpu", "--data", {str(data)!r}, "--out", {str(data / "race.csv")!r}]
began = time.monotonic()
run.main()
print(time.monotonic() - began)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr
    with (data / "race.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    inside = float(done.stdout.splitlines()[-1])
    assert list(row) == run.FIELDS and float(row["seconds"]) + float(row["evaluation_seconds"]) > inside + 1.5
    assert float(row["seconds"]) < inside + 60 and row["entry"] == "cpu" and row["images"] == "160"
