"""Moving average of one list of tensors by another, without waiting for the device."""

import torch
from torch import Tensor


@torch.no_grad()
def ema_update(target: list[Tensor], online: list[Tensor], momentum: Tensor) -> None:
    """In place: target <- momentum * target + (1 - momentum) * online; momentum is a 0-d tensor on their device.

    Three passes over all tensors: `torch._foreach_lerp_` would read the momentum on the host first.
    """
    assert momentum.ndim == 0 and len(target) == len(online) > 0
    step = torch._foreach_sub(online, target)
    # Another dtype would fall back to a loop.
    torch._foreach_mul_(step, (1 - momentum).to(target[0].dtype))
    torch._foreach_add_(target, step)
