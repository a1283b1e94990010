"""Matrix products in a precision, and the symmetric step that every chain of products is made of.

A precision is an object. It has its own type of matrix, `M`: for torch's products a plain tensor, for the Triton
kernels a tensor together with its float16 parts. `fastrdm.kernels.linalg.precisions` has all precisions by name.
"""

from abc import ABC, abstractmethod
from functools import lru_cache
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

BOUNDED_SCALE = 64.0  # of entries known to be below 512: rounding to float16 leaves small ones more digits
SPLIT = 2048.0  # the low part of a split carries the next 11 bits, shifted into the range of float16

M = TypeVar("M")


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """x of magnitude below 65504 as high + low / SPLIT, both float16: 22 bits (Ootomo and Yokota 2022)."""
    high = x.half()
    return high, ((x - high.float()) * SPLIT).half()


def half_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of float16 matrices (K, m, k), (K, k, n), summed and returned in float32."""
    if a.is_cuda:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _split_product(a: Tensor, b: Tensor) -> Tensor:
    a_high, a_low = split(a)
    b_high, b_low = split(b)
    cross = half_product(torch.cat((a_low, a_high), -1), torch.cat((b_high, b_low), -2))
    return half_product(a_high, b_high) + cross / SPLIT


def power_of_two(x: Tensor) -> Tensor:
    """The power of two at or below the largest magnitude of each matrix, (..., 1, 1); 1 for a zero matrix."""
    largest = x.abs().amax((-2, -1), keepdim=True)
    return torch.exp2(torch.floor(torch.log2(torch.where(largest == 0, 1.0, largest))))


def scaled_by(x: Tensor, gain: Tensor) -> Tensor:
    """x gain, in place, for gain (V, 1, 1) float64, at least 0; overflows only where the result does."""
    # In two steps: a product of float32 by float64 takes forty times as long on a CPU.
    root = gain.sqrt().clamp_max(torch.finfo(x.dtype).max).to(x.dtype)
    return x.mul_(root).mul_(root)


class Combination(NamedTuple, Generic[M]):
    """w_0 I + w_1 t_1 + w_2 t_2 + w_3 t_3 of symmetric matrices (K, n, n)."""

    weights: Tensor
    """(K or 1, 4) in the dtype of the matrices."""
    terms: tuple[M, M, M]


@lru_cache(maxsize=1024)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Weights (1, n) of a Combination, copied to the device once."""
    return torch.tensor([values], dtype=dtype, device=device)


class Precision(ABC, Generic[M]):
    """How products of batched matrices are computed.

    `product` takes and returns tensors of any scale. The other products are the steps of a chain: they take and return
    matrices of the precision's own type, which `matrix` makes from a dense tensor and `dense` turns back into one.
    Neither costs a copy. Nobody may write into a tensor that was made a matrix.
    """

    root_shift: float
    """Added to the eigenvalues of a matrix with norm 1 before its root is taken: more than rounding takes away."""

    fused = False
    """True if what surrounds a chain of products is done by the kernels of fastrdm.kernels.spectral.around_triton."""

    @abstractmethod
    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b of (K, m, k), (K, k, n) of any scale."""

    @abstractmethod
    def matrix(self, dense: Tensor) -> M:
        """A tensor (K, m, k) as a matrix of a chain."""

    @abstractmethod
    def dense(self, matrix: M) -> Tensor:
        """The tensor (K, m, k) behind a matrix of a chain."""

    @abstractmethod
    def bounded_product(self, a: M, b: M) -> M:
        """a @ b of (K, m, k), (K, k, n) with entries below 512, the result's too."""

    @abstractmethod
    def symmetric_product(self, a: M, b: M, gamma: float = 0.0) -> M:
        """a b^T + gamma I of (K, n, d) with entries below 512, exactly symmetric, as a b^T is but for rounding."""

    def square(self, x: M) -> M:
        """x x^T of (K, n, d) with entries below 512, exactly symmetric."""
        return self.symmetric_product(x, x)

    @abstractmethod
    def axpby(
        self,
        a: M,
        b: M,
        *,
        alpha: float = 1.0,
        beta: float = 0.0,
        add: M | None = None,
        gamma: float = 0.0,
        combined: Combination[M] | None = None,
    ) -> M:
        """alpha a b + beta add + gamma I + combined of commuting symmetric (K, n, n); exactly symmetric.

        All entries are below 65504.
        """

    @abstractmethod
    def combine(self, combination: Combination[M]) -> M:
        """The combination as a matrix (K, n, n)."""


class _TorchPrecision(Precision[Tensor]):
    """Chains of torch's own products: a matrix is the tensor itself."""

    @abstractmethod
    def _step(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b of a chain's symmetric matrices, which need no scaling."""

    def matrix(self, dense: Tensor) -> Tensor:
        return dense

    def dense(self, matrix: Tensor) -> Tensor:
        return matrix

    def symmetric_product(self, a: Tensor, b: Tensor, gamma: float = 0.0) -> Tensor:
        c = self.bounded_product(a, b.mT)
        c = 0.5 * (c + c.mT)
        if gamma:
            c.diagonal(dim1=-2, dim2=-1).add_(gamma)
        return c

    def axpby(
        self,
        a: Tensor,
        b: Tensor,
        *,
        alpha: float = 1.0,
        beta: float = 0.0,
        add: Tensor | None = None,
        gamma: float = 0.0,
        combined: Combination[Tensor] | None = None,
    ) -> Tensor:
        c = self._step(a, b)
        # Rounding breaks the symmetry that keeps the chains stable.
        c = (0.5 * alpha) * (c + c.mT)
        if add is not None:
            c = c.add_(add, alpha=beta)
        if gamma:
            c.diagonal(dim1=-2, dim2=-1).add_(gamma)
        return c if combined is None else c.add_(self.combine(combined))

    def combine(self, combination: Combination[Tensor]) -> Tensor:
        weights, terms = combination
        first, second, third = (weights[:, i, None, None] * t for i, t in enumerate(terms, start=1))
        sums = first + second + third
        sums.diagonal(dim1=-2, dim2=-1).add_(weights[:, :1])
        return sums


class PlainPrecision(_TorchPrecision):
    """Products in the operands' dtype. In float32 on CUDA torch's own setting for TF32 decides."""

    def __init__(self, root_shift: float) -> None:
        self.root_shift = root_shift

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b

    bounded_product = _step = product


class Fp16x3(_TorchPrecision):
    """Products of float32 matrices as three products of float16 ones, by torch."""

    root_shift = 2e-6  # measured: rounding takes 5e-7

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        unit_a, unit_b = power_of_two(a), power_of_two(b)
        return _split_product(a / unit_a, b / unit_b) * unit_a * unit_b

    def bounded_product(self, a: Tensor, b: Tensor) -> Tensor:
        return _split_product(a * BOUNDED_SCALE, b * BOUNDED_SCALE) / BOUNDED_SCALE**2

    def _step(self, a: Tensor, b: Tensor) -> Tensor:
        return _split_product(a, b)
