"""Settings of the transforms of a branch, and the table by which a configuration knows them. No torch."""

from typing import Literal, NamedTuple

from pydantic import Field
from pydantic.dataclasses import dataclass

from fastrdm import parts
from fastrdm.kernels.spectral.filter_functions import KINDS, SOLVERS
from fastrdm.schema import STRICT, Duration, nearest, require

Kind = Literal["features", "scores", "probabilities"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TransformConfig:
    """The name of a transform; one that has settings has a subclass of this with a field for each."""

    name: str
    """Which transform: a name of the table in docs/methods.md, or package.module:Class for one of your own."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PredictorConfig(TransformConfig):
    """A learned head (SimSiam, BYOL): Linear-BN-ReLU-Linear, its output as wide as its input."""

    name: Literal["predictor"] = "predictor"

    hidden: int | None = Field(default=None, ge=1)
    """Features of the predictor's hidden layer. `null` takes a quarter of the projection's features, as SimSiam does;
    BYOL's CIFAR script uses 4096.
    """

    bias: bool = False
    """Give the predictor's first layer, which a BatchNorm follows, a bias. SimSiam has none, BYOL has one."""

    constant_lr: bool = True
    """Keep the predictor's learning rate at its base value, without warm-up and decay, as SimSiam does. BYOL's follows
    the schedule.
    """


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FilterConfig(TransformConfig):
    """A spectral filter x V f(S) V^T, where x = U S V^T over the rows of all processes (RDM, section 5)."""

    name: Literal["filter"] = "filter"

    kind: str = "power"
    """The function f of the singular values s: power is s^power, log is ln s, log1p is ln(1 + s), log1p_sq is ln(1 +
    s^2), whiten is 1 - strength + strength s_max / s, which brings the spectrum that far towards a flat one. For a
    function of your own, package.module:NAME.
    """

    power: float | None = Field(default=None, allow_inf_nan=False)
    """Exponent of f where `kind` is power, `--sigma` of the authors' scripts: 1 or 2 on the online branch, -0.3 to -1
    on the target. Other kinds take none.
    """

    power_end: float | None = Field(default=None, allow_inf_nan=False)
    """Exponent at the end of the run, reached from `power` along a line over `anneal`. `null` keeps `power`."""

    anneal: Duration = "100%"
    """Time from the start of the run over which the exponent goes to `power_end`. A shorter run takes its whole length.
    """

    strength: float | None = Field(default=None, gt=0, le=1)
    """How far `kind` whiten flattens the spectrum: 1 makes all kept singular values equal. Other kinds take none."""

    epsilon: float = Field(default=0.0, ge=0)
    """Added to every weight as a share of the largest one, also where the weight is 0, so that no direction is lost;
    weights are then divided by the largest one. DirectPred uses 0.1, DirectCopy 0.3, both with `momentum`.
    """

    momentum: float | None = Field(default=None, ge=0, lt=1)
    """Share of the old value in the moving average of the second moment from which the filter is made, over views and
    steps. DirectPred uses 0.3, DirectCopy 0.5. `null` takes this batch alone, each view by itself.
    """

    basis: Literal["self", "other", "cross"] = "self"
    """Whose singular values and vectors the filter uses: those of its own branch, those of the other branch, as the
    authors' ImageNet code does, or cross, those of the cross-correlation of both: x U f(S) V^T of E[x^T y] = U S V^T, a
    closed-form predictor that is orthogonal at power 0.
    """

    gradient: Literal["filtered", "isotropic"] = "filtered"
    """Gradient of the online filter with respect to x: filtered, the output's gradient times W; isotropic, the output's
    gradient as it is, so that every direction learns at the same rate (IsoLoss, Halvagal et al. 2023). Isotropic
    divides the weights by the largest one, as `epsilon` does.
    """

    scale: Literal["raw", "rms"] = "raw"
    """The argument of f: raw singular values of the gathered batch, as in the paper, or rms, these divided by the
    square root of the number of rows. Powers do not depend on it, logarithms do.
    """

    cutoff: float | None = Field(default=None, ge=0, lt=1)
    """Share of the largest singular value below which a direction gets weight 0. `null` chooses by dtype, 1e-6 for
    float32.
    """

    solver: str = "auto"
    """How the filter is computed: auto, eigh (float64 eigendecomposition), newton_schulz (matrix products only) or
    gram_power (even powers). See docs/spectra.md.
    """

    def __post_init__(self) -> None:
        if parts.is_own(self.kind):
            from fastrdm.methods.spectral_filter import own_function

            own_function(self.kind)
        else:
            known = f"one of {', '.join((*KINDS, 'whiten'))}, or package.module:function"
            require(self.kind in (*KINDS, "whiten"), "filter.kind", known, self.kind)
        for key, value, kind in (("power", self.power, "power"), ("strength", self.strength, "whiten")):
            given = f"a number for kind={kind}" if self.kind == kind else f"left out for kind={self.kind}"
            require((value is not None) == (self.kind == kind), f"filter.{key}", given, value)
        ends = self.power_end is None or self.kind == "power"
        require(ends, "filter.power_end", f"left out for kind={self.kind}", self.power_end)
        crossed = self.basis != "cross" or (self.kind == "power" and self.power_end is None and self.scale == "raw")
        require(crossed, "filter.basis", "self or other, but for a kind=power without power_end and scale", self.basis)
        require(self.solver in SOLVERS, "filter.solver", f"one of {', '.join(SOLVERS)}", self.solver)
        if has_weighting(self) or self.momentum is not None:
            solvers = ("auto", "eigh")
            why = "with strength, power_end, epsilon, momentum or gradient=isotropic"
            require(self.solver in solvers, "filter.solver", f"{' or '.join(solvers)} {why}", self.solver)


def is_normalized(config: FilterConfig) -> bool:
    """Whether weights are divided by the largest one, where their scale would matter."""
    return config.epsilon > 0 or config.gradient == "isotropic"


def has_weighting(config: FilterConfig) -> bool:
    """Whether weights are more than a fixed function of the singular values."""
    return config.basis != "cross" and (
        config.strength is not None or config.power_end is not None or is_normalized(config)
    )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PrototypesConfig(TransformConfig):
    """Scores against K learned unit vectors: SwAV's prototypes, DINO's last layer."""

    name: Literal["prototypes"] = "prototypes"

    count: int = Field(default=3000, ge=2)
    """Number of prototypes. The CIFAR scripts use 3000 for SwAV and 4096 for DINO."""

    freeze: Duration = "0ep"
    """Time from the start of the run during which the prototypes are not updated. The authors' scripts use 2ep for SwAV
    and 1ep for DINO.
    """


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StopConfig(TransformConfig):
    """Stop-gradient."""

    name: Literal["stop"] = "stop"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SinkhornConfig(TransformConfig):
    """Assignments to prototypes by Sinkhorn-Knopp (SwAV, section 3.1)."""

    name: Literal["sinkhorn"] = "sinkhorn"

    epsilon: float = Field(default=0.05, gt=0)
    """Entropy regularization: scores are divided by it before the exponential. SwAV uses 0.05; DINOv2, which takes its
    teacher temperature for it, 0.07.
    """

    warmup_epsilon: float | None = Field(default=None, gt=0)
    """Entropy regularization at the first step, from which it goes to `epsilon` over `warmup`. `null` keeps `epsilon`
    throughout; DINOv2 begins at 0.04.
    """

    warmup: Duration = "30ep"
    """Length of the linear ramp from `warmup_epsilon` to `epsilon`. A shorter run takes its whole length. DINOv2 uses
    30 epochs.
    """

    iterations: int = Field(default=3, ge=1)
    """Iterations of scaling first the prototypes, then the samples. SwAV uses 3."""

    queue: int = Field(default=0, ge=0)
    """Earlier features of each view, over all processes, that take part in the assignment; a multiple of the batch size
    and of the number of processes. `0` keeps no queue; SwAV's CIFAR script uses 3840.
    """

    queue_start: Duration = "50ep"
    """Time after which the queue takes part, if it is full by then. SwAV's CIFAR script uses 50ep."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CenterSharpenConfig(TransformConfig):
    """softmax((scores - center) / temperature) (DINO, section 3.1)."""

    name: Literal["center_sharpen"] = "center_sharpen"

    temperature: float = Field(default=0.07, gt=0)
    """Temperature of the target's scores once the warm-up is over. The CIFAR script of DINO uses 0.07."""

    warmup_temperature: float = Field(default=0.04, gt=0)
    """Temperature of the target's scores at the first step."""

    warmup: Duration = "50ep"
    """Length of the linear ramp from `warmup_temperature` to `temperature`. A shorter run takes its whole length."""

    momentum: float = Field(default=0.9, ge=0, le=1)
    """Share of the old value in the moving average that is the center; the rest is the batch's mean score."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class WhitenConfig(TransformConfig):
    """Whitened rows (x - mean) W, W W^T the inverse of the covariance, with gradient through mean and covariance."""

    name: Literal["whiten"] = "whiten"

    root: Literal["zca", "cholesky", "newton"] = "zca"
    """The inverse root W of the covariance: zca, the symmetric one by an eigendecomposition; cholesky, the triangular
    one (W-MSE); newton, the symmetric one by Newton's iterations, not to the end (IterNorm).
    """

    epsilon: float = Field(default=0.0, ge=0, lt=1)
    """Share of the identity that is mixed into the covariance. W-MSE uses 0."""

    size: int | None = Field(default=None, ge=2)
    """Most rows that are whitened together; a larger batch, which must be a multiple, is split at random at each step,
    over all processes and alike for all views. W-MSE takes twice the dimensions. `null` never splits.
    """

    iterations: int = Field(default=5, ge=1)
    """Newton's iterations where `root` is newton. IterNorm uses 5."""


class TransformRow(NamedTuple):
    """What a configuration knows of a transform."""

    code: str
    """Its class, as package.module:Class."""

    settings: type[TransformConfig]
    takes: Kind = "features"
    gives: Kind = "features"


TRANSFORMS: dict[str, TransformRow] = {
    "predictor": TransformRow("fastrdm.methods.predictor:Predictor", PredictorConfig),
    "filter": TransformRow("fastrdm.methods.spectral_filter:SpectralFilter", FilterConfig),
    "prototypes": TransformRow("fastrdm.methods.prototypes:Prototypes", PrototypesConfig, gives="scores"),
    "stop": TransformRow("fastrdm.methods.stop:Stop", StopConfig),
    "sinkhorn": TransformRow("fastrdm.methods.sinkhorn:Sinkhorn", SinkhornConfig, "scores", "probabilities"),
    "center_sharpen": TransformRow(
        "fastrdm.methods.center_sharpen:CenterSharpen", CenterSharpenConfig, "scores", "probabilities"
    ),
    "whiten": TransformRow("fastrdm.methods.whiten:Whiten", WhitenConfig),
}


def transform_row(name: str) -> TransformRow:
    """The row of that name, or that of the class which package.module:Class stands for; ValueError where there is none.

    Code of one's own is loaded to look at it.
    """
    if parts.is_own(name):
        from fastrdm.methods.transform import own_transform

        own = own_transform(name)
        return TransformRow(name, parts.settings_of(own, TransformConfig), own.takes, own.gives)
    if name not in TRANSFORMS:
        raise ValueError(f"must be a transform, got {name!r}: {nearest(name, TRANSFORMS)}")
    return TRANSFORMS[name]


def transform_settings(name: str) -> type[TransformConfig]:
    """The settings of the transform of that name."""
    return transform_row(name).settings
