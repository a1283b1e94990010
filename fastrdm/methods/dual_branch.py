"""The dual branch: every non-contrastive method as two lists of transforms over one encoder or its moving average."""

import copy
from collections.abc import Hashable, Iterator, Sequence
from contextlib import nullcontext
from itertools import groupby
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastrdm import parts
from fastrdm.kernels.batchnorm import set_views
from fastrdm.kernels.ema import ema_update
from fastrdm.methods.alignment import ALIGNMENTS, AlignmentConfig, align, find_loss, loss_settings
from fastrdm.methods.center_sharpen import CenterSharpen
from fastrdm.methods.predictor import Predictor, PredictorConfig
from fastrdm.methods.prototypes import PrototypeLayer, Prototypes, PrototypesConfig
from fastrdm.methods.sinkhorn import Sinkhorn
from fastrdm.methods.spectral_filter import SpectralFilter
from fastrdm.methods.stop import Stop, StopConfig
from fastrdm.methods.transform import BranchContext, Kind, Side, Transform, TransformConfig, TransformContext
from fastrdm.models.encoders import Encoder
from fastrdm.models.heads import Head, HeadConfig
from fastrdm.optim.optimizers import Role
from fastrdm.optim.schedules import cosine_ramp
from fastrdm.schema import STRICT, Horizon, durations, nearest

TRANSFORMS: dict[str, type[Transform]] = {
    "predictor": Predictor,
    "filter": SpectralFilter,
    "prototypes": Prototypes,
    "stop": Stop,
    "sinkhorn": Sinkhorn,
    "center_sharpen": CenterSharpen,
}


def find_transform(name: str) -> type[Transform]:
    """The class of that name, or the one that package.module:Class stands for; ValueError where there is none."""
    if parts.is_own(name):
        own: type[Transform] = parts.load(name, "", _is_transform, "a class derived from fastrdm's Transform")
        return own
    if name not in TRANSFORMS:
        raise ValueError(f"must be a transform, got {name!r}: {nearest(name, TRANSFORMS)}")
    return TRANSFORMS[name]


def _is_transform(found: object) -> bool:
    return isinstance(found, type) and issubclass(found, Transform)


def transform_settings(name: str) -> type[TransformConfig]:
    """The settings of the transform of that name."""
    return parts.settings_of(find_transform(name), TransformConfig)


AnyTransform = Annotated[TransformConfig, parts.Chosen("a transform", TransformConfig, transform_settings, TRANSFORMS)]
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
        _check_prototypes([t for t in (*self.online, *self.target) if isinstance(t, PrototypesConfig)])


def _check_kinds(transforms: Sequence[TransformConfig], key: str, end: Kind, alignment: str) -> None:
    """Raise ValueError where a list of transforms holds two whose kinds do not meet."""
    kind: Kind = "features"
    giver = "the projector"
    for i, t in enumerate(transforms):
        transform = find_transform(t.name)
        if transform.takes != kind:
            raise ValueError(f"{key}.{i}: {t.name} takes {transform.takes}, but {giver} gives {kind}")
        kind, giver = transform.gives, t.name
    if kind != end:
        raise ValueError(f"{key}: alignment {alignment} takes {end} here, but {giver} gives {kind}")


def _check_prototypes(configs: Sequence[PrototypesConfig]) -> None:
    """Raise ValueError where the branches describe the one layer of prototypes differently."""
    for key in ("count", "freeze"):
        values = [str(getattr(c, key)) for c in configs]
        if len(set(values)) > 1:
            raise ValueError(f"prototypes.{key} must be the same on both branches, got {' and '.join(values)}")


class NetworkOutput(NamedTuple):
    """Outputs of a network for V views of B images."""

    features: Tensor  # (V, B, F) of the encoder
    hidden: Tensor  # (V, B, H) in the projector, before its last BatchNorm
    projection: Tensor  # (V, B, D), at least float32


class Output(NamedTuple):
    """Outputs of a step, read by the training step and the monitor. All but the loss are without gradient."""

    loss: Tensor  # 0-d, at least float32
    online: Tensor  # (V, B, K): what the loss compares, features or probabilities
    target: Tensor  # (2, B, K)
    scores: tuple[Tensor, Tensor] | None  # logits of both branches, where there are prototypes
    features: Tensor  # (V, B, F) of the online encoder
    hidden: Tensor  # (V, B, H) in the online projector, before its last BatchNorm


class Network(nn.Module):
    """Encoder, projector and prototypes: what an EMA target copies."""

    def __init__(self, encoder: Encoder, projector: Head, prototypes: PrototypeLayer | None, per_view: bool) -> None:
        super().__init__()
        self.encoder, self.projector, self.prototypes = encoder, projector, prototypes
        self.per_view = per_view

    def forward(self, views: Sequence[Tensor], precision: torch.dtype | None) -> NetworkOutput:
        """(B, 3, H_v, W_v) each to NetworkOutput, under autocast to `precision`.

        The encoder runs once for the views of one resolution, the projector once for all views (SwAV, DINO).
        """
        device, count = views[0].device.type, len(views)
        with torch.autocast(device, precision) if precision else nullcontext():
            alike = [list(same) for _, same in groupby(views, key=lambda view: view.shape)]
            features = torch.cat([self._encode(same) for same in alike])
            set_views(self.projector, count if self.per_view else 1)
            hidden = self.projector.body(features)
        with torch.autocast(device, enabled=False):
            wide = hidden if hidden.dtype == torch.float64 else hidden.float()
            projection = self.projector.tail(wide)
        return NetworkOutput(*(x.unflatten(0, (count, -1)) for x in (features, hidden, projection)))

    def _encode(self, views: list[Tensor]) -> Tensor:
        """Views of one resolution to (V * B, F)."""
        set_views(self.encoder, len(views) if self.per_view else 1)
        features: Tensor = self.encoder(torch.cat(views))
        return features


def _without_drop_path(network: Network) -> Network:
    """Targets are made by whole networks (DINO): timm's modules that drop residual branches at random drop none."""
    for module in network.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0  # type: ignore[assignment]
    return network


class DualBranch(nn.Module):
    """`forward(views) -> Output` and, around the optimizer step, `set_step`, `after_backward`, `after_step`."""

    momentum: Tensor

    def __init__(
        self,
        config: MethodConfig,
        encoder: Encoder,
        horizon: Horizon,
        *,
        batch_size: int,
        sync_bn: bool = True,
        precision: torch.dtype | None = None,
    ) -> None:
        """`precision` is autocast's dtype, None for full precision."""
        super().__init__()
        self.config, self.horizon, self.precision = config, horizon, precision
        self.loss = find_loss(config.alignment.name)
        projector = Head(config.projector, encoder.features, sync_bn)
        scored = [t for t in (*config.online, *config.target) if isinstance(t, PrototypesConfig)]
        prototypes = PrototypeLayer(config.projector.out, scored[0].count) if scored else None
        self.online = Network(encoder, projector, prototypes, config.bn_views == "per_view")
        self.target = _without_drop_path(copy.deepcopy(self.online).requires_grad_(False)) if config.ema else None
        self.freeze = horizon.steps(scored[0].freeze) if scored else 0
        self.frozen = self.freeze > 0  # the prototypes, at this step
        self.register_buffer("momentum", torch.zeros(()), persistent=False)

        def place(side: Side) -> TransformContext:
            count = scored[0].count if scored else None
            return TransformContext(side, config.projector.out, count, batch_size, sync_bn, horizon)

        self.online_transforms = nn.ModuleList(find_transform(t.name)(t, place("online")) for t in config.online)
        self.target_transforms = nn.ModuleList(find_transform(t.name)(t, place("target")) for t in config.target)
        self.wide_loss = any(transform.wide_loss for transform in self.online_transforms)

    def forward(self, views: Sequence[Tensor]) -> Output:
        """Views (B, 3, H_v, W_v), the two global ones first, to the loss and what led to it."""
        z = self.online(views, self.precision)
        with torch.no_grad() if self.target else nullcontext():
            t = self.target(views[:2], self.precision) if self.target else NetworkOutput(*(x[:2] for x in z))
            target_branch = BranchContext(z.projection[:2].flip(0).detach(), (self.target or self.online).prototypes)
            target = self._run(self.target_transforms, t.projection, target_branch)
        online_branch = BranchContext(t.projection.flip(0).detach(), self.online.prototypes)
        online = self._run(self.online_transforms, z.projection, online_branch)
        loss = self._loss(online, target)
        scores = None
        if online_branch.scores is not None and target_branch.scores is not None:
            scores = (online_branch.scores.detach(), target_branch.scores.detach())
        entered = online.detach()
        if self.loss.monitored:
            entered = self.loss.monitored(entered, self.config.alignment)
        return Output(loss, entered, target.detach(), scores, z.features.detach(), z.hidden.detach())

    def _loss(self, online: Tensor, target: Tensor) -> Tensor:
        """The alignment of both branches; in float64 where an online transform asks for it.

        A spectral filter multiplies the gradient by its weights. What float32 leaves of a cosine's gradient along the
        largest direction, where the exact gradient is next to nothing, would come out of it larger than all else.
        """
        wide = (online.double(), target.double()) if self.wide_loss else (online, target)
        return align(*wide, self.loss.formula, self.config.alignment).to(online.dtype)

    def _run(self, transforms: nn.ModuleList, x: Tensor, branch: BranchContext) -> Tensor:
        set_views(transforms, len(x) if self.online.per_view else 1)
        with torch.autocast(x.device.type, enabled=False):
            for transform in transforms:
                x = transform(x, branch)
        return x

    def set_step(self, step: int) -> None:
        """Before the forward pass of `step`: write what depends on it into device tensors."""
        if self.config.ema:
            self.momentum.fill_(cosine_ramp(step, self.horizon.total, self.config.ema.momentum, self.config.ema.final))
        for transform in (*self.online_transforms, *self.target_transforms):
            transform.set_step(step)
        self.frozen = step < self.freeze

    def phase(self) -> Hashable:
        """Return the values, other than numbers in tensors, that decide which work is done at the step that is set."""
        return self.frozen, *(t.phase for t in (*self.online_transforms, *self.target_transforms))

    def phases(self) -> Iterator[tuple[int, str]]:
        """The steps at which the phase changes, and to what."""
        if self.freeze:
            yield self.freeze, "prototypes: begin to learn"
        for transform in (*self.online_transforms, *self.target_transforms):
            yield from transform.phases()

    def after_backward(self) -> None:
        """Before the optimizer step: frozen prototypes take no part in it."""
        if self.frozen and self.online.prototypes is not None:
            self.online.prototypes.weight.grad = None

    def after_step(self) -> None:
        """After the optimizer step: move the EMA target, parameters only; its buffers come from its own passes."""
        if self.target is not None:
            ema_update(list(self.target.parameters()), list(self.online.parameters()), self.momentum)

    def unfinished_durations(self) -> Iterator[str]:
        """A line for every duration of a transform that the run is too short for, and what that means."""
        for side, transforms in (("online", [*self.online_transforms]), ("target", [*self.target_transforms])):
            for i, (config, transform) in enumerate(zip(getattr(self.config, side), transforms, strict=True)):
                for key in durations(config):
                    duration, effect = getattr(config, key), transform.unfinished(key)
                    if effect and self.horizon.steps(duration) >= self.horizon.total:
                        yield f"method.{side}.{i}.{key}={duration} is not over within this run: {effect}"

    def roles(self) -> Iterator[Role]:
        """Trainable parameters by their role for the optimizer."""
        yield Role("network", [(f"online.{n}", p) for n, p in self.online.named_parameters() if p.requires_grad])
        for i, transform in enumerate(self.online_transforms):
            parameters = [(f"online_transforms.{i}.{n}", p) for n, p in transform.named_parameters()]
            if parameters:
                schedule: Literal["constant", "cosine"] = "constant" if transform.constant_lr else "cosine"
                yield Role(self.config.online[i].name, parameters, schedule=schedule)
