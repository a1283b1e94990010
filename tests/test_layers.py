"""The shape of the house: imports point down, links are relative, names are free, `train.py` guards its path."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A folder is a row; what stands alone at the top of a package has a row of its own. Imports point down.
LAYERS = [
    ["__main__", "__init__", "train"],
    ["commands"],
    ["trainer"],
    ["efficiency"],
    ["training"],
    ["report", "explore"],
    ["config"],
    ["evaluation"],
    ["analysis"],
    ["monitoring"],
    ["methods"],
    ["models"],
    ["optim"],
    ["runtime"],
    ["loaders.packing"],
    ["loaders.supervised"],
    ["loaders.build"],
    ["loaders.engines", "loaders.evaluation"],
    ["loaders.augment"],
    ["loaders.order"],
    ["loaders.sources"],
    ["loaders.spec"],
    ["cli"],
    ["files", "live_line", "parts"],
    ["schema"],
    ["errors", "renamed", "worker"],
    ["kernels.augment"],
    ["kernels.spectral"],
    ["kernels.linalg"],
    ["kernels.batchnorm", "kernels.cuda_graph", "kernels.ema", "kernels.optimizers"],
    ["kernels.collectives", "kernels.triton_support"],
]
KERNELS_MAY_IMPORT = {"torch", "triton", "numpy", "fastrdm"} | sys.stdlib_module_names
FILES = {
    ".".join((*prefix, *file.relative_to(folder).with_suffix("").parts)): file
    for folder, prefix in [
        (ROOT / "fastrdm", ("fastrdm",)),
        (ROOT / "loaders", ("fastrdm", "loaders")),
        (ROOT / "kernels", ("fastrdm", "kernels")),
    ]
    for file in sorted(folder.rglob("*.py"))
}


def layer(module: str) -> int:
    """The row of LAYERS, or the one below the last for what is not ours."""
    rows = (i for i, row in enumerate(LAYERS) if any(f"{module}.".startswith(f"fastrdm.{name}.") for name in row))
    return next(rows, len(LAYERS))


def imported(source: str) -> list[str]:
    """Every module or name that a source imports, inside functions as well."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{'.' * node.level}{node.module}.{alias.name}" for alias in node.names]
    return found


def upward(module: str, source: str) -> list[str]:
    """What `module` must not import: rows above its own, relative names, and for kernels any other package."""
    here = layer(module)
    wrong = [name for name in imported(source) if layer(name) < here or name.startswith(".")]
    if module.startswith("fastrdm.kernels"):
        wrong += [name for name in imported(source) if name.partition(".")[0] not in KERNELS_MAY_IMPORT]
    return wrong


@pytest.mark.parametrize("module", FILES)
def test_imports_point_down(module: str) -> None:
    package = module.endswith(".__init__")
    assert package or layer(module) < len(LAYERS), f"{module} stands in no layer: give it one"
    assert not upward(module, FILES[module].read_text())


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("fastrdm.kernels.linalg.gram", "import pydantic"),
        ("fastrdm.kernels.linalg.gram", "from fastrdm.loaders.spec import require"),
        ("fastrdm.loaders.order", "def f():\n    from fastrdm import config"),
        ("fastrdm.methods.transform", "import fastrdm.trainer"),
        ("fastrdm.config.run_config", "from fastrdm.training.run_state import RunState"),
        ("fastrdm.runtime.log", "from . import cli"),
    ],
)
def test_upward_imports_are_found(module: str, line: str) -> None:
    assert len(upward(module, line)) == 1


def test_package_markers_are_empty() -> None:
    for module, file in FILES.items():
        assert not module.endswith(".__init__") or module == "fastrdm.__init__" or file.read_text() == "", module


def test_no_module_is_named_as_one_of_pythons() -> None:
    names = {path.stem for path in (ROOT / "fastrdm").iterdir()} - {"__init__"}
    assert not names & sys.stdlib_module_names, "`torchrun fastrdm/train.py` would find these in place of Python's own"


@pytest.mark.parametrize("name", ["loaders", "kernels"])
def test_links_are_relative(name: str) -> None:
    link = ROOT / "fastrdm" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"


def test_train_is_a_short_entry() -> None:
    source = FILES["fastrdm.train"].read_text()
    assert len(source.splitlines()) < 40
    assert not [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]


def test_train_runs_beside_modules_named_as_pythons(tmp_path: Path) -> None:
    folder = tmp_path / "fastrdm"
    folder.mkdir()
    shutil.copy(ROOT / "fastrdm" / "train.py", folder)
    for name in ("random", "queue", "kernels"):
        (folder / f"{name}.py").write_text("raise SystemExit('found in place of another')\n")
    done = subprocess.run(
        [sys.executable, "fastrdm/train.py", "--print-config"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("preset: simsiam ")
