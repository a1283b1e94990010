"""Encoders from images to pooled features: ResNets with torchvision's keys, a small one, and anything timm has."""

import difflib
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastrdm.kernels.batchnorm import Again, ViewBatchNorm, convert_batchnorm
from fastrdm.schema import STRICT, require


class _Shape(NamedTuple):
    blocks: tuple[int, ...]  # per stage
    bottleneck: bool
    width: int  # channels of the stem and of the first stage, before expansion


RESNETS = {
    "resnet_small": _Shape((1, 1, 1), False, 32),
    "resnet18": _Shape((2, 2, 2, 2), False, 64),
    "resnet34": _Shape((3, 4, 6, 3), False, 64),
    "resnet50": _Shape((3, 4, 6, 3), True, 64),
}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EncoderConfig:
    """Which network turns images into features."""

    name: str = "resnet18"
    """The network: resnet18, resnet34, resnet50, resnet_small (three stages, for small images), or timm/<name> for a
    model of timm.
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

    options: dict[str, bool | int | float | str] | None = None
    """Arguments for timm.create_model, such as {dynamic_img_size: true}."""

    freeze_patch_embed: bool = False
    """Keep a vision transformer's patch embedding at its random initial weights (MoCo v3, section 4.2)."""

    checkpointing: bool = False
    """Recompute each block in the backward pass instead of storing its activations. It saves memory and costs time."""

    def __post_init__(self) -> None:
        if self.name not in RESNETS and not self.name.startswith("timm/"):
            known = f"encoder.name must be one of {', '.join(RESNETS)} or timm/<name>, got {self.name!r}"
            raise ValueError(known + _nearest(self.name, RESNETS))
        require(self.width is None or self.width > 0, "encoder.width", "above 0 channels", self.width)
        if self.name.startswith("timm/"):
            for key, default in (("stem", "imagenet"), ("width", None), ("zero_init_residual", False)):
                value = getattr(self, key)
                require(value == default, f"encoder.{key}", f"left at {default} for {self.name}", value)
        else:
            require(not self.options, "encoder.options", f"left out for {self.name}: they are timm's", self.options)
            frozen = self.freeze_patch_embed
            require(not frozen, "encoder.freeze_patch_embed", f"false for {self.name}, which embeds no patches", frozen)


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f": did you mean {near[0]!r}?" if near else ""


class Encoder(nn.Module):
    """Images (B, 3, H, W) to pooled features (B, features)."""

    features: int
    checkpointing = False  # whether blocks run again in the backward pass instead of keeping what it needs

    @property
    def backbone(self) -> nn.Module:
        """The module whose state dict has the public keys: torchvision's, or timm's."""
        return self

    def checkpoint_blocks(self) -> None:
        """Let blocks run again in the backward pass; ValueError where the network cannot."""
        self.checkpointing = True

    def check_sizes(self, sizes: Iterable[int]) -> None:
        """Raise ValueError for the first of these sizes of images, in pixels, that the network cannot take."""


class ResNet(Encoder):
    """He et al. 2015, with the stride of a bottleneck in its 3x3 convolution; torchvision's keys and initialisation."""

    def __init__(self, shape: _Shape, stem: str, width: int, zero_init_residual: bool, sync_bn: bool) -> None:
        super().__init__()
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
            self.maxpool: nn.Module = nn.MaxPool2d(3, stride=2, padding=1)
        else:
            self.conv1 = nn.Conv2d(3, width, 3, padding=2 if stem == "cifar_padding2" else 1, bias=False)
            self.maxpool = nn.Identity()
        self.bn1 = ViewBatchNorm(width, sync=sync_bn)
        block = _Bottleneck if shape.bottleneck else _Basic
        channels = width
        self.stages = len(shape.blocks)
        for stage, count in enumerate(shape.blocks):
            inner = width << stage
            blocks: list[nn.Module] = []
            for index in range(count):
                blocks.append(block(channels, inner, 2 if stage and not index else 1, sync_bn))
                channels = inner * block.expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.features = channels
        _initialise(self, zero_init_residual)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x)), inplace=True))
        for stage in range(self.stages):
            blocks = getattr(self, f"layer{stage + 1}")
            if self.checkpointing and torch.is_grad_enabled():
                for block in blocks:
                    x = _checkpointed(block, x)
            else:
                x = blocks(x)
        return x.mean((2, 3))


def _checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    """block(x), of which only x is kept; there is no randomness in it."""
    # where compiled, the statistics that a pass leaves behind are an output of the forward graph, once
    again: Any = {} if torch.compiler.is_compiling() else {"context_fn": lambda: (nullcontext(), Again(block))}
    return checkpoint(block, x, use_reentrant=False, preserve_rng_state=False, **again)  # type: ignore[no-any-return]


class _Basic(nn.Module):
    """Two 3x3 convolutions beside the shortcut."""

    expansion = 1

    def __init__(self, channels: int, inner: int, stride: int, sync_bn: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inner, 3, stride, padding=1, bias=False)
        self.bn1 = ViewBatchNorm(inner, sync=sync_bn)
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1, bias=False)
        self.bn2 = ViewBatchNorm(inner, sync=sync_bn)
        self.downsample = _shortcut(channels, inner, stride, sync_bn)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x), inplace=True)


class _Bottleneck(nn.Module):
    """A 3x3 convolution on fewer channels, between two 1x1, beside the shortcut."""

    expansion = 4

    def __init__(self, channels: int, inner: int, stride: int, sync_bn: bool) -> None:
        super().__init__()
        out = inner * self.expansion
        self.conv1 = nn.Conv2d(channels, inner, 1, bias=False)
        self.bn1 = ViewBatchNorm(inner, sync=sync_bn)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, bias=False)
        self.bn2 = ViewBatchNorm(inner, sync=sync_bn)
        self.conv3 = nn.Conv2d(inner, out, 1, bias=False)
        self.bn3 = ViewBatchNorm(out, sync=sync_bn)
        self.downsample = _shortcut(channels, out, stride, sync_bn)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x), inplace=True)


class _Pointwise(nn.Conv2d):
    """A 1x1 convolution."""

    def forward(self, x: Tensor) -> Tensor:
        if self.in_channels < 16 and x.device.type == "cpu":
            # oneDNN (torch 2.14) writes past its buffer: gradient of the weights, stride, less than a SIMD block
            return F.conv2d(x[..., :: self.stride[0], :: self.stride[1]], self.weight)
        return super().forward(x)


def _shortcut(channels: int, out: int, stride: int, sync_bn: bool) -> nn.Module:
    if stride == 1 and channels == out:
        return nn.Identity()
    return nn.Sequential(_Pointwise(channels, out, 1, stride, bias=False), ViewBatchNorm(out, sync=sync_bn))


def _initialise(resnet: ResNet, zero_init_residual: bool) -> None:
    for module in resnet.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif zero_init_residual and isinstance(module, _Basic | _Bottleneck):
            nn.init.zeros_((module.bn3 if isinstance(module, _Bottleneck) else module.bn2).weight)


class TimmEncoder(Encoder):
    """A network of timm without its classifier, its BatchNorms made to split by view."""

    def __init__(self, name: str, sync_bn: bool, options: dict[str, bool | int | float | str] | None = None) -> None:
        super().__init__()
        try:
            import timm
        except ImportError:
            raise ValueError(f"encoder.name timm/{name} needs timm: pip install 'fastrdm[timm]'") from None
        if not timm.is_model(name):
            known = f"encoder.name must be a model of timm {timm.__version__}, got 'timm/{name}'"
            raise ValueError(known + _nearest(f"timm/{name}", [f"timm/{other}" for other in timm.list_models()]))
        given: dict[str, Any] = dict(options or {})
        try:
            model = timm.create_model(name, pretrained=False, num_classes=0, **given)
        except TypeError as error:
            raise ValueError(f"encoder.options must be arguments of timm/{name}, got {options}: {error}") from None
        self.name, self.model = name, convert_batchnorm(model, sync_bn)
        # some networks widen the features after pooling, and then num_features is not what comes out
        self.features = int(getattr(self.model, "head_hidden_size", None) or self.model.num_features)  # type: ignore[arg-type]

    @property
    def backbone(self) -> nn.Module:
        return self.model

    def checkpoint_blocks(self) -> None:
        key, name = "encoder.checkpointing", f"timm/{self.name}"
        norms = any(isinstance(module, ViewBatchNorm) for module in self.model.modules())
        require(not norms, key, f"false for {name}, whose BatchNorm statistics would move twice", True)
        try:
            self.model.set_grad_checkpointing(True)  # type: ignore[operator]
        except (AttributeError, AssertionError):
            raise ValueError(f"{key} must be false for {name}, for which timm has none, got True") from None

    @torch.no_grad()
    def check_sizes(self, sizes: Iterable[int]) -> None:
        training = self.training
        for size in sizes:
            try:
                self.eval()(torch.zeros(1, 3, size, size))
            except (AssertionError, RuntimeError) as error:
                hint = "ViTs take other sizes with encoder.options={dynamic_img_size: true}"
                raise ValueError(f"loader.views.*.size must suit the encoder, got {size}: {error}; {hint}") from None
        self.train(training)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)  # type: ignore[no-any-return]


def build_encoder(config: EncoderConfig) -> Encoder:
    """The encoder that `config` names, in train mode, randomly initialised; ValueError when timm lacks it."""
    encoder = _timm_encoder(config) if config.name.startswith("timm/") else _resnet(config)
    if config.checkpointing:
        encoder.checkpoint_blocks()
    return encoder


def _timm_encoder(config: EncoderConfig) -> Encoder:
    encoder = TimmEncoder(config.name.removeprefix("timm/"), config.sync_bn, config.options)
    if config.freeze_patch_embed:
        patches = getattr(encoder.model, "patch_embed", None)
        if not isinstance(patches, nn.Module):
            raise ValueError(f"encoder.freeze_patch_embed must be false for {config.name}, which embeds no patches")
        patches.requires_grad_(False)
    return encoder


def _resnet(config: EncoderConfig) -> Encoder:
    shape = RESNETS[config.name]
    return ResNet(shape, config.stem, config.width or shape.width, config.zero_init_residual, config.sync_bn)
