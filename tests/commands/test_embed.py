"""`fastrdm embed`: rows that match their names whatever cannot be read, stops, processes, taps, refusals."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastrdm
from fastrdm.commands import embed, export
from fastrdm.commands.pretrained import from_run
from fastrdm.commands.source_word import loader_of, named_source
from fastrdm.config import run_config
from fastrdm.evaluation import embedding
from fastrdm.loaders.evaluation import evaluation_batches, short_side
from fastrdm.loaders.sources.open import open_source
from fastrdm.trainer import Trainer

SMALL = [
    "quickstart.yaml",
    "preset=byol",
    "train.length=2st",
    "optim.warmup=1st",
    "encoder.width=4",
    "method.projector.hidden=16",
    "method.projector.out=12",
    "loader.batch_size=16",
    "loader.views.*.size=16",
    "evaluate.baselines=false",
    "evaluate.probe=false",
]


# `fastrdm embed` in parts of four images; stop_behind waits behind the first of them to be killed.
SMALL_PARTS = """
import time
from fastrdm.cli import entry
from fastrdm.evaluation import embedding

def stop_behind(*arguments):
    write(*arguments)
    time.sleep(600)

embedding.PART = 4
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "byol"
    assert Trainer(run_config.load([*SMALL, f"run={folder}"])).train()
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty images of several sizes in two classes, three of which no reader can read."""
    root = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(0)
    for i in range(40):
        folder = root / ("cat", "dog")[i % 2]
        folder.mkdir(exist_ok=True)
        pixels = draw.integers(0, 256, (20 + i % 7, 24, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    for name in ("cat/06.png", "cat/08.png", "dog/39.png"):
        (root / name).write_bytes(b"no image")
    return root


def call(*arguments: object) -> None:
    assert embed.main([str(a) for a in arguments]) == 0


def table(out: Path) -> list[dict[str, str]]:
    with (out / "images.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def rows_of(run: Path, root: Path, names: list[str]) -> np.ndarray[Any, Any]:
    """Features of the named files, each read and encoded by itself."""
    encoder, preprocess = fastrdm.load_encoder(run)
    # The run's own set is judged by whole images, a folder of photographs by its centers.
    preprocess = replace(preprocess, resize=short_side(preprocess.size, whole=False))
    with torch.no_grad():
        images = [preprocess(Image.open(root / name).convert("RGB")) for name in names]
        return torch.cat([encoder(image[None]) for image in images]).numpy()


def test_rows_match_names_around_unreadable_images(
    run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(embedding, "PART", 8)
    out = tmp_path / "out"
    call(run, photos, "-o", out, "--batch-size", 5)
    features, listed = np.load(out / "features.npy"), table(out)
    assert features.shape == (37, len(features[0])) and features.dtype == np.float32
    names = [row["name"] for row in listed]
    assert names == sorted(names) and not {"cat/06.png", "cat/08.png", "dog/39.png"} & set(names)
    assert [row["label"] for row in listed] == [name[:3] for name in names]
    np.testing.assert_allclose(features, rows_of(run, photos, names), rtol=1e-5, atol=1e-6)
    source = open_source(loader_of(str(photos), None, None), "train")
    assert [source.key(int(row["index"])) for row in listed] == names
    about = json.loads((out / "embed.json").read_text())
    assert about["rows"] == 37 and sorted(about["unreadable"]) == ["3", "39", "4"]
    assert about["encoder"]["sha256"] and about["view"]["size"] == 16
    said = capsys.readouterr().out
    assert "06.png" in said and "37 rows" in said and "3 unreadable images left out" in said
    assert not (out / ".parts").exists()


def test_a_run_without_source_embeds_its_own_images_as_evaluation_sees_them(run: Path, tmp_path: Path) -> None:
    call(run, "-o", tmp_path / "a", "--split", "test", "--branch", "target")
    trained = from_run(run, "target")
    assert trained.loader is not None
    test = open_source(trained.loader, "test")
    with torch.no_grad():
        expected = torch.cat([trained.encoder(x) for x, *_ in evaluation_batches(test, trained.view, 256)])
    assert np.array_equal(np.load(tmp_path / "a" / "features.npy"), expected.numpy())
    assert table(tmp_path / "a")[3] == {"index": "3", "name": "image 3", "label": str(test.labels[3])}


def test_taps(run: Path, photos: Path, tmp_path: Path) -> None:
    found = {}
    for tap in ("features", "hidden", "projection", "layer3", "layer1", "layer2.0.conv1"):
        call(run, photos, "-o", tmp_path / tap, "--tap", tap)
        found[tap] = np.load(tmp_path / tap / "features.npy")
    np.testing.assert_allclose(found["layer3"], found["features"], rtol=1e-5, atol=1e-6)
    assert found["projection"].shape == (37, 12) and found["layer1"].shape == (37, 4)
    projector = embed.load_projector(from_run(run, "online"))
    with torch.no_grad():
        assert np.allclose(projector(torch.from_numpy(found["features"])), found["projection"], atol=1e-5)
        assert np.allclose(projector.tail(torch.from_numpy(found["hidden"])), found["projection"], atol=1e-5)


def test_whitened_and_of_unit_length(run: Path, tmp_path: Path) -> None:
    call(run, "-o", tmp_path / "w", "--whiten", "--tap", "projection")
    white = np.load(tmp_path / "w" / "features.npy").astype(np.float64)
    values = np.linalg.eigvalsh(white.T @ white / len(white))
    assert np.abs(white.mean(0)).max() < 1e-3
    assert np.all((np.abs(values) < 1e-3) | (np.abs(values - 1) < 1e-2)) and values[-1] > 0.9
    call(run, "-o", tmp_path / "u", "--unit")
    np.testing.assert_allclose(np.linalg.norm(np.load(tmp_path / "u" / "features.npy"), axis=1), 1, rtol=1e-5)


def test_parquet_holds_the_same(run: Path, photos: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    call(run, photos, "-o", tmp_path, "--parquet")
    stored = parquet.read_table(tmp_path / "features.parquet")
    assert stored.column("name").to_pylist() == [row["name"] for row in table(tmp_path)]
    assert np.array_equal(
        np.array(stored.column("features").to_pylist(), np.float32), np.load(tmp_path / "features.npy")
    )


def test_an_exported_file_gives_the_same_rows(run: Path, photos: Path, tmp_path: Path) -> None:
    call(run, photos, "-o", tmp_path / "run")
    for ending in ("pth", "safetensors"):
        file = tmp_path / f"encoder.{ending}"
        export.write(from_run(run, "online"), file)
        call(file, photos, "-o", tmp_path / ending)
        assert np.array_equal(*(np.load(tmp_path / name / "features.npy") for name in ("run", ending)))


def test_two_processes_and_a_kill_change_no_row(run: Path, photos: Path, tmp_path: Path) -> None:
    call(run, photos, "-o", tmp_path / "one")
    program, slow = tmp_path / "program.py", tmp_path / "slow.py"
    program.write_text(SMALL_PARTS + "entry()")
    slow.write_text(SMALL_PARTS + "write = embedding._write_part\nembedding._write_part = stop_behind\nentry()")
    given = ["embed", str(run), str(photos), "-o", str(tmp_path / "two"), "--batch-size", "4", "--device", "cpu"]
    first = subprocess.Popen([sys.executable, str(slow), *given])
    parts = tmp_path / "two" / ".parts"
    until = time.monotonic() + 120
    while time.monotonic() < until and not list(parts.glob("0*.npz")) and first.poll() is None:
        time.sleep(0.005)
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL and len(list(parts.glob("0*.npz"))) == 1
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", str(program), *given], capture_output=True, text=True, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr
    assert np.allclose(*(np.load(tmp_path / name / "features.npy") for name in ("one", "two")), rtol=1e-5, atol=1e-6)
    assert (tmp_path / "one" / "images.csv").read_text() == (tmp_path / "two" / "images.csv").read_text()


def test_what_is_done_is_not_computed_again(
    run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "PART", 8)
    seen: list[int] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        for batch in evaluation_batches(*arguments, **options):
            seen.append(len(batch[1]))
            if sum(seen) == 16:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(embedding, "evaluation_batches", counted)
    with pytest.raises(KeyboardInterrupt):
        call(run, photos, "-o", tmp_path, "--batch-size", 4)
    with pytest.raises(
        ValueError, match=r"-o must be a new folder, got .* which holds parts of other features \(tap\)"
    ):
        call(run, photos, "-o", tmp_path, "--tap", "hidden")
    call(run, photos, "-o", tmp_path, "--batch-size", 4)
    assert sum(seen) < 16 + 37
    assert [row["name"] for row in table(tmp_path)] == sorted(row["name"] for row in table(tmp_path))
    assert len(np.load(tmp_path / "features.npy")) == 37
    with pytest.raises(ValueError, match=r"-o must be a folder without features.npy"):
        call(run, photos, "-o", tmp_path)


def test_a_tar_file_gives_the_rows_of_its_folder(run: Path, photos: Path, tmp_path: Path) -> None:
    file = tmp_path / "photos.tar"
    subprocess.run(["tar", "-cf", file, "-C", photos, "cat", "dog"], check=True)
    call(run, photos, "-o", tmp_path / "folder")
    call(run, file, "-o", tmp_path / "tar")
    first, second = table(tmp_path / "folder"), table(tmp_path / "tar")
    a, b = (np.load(tmp_path / name / "features.npy") for name in ("folder", "tar"))
    assert [row["label"] for row in first] == [row["label"] for row in second]
    assert [Path(row["name"]).name for row in first] == [Path(row["name"]).name for row in second]
    np.testing.assert_array_equal(a, b)


def test_what_a_source_word_stands_for(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pack" / "train").mkdir(parents=True)
    (tmp_path / "pack" / "train" / "meta.json").touch()
    (tmp_path / "a.parquet").touch()
    words = {
        str(photos): "folder",
        "pack": "packed",
        "a.parquet": "parquet",
        "digits": "digits",
        "my.module:Source": "my.module:Source",
        "s3://bucket/pack": "packed",
        "https://host/set-{00..09}.tar": "tar",
        "b.parquet": None,
        "photos": None,
    }
    assert {word: named_source(word) for word in words} == words
    with pytest.raises(ValueError, match=r"^--root must be left out for pack, got 'x'"):
        loader_of("pack", "x", None)


def test_what_is_refused(run: Path, photos: Path, tmp_path: Path) -> None:
    def refusal(*arguments: object) -> str:
        with pytest.raises(ValueError) as refused:
            call(*arguments, "-o", tmp_path / "x")
        return str(refused.value)

    assert refusal(tmp_path).startswith("CHECKPOINT must be a run folder with checkpoints")
    nothing = "SOURCE must be a folder, a .tar or .parquet file, a URL, or a name, got"
    assert refusal(run, "digit") == f"{nothing} 'digit', which is none of them: did you mean 'digits'?"
    assert refusal(run, "photos.tar").startswith(f"{nothing} 'photos.tar', which is none of them: names are digits, ")
    assert refusal(run, photos, "--tap", "layer9").startswith(
        "--tap must be one of features, hidden, projection, conv1"
    )
    assert refusal(run, photos, photos).startswith("SOURCE must be one folder or name")
    assert refusal(run, photos, "--batch-size", 0) == "--batch-size must be above 0, got 0"
    file = tmp_path / "encoder.pth"
    export.write(from_run(run, "online"), file)
    assert refusal(file).startswith("SOURCE must name the images")
    assert refusal(file, photos, "--tap", "hidden").startswith("--tap must be a module of the encoder")
    bad = tmp_path / "bad" / "a"
    bad.mkdir(parents=True)
    (bad / "0.png").write_bytes(b"")
    assert refusal(run, bad.parent).startswith("SOURCE must hold an image that can be read: such as ")
