"""The compiled library: kept, verified before use, built again, and never silently left out."""

import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastrdm.kernels.augment import augment_cpu
from fastrdm.kernels.augment.compiled import NoCompiler, compiled
from fastrdm.loaders.augment import reference

LOAD = """
import sys
from pathlib import Path
from fastrdm.kernels.augment.compiled import compiled
assert compiled(Path(sys.argv[1]), ("-shared", "-fPIC")).answer() == 42
"""
build_all = augment_cpu.library.__wrapped__


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source that compiles in no time."""
    path = tmp_path_factory.mktemp("source") / "small.cpp"
    path.write_text('extern "C" int answer() { return 42; }\n')
    return path


def build(source: Path) -> None:
    assert compiled(source, ("-shared", "-fPIC")).answer() == 42


def load(source: Path) -> list[str]:
    return [sys.executable, "-c", LOAD, str(source)]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "fastrdm"


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_no_compiler_is_said(compiler: str, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(NoCompiler, match=compiler):
        build_all()
    monkeypatch.setattr(reference, "library", build_all)
    with pytest.warns(UserWarning, match=f"plain torch.*{compiler}"):
        assert reference._best_on_cpu.__wrapped__() == "reference"
    with pytest.raises(ValueError, match=compiler):
        reference.chosen("cpu", torch.device("cpu"))


def test_the_library_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build(source)
    (built,) = (tmp_path / "fastrdm").iterdir()
    monkeypatch.setattr(subprocess, "run", None)
    build(source)
    assert [built] == list((tmp_path / "fastrdm").iterdir())


@pytest.mark.parametrize("damage", ["cut short", "empty", "one bit", "longer"])
def test_a_damaged_library_is_built_again(damage: str, cache: Path, source: Path) -> None:
    build(source)
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    path.unlink()  # this process has it mapped
    path.write_bytes(
        {"cut short": whole[:3000], "empty": b"", "one bit": bytes(flipped), "longer": whole + b"x"}[damage]
    )
    subprocess.run(load(source), check=True)
    (again,) = cache.iterdir()
    assert again.stem.endswith(sha256(again.read_bytes()).hexdigest()[:32])


def test_processes_that_build_at_once(cache: Path, source: Path) -> None:
    running = [subprocess.Popen(load(source)) for _ in range(2)]
    assert [process.wait(120) for process in running] == [0, 0]
    assert {path.suffix for path in cache.iterdir()} == {".so"}


def test_the_name_does_not_hang_on_chance(cache: Path, source: Path) -> None:
    for seed in ("1", "2", "3"):
        subprocess.run(load(source), check=True, env={**os.environ, "PYTHONHASHSEED": seed})
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("where", ["no home", "a file", "full"])
def test_what_cannot_be_kept_is_built_for_now_and_said(
    where: str, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    if where == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user who is not in passwd
        reason = "home directory"
    elif where == "a file":
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        reason = "Not a directory|File exists"
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        compiler = tmp_path / "c++"
        compiler.write_text(f'#!/bin/sh\ncase "$*" in *{tmp_path}/fastrdm/*) exit 1 ;; esac\nexec c++ "$@"\n')
        compiler.chmod(0o755)
        monkeypatch.setenv("CXX", str(compiler))
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
        reason = "no space left in"
    with pytest.warns(UserWarning, match=rf"is compiled at every start.*cannot be kept.*({reason})"):
        build(source)
    assert not list(temporary.iterdir())


def test_nothing_can_be_written_anywhere(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(NoCompiler, match=r"neither in the cache \(.+\) nor in .*nowhere"):
        build(source)
