"""The functions g of singular values that a filter can have, and W as a product of small factors."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from fastrdm.kernels.linalg.matmul import Precision, scaled_by
from fastrdm.kernels.spectral.filter_functions import FILTER_FUNCTIONS, ChebyshevFit, FilterFunction
from fastrdm.kernels.triton_support import triton_module

# Smallest singular value kept, as a share of the largest, by the dtype the features were last rounded to. Rounding puts
# up to 0.37 eps (measured on BatchNorm outputs) into an exactly null direction: the half types stand just above that;
# float32 leaves room for the arithmetic that made the features, float64 for that of the Gram matrix (1e-13 in s^2).
CUTOFF = {torch.float64: 3e-7, torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3}

# Callers' own functions by the name that own_function gave them, for as long as the caller keeps them.
_OWN: WeakValueDictionary[str, Callable[[Tensor], Tensor]] = WeakValueDictionary()


@torch.compiler.assume_constant_result
def own_function(g: Callable[[Tensor], Tensor]) -> str:
    """The name by which the operator, whose arguments are tensors, numbers and strings, finds a function g."""
    name = f"{getattr(g, '__module__', None)}:{getattr(g, '__qualname__', type(g).__name__)}#{id(g)}"
    _OWN[name] = g
    return name


def filter_function(kind: str) -> FilterFunction:
    """The row of FILTER_FUNCTIONS, or a caller's own function, which is not by products."""
    own = _OWN.get(kind)
    return FILTER_FUNCTIONS[kind] if own is None else FilterFunction(own)


class Function(NamedTuple):
    """g(s / unit) above the cutoff, 0 below, for g one of the filter functions or s^power."""

    kind: str
    """`power`, a name in FILTER_FUNCTIONS or one that own_function gave."""
    power: float | None
    """The exponent where `kind` is power."""
    cutoff: float
    """Share of the largest singular value."""
    unit: float
    """1, or sqrt(rows) for scale="rms"."""

    @property
    def name(self) -> str:
        """The kind as messages show it."""
        return self.kind.partition("#")[0]

    @property
    def fit(self) -> ChebyshevFit | None:
        """How products evaluate a function that is no power."""
        return filter_function(self.kind).fit

    @property
    def amplifies(self) -> bool:
        """True if small singular values may get large weights, so that float32 rounding of x would be blown up."""
        return self.kind not in FILTER_FUNCTIONS if self.power is None else self.power < 0

    def __call__(self, s: Tensor) -> Tensor:
        """g(s / unit) for s > 0, without the cutoff. ValueError for an own g that changes the shape."""
        s = s if self.unit == 1 else s / self.unit
        if self.power is not None:
            return s**self.power
        weights = filter_function(self.kind).g(s)
        if weights.shape != s.shape:
            wanted = f"weights of their shape {tuple(s.shape)}, got {tuple(weights.shape)}"
            raise ValueError(f"filter function {self.name} must map singular values to {wanted}")
        return weights


class Factors(NamedTuple):
    """W = gain basis^T core basis, and the dominant direction's own weight where it was taken out.

    An empty basis stands for the identity, a core of one row for a diagonal.
    """

    basis: Tensor
    """(V, n, D) or (V, 0, D)."""
    core: Tensor
    """(V, n, n) or (V, 1, n), of magnitudes near 1."""
    gain: Tensor
    """(V, 1, 1) float64: apart, so that nothing overflows on the way."""
    right: Tensor | None = None
    """(V, D, 1) float64: the dominant direction, which basis and core know nothing of; zero where none stands alone."""
    weight: Tensor | None = None
    """(V, 1, 1) float64: its weight."""

    def apply(self, x: Tensor, precision: Precision[Any]) -> Tensor:
        """x W for x (V, B, D), in x's dtype."""
        if self.right is None or self.weight is None:
            return self._without_dominant(x, precision).to(x.dtype)
        if precision.fused:
            around = triton_module("spectral.around_triton")
            basis = around.SplitMatrix(self.basis) if self.basis.shape[1] else None
            out: Tensor = around.apply(x, basis, around.SplitMatrix(self.core), self.gain, self.right, self.weight)
            return out
        # In float64, so that what is left of nearly parallel rows keeps its digits.
        along = x.double() @ self.right
        rest = torch.baddbmm(x.double(), along, self.right.mT, alpha=-1).to(self.core.dtype)
        out = self._without_dominant(rest, precision).double()
        return torch.baddbmm(out, along * self.weight, self.right.mT).to(x.dtype)

    def _without_dominant(self, x: Tensor, precision: Precision[Any]) -> Tensor:
        """gain x basis^T core basis in the dtype of the factors."""
        c = x.to(self.core.dtype)
        c = precision.product(c, self.basis.mT) if self.basis.shape[1] else c
        c = c * self.core if self.core.shape[1] == 1 else precision.product(c, self.core)
        c = precision.product(c, self.basis) if self.basis.shape[1] else c
        return scaled_by(c, self.gain)


def no_factors(x: Tensor, dtype: torch.dtype) -> Factors:
    """Factors of the right shape and without content, for a filter that needs no gradient."""
    views, _, width = x.shape
    shapes = (views, 0, width), (views, 0, 0)
    basis, core = (x.new_empty(shape, dtype=dtype) for shape in shapes)
    return Factors(basis, core, x.new_empty((0, 1, 1), dtype=torch.float64))


def work_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 input, float32 for every other."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def is_even(power: float | None) -> bool:
    """True if s^power is a polynomial in the Gram matrix without a constant term."""
    return power is not None and power > 0 and math.fmod(power, 2) == 0
