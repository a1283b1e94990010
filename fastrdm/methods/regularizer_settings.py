"""Settings of regularizers, and the table by which a configuration knows them. No torch."""

from typing import Literal, NamedTuple

from pydantic import Field
from pydantic.dataclasses import dataclass

from fastrdm import parts
from fastrdm.schema import STRICT, nearest

Of = Literal["projection", "features", "output"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RegularizerConfig:
    """The name of a regularizer, its weight and its rows; one that has settings has a subclass of this."""

    name: str
    """Which regularizer: a name of the table in docs/methods.md, or package.module:Class for one of your own."""

    weight: float = Field(default=1.0, gt=0)
    """Factor of the penalty in the loss."""

    of: Of = "projection"
    """Rows that are penalized: the projection, the encoder's features, or the output of the online transforms, which
    must be features for that.
    """

    views: Literal["all", "global"] = "all"
    """Views whose rows are penalized, each by itself: all, or the global ones, which have targets."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class VarianceConfig(RegularizerConfig):
    """Hinge on the standard deviation of each dimension, mean over dimensions (VICReg, equation 1)."""

    name: Literal["variance"] = "variance"

    goal: float = Field(default=1.0, gt=0)
    """Standard deviation from which on a dimension is not penalized. VICReg uses 1."""

    epsilon: float = Field(default=1e-4, gt=0)
    """Added to the variance before its square root is taken. VICReg uses 1e-4."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CovarianceConfig(RegularizerConfig):
    """Squared covariances of different dimensions, summed and divided by the dimensions (VICReg, equation 4)."""

    name: Literal["covariance"] = "covariance"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CodingRateConfig(RegularizerConfig):
    """Negative coding rate of unit rows (SimDINO, balanced over rows and dimensions as its code does)."""

    name: Literal["coding_rate"] = "coding_rate"

    epsilon: float = Field(default=0.5, gt=0)
    """Squared distortion of the code: a smaller one counts more directions. SimDINO's code uses 0.5."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FrobeniusConfig(RegularizerConfig):
    """Logarithm of the squared Frobenius norm of the normalized second moment (FroSSL)."""

    name: Literal["frobenius"] = "frobenius"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class NuclearConfig(RegularizerConfig):
    """Negative nuclear norm of the mean over views of unit rows (MMCR)."""

    name: Literal["nuclear"] = "nuclear"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class KoLeoConfig(RegularizerConfig):
    """Negative logarithm of the distance to the nearest other row, of unit rows (Sablayrolles et al. 2019; DINOv2)."""

    name: Literal["koleo"] = "koleo"

    epsilon: float = Field(default=1e-8, gt=0)
    """Added to each distance before its logarithm is taken. DINOv2 uses 1e-8."""


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


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TicoConfig(RegularizerConfig):
    """Energy of unit rows under a moving average of their second moment (TiCo)."""

    name: Literal["tico"] = "tico"

    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Share of the old matrix in each update, `beta` of TiCo, which uses 0.9."""


class RegularizerRow(NamedTuple):
    """What a configuration knows of a regularizer."""

    code: str
    """Its class, as package.module:Class."""

    settings: type[RegularizerConfig]


REGULARIZERS: dict[str, RegularizerRow] = {
    "variance": RegularizerRow("fastrdm.methods.regularizers:Variance", VarianceConfig),
    "covariance": RegularizerRow("fastrdm.methods.regularizers:Covariance", CovarianceConfig),
    "coding_rate": RegularizerRow("fastrdm.methods.regularizers:CodingRate", CodingRateConfig),
    "frobenius": RegularizerRow("fastrdm.methods.regularizers:Frobenius", FrobeniusConfig),
    "nuclear": RegularizerRow("fastrdm.methods.regularizers:Nuclear", NuclearConfig),
    "koleo": RegularizerRow("fastrdm.methods.regularizers:KoLeo", KoLeoConfig),
    "sigreg": RegularizerRow("fastrdm.methods.regularizers:SigReg", SigRegConfig),
    "visreg": RegularizerRow("fastrdm.methods.regularizers:VisReg", VisRegConfig),
    "tico": RegularizerRow("fastrdm.methods.regularizers:Tico", TicoConfig),
}


def regularizer_row(name: str) -> RegularizerRow:
    """The row of that name, or that of the class which package.module:Class stands for; ValueError where there is none.

    Code of one's own is loaded to look at it.
    """
    if parts.is_own(name):
        from fastrdm.methods.regularizer import own_regularizer

        return RegularizerRow(name, parts.settings_of(own_regularizer(name), RegularizerConfig))
    if name not in REGULARIZERS:
        raise ValueError(f"must be a regularizer, got {name!r}: {nearest(name, REGULARIZERS)}")
    return REGULARIZERS[name]


def regularizer_settings(name: str) -> type[RegularizerConfig]:
    """The settings of the regularizer of that name."""
    return regularizer_row(name).settings
