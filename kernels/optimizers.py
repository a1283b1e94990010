"""Optimizers made of multi-tensor operations: rates, decays and a scaler's verdict stay on the device.

A group has `lr` (a 0-d tensor), `weight_decay` (a number), and may have `decay`, a 0-d tensor that stands in for it.
GradScaler hands `grad_scale` and `found_inf` over as tensors, and a step on infinite gradients changes nothing.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

Group = dict[str, Any]


def with_gradient(group: Group) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters that have a gradient, and their gradients."""
    params = [p for p in group["params"] if p.grad is not None]
    return params, [p.grad for p in params]


def norms(tensors: list[Tensor]) -> Tensor:
    """Euclidean norms (P,) of P tensors."""
    return torch.stack(torch._foreach_norm(tensors))


def zero_momentum(optimizer: Optimizer) -> None:
    """Give every parameter a momentum buffer of zeros, also one that gets its first gradient late."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)


def _times(tensors: list[Tensor], factors: Tensor) -> list[Tensor]:
    """Each tensor times its entry of factors (P,)."""
    return list(torch._foreach_mul(tensors, factors.unbind()))


def _plus(tensors: list[Tensor], others: list[Tensor], factor: float | Tensor) -> list[Tensor]:
    """tensors + factor * others."""
    if isinstance(factor, Tensor):
        return list(torch._foreach_add(tensors, torch._foreach_mul(others, factor)))
    return list(torch._foreach_add(tensors, others, alpha=factor))


def _unscale(optimizer: Optimizer, grads: list[Tensor]) -> None:
    """Divide the gradients by the scaler's scale, in place, as GradScaler.unscale_ does, unless it has been done."""
    scale = getattr(optimizer, "grad_scale", None)
    if scale is not None:
        torch._foreach_mul_(grads, scale.double().reciprocal().float())


def _unless(skip: Tensor | None, value: float | Tensor, otherwise: float) -> float | Tensor:
    """`value`, or `otherwise` on a device where `skip` is above 0."""
    return value if skip is None else torch.where(skip > 0, otherwise, value)


def _clear(skip: Tensor | None, tensors: list[Tensor]) -> list[Tensor]:
    """The tensors, set to zero in place where `skip` is above 0.

    Infinity times 0 would be no number, and there is no foreach operation that selects.
    """
    if skip is not None:
        skipped = skip > 0
        for tensor in tensors:
            tensor.masked_fill_(skipped, 0)
    return tensors


def _decay(group: Group) -> float | Tensor:
    return cast("float | Tensor", group.get("decay", group["weight_decay"]))


class Lars(Optimizer):
    """SGD with momentum whose step is scaled per parameter by eta |w| / (|g| + decay |w|) (You et al. 2017).

    Groups whose `adapt` is false are stepped by plain SGD.
    """

    _step_supports_amp_scaling = True

    def __init__(self, groups: list[Group], *, momentum: float, eta: float = 0.02, clip: bool = False) -> None:
        super().__init__(groups, {"momentum": momentum, "eta": eta, "clip": clip})
        zero_momentum(self)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One step on the gradients at hand; nothing is read on the host."""
        skip = getattr(self, "found_inf", None)
        for group in self.param_groups:
            params, grads = with_gradient(group)
            if not params:
                continue
            _unscale(self, grads)
            grads = self._adapted(params, grads, group) if group["adapt"] else _plus(grads, params, _decay(group))
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_mul_(buffers, _unless(skip, group["momentum"], 1.0))
            torch._foreach_add_(buffers, _clear(skip, grads))
            torch._foreach_sub_(params, torch._foreach_mul(buffers, _unless(skip, group["lr"], 0.0)))

    @staticmethod
    def _adapted(params: list[Tensor], grads: list[Tensor], group: Group) -> list[Tensor]:
        """Gradients (g + decay w) local; those of a zero weight or gradient are neither decayed nor adapted.

        As in the RDM authors' scripts (solo/utils/lars.py, lines 131 to 165); `clip` caps local / lr at 1.
        """
        decay, weight, grad = _decay(group), norms(params), norms(grads)
        local = group["eta"] * weight / (grad + decay * weight + 1e-8)
        if group["clip"]:
            local = (local / group["lr"]).clamp(max=1)
        alive = (weight > 0) & (grad > 0)
        adapted = _times(grads, torch.where(alive, local, 1.0))
        torch._foreach_add_(adapted, _times(params, torch.where(alive, local * decay, 0.0)))
        return adapted


class Lamb(Optimizer):
    """Adam's direction plus decay, scaled per parameter to the weight's norm (You et al. 2020)."""

    _step_supports_amp_scaling = True

    def __init__(self, groups: list[Group], *, betas: tuple[float, float], eps: float = 1e-6) -> None:
        super().__init__(groups, {"betas": betas, "eps": eps})
        for p in (p for group in self.param_groups for p in group["params"]):
            # not called "step": torch would leave that one on the device it was saved from
            self.state[p] = {"mean": torch.zeros_like(p), "square": torch.zeros_like(p), "count": p.new_zeros(())}

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One step on the gradients at hand; nothing is read on the host."""
        skip = getattr(self, "found_inf", None)
        for group in self.param_groups:
            params, grads = with_gradient(group)
            if not params:
                continue
            _unscale(self, grads)
            update = _plus(self._direction(params, _clear(skip, grads), group, skip), params, _decay(group))
            if group["adapt"]:
                weight, length = norms(params), norms(update)
                update = _times(update, torch.where((weight > 0) & (length > 0), weight / length, 1.0))
            torch._foreach_sub_(params, torch._foreach_mul(update, _unless(skip, group["lr"], 0.0)))

    def _direction(self, params: list[Tensor], grads: list[Tensor], group: Group, skip: Tensor | None) -> list[Tensor]:
        """Bias-corrected mean over root of mean square; gradients are zeros where `skip` is above 0."""
        means, squares, counts = ([self.state[p][key] for p in params] for key in ("mean", "square", "count"))
        beta, beta2 = group["betas"]
        # a list: a single tensor would be read on the host
        torch._foreach_add_(counts, 1 if skip is None else [(skip == 0).to(counts[0].dtype)] * len(counts))
        torch._foreach_mul_(means, _unless(skip, beta, 1.0))
        torch._foreach_add_(means, grads, alpha=1 - beta)
        torch._foreach_mul_(squares, _unless(skip, beta2, 1.0))
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        updates = torch.stack(counts).clamp(min=1)  # 0 where a scaler skips the first steps
        roots = torch._foreach_sqrt(_times(squares, 1 / (1 - beta2**updates)))
        torch._foreach_add_(roots, group["eps"])
        return list(torch._foreach_div(_times(means, 1 / (1 - beta**updates)), roots))


class DecayingAdamW(AdamW):
    """torch's fused AdamW, which takes decay as a number, after a decay by the tensors `group["decay"]`."""

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One step on the gradients at hand; nothing is read on the host."""
        skip = getattr(self, "found_inf", None)
        for group in self.param_groups:
            params, _ = with_gradient(group)
            if "decay" in group and params:
                torch._foreach_mul_(params, _unless(skip, 1 - group["lr"] * group["decay"], 1.0))
        super().step()
