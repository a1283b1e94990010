"""Regularizers of published methods: variance and covariance, coding rate, spread on the sphere, Gaussian slices."""

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastrdm import parts
from fastrdm.kernels.collectives import process_rank
from fastrdm.kernels.spectral.spectral_filter import spectral_filter
from fastrdm.methods.regularizer import (
    Regularizer,
    RegularizerConfig,
    RegularizerContext,
    centered,
    off_diagonal,
    row_count,
    second_moment,
)
from fastrdm.runtime.distributed import (
    gather_rows,
    gather_rows_with_gradient,
    sum_over_processes,
    sum_with_gradient,
)
from fastrdm.schema import STRICT, nearest

TINY = 1e-24  # squares below it count as it, so that a collapsed dimension divides by no zero
SHORTEST = 1e-12  # length below which a row counts as one of it, as in F.normalize


@dataclass(frozen=True, kw_only=True, config=STRICT)
class VarianceConfig(RegularizerConfig):
    """Hinge on the standard deviation of each dimension, mean over dimensions (VICReg, equation 1)."""

    name: Literal["variance"] = "variance"

    goal: float = Field(default=1.0, gt=0)
    """Standard deviation from which on a dimension is not penalized. VICReg uses 1."""

    epsilon: float = Field(default=1e-4, gt=0)
    """Added to the variance before its square root is taken. VICReg uses 1e-4."""


class Variance(Regularizer):
    """mean_j max(0, goal - sqrt(Var_j + epsilon)), the variance over n - 1."""

    def __init__(self, config: VarianceConfig, context: RegularizerContext) -> None:
        super().__init__(config, context)
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        variance = sum_with_gradient(centered(x).square().sum(-2)) / (row_count(x) - 1)
        return F.relu(self.config.goal - (variance + self.config.epsilon).sqrt()).mean()


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CovarianceConfig(RegularizerConfig):
    """Squared covariances of different dimensions, summed and divided by the dimensions (VICReg, equation 4)."""

    name: Literal["covariance"] = "covariance"


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


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CodingRateConfig(RegularizerConfig):
    """Negative coding rate of unit rows (SimDINO, balanced over rows and dimensions as its code does)."""

    name: Literal["coding_rate"] = "coding_rate"

    epsilon: float = Field(default=0.5, gt=0)
    """Squared distortion of the code: a smaller one counts more directions. SimDINO's code uses 0.5."""


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


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FrobeniusConfig(RegularizerConfig):
    """Logarithm of the squared Frobenius norm of the normalized second moment (FroSSL)."""

    name: Literal["frobenius"] = "frobenius"


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


@dataclass(frozen=True, kw_only=True, config=STRICT)
class NuclearConfig(RegularizerConfig):
    """Negative nuclear norm of the mean over views of unit rows (MMCR)."""

    name: Literal["nuclear"] = "nuclear"


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


@dataclass(frozen=True, kw_only=True, config=STRICT)
class KoLeoConfig(RegularizerConfig):
    """Negative logarithm of the distance to the nearest other row, of unit rows (Sablayrolles et al. 2019; DINOv2)."""

    name: Literal["koleo"] = "koleo"

    epsilon: float = Field(default=1e-8, gt=0)
    """Added to each distance before its logarithm is taken. DINOv2 uses 1e-8."""


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


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SigRegConfig(RegularizerConfig):
    """Distance of random slices from a standard normal, by the Epps-Pulley statistic (LeJEPA)."""

    name: Literal["sigreg"] = "sigreg"

    slices: int = Field(default=1024, ge=1)
    """Random directions along which the rows are tested, drawn anew at each step. LeJEPA uses 1024."""

    knots: int = Field(default=17, ge=2)
    """Frequencies at which characteristic functions are compared, 0 and `limit` included. LeJEPA uses 17."""

    limit: float = Field(default=3.0, gt=0)
    """Largest frequency. LeJEPA's recommended code uses 3."""


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


@dataclass(frozen=True, kw_only=True, config=STRICT)
class VisRegConfig(RegularizerConfig):
    """Center, scale and Gaussian shape of the rows, each penalized apart (VISReg, equations 1, 5 and 6)."""

    name: Literal["visreg"] = "visreg"

    slices: int = Field(default=4096, ge=1)
    """Random directions along which the shape is compared, drawn anew at each step. VISReg uses 4096."""

    center: float = Field(default=1.0, ge=0)
    """Factor of the squared mean row."""

    scale: float = Field(default=1.0, ge=0)
    """Factor of the squared deviation of each dimension's standard deviation from 1."""

    shape: float = Field(default=1.0, ge=0)
    """Factor of the squared 2-Wasserstein distance of the slices from a standard normal."""

    epsilon: float = Field(default=1e-4, gt=0)
    """Added to the standard deviation by which the shape's rows are divided."""


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


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TicoConfig(RegularizerConfig):
    """Energy of unit rows under a moving average of their second moment (TiCo)."""

    name: Literal["tico"] = "tico"

    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Share of the old matrix in each update, `beta` of TiCo, which uses 0.9."""


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


REGULARIZERS: dict[str, type[Regularizer]] = {
    "variance": Variance,
    "covariance": Covariance,
    "coding_rate": CodingRate,
    "frobenius": Frobenius,
    "nuclear": Nuclear,
    "koleo": KoLeo,
    "sigreg": SigReg,
    "visreg": VisReg,
    "tico": Tico,
}


def find_regularizer(name: str) -> type[Regularizer]:
    """The class of that name, or the one that package.module:Class stands for; ValueError where there is none."""
    if parts.is_own(name):
        own: type[Regularizer] = parts.load(
            name, "", lambda x: isinstance(x, type) and issubclass(x, Regularizer), "a class derived from Regularizer"
        )
        return own
    if name not in REGULARIZERS:
        raise ValueError(f"must be a regularizer, got {name!r}: {nearest(name, REGULARIZERS)}")
    return REGULARIZERS[name]


def regularizer_settings(name: str) -> type[RegularizerConfig]:
    """The settings of the regularizer of that name."""
    return parts.settings_of(find_regularizer(name), RegularizerConfig)
