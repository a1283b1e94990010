"""Bench: what is measured is what is there, the advice follows from the numbers, and the time is kept."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastrdm.commands import bench, plan
from fastrdm.commands.bench import Bench, advice, choice, settings_of
from fastrdm.config import run_config
from fastrdm.efficiency import speed
from fastrdm.efficiency.speed import Budget, LoadRate, ReadCost, StepRate, Together
from fastrdm.loaders.build import ENGINES
from fastrdm.loaders.sources.folder import FolderSource
from fastrdm.loaders.spec import cores_of_a_process
from fastrdm.runtime.distributed import Processes

SMALL = [
    *("encoder.name=resnet_small", "encoder.width=4", "method.projector.hidden=16", "method.projector.out=16"),
    *("loader.views.*.size=16", "loader.batch_size=16", "train.device=cpu"),
]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Forty JPEG files of two classes; one of them is damaged."""
    random = np.random.default_rng(0)
    for number in range(40):
        path = tmp_path / "photos" / f"class{number % 2}" / f"{number:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (24, 32, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:300])
    return tmp_path / "photos"


def test_a_folder_of_photographs(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = {name: engine for name, engine in ENGINES.items() if name in ("resident", "native")}
    monkeypatch.setattr(speed, "ENGINES", ours)  # others take seconds to start
    before = sorted(path for path in tmp_path.rglob("*"))
    began = time.monotonic()
    file = tmp_path / "bench.json"
    assert bench.main([str(photos), *SMALL, "loader.max_corrupt=0.1", "--seconds", "20", "--json", str(file)]) == 0
    assert time.monotonic() - began < 60
    out = capsys.readouterr().out
    assert out.startswith("bench: 40 images of folder, views of 16 px, 16 px; simsiam, resnet_small, fp32 on cpu\n")
    assert "loader.engine=resident takes sets held in memory" in out
    assert out.splitlines()[-1].startswith("advice: loader.engine=")
    found = json.loads(file.read_text())
    file.unlink()
    assert sorted(path for path in tmp_path.rglob("*")) == before  # nothing is left beside the images
    rates = {(row["engine"], row["data"], row["workers"]): row["images_per_second"] for row in found["loading"]}
    for data in ("set", "sample", "jpeg", "raw"):
        assert rates["native", data, cores_of_a_process()], found["loading"]
    assert [step["images"] for step in found["steps"]] == [8, 16]
    assert found["training"]["images"] == 16
    assert found["training"]["images_per_second"] > 0
    assert found["reading_ms"]["decode"] > 0
    assert found["batch"] == 16


def test_a_set_in_memory_is_not_packed() -> None:
    loaded = run_config.compose(settings_of(["digits", *SMALL]))
    found = bench.measure(loaded, 2.0)
    assert {row.data for row in found.loading} == {"set"}
    assert found.reading is None
    assert "pack" not in advice(found)


def test_the_rate_of_an_engine_is_that_of_its_batches(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image that takes 10 ms on one thread: 100 a second, whatever else the engine does."""
    read = FolderSource.read_into

    def slow(self: FolderSource, *arguments: object) -> object:
        time.sleep(0.01)
        return read(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(FolderSource, "read_into", slow)
    settings = run_config.load([*SMALL, "loader.source=folder", f"loader.root={photos}", "loader.max_corrupt=0.1"])
    here = Processes(0, 1, torch.device("cpu"))
    found = speed.load_rate(settings, FolderSource(photos), here, "native", 1, "set", 0.5)
    assert found.images_per_second == pytest.approx(95, rel=0.2)


def test_when_the_time_is_over_nothing_more_is_begun(photos: Path) -> None:
    settings = run_config.load([*SMALL, "loader.source=folder", f"loader.root={photos}"])
    over = Budget(0.0)
    here = settings, FolderSource(photos), Processes(0, 1, torch.device("cpu"))
    rows = speed.engine_rates(*here, over) + speed.thread_rates(*here, LoadRate("native", 2, "set", 1.0, 0.1), over)
    assert {row.reason for row in rows} == {"the time was over"}
    assert choice(rows, []) is None


def result(**changes: object) -> Bench:
    """Native takes 400 images/s on two threads, and the step 100."""
    loading = [
        LoadRate("native", 2, "set", 400.0, 0.1),
        LoadRate("native", 1, "set", 390.0, 0.1),
        LoadRate("native", 2, "sample", 400.0, 0.1),
        LoadRate("native", 2, "jpeg", 420.0, 0.1),
        LoadRate("native", 2, "raw", 1200.0, 0.1),
    ]
    steps = [StepRate(8, 0.1), StepRate(16, 0.16), StepRate(32, 0.32)]
    training = Together(32, 98.0, 0.01, 100.0)
    return Bench("about", 1000, 32, ReadCost(0.1, 2.0), loading, steps, training)._replace(**changes)  # type: ignore[arg-type]


def test_advice_where_loading_keeps_up() -> None:
    told = advice(result())
    assert told == (
        "loader.engine=native loader.workers=1; steps of 16 images reach the full speed; do not pack, loading keeps up "
        "(packed as raw it loads 3.0 times as fast, as jpeg 1.1 times); training waits for the step itself; an epoch "
        "takes about 10.2 seconds"
    )


@pytest.mark.parametrize(
    ("training", "reading", "words"),
    [
        (Together(32, 60.0, 0.4, 100.0), ReadCost(0.1, 2.0), "waits 40 % of its time for decoding and augmentation"),
        (Together(32, 60.0, 0.4, 100.0), ReadCost(5.0, 2.0), "waits 40 % of its time for storage"),
        (Together(32, 60.0, 0.0, 100.0), ReadCost(0.1, 2.0), "never waits, but loading beside it takes 40 %"),
    ],
)
def test_advice_where_loading_costs(training: Together, reading: ReadCost, words: str) -> None:
    told = advice(result(training=training, reading=reading))
    assert words in told
    assert "pack with --mode raw, 0.2 GB" in told


def test_another_engine_is_advised_where_it_is_clearly_faster() -> None:
    rows = result().loading
    assert choice([*rows, LoadRate("torchcodec", 2, "set", 440.0, 0.1)], []) == rows[1]
    faster = LoadRate("torchcodec", 2, "set", 500.0, 0.1)
    assert choice([*rows, faster], []) == faster
    refused = LoadRate("dali", 2, "set", None, 0.0, "not installed")
    assert choice([refused], []) is None
    assert advice(result(loading=[refused])).startswith("no engine reads this set")


def test_packs_that_were_not_measured_are_not_judged() -> None:
    assert "what packing would bring was not measured" in advice(result(loading=result().loading[:3]))


def test_larger_steps_that_were_not_timed_are_said() -> None:
    assert "(larger ones than 32 were not timed)" in advice(result(batch=256))


def test_words(photos: Path) -> None:
    assert settings_of([str(photos), "a.yaml", "x=1"]) == [
        *("loader.source=folder", f"loader.root={photos}", "a.yaml", "x=1")
    ]
    assert settings_of(["s3://bucket/pack"]) == ["loader.source=packed", "loader.root=s3://bucket/pack"]
    assert settings_of(["quickstart.yaml"]) == ["quickstart.yaml"]
    with pytest.raises(ValueError, match="SOURCE must be one folder, file, URL or name"):
        settings_of(["digits", str(photos)])
    with pytest.raises(ValueError, match="--seconds must be at least 20"):
        bench.main(["digits", "--seconds", "1"])


def test_plan_takes_the_rate_that_it_measures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "measure", lambda loaded: result(batch=256))
    settings = [*SMALL, "loader.source=digits", "train.length=1ep", "optim.warmup=0st", "monitor.every=0st"]
    assert plan.main([*settings, "--bench"]) == 0
    out = capsys.readouterr().out
    assert "at 98 images/s (measured here just now, one process, eager steps of 32 images, which stand for" in out
    with pytest.raises(ValueError, match="--gpus must be left out with --bench, got 2"):
        plan.main([*settings, "--bench", "--gpus", "2"])
    monkeypatch.setattr(bench, "measure", lambda loaded: result(training=None, loading=[]))
    with pytest.raises(ValueError, match="--bench found no rate: no engine reads this set"):
        plan.main([*settings, "--bench"])
