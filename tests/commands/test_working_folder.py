"""Files in the working folder that are called like modules of Python's change nothing (shared/cases/17)."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with some images and such files."""
    for name in ("signal", "queue", "inspect", "json"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('found in place of another')\n")
    (tmp_path / "data" / "a").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
    for i in range(4):
        Image.fromarray(noise).save(tmp_path / "data" / "a" / f"{i}.jpg")
    return tmp_path


ENTRY = "import sys; sys.path = [path for path in sys.path if path]; from fastrdm.cli import entry; entry()"


def test_pack_and_doctor_work_beside_them(folder: Path) -> None:
    """As the console script starts them, which does not look into the working folder either."""
    command = [sys.executable, "-c", ENTRY]
    words = ["pack", "data", "out", "--workers", "1", "--labels", "none"]
    done = subprocess.run([*command, *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (folder / "out" / "meta.json").exists()
    done = subprocess.run([*command, "doctor"], cwd=folder, capture_output=True, text=True)
    assert "found in place of another" not in done.stdout + done.stderr
    assert not [line for line in done.stdout.splitlines() if line.startswith("broken") and "torch" in line]
