"""What is installed is what is in the checkout: the wheel's files, its version, the size of what is committed."""

import re
import shutil
import stat
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MIB = 1 << 20


def tracked() -> list[Path]:
    """The files that git knows, links not followed."""
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("not a checkout of git")
    command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in names.split("\0") if name and (ROOT / name).exists()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of the tracked files as they are here, built without network."""
    pytest.importorskip("setuptools", minversion="70.1")
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for file in tracked():
        place = tree / file.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, place, follow_symlinks=False)
    command = ["pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(out), str(tree)]
    subprocess.run([sys.executable, "-m", *command], check=True, timeout=120)
    return zipfile.ZipFile(next(out.iterdir()))


def test_wheel_holds_every_module_and_config_as_a_file(wheel: zipfile.ZipFile) -> None:
    expected = {"fastrdm/py.typed"}
    for file in tracked():
        name = file.relative_to(ROOT).as_posix()
        top = name.split("/")[0]
        if top in ("loaders", "kernels") and file.suffix in (".py", ".cpp", ".txt"):
            expected.add(f"fastrdm/{name}")
        elif top == "fastrdm" and file.suffix in (".py", ".yaml"):
            expected.add(name)
    assert {
        "fastrdm/kernels/linalg/effective_rank.py",
        "fastrdm/loaders/spec.py",
        "fastrdm/recipes/quickstart.yaml",
    } <= expected
    found = {info.filename: info for info in wheel.infolist() if not info.filename.split("/")[0].endswith(".dist-info")}
    assert found.keys() == expected
    assert not [name for name, info in found.items() if stat.S_ISLNK(info.external_attr >> 16)]
    assert wheel.read("fastrdm/loaders/spec.py") == (ROOT / "loaders" / "spec.py").read_bytes()


def test_version_is_one(wheel: zipfile.ZipFile) -> None:
    assert wheel.filename is not None
    assert Path(wheel.filename).name == f"fastrdm-{version('fastrdm')}-py3-none-any.whl"
    citation = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert citation is not None
    assert citation[1] == version("fastrdm")
    assert f"## [{version('fastrdm')}]" in (ROOT / "CHANGELOG.md").read_text()


def test_wheel_brings_the_command_and_its_needs(wheel: zipfile.ZipFile) -> None:
    info = f"fastrdm-{version('fastrdm')}.dist-info"
    assert "fastrdm = fastrdm.cli:entry" in wheel.read(f"{info}/entry_points.txt").decode()
    needs = re.findall(r"^Requires-Dist: ([\w-]+)(.*)", wheel.read(f"{info}/METADATA").decode(), re.MULTILINE)
    base = {name.lower() for name, rest in needs if "extra ==" not in rest}
    assert {"torch", "numpy", "pydantic", "safetensors", "scikit-learn"} <= base
    assert not {"torchvision", "timm", "triton", "lightly"} & base  # the base install works without
    pins = re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert {name.lower() for name, _ in needs} - {name.lower() for name in pins} == {"wandb"}  # tested by a stand-in


def test_no_large_file_is_committed() -> None:
    assert [str(file) for file in tracked() if file.lstat().st_size > MIB] == []
