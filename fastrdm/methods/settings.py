"""Settings of a method, and whether its parts fit together. No torch."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from fastrdm import parts
from fastrdm.methods.losses import ALIGNMENTS, AlignmentConfig, find_loss, loss_settings
from fastrdm.methods.regularizer_settings import REGULARIZERS, RegularizerConfig, regularizer_settings
from fastrdm.methods.transform_settings import (
    TRANSFORMS,
    Kind,
    PredictorConfig,
    PrototypesConfig,
    StopConfig,
    TransformConfig,
    transform_row,
    transform_settings,
)
from fastrdm.models.settings import HeadConfig
from fastrdm.schema import STRICT

AnyTransform = Annotated[TransformConfig, parts.Chosen("a transform", TransformConfig, transform_settings, TRANSFORMS)]
AnyRegularizer = Annotated[
    RegularizerConfig, parts.Chosen("a regularizer", RegularizerConfig, regularizer_settings, REGULARIZERS)
]
AnyAlignment = Annotated[AlignmentConfig, parts.Chosen("a loss", AlignmentConfig, loss_settings, ALIGNMENTS)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EmaConfig:
    """The target network is a moving average of the online one: parameters only, after each optimizer step."""

    momentum: float = Field(default=0.99, ge=0, le=1)
    """Share of the old weights kept in each update at the start of the run. The CIFAR scripts use 0.99 for BYOL and
    0.9995 for DINO.
    """

    final: float = Field(default=1.0, ge=0, le=1)
    """Share of the old weights kept in each update at the end of the run, reached along a cosine."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MethodConfig:
    """A row of the table of methods: see docs/methods.md."""

    projector: HeadConfig = HeadConfig()
    online: tuple[AnyTransform, ...] = (PredictorConfig(),)
    """Transforms of the online branch, which learns, in the order in which they are applied to the projection."""

    target: tuple[AnyTransform, ...] = (StopConfig(),)
    """Transforms of the target branch, with which the online branch is compared, in the order in which they are
    applied.
    """

    ema: EmaConfig | None = None
    """Moving average that makes the target network. `null` uses the online network for both branches."""

    alignment: AnyAlignment = AlignmentConfig()
    regularize: tuple[AnyRegularizer, ...] = ()
    """Penalties on rows of the online network, over all processes, that are added to the loss: what keeps the rank of
    methods whose branches are alike.
    """

    target_views: int = Field(default=2, ge=2)
    """Number of global views, from the first one on, which have targets. FastSiam takes 4; further views are local
    crops.
    """

    bn_views: Literal["per_view", "joint"] = "per_view"
    """The rows that BatchNorm's statistics cover: `per_view` treats each view as a batch of its own, joint takes all
    views of one resolution together.
    """

    def __post_init__(self) -> None:
        loss = find_loss(self.alignment.name)
        _check_kinds(self.online, "method.online", loss.online, self.alignment.name)
        _check_kinds(self.target, "method.target", loss.target, self.alignment.name)
        if any(t.name == "stop" for t in self.online):
            raise ValueError("method.online: stop belongs to method.target, here it leaves nothing to train")
        if any(t.name == "predictor" for t in self.target):
            raise ValueError("method.target: predictor belongs to method.online, here nothing trains it")
        _check_regularizers(self.regularize, self.online)
        _check_prototypes([t for t in (*self.online, *self.target) if isinstance(t, PrototypesConfig)])


def _check_kinds(transforms: Sequence[TransformConfig], key: str, end: Kind, alignment: str) -> None:
    """Raise ValueError where a list of transforms holds two whose kinds do not meet."""
    kind: Kind = "features"
    giver = "the projector"
    for i, t in enumerate(transforms):
        transform = transform_row(t.name)
        if transform.takes != kind:
            raise ValueError(f"{key}.{i}: {t.name} takes {transform.takes}, but {giver} gives {kind}")
        kind, giver = transform.gives, t.name
    if kind != end:
        raise ValueError(f"{key}: alignment {alignment} takes {end} here, but {giver} gives {kind}")


def _check_regularizers(regularizers: Sequence[RegularizerConfig], online: Sequence[TransformConfig]) -> None:
    """Raise ValueError where a regularizer would get scores or probabilities."""
    if not online or (kind := transform_row(online[-1].name).gives) == "features":
        return
    for i, r in enumerate(regularizers):
        if r.of == "output":
            raise ValueError(
                f"method.regularize.{i}.of must be projection or features where {online[-1].name} ends the online "
                f"branch, got 'output': a regularizer takes features, not {kind}"
            )


def _check_prototypes(configs: Sequence[PrototypesConfig]) -> None:
    """Raise ValueError where the branches describe the one layer of prototypes differently."""
    for key in ("count", "freeze"):
        values = [str(getattr(c, key)) for c in configs]
        if len(set(values)) > 1:
            raise ValueError(f"prototypes.{key} must be the same on both branches, got {' and '.join(values)}")
