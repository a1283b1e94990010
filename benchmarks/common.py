"""Parts that all benchmarks share: clocks, turns and their percentiles, the machine and its versions, CSV rows."""

import argparse
import csv
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

FOLDER = Path(__file__).parent  # holds results/ and records/
ROOT = FOLDER.parent
Clock = Callable[[], float]
# Processor time is that of this process over all its threads: for a machine that others use too.
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
ENVIRONMENT = ["device", "threads", "torch", "commit"]
MACHINE = ["device", "cpu", "cores", "versions", "commit"]
LIBRARIES = ["nvidia-dali-cuda130", "ffcv", "simplejpeg", "opencv-python-headless", "pillow", "torchvision"]
LIBRARIES += ["torchcodec", "kornia", "albumentations", "numpy", "torch"]
Row = Mapping[str, object]
Name = TypeVar("Name", bound=str)


def parser(description: str | None) -> argparse.ArgumentParser:
    """An argument parser that shows a module's docstring as it stands."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def available_device() -> torch.device:
    """The first CUDA device, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def require_cuda(module: str) -> None:
    """End the program with one line if torch sees no CUDA device."""
    if not torch.cuda.is_available():
        sys.exit(f"{module} needs a CUDA device")


def require_packages(*modules: str) -> None:
    """End the program with one line if one of `modules` cannot be imported."""
    error = import_error(*modules)
    if error:
        sys.exit(error)


def import_error(*modules: str) -> str | None:
    """Why one of `modules` cannot be imported, or None if all can. A library of theirs may be missing as well."""
    for module in modules:
        try:
            import_module(module)
        except (ImportError, RuntimeError, OSError) as error:
            return f"{module} cannot be imported: {str(error).partition(chr(10))[0]}"
    return None


def milliseconds(call: Callable[[], object], clock: Clock, cuda: bool) -> float:
    """Time of one call in milliseconds, from an idle device to an idle device."""
    if cuda:
        torch.cuda.synchronize()
    start = clock()
    call()
    if cuda:
        torch.cuda.synchronize()
    return 1e3 * (clock() - start)


def in_turns(
    calls: Mapping[Name, Callable[[], object]], turns: int, clock: Clock, cuda: bool
) -> dict[Name, list[float]]:
    """Milliseconds of every call in every turn. A turn is one call of each: what slows the machine slows all."""
    times: dict[Name, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            times[name].append(milliseconds(call, clock, cuda))
    return times


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The 20th percentile, the median and the 80th percentile, linear between two values."""
    low, middle, high = np.quantile(np.asarray(values, np.float64), (0.2, 0.5, 0.8)).tolist()
    return low, middle, high


def times(values: Sequence[float], digits: int) -> dict[str, str]:
    """The columns ms, p20 and p80 of a row, from milliseconds."""
    low, middle, high = percentiles(values)
    return {"ms": f"{middle:.{digits}f}", "p20": f"{low:.{digits}f}", "p80": f"{high:.{digits}f}"}


def commit() -> str:
    """The checkout as `git describe` names it, with "-dirty" if it was changed, or "unknown" without git."""
    command = ["git", "describe", "--always", "--dirty"]
    with suppress(OSError):
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"
    return "unknown"


def processor() -> str:
    """The processor's model name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's model name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def environment(device: torch.device) -> dict[str, object]:
    """The columns ENVIRONMENT: the device's name, torch's threads and version, the commit."""
    values = device_name(device), torch.get_num_threads(), torch.__version__, commit()
    return dict(zip(ENVIRONMENT, values, strict=True))


def machine(device: torch.device) -> dict[str, object]:
    """The columns MACHINE: a GPU's name or "cpu", the processor and its cores, versions of libraries, the commit."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = []
    for library in LIBRARIES:
        with suppress(PackageNotFoundError):
            versions.append(f"{library} {version(library)}")
    return dict(zip(MACHINE, (name, processor(), os.cpu_count(), " ".join(versions), commit()), strict=True))


def print_rows(fields: Sequence[str], rows: Iterable[Row], head: bool = True) -> None:
    """Print rows as CSV, each as soon as it is measured; `head`: the line of column names first."""
    writer = csv.DictWriter(sys.stdout, fields, restval="", lineterminator="\n")
    if head:
        writer.writeheader()
    sys.stdout.flush()
    for row in rows:
        writer.writerow(row)
        sys.stdout.flush()


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@contextmanager
def added_rows(path: Path, fields: Sequence[str]) -> Iterator["csv.DictWriter[Any]"]:
    """Writer of rows that are added to a CSV file at once; a new file gets the line of column names."""
    new = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="", buffering=1) as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n", extrasaction="ignore")
        if new:
            writer.writeheader()
        yield writer
