"""Wheel and source archive hold what is in the checkout; their metadata and version; the size of committed files."""

import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from email.message import Message
from importlib.metadata import version
from pathlib import Path

import pytest

import fastrdm

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
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tracked files as they are here."""
    pytest.importorskip("setuptools", minversion="70.1")
    copy = tmp_path_factory.mktemp("tree")
    for file in tracked():
        place = copy / file.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, place, follow_symlinks=False)
    return copy


def build_wheel(source: Path, out: Path) -> zipfile.ZipFile:
    """The wheel of a folder or a source archive, built without network."""
    command = ["pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(out), str(source)]
    subprocess.run([sys.executable, "-m", *command], check=True, timeout=120)
    (made,) = out.glob("*.whl")
    return zipfile.ZipFile(made)


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    return build_wheel(tree, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def archive(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive of the tracked files."""
    out = tmp_path_factory.mktemp("sdist")
    code = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(out)], cwd=tree, check=True, capture_output=True, timeout=120)
    (made,) = out.iterdir()
    return made


def metadata(wheel: zipfile.ZipFile) -> Message:
    return message_from_string(wheel.read(f"fastrdm-{version('fastrdm')}.dist-info/METADATA").decode())


def test_wheel_holds_every_module_and_config_as_a_file(wheel: zipfile.ZipFile) -> None:
    expected = {"fastrdm/py.typed"}
    for file in tracked():
        name = file.relative_to(ROOT).as_posix()
        top = name.split("/")[0]
        if top in ("loaders", "kernels") and file.suffix in (".py", ".cpp", ".txt"):
            expected.add(f"fastrdm/{name}")
        elif top == "fastrdm" and (file.suffix in (".py", ".yaml", ".html", ".json") or file.parent.name == "assets"):
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
    assert fastrdm.__version__ == version("fastrdm") == metadata(wheel)["Version"]


def test_metadata_says_who_what_and_where(wheel: zipfile.ZipFile) -> None:
    told = metadata(wheel)
    assert told["Author"] == "The fastrdm authors"
    assert told["License"] == "MIT" or told["License-Expression"] == "MIT"
    assert "Paper, https://arxiv.org/abs/2303.02387" in told.get_all("Project-URL", [])
    classifiers = told.get_all("Classifier", [])
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in (10, 11, 12)} <= set(classifiers)
    assert "Typing :: Typed" in classifiers
    assert "effective rank" in told["Keywords"].split(",")
    page = str(told.get_payload())
    assert page.startswith("# fastrdm\n")
    assert re.findall(r"\]\((?!https?://|#)", page) == [], "a relative link leads nowhere on a package index"
    assert "[arXiv 2303.02387](https://arxiv.org/abs/2303.02387)" in page
    assert "pip install -c constraints.txt -e '.[test]' && pytest" in page


def test_archive_holds_every_tracked_file_and_the_links(archive: Path, tmp_path: Path) -> None:
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path, filter="data")
    (root,) = tmp_path.iterdir()
    for file in tracked():
        name = file.relative_to(ROOT)
        if name.name == ".gitignore":
            continue
        if file.is_symlink():
            assert (root / name).readlink() == file.readlink()
        else:
            assert (root / name).read_bytes() == file.read_bytes()
    assert not [path for path in root.rglob("*") if path.suffix in (".pyc", ".so")]
    tests = [sys.executable, "-m", "pytest", "-q", "-n", "0", "tests/test_layers.py", "tests/test_docs.py"]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [*tests, "-k", "links or imports"], cwd=root, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout


def test_the_wheel_of_the_archive_is_the_wheel_of_the_checkout(
    archive: Path, wheel: zipfile.ZipFile, tmp_path: Path
) -> None:
    again = build_wheel(archive, tmp_path)
    names = [name for name in wheel.namelist() if ".dist-info/" not in name]
    assert sorted(names) == sorted(name for name in again.namelist() if ".dist-info/" not in name)
    assert all(again.read(name) == wheel.read(name) for name in names)


def test_wheel_brings_the_command_and_its_needs(wheel: zipfile.ZipFile) -> None:
    info = f"fastrdm-{version('fastrdm')}.dist-info"
    assert "fastrdm = fastrdm.cli:entry" in wheel.read(f"{info}/entry_points.txt").decode()
    needs = [re.findall(r"^([\w-]+)(.*)", line)[0] for line in metadata(wheel).get_all("Requires-Dist", [])]
    base = {name.lower() for name, rest in needs if "extra ==" not in rest}
    assert {"torch", "numpy", "pydantic", "safetensors", "scikit-learn"} <= base
    assert not {"torchvision", "timm", "triton", "lightly"} & base  # the base install works without
    pins = re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert {name.lower() for name, _ in needs} - {name.lower() for name in pins} == {"wandb"}  # tested by a stand-in


def test_no_large_file_is_committed() -> None:
    assert [str(file) for file in tracked() if file.lstat().st_size > MIB] == []
