"""Chosen before torch and Triton are imported, here and in the processes that tests start."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # test processes fill the cores; more threads would wait for each other

import torch

# For `import benchmarks`, which is not installed. At the end, so that an installed fastrdm is what the tests import.
sys.path.append(str(Path(__file__).parents[1]))

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # without a GPU the Triton kernels run in Triton's interpreter
