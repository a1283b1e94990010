"""Every mutant of the table turns its test red, in a copy of the tree where that test is green without it."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest


class Mutant(NamedTuple):
    """A row of the table."""

    file: str
    mistake: str
    old: str
    new: str
    killed_by: str


ROOT = Path(__file__).parents[2]
PARTS = ("fastrdm", "loaders", "kernels", "tests", "pyproject.toml")
TABLE = runpy.run_path(str(Path(__file__).with_name("table.py")))["MUTANTS"]
MUTANTS = [Mutant(file, *row) for file, rows in TABLE.items() for row in rows]


def run(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in a folder of `tree`, whose packages come before installed ones."""
    # without bytecode: a patched file of equal length and time would be taken for the old one
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=tree / "tests", env=environment, capture_output=True, text=True, timeout=900)


def outcome(tree: Path, tests: list[str]) -> tuple[int, str]:
    """Exit code of pytest over `tests` in `tree` (0 green, 1 red, else not run), and the end of what it printed."""
    done = run(tree, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *(str(tree / test) for test in tests))
    return done.returncode, done.stdout[-3000:]


def copy_to(tree: Path) -> Path:
    for part in PARTS:
        if (ROOT / part).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "mutants")
            shutil.copytree(ROOT / part, tree / part, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / part, tree / part)
    return tree


@pytest.fixture(scope="module")
def green(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unmutated copy in which the tests of all selected mutants pass."""
    tree = copy_to(tmp_path_factory.mktemp("green"))
    items = [item for item in request.session.items if item.originalname == "test_killed"]
    chosen = [item.callspec.params["mutant"] for item in items]
    code, printed = outcome(tree, list(dict.fromkeys(mutant.killed_by for mutant in chosen)))
    assert code == 0, printed
    found = run(tree, "-c", "import fastrdm.kernels.ema as module; print(module.__file__)").stdout
    assert found.startswith(str(tree)), f"the tests would run against {found}"
    return tree


def mutated(mutant: Mutant, source: str) -> str:
    """The file's source with the mistake in it."""
    assert source.count(mutant.old) == 1, f"{mutant.file} does not hold once: {mutant.old}"
    wrong = source.replace(mutant.old, mutant.new)
    compile(wrong, mutant.file, "exec")
    return wrong


def test_every_patch_applies() -> None:
    for mutant in MUTANTS:
        mutated(mutant, (ROOT / mutant.file).read_text())


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.mistake.replace(" ", "-"))
def test_killed(green: Path, mutant: Mutant) -> None:
    file = green / mutant.file
    source = file.read_text()
    try:
        file.write_text(mutated(mutant, source))
        code, printed = outcome(green, [mutant.killed_by])
    finally:
        file.write_text(source)
    assert code == 1, f"{mutant.killed_by} did not turn red:\n{printed}"
