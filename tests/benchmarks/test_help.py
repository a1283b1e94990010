"""Every benchmark answers --help with nothing installed but what fastrdm itself needs."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODULES = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for file in (ROOT / "benchmarks").rglob("*.py")
    if "def main(" in file.read_text()
)
# In one process, since importing torch takes longer than all else; the finder behaves as if packages were missing.
PROGRAM = """
import contextlib, io, runpy, sys
from importlib.machinery import PathFinder

HIDDEN = ["torchvision", "kornia", "matplotlib", "nvidia.dali", "ffcv", "cv2", "torchcodec", "timm", "triton"]


class BaseInstall(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = any(name == package or name.startswith(package + ".") for package in HIDDEN)
        return None if hidden else super().find_spec(name, path, target)


sys.meta_path[:] = [BaseInstall if finder is PathFinder else finder for finder in sys.meta_path]
for package in HIDDEN:
    with contextlib.suppress(ImportError):
        __import__(package)
        raise SystemExit(f"{package} is not hidden")
for module in sys.argv[1:]:
    sys.argv, out = [module, "--help"], io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            runpy.run_module(module, run_name="__main__")
    except SystemExit as end:
        print(module, end.code, out.getvalue().startswith("usage: "))
"""


def test_every_benchmark_answers_help_with_the_base_install() -> None:
    command = [sys.executable, "-c", PROGRAM, *MODULES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{module} 0 True" for module in MODULES], done.stderr
    assert {"benchmarks.gpu_suite", "benchmarks.loaders.augment", "benchmarks.plots.loader"} <= set(MODULES)
