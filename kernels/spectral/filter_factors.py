"""What every solver hands out: W as a product of small factors, and the functions g of singular values."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastrdm.kernels.linalg.matmul import product, scaled_by

# Smallest singular value kept, as a share of the largest, by the dtype the features were last rounded to. Rounding puts
# up to 0.37 eps (measured on BatchNorm outputs) into an exactly null direction: the half types stand just above that;
# float32 leaves room for the arithmetic that made the features, float64 for that of the Gram matrix (1e-13 in s^2).
CUTOFF = {torch.float64: 3e-7, torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3}

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "log": torch.log,
    "log1p": torch.log1p,
    "log1p_sq": lambda s: torch.log1p(s * s),
}


class Function(NamedTuple):
    """g(s / unit) above the cutoff, 0 below: s^power, ln s, ln(1 + s) or ln(1 + s^2)."""

    kind: str
    power: float | None
    cutoff: float  # share of the largest singular value
    unit: float  # 1, or sqrt(rows) for scale="rms"

    @property
    def amplifies(self) -> bool:
        """Whether small singular values get the large weights, so that float32 rounding of x would be blown up."""
        return self.power is not None and self.power < 0

    def __call__(self, s: Tensor) -> Tensor:
        """g(s / unit) for s > 0, without the cutoff."""
        return FUNCTIONS[self.kind](s / self.unit) if self.power is None else (s / self.unit) ** self.power


class Factors(NamedTuple):
    """W = gain basis^T core basis; an empty basis stands for the identity, a core of one row for a diagonal."""

    basis: Tensor  # (V, n, D) or (V, 0, D)
    core: Tensor  # (V, n, n) or (V, 1, n); magnitudes near 1
    gain: Tensor  # (V, 1, 1) float64: apart, so that nothing overflows on the way

    def apply(self, x: Tensor, precision: str) -> Tensor:
        """x W for x (V, B, D), in x's dtype."""
        c = x.to(self.core.dtype)
        c = product(c, self.basis.mT, precision) if self.basis.shape[1] else c
        c = c * self.core if self.core.shape[1] == 1 else product(c, self.core, precision)
        c = product(c, self.basis, precision) if self.basis.shape[1] else c
        return scaled_by(c, self.gain).to(x.dtype)


def no_factors(x: Tensor, dtype: torch.dtype) -> Factors:
    """Factors of the right shape and without content, for a filter that needs no gradient."""
    views, _, width = x.shape
    shapes = (views, 0, width), (views, 0, 0)
    basis, core = (x.new_empty(shape, dtype=dtype) for shape in shapes)
    return Factors(basis, core, x.new_ones((views, 1, 1), dtype=torch.float64))


def work_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 input, float32 for every other."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def is_even(power: float | None) -> bool:
    """Whether s^power is a polynomial in the Gram matrix without a constant term."""
    return power is not None and power > 0 and math.fmod(power, 2) == 0
