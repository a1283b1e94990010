"""Whitening with gradient: rows minus their mean, times an inverse root of their covariance (W-MSE, IterNorm)."""

from typing import Any

import torch
from torch import Tensor

from fastrdm.kernels.collectives import process_count, process_rank
from fastrdm.methods.transform import BranchContext, Transform, TransformContext
from fastrdm.methods.transform_settings import TransformConfig
from fastrdm.methods.transform_settings import WhitenConfig as WhitenConfig
from fastrdm.runtime.distributed import gather_rows_with_gradient, sum_with_gradient
from fastrdm.schema import require

SMALLEST = 1e-12  # share of the largest variance below which zca takes a direction for empty


class Whiten(Transform):
    """Each view, or each random part of `size` rows of it, to zero mean and identity covariance over n - 1."""

    shared = True
    order: Tensor

    def __init__(self, config: WhitenConfig, context: TransformContext) -> None:
        super().__init__(config, context)
        self.config = config
        images = context.batch_size
        self.size = images if config.size is None else min(config.size, images)
        divides = images % self.size == 0
        require(divides, "whiten.size", f"a divisor of the {images} images that a step sees at once", config.size)
        if config.root == "cholesky" and config.epsilon == 0:
            above = f"rows (whiten.size={config.size}, {images} images) above the {context.width} dimensions"
            require(self.size > context.width, "whiten.root=cholesky with epsilon=0", above, self.size)
        self.register_buffer("order", torch.arange(images), persistent=False)

    @staticmethod
    def waits(config: TransformConfig) -> bool:
        assert isinstance(config, WhitenConfig)
        return config.root == "zca"

    def set_step(self, step: int) -> None:
        if self.size < len(self.order):
            self.order.copy_(torch.randperm(len(self.order), generator=torch.Generator().manual_seed(step)))

    def forward(self, x: Tensor, branch: BranchContext) -> Tensor:
        if self.size == len(self.order):
            count = x.shape[1] * process_count()
            x = x - sum_with_gradient(x.sum(1, keepdim=True)) / count
            return self._rooted(x, sum_with_gradient(x.mT @ x) / (count - 1))
        everyone = gather_rows_with_gradient(x, dim=1)[:, self.order]
        parts = everyone.unflatten(1, (-1, self.size))
        parts = parts - parts.mean(2, keepdim=True)
        out = self._rooted(parts, parts.mT @ parts / (self.size - 1)).flatten(1, 2)
        first = process_rank() * x.shape[1]
        return out[:, self.order.argsort()][:, first : first + x.shape[1]]

    def _rooted(self, x: Tensor, covariance: Tensor) -> Tensor:
        """Centered rows (..., n, D) times an inverse root of the covariance (..., D, D)."""
        c, unit = self.config, torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        covariance = (1 - c.epsilon) * covariance + c.epsilon * unit
        if c.root == "cholesky":
            factor = torch.linalg.cholesky_ex(covariance)[0]
            solved: Tensor = torch.linalg.solve_triangular(factor, x.mT, upper=False)
            return solved.mT
        if c.root == "newton":
            trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
            root, scaled = unit.expand_as(covariance), covariance / trace
            for _ in range(c.iterations):
                root = (3 * root - root @ root @ root @ scaled) / 2
            whole: Tensor = x @ root / trace.sqrt()
            return whole
        inverse: Tensor = _InverseRoot.apply(covariance)
        return x @ inverse


class _InverseRoot(torch.autograd.Function):
    """The symmetric inverse root of covariances (..., D, D), zero along empty directions.

    The gradient is the Daleckii-Krein formula, which divides by sums of roots: unlike that of the eigenvectors it stays
    finite where eigenvalues are equal.
    """

    @staticmethod
    def forward(ctx: Any, covariance: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(covariance.double())
        full = values > SMALLEST * values[..., -1:]
        root = torch.where(full, torch.where(full, values, 1.0).rsqrt(), 0.0)
        ctx.save_for_backward(root, vectors)
        inverse: Tensor = (vectors * root.unsqueeze(-2)) @ vectors.mT
        return inverse.to(covariance.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        root, vectors = ctx.saved_tensors
        both = root.unsqueeze(-1) + root.unsqueeze(-2)
        product = (root.unsqueeze(-1) * root.unsqueeze(-2)).square()
        slopes = -product / torch.where(both == 0, 1.0, both)
        inside = vectors.mT @ grad.double() @ vectors
        out: Tensor = vectors @ (slopes * (inside + inside.mT) / 2) @ vectors.mT
        return out.to(grad.dtype)
