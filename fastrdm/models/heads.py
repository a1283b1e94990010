"""Projectors and predictors: a few Linear layers, split where 16-bit arithmetic must end."""

from torch import Tensor, nn

from fastrdm.kernels.batchnorm import ViewBatchNorm
from fastrdm.models.settings import HeadConfig as HeadConfig

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU}


SIMSIAM_PROJECTOR = HeadConfig(last_norm="plain")
SIMSIAM_PREDICTOR = HeadConfig(layers=2, hidden=512)
BYOL_PROJECTOR = HeadConfig(layers=2, hidden=4096, out=256, bias=True)
BYOL_PREDICTOR = BYOL_PROJECTOR
SWAV_PROJECTOR = HeadConfig(layers=2, out=128, bias=True)
DINO_PROJECTOR = HeadConfig(out=256, bias=True, activation="gelu", norm=False, init="trunc_normal")


class Head(nn.Sequential):
    """(N, width_in) to (N, out) as tail(body(x)); keys are those of one nn.Sequential.

    The tail starts at the last BatchNorm, or is the last Linear where there is none. Run it in float32: then what
    enters the loss and the spectra was never rounded to 16 bits after its last normalization.
    """

    def __init__(self, config: HeadConfig, width_in: int, sync_bn: bool = True) -> None:
        modules: list[nn.Module] = []
        width = width_in
        for _ in range(config.layers - 1):
            modules.append(nn.Linear(width, config.hidden, bias=config.bias))
            if config.norm:
                modules.append(ViewBatchNorm(config.hidden, sync=sync_bn))
            modules.append(ACTIVATIONS[config.activation]())
            width = config.hidden
        modules.append(nn.Linear(width, config.out, bias=config.last_norm == "none"))
        if config.last_norm != "none":
            modules.append(ViewBatchNorm(config.out, affine=config.last_norm == "affine", sync=sync_bn))
        super().__init__(*modules)
        norms = [index for index, module in enumerate(modules) if isinstance(module, ViewBatchNorm)]
        self.out = config.out
        self.split = norms[-1] if norms else len(modules) - 1
        if config.init == "trunc_normal":
            self.apply(_trunc_normal)

    def body(self, x: Tensor) -> Tensor:
        """The layers that may run in 16 bits. The monitor reads their output, before the last BatchNorm."""
        for module in list(self)[: self.split]:
            x = module(x)
        return x

    def tail(self, x: Tensor) -> Tensor:
        """The last BatchNorm and all after it, on the body's output."""
        for module in list(self)[self.split :]:
            x = module(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.body(x))


def _trunc_normal(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
