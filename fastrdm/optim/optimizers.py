"""Optimizers whose learning rates live on the device, and the groups of parameters they step."""

from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastrdm.kernels.optimizers import DecayingAdamW, Group, Lamb, Lars, norms, zero_momentum
from fastrdm.optim.schedules import cosine_ramp, warmup_decay
from fastrdm.optim.settings import OptimConfig as OptimConfig
from fastrdm.schema import require


class Role(NamedTuple):
    """Parameters that are stepped alike, by what they do in the method."""

    name: str
    parameters: Sequence[tuple[str, nn.Parameter]]  # those without requires_grad are left out
    lr: float | None = None  # at 256 images a step; none: the config's
    weight_decay: float | None = None  # none: the config's
    schedule: Literal["cosine", "constant"] = "cosine"  # constant: no warm-up, no decay (SimSiam's predictor)
    adapt: bool = True  # LARS and LAMB scale the step by the weight's norm


def parameter_groups(roles: Iterable[Role], config: OptimConfig, scale: float = 1.0) -> list[Group]:
    """One group a role, or two where biases and norms are excluded; rates are multiplied by `scale`.

    Keys: name, params, param_names, base_lr, weight_decay, schedule, adapt.
    """
    groups = []
    for role in roles:
        trainable = [(name, p) for name, p in role.parameters if p.requires_grad]
        excluded = [(name, p) for name, p in trainable if config.exclude_bias_norm and p.ndim <= 1]
        included = [(name, p) for name, p in trainable if not (config.exclude_bias_norm and p.ndim <= 1)]
        decay = config.weight_decay if role.weight_decay is None else role.weight_decay
        if included:
            groups.append(_group(role.name, included, role, config, scale, decay, role.adapt))
        if excluded:
            groups.append(_group(f"{role.name}.bias_norm", excluded, role, config, scale, 0.0, False))
    return groups


def _group(
    name: str,
    parameters: list[tuple[str, nn.Parameter]],
    role: Role,
    config: OptimConfig,
    scale: float,
    weight_decay: float,
    adapt: bool,
) -> Group:
    return {
        "name": name,
        "params": [p for _, p in parameters],
        "param_names": [name for name, _ in parameters],
        "base_lr": (config.lr if role.lr is None else role.lr) * scale,
        "weight_decay": weight_decay,
        "schedule": role.schedule,
        "adapt": adapt,
    }


def learning_rates(groups: Iterable[Group], step: int, total: int, warmup: int, config: OptimConfig) -> list[float]:
    """Learning rate of each group at `step` of `total`, the first `warmup` of which are the warm-up.

    Groups with a constant schedule keep their base rate, as SimSiam's predictor does in solo-learn
    (solo/methods/base.py, lines 449 to 461). The others follow `warmup_decay`.
    """
    return [
        group["base_lr"]
        if group["schedule"] == "constant"
        else warmup_decay(step, total, warmup, group["base_lr"], config.min_lr, config.warmup_lr, config.schedule)
        for group in groups
    ]


def set_learning_rates(optimizer: Optimizer, rates: Iterable[float]) -> None:
    """Write one rate per group into the device tensors that the optimizer reads."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"].fill_(rate)


def set_weight_decays(
    optimizer: Optimizer, groups: Iterable[Group], step: int, total: int, config: OptimConfig
) -> None:
    """Write the weight decay of `step` into the device tensors of groups that decay.

    Does nothing unless `config.weight_decay_end` is set.
    """
    if config.weight_decay_end is None:
        return
    decay = cosine_ramp(step, total, config.weight_decay, config.weight_decay_end)
    for stepped, group in zip(optimizer.param_groups, groups, strict=True):
        if group["weight_decay"]:
            stepped["decay"].fill_(decay)


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], config: OptimConfig) -> None:
    """Shorten gradients to norm `config.clip_grad`, as one vector or each by itself; nothing is read on the host."""
    if config.clip_grad is None:
        return
    if config.clip_grad_of == "all":
        torch.nn.utils.clip_grad_norm_(parameters, config.clip_grad)
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    torch._foreach_mul_(grads, (config.clip_grad / (norms(grads) + 1e-6)).clamp(max=1).unbind())


def build_optimizer(groups: Iterable[Group], config: OptimConfig, device: torch.device) -> Optimizer:
    """The optimizer over `parameter_groups`; `group["lr"]` is a 0-d float32 tensor on `device`, made to be written to.

    So is `group["decay"]`, which stands in for `weight_decay` in groups that decay where `config.weight_decay_end` is
    set. Loading a state dict restores state and rates into the tensors at hand and keeps the present settings.
    """
    own, rising = [_on_device(group, config, device) for group in groups], config.weight_decay_end is not None
    optimizer: Optimizer
    if config.backend == "apex":
        optimizer = fused_adam(device)(own, lr=config.lr, betas=config.betas, capturable=True)
    elif config.name == "adamw":
        # capturable: else the step would refuse to be recorded in a CUDA graph
        kind = DecayingAdamW if rising else torch.optim.AdamW
        optimizer = kind(own, config.lr, config.betas, fused=True, capturable=device.type == "cuda")
    elif config.name == "lamb":
        optimizer = Lamb(own, betas=config.betas)
    elif config.name == "lars":
        optimizer = Lars(own, momentum=config.momentum, eta=config.eta, clip=config.clip)
    elif rising:  # torch's SGD takes decay as a number; without adaptation LARS is SGD
        optimizer = Lars([{**group, "adapt": False} for group in own], momentum=config.momentum)
    else:
        optimizer = torch.optim.SGD(own, lr=config.lr, momentum=config.momentum, fused=True)
        if config.momentum:
            zero_momentum(optimizer)
    _keep_settings(optimizer)
    return optimizer


def fused_adam(device: torch.device, find: Callable[[str], Any] = find_spec) -> Callable[..., Optimizer]:
    """apex.optimizers.FusedAdam, whose rate may be a device tensor; ValueError where there is none, and why."""
    key, get = "optim.backend", "build it as https://github.com/NVIDIA/apex says, with its CUDA extensions"
    require(device.type == "cuda", key, "torch where there is no CUDA device", "apex")
    spec = find("apex")
    require(spec is not None, key, f"torch while NVIDIA's apex is not installed ({get})", "apex")
    folders = [Path(place) for place in spec.submodule_search_locations or ()]
    ours = any((folder / "multi_tensor_apply").is_dir() for folder in folders)
    other = "torch: the package apex here is PyPI's of that name, not NVIDIA's (pip uninstall apex, then"
    require(ours, key, f"{other} {get})", "apex")
    require(find("amp_C") is not None, key, f"torch: apex here has no CUDA extensions ({get})", "apex")
    kind: type[Optimizer] = import_module("apex.optimizers").FusedAdam
    return kind


def _on_device(group: Group, config: OptimConfig, device: torch.device) -> Group:
    """A group whose rate, and decay where it rises, are tensors on `device`."""
    own = {**group, "lr": torch.tensor(group["base_lr"], dtype=torch.float32, device=device)}
    if config.weight_decay_end is not None and group["weight_decay"]:
        own |= {"weight_decay": 0.0, "decay": torch.full_like(own["lr"], group["weight_decay"])}
    return own


def _keep_settings(optimizer: Optimizer) -> None:
    settings = [{key: value for key, value in g.items() if key != "params"} for g in optimizer.param_groups]

    def check(_: Optimizer, state: dict[str, Any]) -> None:
        ours = [name for group in settings for name in group["param_names"]]
        theirs = [name for group in state["param_groups"] for name in group.get("param_names", ["(unnamed)"])]
        pairs = zip([*ours, "(none)"], [*theirs, "(none)"], strict=False)
        odd = next(((a, b) for a, b in pairs if a != b), None)
        require(odd is None, "the optimizer state", f"for the same parameters, {odd and odd[0]} here", odd and odd[1])

    def restore(_: Optimizer) -> None:
        for group, setting in zip(optimizer.param_groups, settings, strict=True):
            for key in ("lr", "decay"):
                if key in setting:
                    setting[key].copy_(group.get(key, setting[key]))
            # torch leaves tensors of a group, such as apex's count of steps, on the device they were saved from
            group.update({key: x.to(setting["lr"].device) for key, x in group.items() if isinstance(x, Tensor)})
            group.update(setting)

    optimizer.register_load_state_dict_pre_hook(check)
    optimizer.register_load_state_dict_post_hook(restore)
