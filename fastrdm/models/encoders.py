"""Encoders from images to pooled features: ResNets with torchvision's keys, a small one, timm's, and one's own."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastrdm import parts
from fastrdm.kernels.batchnorm import Again, ViewBatchNorm, convert_batchnorm
from fastrdm.models.settings import TIMM, EncoderOptions, find_encoder
from fastrdm.models.settings import EncoderConfig as EncoderConfig
from fastrdm.schema import nearest, require


class Encoder(nn.Module):
    """Images (B, 3, H, W) to pooled features (B, features)."""

    features: int

    @property
    def backbone(self) -> nn.Module:
        """The module whose state dict has the public keys: torchvision's, or timm's."""
        return self

    def checkpoint_blocks(self) -> None:
        """Let blocks run again in the backward pass; ValueError where the network cannot."""
        raise ValueError(f"encoder.checkpointing must be false for {type(self).__name__}, which has no way to do it")

    def check_sizes(self, sizes: Iterable[int]) -> None:
        """Raise ValueError for the first of these sizes of images, in pixels, that the network cannot take."""


class ResNet(Encoder):
    """He et al. 2015, with the stride of a bottleneck in its 3x3 convolution; torchvision's keys and initialization.

    `blocks`: residual blocks of each stage. `width`: channels of the stem and of the first stage, before expansion.
    """

    def __init__(
        self,
        blocks: tuple[int, ...],
        bottleneck: bool,
        stem: str,
        width: int,
        zero_init_residual: bool = False,
        sync_bn: bool = True,
    ) -> None:
        super().__init__()
        self.checkpointing = False  # whether blocks run again in the backward pass instead of keeping what it needs
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
            self.maxpool: nn.Module = nn.MaxPool2d(3, stride=2, padding=1)
        else:
            self.conv1 = nn.Conv2d(3, width, 3, padding=2 if stem == "cifar_padding2" else 1, bias=False)
            self.maxpool = nn.Identity()
        self.bn1 = ViewBatchNorm(width, sync=sync_bn)
        block = _Bottleneck if bottleneck else _Basic
        channels = width
        self.stages = len(blocks)
        for stage, count in enumerate(blocks):
            inner = width << stage
            made: list[nn.Module] = []
            for index in range(count):
                made.append(block(channels, inner, 2 if stage and not index else 1, sync_bn))
                channels = inner * block.expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*made))
        self.features = channels
        _initialize(self, zero_init_residual)

    def checkpoint_blocks(self) -> None:
        self.checkpointing = True

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


def _initialize(resnet: ResNet, zero_init_residual: bool) -> None:
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
            near = nearest(f"timm/{name}", (f"timm/{other}" for other in timm.list_models()))
            hint = f": {near}" if near.startswith("did") else ""  # timm has too many models to list them
            raise ValueError(f"encoder.name must be a model of timm {timm.__version__}, got 'timm/{name}'{hint}")
        given: dict[str, Any] = dict(options or {})
        # timm would read a file that a configuration names, and older versions of it run what is pickled there
        require("checkpoint_path" not in given, "encoder.options", "without checkpoint_path", options)
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


def build_resnet(config: EncoderConfig) -> Encoder:
    """A ResNet of the table."""
    row = find_encoder(config.name)
    width = config.width or row.width
    assert width is not None
    return ResNet(row.blocks, row.bottleneck, config.stem, width, config.zero_init_residual, config.sync_bn)


def build_timm(config: EncoderConfig) -> Encoder:
    """A network of timm."""
    assert not isinstance(config.options, EncoderOptions)
    encoder = TimmEncoder(config.name.removeprefix(TIMM), config.sync_bn, config.options)
    if config.freeze_patch_embed:
        patches = getattr(encoder.model, "patch_embed", None)
        if not isinstance(patches, nn.Module):
            raise ValueError(f"encoder.freeze_patch_embed must be false for {config.name}, which embeds no patches")
        patches.requires_grad_(False)
    return encoder


def own_encoder(name: str) -> Callable[[Any], Encoder]:
    """The class or function that package.module:NAME stands for; ValueError where there is none."""
    expected = "a class derived from fastrdm's Encoder, or a function annotated as returning one"
    made: Callable[[Any], Encoder] = parts.load(name, "encoder.name", lambda x: parts.makes(x, Encoder), expected)
    return made


def build_own(config: EncoderConfig) -> Encoder:
    """A network of one's own."""
    encoder = own_encoder(config.name)(config.options)
    right = isinstance(encoder, Encoder) and isinstance(getattr(encoder, "features", None), int)
    require(right, f"encoder.name {config.name!r}", "an Encoder that sets `features`", type(encoder).__name__)
    converted = convert_batchnorm(encoder, config.sync_bn)
    assert isinstance(converted, Encoder)
    return converted


def build_encoder(config: EncoderConfig) -> Encoder:
    """The encoder that `config` names, in train mode, randomly initialized; ValueError when timm lacks it."""
    encoder: Encoder = parts.of_ours(find_encoder(config.name).code)(config)
    if config.checkpointing:
        encoder.checkpoint_blocks()
    return encoder
