"""Every command, given broken input: one line that names the key or the file, the exit status of it, no traceback."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastrdm import cli

GARBAGE = {
    "empty": b"",
    "binary": bytes(range(256)) * 4,
    "no utf-8": b"a: \xff\xfe\n",
    "a list": b"[1, 2, 3]\n",
    "a number": b"3\n",
    "cut": b'{"format": "fastrdm-1", "st',
    "deep": b"[" * 20_000,
    "wrong kinds": b'{"format": "fastrdm-1", "step": [], "files": 3, "config": "x", "sha256": null}\n',
}


@pytest.fixture(params=GARBAGE)
def garbage(request: pytest.FixtureRequest) -> bytes:
    return GARBAGE[request.param]


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., str]:
    """Run a command that must end in one line; the line."""
    monkeypatch.chdir(tmp_path)

    def refused(name: str, *arguments: object) -> str:
        capfd.readouterr()
        try:
            status = cli.run(name, [str(argument) for argument in arguments])
        except SystemExit as end:  # argparse's own refusals: usage, and one line
            status = int(end.code or 0)
        told = capfd.readouterr().err
        lines = [line for line in told.splitlines() if "warn" not in line.lower()]
        assert status in (cli.EXIT_FAILED, cli.EXIT_REFUSED), (status, told)
        assert "Traceback" not in told and lines, told
        own = next(i for i, line in enumerate(lines) if line.startswith("fastrdm"))  # usage may stand before it
        assert len(lines) - own <= 5 and max(map(len, lines[own:])) < 1500, told  # one line for each key
        return "\n".join(lines[own:])

    return refused


def run_folder(root: Path, content: bytes) -> Path:
    """A folder that looks like a run, all of whose files hold the same."""
    step = root / "checkpoints" / "step-00000005"
    step.mkdir(parents=True)
    for file in ("config.yaml", "metrics.jsonl", "spectra.jsonl", "alarms.jsonl", "analysis.jsonl", "summary.json"):
        (root / file).write_bytes(content)
    for file in ("meta.json", "state.pt", "model.safetensors"):
        (step / file).write_bytes(content)
    return root


@pytest.mark.parametrize("command", ["eval", "analyze", "export"])
def test_a_broken_run_folder(command: str, garbage: bytes, refused: Callable[..., str], tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", garbage)
    options = ["--layout", "torchvision", "--out", tmp_path / "x.pt"] if command == "export" else []
    assert "step-00000005" in refused(command, run, *options)


def test_a_report_on_a_broken_run_folder_says_what_is_missing(garbage: bytes, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", garbage)
    assert cli.run("report", [str(run)]) == 0
    assert "could not be read" in (run / "report.html").read_text() or garbage in (b"", b"3\n")


@pytest.mark.parametrize("command", ["eval", "analyze", "export", "report"])
@pytest.mark.parametrize("what", ["nothing", "a file", "an empty folder"])
def test_no_run_folder(command: str, what: str, refused: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "place"
    if what == "a file":
        path.write_text("x")
    elif what == "an empty folder":
        path.mkdir()
    options = ["--layout", "torchvision", "--out", tmp_path / "x.pt"] if command == "export" else []
    assert "place" in refused(command, path, *options)


@pytest.mark.parametrize("layout", ["torchvision", "timm", "simsiam", "dino", "solo"])
def test_broken_weights(layout: str, garbage: bytes, refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(garbage)
    told = refused(
        "eval", "--weights", tmp_path / "w.pth", "--layout", layout, "--encoder", "resnet18", "--source", "digits"
    )
    assert "w.pth" in told or "--layout" in told


# An empty file is a configuration: all defaults.
@pytest.mark.parametrize("garbage", [name for name in GARBAGE if name != "empty"], indirect=True)
@pytest.mark.parametrize("command", ["train", "plan"])
def test_a_broken_configuration(command: str, garbage: bytes, refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(garbage)
    assert "c.yaml" in refused(command, tmp_path / "c.yaml") or garbage.startswith(b"{")


@pytest.mark.parametrize("part", ["images", "labels"])
def test_broken_arrays(part: str, garbage: bytes, refused: Callable[..., str], tmp_path: Path) -> None:
    for split in ("train", "test"):
        np.save(tmp_path / f"{split}.images.npy", np.zeros((20, 32, 32, 3), np.uint8))
        np.save(tmp_path / f"{split}.labels.npy", np.arange(20) % 10)
    (tmp_path / f"train.{part}.npy").write_bytes(garbage)
    assert f"train.{part}.npy" in refused("train", "loader.source=cifar10", f"loader.root={tmp_path}", "run=r")


@pytest.mark.parametrize("source", ["cifar10", "cifar100"])
def test_broken_archives(source: str, garbage: bytes, refused: Callable[..., str], tmp_path: Path) -> None:
    name = "cifar-10-python.tar.gz" if source == "cifar10" else "cifar-100-python.tar.gz"
    (tmp_path / name).write_bytes(garbage)
    assert name in refused("train", f"loader.source={source}", f"loader.root={tmp_path}", "run=r")


@pytest.mark.parametrize("file", ["meta.json", "index.npy"])
def test_broken_packs(file: str, garbage: bytes, refused: Callable[..., str], tmp_path: Path) -> None:
    for folder in ("train", "val"):
        (tmp_path / folder).mkdir()
        for each in ("meta.json", "index.npy"):
            (tmp_path / folder / each).write_bytes(garbage)
    assert "meta.json" in refused("train", "loader.source=packed", f"loader.root={tmp_path}", "run=r")


@pytest.mark.parametrize(
    "arguments",
    [
        ["run=place", "train.length=1st"],
        ["loader.source=folder", "loader.root=nowhere"],
        ["loader.source=folder", "loader.root=place"],
        ["loader.source=nothing:Here"],
        ["loader.source=os:execl", "loader.root=/bin/true"],
        ["loader.classes=place"],
        ["encoder.name=timm/none"],
        ["train.length=0st"],
        ["loader.batch_size=-1"],
        ["optim.lr=fast"],
        ["a.b=c"],
        ["nowhere.yaml"],
        ["place"],
    ],
)
def test_settings_that_cannot_be(arguments: list[str], refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "place").write_bytes(b"\xff\x00")
    refused("train", *arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["nowhere", "out"],
        ["file", "out"],
        ["empty", "out"],
        ["images", "file"],
        ["images", "out", "--labels", "nowhere.csv"],
        ["images", "out", "--labels", "file"],
        ["images", "out", "--mode", "raw", "--size", "0"],
        ["images", "out", "--workers", "-1"],
    ],
)
def test_what_cannot_be_packed(arguments: list[str], refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"\xff\x00")
    (tmp_path / "empty").mkdir()
    (tmp_path / "images" / "a").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "images" / "a" / "1.png")
    refused("pack", *arguments)


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_unknown_options(command: str, refused: Callable[..., str]) -> None:
    refused(command, "--no-such-option")


def test_an_unwritable_place_for_results(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "epoch": 1, "loss": 1.0}) + "\n")
    assert "nowhere" in refused("report", tmp_path, "--out", tmp_path / "nowhere" / os.devnull[1:] / "x.html")
