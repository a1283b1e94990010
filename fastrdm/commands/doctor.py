"""`fastrdm doctor`: what is installed here, what will be used, what is missing and the command that installs it.

Only Python's own modules are imported at the top, so that the command runs where torch itself is broken.
"""

import argparse
import importlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

# where a package's module has another name
MODULES = {
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
    "pillow": "PIL",
    "opencv-python-headless": "cv2",
    "umap-learn": "umap",
}
DEVELOPMENT = frozenset(("test", "dev"))  # extras that no run needs
FFCV_SYSTEM = "apt-get install libopencv-dev libturbojpeg0-dev pkg-config && "  # what ffcv is built with
PROBE = """
import sys
sys.path = [path for path in sys.path if path]  # not the working folder, which may hold a signal.py
import importlib, json
for name in sys.argv[1:]:
    print("\\x1e" + json.dumps([name]), flush=True)
    try:
        version, error = str(getattr(importlib.import_module(name), "__version__", "")), ""
    except BaseException as reason:
        version, error = "", f"{type(reason).__name__}: {reason}"
    print("\\x1e" + json.dumps([name, version, error]), flush=True)
"""
SECONDS = 120  # for all imports together


class Package(NamedTuple):
    """A package that fastrdm or one of its extras asks for, as found here."""

    name: str
    least: str  # version asked for, empty for any
    extra: str  # empty: every run needs it
    version: str  # empty: not installed
    problem: str  # empty: it can be used


class Missing(NamedTuple):
    """Something that is not there, and how to get it."""

    what: str
    reason: str
    command: str


def main(arguments: Sequence[str]) -> int:
    """`fastrdm doctor`; 0 when all that every run needs works and all that is required, else 1."""
    parser = argparse.ArgumentParser(prog="fastrdm doctor", description="What works here, what is missing.")
    parser.add_argument("--require", default="", metavar="A,B", help="names from the line `can be required`")
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    options = parser.parse_args(arguments)
    found = examine()
    required = [name for name in options.require.split(",") if name]
    unknown = [name for name in required if name not in found["works"]]
    if unknown:
        raise ValueError(f"--require takes {', '.join(found['works'])}, got {', '.join(unknown)}")
    found["required"] = [name for name in required if not found["works"][name]]
    found["ok"] = not found["broken"] and not found["required"]
    print(json.dumps(found, indent=1) if options.json else "\n".join(summary_lines(found)))
    return 0 if found["ok"] else 1


def examine() -> dict[str, Any]:
    """All findings as plain data."""
    packages = installed()
    torch = next((p for p in packages if p.name == "torch"), None)
    usable = torch is not None and not torch.problem
    devices = devices_of(importlib.import_module("torch")) if usable else {"cpu": platform.machine(), "cuda": []}
    compilers = {
        "c++": _version_of(os.environ.get("CXX") or "g++", "c++", "clang++"),
        "nvcc": _version_of("nvcc"),
        "triton": imports(["triton"])["triton"][0] if find_spec("triton") else "",
    }
    works = abilities(packages, devices, compilers)
    base = [p for p in packages if not p.extra]
    broken = [f"{p.name}: {p.problem}; {_command(p)}" for p in base if p.problem]
    if not base:
        broken.append("fastrdm is not installed, what it needs is not known: pip install -e .")
    return {
        "python": f"{platform.python_version()} ({platform.system()} {platform.machine()})",
        "packages": [p._asdict() for p in packages],
        "devices": devices,
        "compilers": compilers,
        "engines": {
            "resident": usable,
            "native": usable,
            "dali": works.get("dali", False),
            "ffcv": works.get("ffcv", False),
            "torchcodec": works.get("torchcodec", False),
        },
        "used": used(devices, compilers, works) if usable else {},
        "works": works,
        "broken": broken,
        "missing": [m._asdict() for m in missing(packages, works)],
        "notes": [note for note in (apex(),) if note],
    }


def wanted() -> list[tuple[str, str, str]]:
    """Name, least version and extra of every package that fastrdm asks for; nothing when it is not installed."""
    try:
        lines = metadata.requires("fastrdm") or []
    except metadata.PackageNotFoundError:
        return []
    out = []
    for line in lines:
        name = re.match(r"[\w.-]+", line)
        least, extra = re.search(r">=([\w.]+)", line), re.search(r"extra == ['\"]([\w-]+)['\"]", line)
        if name and not (extra and extra[1] in DEVELOPMENT):
            out.append((name[0].lower(), least[1] if least else "", extra[1] if extra else ""))
    return out


def module_of(package: str) -> str:
    return "nvidia.dali" if package.startswith("nvidia-dali") else MODULES.get(package, package.replace("-", "_"))


def installed() -> list[Package]:
    """Every package asked for, imported in a process of its own: a broken one takes nothing down."""
    asked = wanted()
    results = imports(dict.fromkeys(module_of(name) for name, *_ in asked))
    out = []
    for name, least, extra in asked:
        version, problem = results[module_of(name)]
        version = _distribution(name) or version
        if not problem and version and least and _numbers(version) < _numbers(least):
            problem = f"{version} is older than {least}"
        out.append(Package(name, least, extra, version, problem))
    return out


def imports(modules: Iterable[str], seconds: float = SECONDS) -> dict[str, tuple[str, str]]:
    """(version, what went wrong) of each module, tried in child processes that may crash."""
    left = list(modules)
    found: dict[str, tuple[str, str]] = {}
    while left:
        try:
            command = [sys.executable, "-c", PROBE, *left]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=seconds)
            output, end = done.stdout, f"its import ended Python with status {done.returncode}"
        except subprocess.TimeoutExpired as error:
            output = (error.stdout or b"").decode(errors="replace") if isinstance(error.stdout, bytes) else ""
            end = f"its import did not end in {seconds:g} s"
        lines = [json.loads(part.split("\n")[0]) for part in output.split("\x1e")[1:]]
        found |= {line[0]: (line[1], line[2].split("\n")[0]) for line in lines if len(line) == 3}
        stuck = next((name for name in left if name not in found), None)
        if stuck:
            found[stuck] = ("", end)
        left = [name for name in left if name not in found]
    return found


def _distribution(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _numbers(version: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", version.split("+")[0])[:3]]


def _version_of(*programs: str) -> str:
    """The first of these programs that is there, and the version it tells; empty when none is."""
    path = next((path for path in map(shutil.which, programs) if path), None)
    if not path:
        return ""
    lines = _output(path, "--version").splitlines()
    release = next((line for line in lines if "release" in line), lines[0] if lines else "")
    return f"{Path(path).name}: {release.strip()}"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def devices_of(torch: Any) -> dict[str, Any]:
    """Processor and GPUs as torch sees them; a driver that fails is reported."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpu = f"{platform.machine()}, {cores} cores, {torch.backends.cpu.get_cpu_capability()}"
    out: dict[str, Any] = {"cpu": cpu, "cuda": [], "torch_cuda": torch.version.cuda}
    out["cpu_bf16"] = torch.cpu.get_capabilities().get("avx512_bf16", False)  # what auto goes by
    try:
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            bf16 = p.major >= 8  # below, torch emulates it
            gib = round(p.total_memory / 2**30, 1)
            out["cuda"].append({"name": p.name, "gib": gib, "capability": f"{p.major}.{p.minor}", "bf16": bf16})
    except Exception as error:  # a driver too old for this torch, a GPU that fell off the bus
        out["problem"] = f"{type(error).__name__}: {error}".split("\n")[0]
    if out["cuda"]:
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0].strip()
        out["driver"] = driver or "unknown"
    return out


def abilities(packages: Sequence[Package], devices: dict[str, Any], compilers: dict[str, str]) -> dict[str, bool]:
    """Every name that --require takes, and whether it works here."""
    cuda = bool(devices["cuda"])
    compiled = bool(compilers["triton"] if cuda else compilers["c++"])
    extras = dict.fromkeys(p.extra for p in packages if p.extra)
    out = {
        "cuda": cuda,
        "bf16": cuda and all(d["bf16"] for d in devices["cuda"]),
        "triton": cuda and bool(compilers["triton"]),
        "compile": compiled,
        "c++": bool(compilers["c++"]),
        "nvcc": bool(compilers["nvcc"]),
    }
    out |= {p.name: not p.problem for p in packages if p.extra}
    return out | {e: all(not p.problem for p in packages if p.extra == e) for e in extras}


def used(devices: dict[str, Any], compilers: dict[str, str], works: dict[str, bool]) -> dict[str, str]:
    """The device, engine, solver and precision that `auto` takes here, by job."""
    cuda = works["cuda"]
    bf16 = works["bf16"] if cuda else devices["cpu_bf16"]
    compiler = "Triton" if cuda else compilers["c++"].partition(":")[0]
    return {
        "device": devices["cuda"][0]["name"] if cuda else "cpu",
        "JPEG decoder": "simplejpeg (libjpeg-turbo), Pillow for what it refuses and for other formats",
        "engine": "resident for sets held in memory, native for files",
        "SyncBN": "fastrdm's own, over " + ("nccl" if cuda else "gloo"),
        "spectral solver": "newton_schulz, eigh where it falls short" if cuda else "eigh, gram_power for even powers",
        "Triton kernels": "available" if works["triton"] else "off: no CUDA device" if not cuda else "off: no Triton",
        "torch.compile": f"through {compiler}" if works["compile"] else "not possible: no compiler",
        "16-bit training": "bf16" if bf16 else "fp16" if cuda else "slow",
    }


def _command(package: Package) -> str:
    if not package.extra:
        return f"pip install '{package.name}{'>=' if package.least else ''}{package.least}'"
    return f"{FFCV_SYSTEM if package.extra == 'ffcv' else ''}pip install 'fastrdm[{package.extra}]'"


def missing(packages: Sequence[Package], works: dict[str, bool]) -> list[Missing]:
    """Optional parts that are not here, each with the command that installs it."""
    gone = [Missing(p.extra, f"{p.name}: {p.problem}", _command(p)) for p in packages if p.extra and p.problem]
    advice = {
        "cuda": ("no CUDA device that torch can use", "nvidia-smi shows the driver; pip install torch, built for CUDA"),
        "c++": ("torch.compile on a CPU needs a C++ compiler", "apt-get install g++"),
        "nvcc": ("only kernels/csrc needs it", "install the CUDA toolkit of torch's CUDA version"),
    }
    if works["cuda"] and not works["triton"]:
        advice["triton"] = ("torch.compile and the Triton kernels need it", "pip install triton")
    return gone + [Missing(name, *reason) for name, reason in advice.items() if not works[name]]


def apex(find: Callable[[str], Any] = find_spec) -> str:
    """A note when the package `apex` here is the one of PyPI, which is not NVIDIA's; it is not imported."""
    try:
        spec = find("apex")
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return ""
    folders = [Path(place) for place in spec.submodule_search_locations or ()]
    if any((folder / "multi_tensor_apply").is_dir() for folder in folders):
        return "apex: NVIDIA's, for optim.backend=apex; fastrdm has never been run with it"
    return "apex: this is PyPI's package of that name, not NVIDIA's, and of no use here: pip uninstall apex"


def summary_lines(found: dict[str, Any]) -> list[str]:
    """The findings of `examine` as lines for the terminal."""
    lines = [f"python {found['python']}"]
    for p in found["packages"]:
        mark, extra = ("ok" if not p["problem"] else "--"), f" [{p['extra']}]" if p["extra"] else ""
        lines.append(
            f"{mark} {p['name']}{extra} {p['version'] or 'not there'}{': ' if p['problem'] else ''}{p['problem']}"
        )
    devices = found["devices"]
    lines.append(f"cpu: {devices['cpu']}")
    lines += [f"cuda {i}: {d['name']}, {d['gib']} GiB, {d['capability']}" for i, d in enumerate(devices["cuda"])]
    lines += [f"{key}: {devices[key]}" for key in ("driver", "problem") if key in devices]
    lines += [f"{name}: {version or 'none'}" for name, version in found["compilers"].items()]
    lines.append(
        "engines: " + ", ".join(f"{name} {'ready' if ok else 'missing'}" for name, ok in found["engines"].items())
    )
    lines += [f"{job}: {what}" for job, what in found["used"].items()]
    lines += found["notes"] + [f"missing {m['what']} ({m['reason']}): {m['command']}" for m in found["missing"]]
    lines.append(f"can be required: {', '.join(found['works'])}")
    lines += [f"required but not working: {name}" for name in found["required"]]
    lines += [f"broken: {line}" for line in found["broken"]]
    return [*lines, "all that a run needs works" if found["ok"] else "not all that is needed works"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
