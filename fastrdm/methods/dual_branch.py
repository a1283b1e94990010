"""The dual branch: every method as two lists of transforms over one encoder or its moving average, and penalties."""

import copy
from collections.abc import Hashable, Iterator, Sequence
from contextlib import nullcontext
from itertools import groupby
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastrdm.kernels.batchnorm import set_views
from fastrdm.kernels.ema import ema_update
from fastrdm.methods.alignment import align
from fastrdm.methods.losses import find_loss
from fastrdm.methods.prototypes import PrototypeLayer, PrototypesConfig
from fastrdm.methods.regularizer import RegularizerContext, find_regularizer
from fastrdm.methods.regularizer_settings import Of
from fastrdm.methods.settings import MethodConfig as MethodConfig
from fastrdm.methods.transform import BranchContext, Side, TransformContext, find_transform
from fastrdm.models.encoders import Encoder
from fastrdm.models.heads import Head
from fastrdm.optim.optimizers import Role
from fastrdm.optim.schedules import cosine_ramp
from fastrdm.schema import Horizon, durations


class NetworkOutput(NamedTuple):
    """Outputs of a network for V views of B images."""

    features: Tensor  # (V, B, F) of the encoder
    hidden: Tensor  # (V, B, H) in the projector, before its last BatchNorm
    projection: Tensor  # (V, B, D), at least float32


class Output(NamedTuple):
    """Outputs of a step, read by the training step and the monitor. All but the loss are without gradient."""

    loss: Tensor  # 0-d, at least float32
    online: Tensor  # (V, B, K): what the loss compares, features or probabilities
    target: Tensor  # (T, B, K) of the T global views
    scores: tuple[Tensor, Tensor] | None  # logits of both branches, where there are prototypes
    features: Tensor  # (V, B, F) of the online encoder
    hidden: Tensor  # (V, B, H) in the online projector, before its last BatchNorm
    terms: dict[str, Tensor]  # of a loss with regularizers: each summand by its name, weight included, 0-d


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
            count, views = scored[0].count if scored else None, config.target_views
            return TransformContext(side, config.projector.out, count, batch_size, sync_bn, horizon, views)

        self.online_transforms = nn.ModuleList(find_transform(t.name)(t, place("online")) for t in config.online)
        self.target_transforms = nn.ModuleList(find_transform(t.name)(t, place("target")) for t in config.target)
        widths: dict[Of, int] = {
            "features": encoder.features,
            "projection": config.projector.out,
            "output": config.projector.out,
        }
        self.regularizers = nn.ModuleList(
            find_regularizer(r.name)(r, RegularizerContext(widths[r.of], batch_size)) for r in config.regularize
        )
        self.alike = config.online == config.target and config.ema is None
        self.alike = self.alike and all(transform.shared for transform in self.online_transforms)
        self.once = self.alike and self.loss.symmetric and config.alignment.targets == "pairs"
        self.wide_loss = any(transform.wide_loss for transform in self.online_transforms)

    def forward(self, views: Sequence[Tensor]) -> Output:
        """Views (B, 3, H_v, W_v), the global ones first, to the loss and what led to it."""
        z, count = self.online(views, self.precision), self.config.target_views
        with torch.no_grad() if self.target else nullcontext():
            t = self.target(views[:count], self.precision) if self.target else NetworkOutput(*(x[:count] for x in z))
            target_branch = BranchContext(z.projection[:2].flip(0).detach(), (self.target or self.online).prototypes)
            other = None if self.alike else self._run(self.target_transforms, t.projection, target_branch)
        online_branch = BranchContext(t.projection.flip(0).detach(), self.online.prototypes)
        online = self._run(self.online_transforms, z.projection, online_branch)
        target = online[:count] if other is None else other
        loss = self._loss(online, target)
        terms = self._penalties({"features": z.features, "projection": z.projection, "output": online})
        if terms:
            terms = {self.config.alignment.name: loss, **terms}
            loss = torch.stack(list(terms.values())).sum()
        scores = None
        if online_branch.scores is not None and target_branch.scores is not None:
            scores = (online_branch.scores.detach(), target_branch.scores.detach())
        entered = online.detach()
        if self.loss.monitored:
            entered = self.loss.monitored(entered, self.config.alignment)
        terms = {name: term.detach() for name, term in terms.items()}
        return Output(loss, entered, target.detach(), scores, z.features.detach(), z.hidden.detach(), terms)

    def _penalties(self, rows: dict[Of, Tensor]) -> dict[str, Tensor]:
        """Each regularizer's share of the loss, of `rows` (V, B, D); of two with one name, the second is numbered."""
        terms: dict[str, Tensor] = {}
        for config, regularizer in zip(self.config.regularize, self.regularizers, strict=True):
            x = rows[config.of]
            x = x if x.dtype == torch.float64 else x.float()
            with torch.autocast(x.device.type, enabled=False):
                penalty = regularizer(x if config.views == "all" else x[: self.config.target_views])
            name = config.name if config.name not in terms else f"{config.name} {len(terms) + 1}"
            terms[name] = config.weight * penalty
        return terms

    def _loss(self, online: Tensor, target: Tensor) -> Tensor:
        """The alignment of both branches; in float64 where an online transform asks for it.

        A spectral filter multiplies the gradient by its weights. What float32 leaves of a cosine's gradient along the
        largest direction, where the exact gradient is next to nothing, would come out of it larger than all else.
        """
        wide = (online.double(), target.double()) if self.wide_loss else (online, target)
        return align(*wide, self.loss.formula, self.config.alignment, self.once).to(online.dtype)

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
        for part in (*self.online_transforms, *self.target_transforms, *self.regularizers):
            part.set_step(step)
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
        for i, regularizer in enumerate(self.regularizers):
            parameters = [(f"regularizers.{i}.{n}", p) for n, p in regularizer.named_parameters()]
            if parameters:
                yield Role(self.config.regularize[i].name, parameters)
