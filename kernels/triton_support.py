"""The one place that asks for Triton, because a CPU build of torch comes without it."""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

# Found once, at import: torch.compile cannot trace the question.
HAS_TRITON = find_spec("triton") is not None


def triton_module(name: str) -> ModuleType:
    """Module `fastrdm.kernels.NAME`, which imports Triton. ModuleNotFoundError names Triton where it is missing."""
    return import_module(f"fastrdm.kernels.{name}")
