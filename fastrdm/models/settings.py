"""Settings of heads and encoders, and the table by which a configuration knows an encoder. No torch."""

import dataclasses
from typing import Literal, NamedTuple

from pydantic import SerializeAsAny
from pydantic.dataclasses import dataclass

from fastrdm import parts
from fastrdm.schema import STRICT, nearest, require


@dataclass(frozen=True, kw_only=True, config=STRICT)
class HeadConfig:
    """A projector or predictor: a few Linear layers. The defaults are SimSiam's (Chen and He 2021, section 3)."""

    layers: int = 3
    """Number of Linear layers, the last one included."""

    hidden: int = 2048
    """Features between two layers."""

    out: int = 2048
    """Features of the projection, which the branches' transforms take."""

    bias: bool = False
    """Give hidden layers a bias. The last layer has one unless `last_norm` would cancel it."""

    activation: Literal["relu", "gelu"] = "relu"
    """Nonlinearity after each hidden layer."""

    norm: bool = True
    """Put a BatchNorm after each hidden layer."""

    last_norm: Literal["none", "affine", "plain"] = "none"
    """BatchNorm after the last layer: none, affine (with learned scale and shift) or plain (without)."""

    init: Literal["torch", "trunc_normal"] = "torch"
    """Initial weights: torch's defaults, or normal with deviation 0.02, truncated, and zero biases, as in DINO."""

    def __post_init__(self) -> None:
        require(self.layers >= 1, "layers", "at least 1", self.layers)
        require(self.hidden >= 1, "hidden", "at least 1 feature", self.hidden)
        require(self.out >= 1, "out", "at least 1 feature", self.out)


# settings that only some encoders have, and the value that leaves each out
LEFT_OUT: dict[str, object] = {
    "stem": "imagenet",
    "width": None,
    "zero_init_residual": False,
    "options": None,
    "freeze_patch_embed": False,
}
TIMM = "timm/"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EncoderOptions:
    """Settings of an encoder of one's own, which has a subclass of this with a field for each."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EncoderConfig:
    """Which network turns images into features."""

    name: str = "resnet18"
    """The network: resnet18, resnet34, resnet50, resnet_small (three stages, for small images), timm/<name> for a model
    of timm, or package.module:NAME for one of your own.
    """

    stem: Literal["imagenet", "cifar", "cifar_padding2"] = "imagenet"
    """First layers of a ResNet: imagenet is a 7x7 convolution with stride 2 and a max pool, cifar a 3x3 convolution.
    `cifar_padding2` pads it by 2, as the paper's code does, so that 32 px images give 34 px maps.
    """

    width: int | None = None
    """Channels of a ResNet's stem. `null` is 64, and 32 for resnet_small."""

    zero_init_residual: bool = False
    """Start the last BatchNorm of every residual block at zero weight, so that the block passes its input on. SimSiam's
    scripts do.
    """

    sync_bn: bool = True
    """Compute BatchNorm statistics over the batches of all processes."""

    options: SerializeAsAny[EncoderOptions] | dict[str, bool | int | float | str] | None = None
    """Arguments for timm.create_model, such as {dynamic_img_size: true}, or the settings of an encoder of your own."""

    freeze_patch_embed: bool = False
    """Keep a vision transformer's patch embedding at its random initial weights (MoCo v3, section 4.2)."""

    checkpointing: bool = False
    """Recompute each block in the backward pass instead of storing its activations. It saves memory and costs time."""

    def __post_init__(self) -> None:
        require(self.width is None or self.width > 0, "encoder.width", "above 0 channels", self.width)
        takes = find_encoder(self.name).takes
        for key, default in LEFT_OUT.items():
            told = {"None": "null", "False": "false"}.get(str(default), default)
            expected, value = f"left at {told} for {self.name}, which does not have it", getattr(self, key)
            require(key in takes or value == default, f"encoder.{key}", expected, value)
        if parts.is_own(self.name) and not isinstance(self.options, EncoderOptions):
            options = parts.validated(_own_settings(self.name), self.options or {}, at="options")
            object.__setattr__(self, "options", options)  # of its own type, and all of them


class Architecture(NamedTuple):
    """A row of the table of encoders."""

    code: str
    """A function from EncoderConfig to the Encoder, in train mode and randomly initialized, as package.module:NAME."""

    takes: frozenset[str] = frozenset()
    """The keys of LEFT_OUT that it has."""

    exports: tuple[str, ...] = ()
    """Layouts of other libraries that hold its weights, besides safetensors."""

    width: int | None = None
    """Channels of a ResNet's stem where encoder.width is left out."""

    blocks: tuple[int, ...] = ()
    """Residual blocks of each stage of a ResNet."""

    bottleneck: bool = False
    """Whether these blocks are bottlenecks."""


def resnet_row(
    blocks: tuple[int, ...], width: int, bottleneck: bool = False, exports: tuple[str, ...] = ()
) -> Architecture:
    """The row of a ResNet."""
    takes = frozenset(("stem", "width", "zero_init_residual"))
    return Architecture("fastrdm.models.encoders:build_resnet", takes, exports, width, blocks, bottleneck)


ENCODERS: dict[str, Architecture] = {
    "resnet_small": resnet_row((1, 1, 1), 32),
    "resnet18": resnet_row((2, 2, 2, 2), 64, exports=("torchvision", "timm")),
    "resnet34": resnet_row((3, 4, 6, 3), 64, exports=("torchvision", "timm")),
    "resnet50": resnet_row((3, 4, 6, 3), 64, bottleneck=True, exports=("torchvision", "timm")),
}


def find_encoder(name: str) -> Architecture:
    """The row of that name, timm's for timm/NAME, or one's own; ValueError where there is none."""
    if parts.is_own(name):
        return Architecture("fastrdm.models.encoders:build_own", frozenset(("options",)))
    if name.startswith(TIMM):
        takes = frozenset(("options", "freeze_patch_embed"))
        return Architecture("fastrdm.models.encoders:build_timm", takes, ("timm",))
    if name not in ENCODERS:
        known = f"encoder.name must be one of {', '.join(ENCODERS)}, timm/NAME or package.module:Class, got {name!r}"
        raise ValueError(f"{known}: {nearest(name, ENCODERS)}")
    return ENCODERS[name]


def encoder_settings(name: str) -> list[str]:
    """Names of the settings that the encoder of that name has."""
    missing = LEFT_OUT.keys() - find_encoder(name).takes
    return [field.name for field in dataclasses.fields(EncoderConfig) if field.name not in missing]


def _own_settings(name: str) -> type[EncoderOptions]:
    """The settings of an encoder of one's own, whose code is loaded to look at it."""
    from fastrdm.models.encoders import own_encoder

    return parts.settings_of(own_encoder(name), EncoderOptions)
