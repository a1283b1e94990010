"""Names of files that are no text, as old archives have them, in every command, where output is strict UTF-8."""

import io
import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from fastrdm import cli

NAME = os.fsdecode(b"caf\xe9")  # Latin-1
SMALL = [
    *("encoder.name=resnet_small", "encoder.width=4", "method.projector={hidden: 16, out: 12}", "train.length=1st"),
    *("optim.warmup=0st", "loader.batch_size=8", "loader.views.*.size=8", "evaluate.baselines=false"),
]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Run a command beside a set that has such names, one of them of an image that cannot be read; what it printed."""
    root = tmp_path_factory.mktemp("names")
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in ("a", NAME):
            folder = root / "data" / split / label
            folder.mkdir(parents=True)
            for number in range(8):
                Image.fromarray(random.integers(0, 256, (12, 14, 3), np.uint8)).save(folder / f"{NAME}{number}.png")
    (root / "data" / "train" / "a" / f"{NAME}0.png").write_bytes(b"no image")
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict", "OMP_NUM_THREADS": "1", "LC_ALL": "C.UTF-8"}

    def command(*words: str) -> str:
        full = [sys.executable, "-m", "fastrdm", *words]
        done = subprocess.run(full, cwd=root, env=environment, capture_output=True)
        told = (done.stdout + done.stderr).decode()  # which would fail for what is no UTF-8
        assert done.returncode == 0 and "Traceback" not in told, told
        return told

    told = command("train", "loader.source=folder", "loader.root=data", "loader.max_corrupt=0.2", "run=run", *SMALL)
    assert "unreadable image" in told and "report: " in told
    command.root = root  # type: ignore[attr-defined]
    return command


COMMANDS = {
    "eval": ["run", "--method", "knn"],
    "analyze": ["run", "--images", "12", "--replicates", "10"],
    "report": ["run"],
    "export": ["run", "--layout", "safetensors", "--out", "encoder.safetensors"],
    "embed": ["run", "data/train", "--out", f"{NAME}-features", "--parquet"],
    "explore": ["run", "data/train", "--out", f"{NAME}.html"],
    "pack": ["data", f"{NAME}-pack", "--workers", "1", "--max-bad", "0.5"],
    "plan": ["loader.source=folder", "loader.root=data", *SMALL],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_names_that_are_no_text(name: str, command: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "embed":
        pytest.importorskip("pyarrow")
    if name == "pack":
        command(name, *COMMANDS[name])  # in a process of its own, and its workers' in others
        return
    monkeypatch.chdir(command.root)  # type: ignore[attr-defined]
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "utf-8", "strict"))
    assert cli.run(name, COMMANDS[name]) == 0


def test_embedded_names_are_those_of_the_files(command: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(command.root)  # type: ignore[attr-defined]
    assert cli.run("embed", ["run", "data/train", "--out", "features"]) == 0
    table = (command.root / "features" / "images.csv").read_bytes()  # type: ignore[attr-defined]
    assert table.count(b"a/caf\xe9") == 7 and b"caf\xe9/caf\xe97.png,caf\xe9" in table
