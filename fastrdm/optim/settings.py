"""Settings of the optimizer. No torch."""

from typing import Literal

from pydantic.dataclasses import dataclass

from fastrdm.schema import STRICT, Duration, Pair, require


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimConfig:
    """How parameters are stepped.

    The defaults are those of solo-learn's CIFAR script for SimSiam (bash_files/pretrain/cifar). The warm-up from 3e-5
    over 10 epochs, about which the script is silent, is solo-learn's own (solo/methods/base.py, lines 125 to 127).
    """

    name: Literal["sgd", "lars", "adamw", "lamb"] = "sgd"
    """The optimizer: sgd and lars have momentum, adamw and lamb have decoupled weight decay."""

    backend: Literal["torch", "apex"] = "torch"
    """Implementation of the optimizer. `apex` is NVIDIA's fused AdamW, for GPUs only; this project has never run it."""

    lr: float = 0.5
    """Peak learning rate for a batch of 256 images; it is scaled by the global batch size over 256. SimSiam's CIFAR
    script uses 0.5.
    """

    schedule: Literal["cosine", "linear"] = "cosine"
    """Curve along which the learning rate falls after the warm-up, from `lr` to `min_lr`. `linear` with a warm-up of
    30 % is a one-cycle schedule.
    """

    min_lr: float = 0.0
    """Learning rate at the end of the run. It is not scaled by the batch size, as in the authors' code."""

    warmup: Duration = "10ep"
    """Length of the linear warm-up from `warmup_lr` to `lr`."""

    warmup_lr: float = 3e-5
    """Learning rate at the first step. It is not scaled by the batch size either."""

    momentum: float = 0.9
    """Momentum of SGD and LARS."""

    weight_decay: float = 1e-5
    """Weight decay: this share of the weight is added to the gradient by SGD and LARS, and to the step by AdamW and
    LAMB.
    """

    weight_decay_end: float | None = None
    """Weight decay at the end of the run, reached along a cosine, as DINO does with a vision transformer (0.04 to 0.4).
    `null` keeps it constant.
    """

    exclude_bias_norm: bool = False
    """Leave biases and the weights of norms, all of them 1-D, without weight decay and without the scaling of LARS and
    LAMB.
    """

    eta: float = 0.02
    """Trust coefficient of LARS: the length of a step over the norm of the weight, at a learning rate of 1."""

    clip: bool = False
    """Let LARS shorten a step but never lengthen it."""

    betas: Pair = (0.9, 0.999)
    """Decay rates of AdamW's and LAMB's averages of the gradient and of its square."""

    clip_grad: float | None = None
    """Largest norm of the gradient; longer gradients are scaled down to it. `null` clips nothing."""

    clip_grad_of: Literal["all", "each"] = "all"
    """Whether `clip_grad` limits the norm over all tensors together, or of each tensor by itself as in DINO's code."""

    def __post_init__(self) -> None:
        for key in ("lr", "min_lr", "warmup_lr", "weight_decay"):
            require(getattr(self, key) >= 0, f"optim.{key}", "at least 0", getattr(self, key))
        for key, value in (("momentum", self.momentum), ("betas", self.betas[0]), ("betas", self.betas[1])):
            require(0 <= value < 1, f"optim.{key}", "in [0, 1)", value)
        require(self.eta > 0, "optim.eta", "above 0", self.eta)
        end, decays = self.weight_decay_end, self.weight_decay > 0
        require(end is None or end >= 0, "optim.weight_decay_end", "at least 0", end)
        require(end is None or decays, "optim.weight_decay", "above 0 where weight_decay_end is set", self.weight_decay)
        require(self.clip_grad is None or self.clip_grad > 0, "optim.clip_grad", "above 0", self.clip_grad)
        if self.backend == "apex":
            others = "adamw with backend=apex, whose other optimizers read the learning rate on the host in each step"
            require(self.name == "adamw", "optim.name", others, self.name)
            require(end is None, "optim.weight_decay_end", "null with backend=apex, where decay is a number", end)
            require(self.clip_grad is None, "optim.clip_grad", "null with backend=apex, which unscales", self.clip_grad)
