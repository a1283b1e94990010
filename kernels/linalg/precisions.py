"""The table of precisions by name, and the one that `auto` stands for."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastrdm.kernels.linalg.matmul import Fp16x3, PlainPrecision, Precision
from fastrdm.kernels.triton_support import HAS_TRITON, triton_module

_BUILDERS: dict[str, Callable[[], Precision[Any]]] = {
    "fp64": lambda: PlainPrecision(root_shift=1e-12),
    "fp32": lambda: PlainPrecision(root_shift=1e-6),
    "fp16x3": Fp16x3,
    "fp16x3-triton": lambda: triton_module("linalg.fp16x3_triton").Fp16x3Triton(),
}
PRECISIONS = tuple(_BUILDERS)


@cache
def precision_named(name: str) -> Precision[Any]:
    """The precision of that name in PRECISIONS."""
    return _BUILDERS[name]()


def resolve(name: str, x: Tensor) -> str:
    """The name that `auto` stands for: the input's own precision on a CPU, three float16 products on CUDA.

    ValueError for a name that is neither `auto` nor in PRECISIONS.
    """
    if name not in ("auto", *PRECISIONS):
        raise ValueError(f"precision must be one of auto, {', '.join(PRECISIONS)}, got {name!r}")
    if name != "auto":
        return name
    if x.dtype == torch.float64:
        return "fp64"
    if not x.is_cuda:
        return "fp32"
    return "fp16x3-triton" if HAS_TRITON else "fp16x3"
