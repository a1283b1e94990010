"""What a step frees on a CPU stays with the process: the next step causes next to no page faults."""

import os
import platform
import subprocess
import sys

import pytest

# Rounds of five blocks of 8 MB, all of a round alive at once, as activations are; page faults of the last four rounds.
ROUNDS = """
import resource, sys
import torch
from fastrdm.runtime.host_memory import keep_freed_memory

print(keep_freed_memory())
for i in range(8):
    blocks = [torch.ones(2**21) for _ in range(5)]
    del blocks
    if i == 3:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**environment: str) -> tuple[str, int]:
    """What keep_freed_memory answered in a process of its own, and the page faults of four rounds."""
    command = [sys.executable, "-c", ROUNDS]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | environment)
    kept, count = done.stdout.split()
    return kept, int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
def test_freed_memory_is_used_again() -> None:
    kept, count = faults()
    assert kept == "True" and count < 1000, "40,960 pages of 4 KB are written"


def test_settings_of_the_environment_stay() -> None:
    kept, _ = faults(MALLOC_TOP_PAD_="0")
    assert kept == "False"
