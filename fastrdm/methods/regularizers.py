"""Regularizers of published methods: variance and covariance, coding rate, spread on the sphere, Gaussian slices."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrdm.kernels.collectives import process_rank
from fastrdm.kernels.spectral.spectral_filter import spectral_filter
from fastrdm.methods.regularizer import (
    Regularizer,
    RegularizerContext,
    centered,
    off_diagonal,
    row_count,
    second_moment,
)
from fastrdm.methods.regularizer_settings import (
    CodingRateConfig,
    CovarianceConfig,
    FrobeniusConfig,
    KoLeoConfig,
    NuclearConfig,
    RegularizerConfig,
    SigRegConfig,
    TicoConfig,
    VarianceConfig,
    VisRegConfig,
)
from fastrdm.runtime.distributed import (
    gather_rows,
    gather_rows_with_gradient,
    sum_over_processes,
    sum_with_gradient,
)

TINY = 1e-24  # squares below it count as it, so that a collapsed dimension divides by no zero
SHORTEST = 1e-12  # length below which a row counts as one of it, as in F.normalize


class Variance(Regularizer):
    """mean_j max(0, goal - sqrt(Var_j + epsilon)), the variance over n - 1."""

    def __init__(self, config: VarianceConfig, context: RegularizerContext) -> None:
        super().__init__(config, context)
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        variance = sum_with_gradient(centered(x).square().sum(-2)) / (row_count(x) - 1)
        return F.relu(self.config.goal - (variance + self.config.epsilon).sqrt()).mean()


class Covariance(Regularizer):
    """sum_{i != j} C_ij^2 / D of the covariance C over n - 1.

    With fewer rows than dimensions the squares are those of the Gram matrix of the rows, |C|_F = |X X^T|_F / (n - 1),
    which is smaller; C then has large entries off its diagonal, so that taking the diagonal off loses nothing.
    """

    def __init__(self, config: CovarianceConfig, context: RegularizerContext) -> None:
        super().__init__(config, context)

    def forward(self, x: Tensor) -> Tensor:
        x, n, width = centered(x), row_count(x), x.shape[-1]
        if n >= width:
            return off_diagonal(second_moment(x) / (n - 1)).square().sum((-2, -1)).mean() / width
        diagonal = sum_with_gradient(x.square().sum(-2)) / (n - 1)
        rows = gather_rows_with_gradient(x, dim=1)
        every = (rows @ rows.mT / (n - 1)).square().sum((-2, -1))
        return (every - diagonal.square().sum(-1)).mean() / width


class CodingRate(Regularizer):
    """-(n + D) / (n D) ln det(I + D / (n epsilon) Z^T Z) / 2 of unit rows Z (n, D), by Cholesky on the smaller side."""

    def __init__(self, config: CodingRateConfig, context: RegularizerContext) -> None:
        super().__init__(config, context)
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        x, n, width = F.normalize(x, dim=-1), row_count(x), x.shape[-1]
        if n >= width:
            gram = second_moment(x)
        else:
            rows = gather_rows_with_gradient(x, dim=1)
            gram = rows @ rows.mT
        unit = torch.eye(gram.shape[-1], dtype=x.dtype, device=x.device)
        # cholesky_ex does not make the host wait for a check; I + a positive matrix always has a factor
        factor: Tensor = torch.linalg.cholesky_ex(unit + gram * (width / (n * self.config.epsilon)))[0]
        rate = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return -rate.mean() * (n + width) / (n * width)


class Frobenius(Regularizer):
    """ln(|K|_F^2), K = X^T X / tr(X^T X) of columns X at length 1: minus the collision entropy of the spectrum."""

    def __init__(self, config: FrobeniusConfig, context: RegularizerContext) -> None:
        super().__init__(config, context)

    def forward(self, x: Tensor) -> Tensor:
        length = sum_with_gradient(x.square().sum(-2, keepdim=True)).clamp_min(TINY).sqrt()
        x = x / length
        if row_count(x) >= x.shape[-1]:
            gram = second_moment(x)
        else:
            rows = gather_rows_with_gradient(x, dim=1)
            gram = rows @ rows.mT
        trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
        return (gram.square().sum((-2, -1)) / trace.square().clamp_min(TINY)).clamp_min(TINY).log().mean()


class Nuclear(Regularizer):
    """-|C|_* of the centroids C (n, D), as <C, P> with their polar factor P, which is the gradient too."""

    def __init__(self, config: NuclearConfig, context: RegularizerContext) -> None:
        super().__init__(config, context)

    def forward(self, x: Tensor) -> Tensor:
        # As F.normalize and a mean, in two thirds of the time: no quotient has to be differentiated.
        gain = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(SHORTEST).reciprocal() / len(x)
        own = (x * gain).sum(0)
        first = process_rank() * len(own)
        rows = gather_rows(own)
        polar = spectral_filter(own, "power", -1.0, x_all=rows, offset=first, side="target")
        return -sum_with_gradient(own.flatten() @ polar.flatten())


class KoLeo(Regularizer):
    """-mean_i ln(|z_i - z_nn(i)| + epsilon), the neighbor among the rows of one view on all processes."""

    def __init__(self, config: KoLeoConfig, context: RegularizerContext) -> None:
        super().__init__(config, context)
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self._of_view(F.normalize(view, dim=-1)) for view in x]).mean()

    def _of_view(self, x: Tensor) -> Tensor:
        """Unit rows (B, D) of this process against those of all."""
        everyone = gather_rows_with_gradient(x)
        with torch.no_grad():
            similarity = x @ everyone.mT
            itself = torch.arange(len(x), device=x.device) + process_rank() * len(x)
            similarity.scatter_(1, itself.unsqueeze(-1), -2.0)
        distance = F.pairwise_distance(x, everyone[similarity.argmax(1)], eps=self.config.epsilon)
        return -(distance + self.config.epsilon).log().mean()


class Sliced(Regularizer):
    """A regularizer that looks at rows along random unit vectors, drawn anew at each step, alike on all processes."""

    slices: Tensor

    def __init__(self, config: RegularizerConfig, context: RegularizerContext, slices: int) -> None:
        super().__init__(config, context)
        self.register_buffer("slices", torch.zeros(context.width, slices), persistent=False)
        self.set_step(0)

    def set_step(self, step: int) -> None:
        draw = torch.Generator(self.slices.device).manual_seed(step)
        self.slices.normal_(generator=draw)
        self.slices /= self.slices.norm(dim=0)


class _Characteristic(torch.autograd.Function):
    """Sums over rows of cos and sin of k * step * y, k = 0 to knots - 1: y (V, n, M) to (V, M, knots, 2).

    One cosine and one sine of each number; the multiples follow by the addition theorems, and are made again for the
    gradient instead of being kept.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, step: float, knots: int) -> Tensor:
        ctx.save_for_backward(y)
        ctx.step, ctx.knots = step, knots
        return torch.stack([torch.stack((c.sum(-2), s.sum(-2)), -1) for c, s in _multiples(y * step, knots)], -2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (y,) = ctx.saved_tensors
        out = torch.zeros_like(y)
        for k, (c, s) in enumerate(_multiples(y * ctx.step, ctx.knots)):
            by = (grad[..., k, :] * (k * ctx.step)).unsqueeze(-3)
            out = out + by[..., 1] * c - by[..., 0] * s
        return out, None, None


def _multiples(angle: Tensor, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cosine and sine of k * angle for k = 0 to count - 1."""
    c, s = torch.ones_like(angle), torch.zeros_like(angle)
    c1, s1 = angle.cos(), angle.sin()
    for _ in range(count):
        yield c, s
        c, s = c * c1 - s * s1, s * c1 + c * s1


class SigReg(Sliced):
    """mean over slices of n * integral |phi_n(t) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) dt over [-limit, limit]."""

    def __init__(self, config: SigRegConfig, context: RegularizerContext) -> None:
        super().__init__(config, context, config.slices)
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        n, knots = row_count(x), self.config.knots
        along = x @ self.slices.to(x.dtype)
        step = self.config.limit / (knots - 1)
        phi = sum_with_gradient(_Characteristic.apply(along, step, knots)) / n
        t = torch.arange(knots, dtype=x.dtype, device=x.device) * step
        normal = torch.exp(-t.square() / 2)
        error = (phi[..., 0] - normal).square() + phi[..., 1].square()
        weights = torch.full_like(t, 2 * step)
        weights[0] = weights[-1] = step
        return n * (error * (weights * normal)).sum(-1).mean()


class VisReg(Sliced):
    """Mean row, deviations and sorted slices of standardized rows against normal quantiles; rows of all processes."""

    quantiles: Tensor

    def __init__(self, config: VisRegConfig, context: RegularizerContext) -> None:
        super().__init__(config, context, config.slices)
        self.config = config
        positions = torch.arange(1, context.batch_size + 1, dtype=torch.float64) / (context.batch_size + 1)
        self.register_buffer("quantiles", torch.special.ndtri(positions).unsqueeze(-1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        c = self.config
        x = gather_rows_with_gradient(x, dim=1)
        mean = x.mean(1, keepdim=True)
        deviation = (x - mean).square().mean(1, keepdim=True).clamp_min(TINY).sqrt()
        standard = (x - mean) / (deviation.detach() + c.epsilon)
        along = (standard @ self.slices.to(x.dtype)).sort(dim=1).values
        shape = (along - self.quantiles.to(x.dtype)).square().mean()
        return c.center * mean.square().mean() + c.scale * (1 - deviation).square().mean() + c.shape * shape


class Tico(Regularizer):
    """mean_i z_i^T C z_i, C <- momentum C + (1 - momentum) E[z z^T] over views and processes, no gradient through C."""

    moment: Tensor

    def __init__(self, config: TicoConfig, context: RegularizerContext) -> None:
        super().__init__(config, context)
        self.config = config
        self.register_buffer("moment", torch.zeros(context.width, context.width))

    def forward(self, x: Tensor) -> Tensor:
        x = F.normalize(x, dim=-1)
        with torch.no_grad():
            rows = x.flatten(0, 1)
            batch = sum_over_processes(rows.mT @ rows) / (row_count(x) * len(x))
            moment = torch.lerp(batch, self.moment.to(x.dtype), self.config.momentum)
            if self.training:
                self.moment.copy_(moment)
        return ((x @ moment) * x).sum(-1).mean()
