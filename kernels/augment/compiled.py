"""A C++ source compiled on first use and kept: what is kept is compared with its checksum before it is loaded."""

import ctypes
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from hashlib import sha256
from pathlib import Path


class NoCompiler(ValueError):
    """The machine has no C++ compiler that builds the source; says why."""


def compiled(source: Path, flags: tuple[str, ...]) -> ctypes.CDLL:
    """The shared library of `source`, from $XDG_CACHE_HOME/fastrdm (~/.cache/fastrdm), built where that lacks it.

    A kept library is named by the checksum of its own content beside that of all it was made from. One that was cut
    short or changed does not match its name and is built again: loading it could end the process by SIGBUS. Processes
    that build at once each rename a whole file into place. Where nothing can be kept, the library is built for this
    process alone, and a warning says so. NoCompiler where it cannot be built.
    """
    compiler = os.environ.get("CXX", "c++")
    made_of = "\0".join((source.read_text(), compiler, *flags, _machine()))
    stem = f"{source.stem}-{sha256(made_of.encode()).hexdigest()[:16]}"
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fastrdm"
        folder.mkdir(parents=True, exist_ok=True)
        return ctypes.CDLL(str(_kept(folder, stem) or _built(compiler, flags, source, folder, stem)))
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        return _built_for_now(compiler, flags, source, stem, error)


def _kept(folder: Path, stem: str) -> Path | None:
    """The library in the cache that is what its name says; others of this stem are removed."""
    for path in sorted(folder.glob(f"{stem}-*.so")):
        if path.stem == f"{stem}-{_checksum(path)}":
            return path
        path.unlink(missing_ok=True)
    return None


def _built(compiler: str, flags: tuple[str, ...], source: Path, folder: Path, stem: str) -> Path:
    handle, name = tempfile.mkstemp(".part", f"{stem}-", folder)  # a name that no other process or host takes
    os.close(handle)
    part = Path(name)
    try:
        subprocess.run([compiler, *flags, "-o", part, source], check=True, capture_output=True, text=True)
        part.chmod(0o755)
        whole = folder / f"{stem}-{_checksum(part)}.so"
        part.replace(whole)
    except FileNotFoundError as error:
        raise NoCompiler(f"{source.name} cannot be built: there is no {compiler}") from error
    except subprocess.CalledProcessError as error:
        if shutil.disk_usage(folder).free < 1 << 20:
            raise OSError(f"no space left in {folder}") from error
        raise NoCompiler(f"{compiler} does not compile {source.name}: {error.stderr.strip()[:500]}") from error
    finally:
        part.unlink(missing_ok=True)
    return whole


def _built_for_now(compiler: str, flags: tuple[str, ...], source: Path, stem: str, why: Exception) -> ctypes.CDLL:
    """A library in a folder of this process alone, gone from the disk once it is loaded."""
    try:
        with tempfile.TemporaryDirectory(prefix="fastrdm-") as folder:
            loaded = ctypes.CDLL(str(_built(compiler, flags, source, Path(folder), stem)))
    except OSError as error:
        raise NoCompiler(
            f"{source.name} can be kept neither in the cache ({why}) nor in {tempfile.gettempdir()}: {error}"
        ) from error
    warnings.warn(f"{source.name} is compiled at every start, some seconds: it cannot be kept ({why})", stacklevel=4)
    return loaded


def _checksum(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()[:32]


def _machine() -> str:
    """Describe what the compiler's `native` means here: a library built elsewhere may use what this machine lacks."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
