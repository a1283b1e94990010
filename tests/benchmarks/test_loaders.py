"""The loaders' benchmark: a run gives sound rows and goes on where it was; other views are refused; what is told."""

import csv
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from benchmarks.loaders import engine_runs, throughput
from benchmarks.plots import loader

ROOT = Path(__file__).parents[2]


def test_a_call_adds_the_rows_that_are_missing(tmp_path: Path) -> None:
    for k in range(260):
        path = tmp_path / "images" / f"class{k % 2}" / f"{k:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((24, 24, 3), k % 256, np.uint8)).save(path)
    out = tmp_path / "rows.csv"
    with out.open("w") as file:
        writer = csv.DictWriter(file, throughput.FIELDS)
        writer.writeheader()
        writer.writerow(
            {"contestant": "loop pillow", "workers": 1, "plain": "loop simplejpeg", "device": "cpu", "rate": 7}
        )
    command = [sys.executable, "-m", "benchmarks.loaders.throughput", "decode", str(tmp_path / "images")]
    command += ["--threads", "1", "--rounds", "2", "--seconds", "0.1", "--out", str(out), "--device", "cpu"]
    command += ["--only", "engine files", "loop pillow"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    old, row = csv.DictReader(out.open())
    assert (old["contestant"], old["rate"], row["contestant"]) == ("loop pillow", "7", "engine files")
    assert "engine files,1,2," in done.stdout and "pillow,1" not in done.stdout
    assert row["plain"] == "loop simplejpeg" and row["commit"] and "torch " in row["versions"]
    assert 0 < float(row["p20"]) <= float(row["rate"]) <= float(row["p80"]) and float(row["first"]) > 0
    assert float(row["cpu_ms"]) * float(row["core"]) == pytest.approx(1000, rel=0.1)
    assert float(row["mib"]) > 50 and 0 < float(row["times_core"]) < 20


def test_a_contestant_that_makes_other_views_is_refused() -> None:
    measured, entry = throughput.measured, SimpleNamespace(bar=2.0, plain="a")
    child = SimpleNamespace(levels=1.9, first=90.0, views=2, mib=100.0, rates=lambda _: (100.0, 50.0))
    plain = SimpleNamespace(rates=lambda _: (40.0, 25.0))
    row = measured("one", entry, child, plain, 3, 1.0)
    assert row["rate"] == "100" and row["views"] == "200" and row["times"] == "2.500" and row["times_core"] == "2.000"
    assert row["cpu_ms"] == "20.000" and row["core_views"] == "100"
    for levels in (2.1, float("nan")):
        child.levels = levels
        with pytest.raises(SystemExit, match="one makes other views"):
            measured("one", entry, child, plain, 3, 1.0)


def runs(shift: float) -> list[dict[str, str]]:
    """Three seeds of three engines, the last one's k-NN moved."""
    rows = []
    for engine, moved in (("native", 0.0), ("dali", 0.0), ("ffcv", shift)):
        for seed in range(3):
            metrics = {"start": -0.01, "loss": -0.5 + seed / 100, "knn": 0.30 + seed / 100 + moved, "knn_random": 0.25}
            row = {"task": "photos", "engine": engine, "seed": seed, "cpu_seconds": 30, **metrics}
            rows.append({key: str(value) for key, value in row.items()})
    return rows


def test_engines_that_differ_by_more_than_seeds_do_are_named() -> None:
    comparison = engine_runs.comparison
    assert comparison(runs(0.02), "photos")[-1] == "No engine differs from native."
    assert comparison(runs(0.03), "photos")[-1] == "They differ: ffcv in k-NN, trained."
    assert "| native | 3 | -0.0100 ± 0.0000 | -0.4900 ± 0.0100 | 31.0 ± 1.0 % |" in comparison(runs(0.0), "photos")[2]


def test_a_contestant_without_its_package_is_skipped_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    build = throughput.decode_table()["loop pillow"].build
    entries = {
        "here": throughput.Contestant(build, "here"),
        "gone": throughput.Contestant(build, "here", needs=("no_such_package",)),
        "beside": throughput.Contestant(build, "gone"),
    }
    assert throughput.wanted(entries, None) == ["here"]
    assert throughput.wanted(entries, ["he"]) == ["here"]
    told = capsys.readouterr().err
    assert "gone: skipped, no_such_package cannot be imported: No module named 'no_such_package'\n" in told
    assert "beside: skipped, no_such_package" in told


def test_the_plot_shows_every_contestant_but_synthetic(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    heads = "contestant,workers,rate,times,times_p20,times_p80,times_core,plain,device,cpu,cores"
    path = tmp_path / "loader_views.csv"
    lines = ["slow,2,30,1,0.9,1.1,1", "native files,2,1234,4.2,4,4.4,3", "synthetic,2,9,9,9,9,9", "old,1,7,7,7,7,7"]
    path.write_text("\n".join([heads, *(f"{line},slow,cpu,A,2" for line in lines)]))
    drawing = loader.drawing([loader.table_of(path)])
    ElementTree.fromstring(drawing)
    assert drawing.index("native files") < drawing.index(">slow<") and "1,234" in drawing and "2 of 2 cores" in drawing
    assert "synthetic" not in drawing and ">old<" not in drawing
