"""Memory that was freed is there for the next step, without new pages from the kernel."""

import os
import subprocess
import sys

import pytest

from fastrdm.runtime.allocator import keep_freed_memory

PROGRAM = """
import resource, sys
from fastrdm.runtime.allocator import keep_freed_memory
told = keep_freed_memory()
import torch

torch.set_num_threads(1)
layers = []
for channels in (3, 16, 16):
    layers += [torch.nn.Conv2d(channels, 16, 3, padding=1), torch.nn.BatchNorm2d(16), torch.nn.ReLU()]
network, images = torch.nn.Sequential(*layers), torch.randn(512, 3, 32, 32)

def step():
    network(images).mean().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range(6):
    before = step()
print(told, max(step() for _ in range(3)) - before)
"""


def run(**variables: str) -> tuple[bool, int]:
    """Whether the allocator was told, and page faults of three steps on maps of 32 MiB, after six steps."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=plain | variables, capture_output=True, text=True, check=True, timeout=300
    )
    told, faults = done.stdout.split()
    return told == "True", int(faults)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="page faults are counted as Linux does")
def test_freed_memory_is_used_again() -> None:
    told, faults = run()
    if not told:
        pytest.skip("this C library has no mallopt")
    left, before = run(MALLOC_ARENA_MAX="8")
    assert not left, "who sets the allocator by the environment is not overruled"
    assert faults < before / 4


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    assert not keep_freed_memory()
