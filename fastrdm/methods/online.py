"""What a transform is, and those that carry gradient: the predictor, the spectral filter, the prototypes."""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass as plain_dataclass
from typing import Literal, NamedTuple

import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastrdm.distributed import gather_rows
from fastrdm.heads import Head, HeadConfig
from fastrdm.kernels.collectives import process_rank
from fastrdm.kernels.ladder import SOLVERS, spectral_filter
from fastrdm.loaders.spec import STRICT, require
from fastrdm.schedules import Duration, steps_of

Kind = Literal["features", "scores", "probabilities"]
Side = Literal["online", "target"]


class Horizon(NamedTuple):
    """The length of a run, against which durations are resolved."""

    steps_per_epoch: int
    total: int  # steps

    def steps(self, duration: Duration) -> int:
        return steps_of(duration, self.steps_per_epoch, self.total)


class Place(NamedTuple):
    """What a transform is told when it is built."""

    side: Side
    width: int  # D of the projection
    prototypes: int | None  # K, where this method has prototypes
    batch_size: int  # images a step over all processes
    sync_bn: bool
    horizon: Horizon


@plain_dataclass
class Branch:
    """What a transform may ask of the branch it runs in, besides its input."""

    other: Tensor | None  # the other branch's projection of the partner view, (V, B, D), without gradient
    score: Callable[[Tensor], Tensor] | None  # this branch's prototypes: features (..., D) to scores (..., K)
    scored: Tensor | None = None  # the features (V, B, D) that the prototypes of this branch scored
    scores: Tensor | None = None  # and their scores (V, B, K)


class Transform(nn.Module):
    """One step of a branch: (V, B, D) of kind `takes` to (V, B, K) of kind `gives`; V views of B images."""

    takes: Kind = "features"
    gives: Kind = "features"
    constant_lr = False  # whether its parameters keep the base rate throughout
    phase: Hashable = None  # what decides at this step which work is done, besides the numbers in tensors

    def set_step(self, step: int) -> None:
        """Write what changes with the step into device tensors, before the forward pass."""

    def phases(self) -> Iterator[tuple[int, str]]:
        """The steps at which `phase` changes, and to what."""
        yield from ()

    def forward(self, x: Tensor, branch: Branch) -> Tensor:
        raise AssertionError(f"{type(self).__name__} has no forward")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PredictorConfig:
    """A learned head (SimSiam, BYOL): Linear-BN-ReLU-Linear, its output as wide as its input."""

    name: Literal["predictor"] = "predictor"
    hidden: int | None = Field(default=None, ge=1)  # features of its hidden layer; null: a quarter of the projection
    bias: bool = False  # of the first layer, which a BatchNorm follows: SimSiam no, BYOL yes
    constant_lr: bool = True  # SimSiam: its rate neither warms up nor decays; BYOL: it follows the schedule


class Predictor(Transform):
    """z -> h(z); BatchNorm statistics per view like everywhere."""

    def __init__(self, config: PredictorConfig, place: Place) -> None:
        super().__init__()
        self.constant_lr = config.constant_lr
        hidden = config.hidden or max(place.width // 4, 1)
        head = HeadConfig(layers=2, hidden=hidden, out=place.width, bias=config.bias, last_norm="none")
        self.head = Head(head, place.width, place.sync_bn)

    def forward(self, x: Tensor, branch: Branch) -> Tensor:
        out: Tensor = self.head(x.flatten(0, 1))
        return out.view(*x.shape)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FilterConfig:
    """A spectral filter x V f(S) V^T, where x = U S V^T over the rows of all processes (RDM, section 5)."""

    name: Literal["filter"] = "filter"
    kind: Literal["power", "log", "log1p", "log1p_sq"] = "power"  # f(s) = s^power, ln s, ln(1+s), ln(1+s^2)
    power: float | None = Field(default=None, allow_inf_nan=False)  # of f itself, --sigma: online 1 or 2, target < 0
    basis: Literal["self", "other"] = "self"  # whose spectrum: its own, or the other branch's (authors' ImageNet code)
    scale: Literal["raw", "rms"] = "raw"  # raw: singular values of the gathered batch (the paper's); rms: / sqrt(rows)
    cutoff: float | None = Field(default=None, ge=0, lt=1)  # smaller shares of the largest s count as 0; null: by dtype
    solver: str = "auto"  # how W is computed: see docs/spectra.md

    def __post_init__(self) -> None:
        given = "a number for kind=power" if self.kind == "power" else f"left out for kind={self.kind}"
        require((self.power is not None) == (self.kind == "power"), "filter.power", given, self.power)
        require(self.solver in SOLVERS, "filter.solver", f"one of {', '.join(SOLVERS)}", self.solver)


class SpectralFilter(Transform):
    """Online: x W with W constant, so that the gradient is g W. Target: the filtered x, without gradient."""

    def __init__(self, config: FilterConfig, place: Place) -> None:
        super().__init__()
        self.config, self.side = config, place.side

    def forward(self, x: Tensor, branch: Branch) -> Tensor:
        c = self.config
        basis = None
        if c.basis == "other":
            assert branch.other is not None
            basis = gather_rows(branch.other, dim=1)
        return spectral_filter(
            x,
            c.kind,
            c.power,
            x_all=gather_rows(x, dim=1),
            offset=process_rank() * x.shape[1],
            basis=basis,
            side=self.side,
            cutoff=c.cutoff,
            scale=c.scale,
            solver=c.solver,
        )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PrototypesConfig:
    """Scores against K learned unit vectors: SwAV's prototypes, DINO's last layer."""

    name: Literal["prototypes"] = "prototypes"
    count: int = Field(default=3000, ge=2)  # K
    freeze: Duration = "0ep"  # they get no gradient for so long: SwAV 2ep, DINO 1ep in the authors' scripts


class Prototypes(Transform):
    """x -> x/|x| . c_k/|c_k|. The layer belongs to the branch's network, so that an EMA target has its own copy."""

    gives: Kind = "scores"

    def __init__(self, config: PrototypesConfig, place: Place) -> None:
        super().__init__()

    def forward(self, x: Tensor, branch: Branch) -> Tensor:
        assert branch.score is not None
        branch.scored, branch.scores = x, branch.score(x)
        return branch.scores


class PrototypeLayer(nn.Module):
    """Cosines of (..., D) features with K prototypes: weight norm with its gain fixed at 1."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.weight = nn.Linear(width, count, bias=False).weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))
