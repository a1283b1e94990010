"""Images to views by a chosen implementation, and the reference: plain torch, float32 in [0, 1], no synchronization.

Torchvision v2 on float images defines every operation; after the crop the values are clamped to [0, 1], which
torchvision leaves to the caller and 8-bit pipelines do by themselves.
"""

import warnings
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fastrdm.kernels.augment.augment_cpu import augment_cpu, crop_cpu, library
from fastrdm.kernels.augment.compiled import NoCompiler
from fastrdm.kernels.augment.layout import Adjustment, Column
from fastrdm.kernels.augment.ragged import Ragged, Strided, ragged, strided
from fastrdm.kernels.triton_support import HAS_TRITON, triton_module
from fastrdm.loaders.spec import ViewSpec
from fastrdm.schema import Triple

# Plain numbers, because torch.compile cannot trace a comparison with a member of an enum.
_, CONTRAST, SATURATION, HUE = (int(kind) for kind in Adjustment)

# uint8: (B, H, W, 3), any sizes in one buffer, or B times (H, W, 3), of which Strided holds the addresses too.
Images = Tensor | Ragged | Strided | Sequence[Tensor]


def augment(
    images: Images, parameters: Tensor, spec: ViewSpec, dtype: torch.dtype = torch.float32, implementation: str = "auto"
) -> Tensor:
    """Views (B, 3, S, S) `dtype`, channels-last, normalized, of uint8 images and their parameters (B, COLUMNS).

    `implementation` as LoaderConfig.augment. The reference waits for the device where images differ in size.
    """
    name = chosen(implementation, parameters.device)
    if name == "triton":
        views: Tensor = triton_module("augment.augment_triton").augment_triton(
            _addressed(images), parameters, spec, dtype
        )
        return views
    if isinstance(images, Strided):
        images = images.images
    if name == "cpu":
        return augment_cpu(ragged(images) if isinstance(images, Tensor) else images, parameters, spec).to(dtype)
    if isinstance(images, Tensor):
        crops = crop_resize(images, parameters, spec)
    else:
        singles = map(images.image, range(len(parameters))) if isinstance(images, Ragged) else images
        crops = torch.stack([crop_resize_one(*pair, spec) for pair in zip(singles, parameters, strict=True)])
    return color(crops, parameters, spec, dtype)


def _addressed(images: Images) -> Ragged | Strided:
    """The images with the places at which the Triton kernels find them; no pixel is copied."""
    if isinstance(images, Ragged | Strided):
        return images
    return ragged(images) if isinstance(images, Tensor) else strided(images)


def crop(images: Sequence[Tensor], parameters: Tensor, spec: ViewSpec, out: Tensor, implementation: str) -> None:
    """Crops of images (H, W, 3) uint8 on the CPU, rounded, into `out` (B, 3, S, S) uint8; by `cpu` or `reference`."""
    if implementation == "cpu":
        crop_cpu(images, parameters, spec, out)
        return
    for place, image, row in zip(out, images, parameters, strict=True):
        place.copy_(crop_resize_one(image, row, spec).mul_(255).round_())


def chosen(name: str, device: torch.device) -> str:
    """The implementation that LoaderConfig.augment means on `device`: reference, cpu or triton.

    ValueError where it cannot run.
    """
    if device.type != {"cpu": "cpu", "triton": "cuda"}.get(name, device.type):
        raise ValueError(f"loader.augment={name} does not run on {device.type}: take auto or reference")
    if name == "cpu":
        # NoCompiler now, not in a thread later.
        library()
    if name != "auto":
        return name
    return _best_on_cpu() if device.type == "cpu" else _best_on_cuda()


@cache
def _best_on_cuda() -> str:
    if HAS_TRITON:
        return "triton"
    warnings.warn("views are made in plain torch, 30 times slower than by Triton, which is not installed", stacklevel=3)
    return "reference"


@cache
def _best_on_cpu() -> str:
    try:
        library()
    except NoCompiler as error:
        warnings.warn(f"views are made in plain torch, ten times slower than compiled: {error}", stacklevel=3)
        return "reference"
    return "cpu"


def color(x: Tensor, parameters: Tensor, spec: ViewSpec, dtype: torch.dtype = torch.float32) -> Tensor:
    """Views of crops (B, 3, S, S) float32 in [0, 1], which it may overwrite: every operation behind the crop."""
    if spec.jitter > 0:
        x = jitter(x, parameters)
    if spec.grayscale > 0:
        x = grayscale(x, parameters[:, Column.GRAYSCALE])
    if spec.blur > 0:
        x = blur(x, parameters[:, Column.BLUR], spec.blur_kernel)
    if spec.solarize > 0:
        x = solarize(x, parameters[:, Column.SOLARIZE], spec.solarize_threshold / 255)
    return normalize(x, spec.mean, spec.std, dtype)


def crop_resize(images: Tensor, parameters: Tensor, spec: ViewSpec) -> Tensor:
    """Crops (B, 3, S, S) float32 in [0, 1], flipped where drawn, of images (B, H, W, 3) uint8."""
    top, left, tall, wide, flip = parameters[:, : Column.FLIP + 1, None].unbind(1)
    place = torch.arange(spec.size, device=images.device, dtype=torch.float32)
    columns = torch.where(flip > 0, spec.size - 1 - place, place)
    across = resize_weights(columns, wide / spec.size, left, wide, images.shape[2], spec.interpolation)
    down = resize_weights(place, tall / spec.size, top, tall, images.shape[1], spec.interpolation)
    return resample(images, down, across)


def crop_resize_one(image: Tensor, parameters: Tensor, spec: ViewSpec) -> Tensor:
    """The crop (3, S, S) float32 in [0, 1], flipped where drawn, of one image (H, W, 3) uint8 on the CPU.

    `parameters` is the image's row (COLUMNS,).
    """
    top, left, tall, wide, flip = (int(value) for value in parameters[: Column.FLIP + 1])
    box = image[top : top + tall, left : left + wide].permute(2, 0, 1)[None]
    # Planes are a third faster than channels-last.
    box = box.to(torch.float32, memory_format=torch.contiguous_format)
    x = interpolate(box, size=(spec.size, spec.size), mode=spec.interpolation, antialias=True, align_corners=False)
    return (x[0].flip(2) if flip else x[0]).div_(255).clamp_(0, 1)


def resize_weights(place: Tensor, scale: Tensor, start: Tensor, length: Tensor, pixels: int, mode: str) -> Tensor:
    """Weights (B, S, pixels) of the antialiased resize of the box [start, start + length) of each sample's axis.

    `place` (S,) or (B, S) are output pixels, `scale` (B, 1) source pixels an output pixel; as torch's interpolate.
    """
    center = ((place + 0.5) * scale)[..., None]
    source = torch.arange(pixels, device=place.device, dtype=torch.float32) - start[..., None]
    distance = ((source + 0.5 - center) / scale.clamp(min=1)[..., None]).abs()
    weights = _triangle(distance) if mode == "bilinear" else _keys_cubic(distance)
    weights = weights * ((source >= 0) & (source < length[..., None]))
    return weights / weights.sum(dim=-1, keepdim=True)


def _triangle(distance: Tensor) -> Tensor:
    return (1 - distance).clamp_(min=0)


def _keys_cubic(distance: Tensor) -> Tensor:
    """Cubic convolution with a = -1/2 (Keys 1981), which antialiased bicubic resizing uses."""
    near = (1.5 * distance - 2.5) * distance * distance + 1
    distance = distance.clamp(max=2)
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, far)


def resample(images: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """down @ image @ across^T, (B, 3, S, T) float32 in [0, 1], of images (B, H, W, 3) uint8, (B, S, H), (B, T, W)."""
    batch, _, width, channels = images.shape
    rows = torch.bmm(down, images.flatten(2).float()).view(batch, -1, width, channels)
    planes = rows.permute(0, 3, 1, 2).flatten(1, 2)
    x = torch.bmm(planes, across.transpose(1, 2)).view(batch, channels, down.shape[1], across.shape[1])
    return x.div_(255).clamp_(0, 1)


def jitter(x: Tensor, parameters: Tensor) -> Tensor:
    """The four operations of color jitter in each sample's own order.

    Hue is dear and the rest cheap: three turns of blending before hue, three after, and in each turn the samples whose
    order has no such turn stay as they are. So one graph serves every order.
    """
    order = parameters[:, Column.ORDER : Column.ORDER + 4]
    hue_turn = (order == HUE).float().argmax(dim=1, keepdim=True)
    factor = parameters[:, Column.BRIGHTNESS : Column.HUE].gather(1, order.long().clamp(max=SATURATION))
    for k in range(3):
        x = blend(x, order[:, k], torch.where(hue_turn[:, 0] > k, factor[:, k], 1.0))
    x = adjust_hue(x, parameters[:, Column.HUE])
    for k in range(1, 4):
        x = blend(x, order[:, k], torch.where(hue_turn[:, 0] < k, factor[:, k], 1.0))
    return x


def blend(x: Tensor, operation: Tensor, factor: Tensor) -> Tensor:
    """factor * x + (1 - factor) * other, clamped to [0, 1], with an `operation` and a `factor` (B,) for each sample.

    `other` is black (brightness), the image's mean gray (contrast) or each pixel's own gray (saturation).
    """
    gray = luma(x)
    # In two steps: a sum over one long row would be split by thread count and batch size, and round differently.
    mean = gray.mean(dim=3, keepdim=True).mean(dim=2, keepdim=True)
    rest = 1 - factor
    other = gray * _each(rest * (operation == SATURATION)) + mean * _each(rest * (operation == CONTRAST))
    return (x * _each(factor)).add_(other).clamp_(0, 1)


def adjust_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Hue rotated by `turns` (B,) of the circle at constant HSV saturation and value."""
    red, green, blue = x.unbind(1)
    high, low = x.amax(dim=1), x.amin(dim=1)
    span = high - low
    sixth = torch.where(
        high == red,
        green - blue,
        torch.where(high == green, torch.add(blue - red, span, alpha=2), torch.add(red - green, span, alpha=4)),
    )
    hue = sixth.div_(span.clamp(min=1e-12)).add_(6 * turns[:, None, None])
    hue = torch.add(hue, torch.floor(hue / 6), alpha=-6)  # in [0, 6)
    ramps = ((hue - 3).abs_() - 1, 2 - (hue - 2).abs_(), 2 - (hue - 4).abs_())
    return torch.stack([ramp.clamp_(0, 1).mul_(span).add_(low) for ramp in ramps], dim=1)


def luma(x: Tensor) -> Tensor:
    """Gray (B, 1, S, S) by the weights of ITU-R 601-2."""
    return (x[:, :1] * 0.2989).add_(x[:, 1:2], alpha=0.587).add_(x[:, 2:], alpha=0.114)


def grayscale(x: Tensor, drawn: Tensor) -> Tensor:
    """Gray in all channels where `drawn` (B,) is not 0."""
    return torch.where(_each(drawn) > 0, luma(x), x)


def blur(x: Tensor, sigma: Tensor, kernel: int) -> Tensor:
    """Gaussian blur with `sigma` (B,) pixels, 0 for none, reflected at the border; needs no loop over samples."""
    matrix = blur_matrix(sigma, kernel, x.shape[2])
    batch, channels, size, _ = x.shape
    rows = torch.bmm(x.flatten(1, 2), matrix.transpose(1, 2)).view(x.shape)
    columns = rows.permute(0, 2, 1, 3).flatten(2)
    return torch.bmm(matrix, columns).view(batch, size, channels, size).permute(0, 2, 1, 3)


def blur_matrix(sigma: Tensor, kernel: int, size: int) -> Tensor:
    """(B, size, size) matrices that blur one axis; `kernel` shrinks to what reflection at the border allows."""
    reach = min(kernel // 2, size - 1)
    offset = torch.arange(-reach, reach + 1, device=sigma.device)
    taps = torch.softmax(-(offset**2) / (2 * sigma.clamp(min=1e-6)[:, None] ** 2), dim=1)
    source = (torch.arange(size, device=sigma.device)[:, None] + offset).abs()
    source = (size - 1) - (size - 1 - source).abs()
    matrix = torch.zeros(len(sigma), size, size, device=sigma.device)
    return matrix.scatter_add_(2, source.expand(len(sigma), -1, -1), taps[:, None].expand(-1, size, -1))


def solarize(x: Tensor, drawn: Tensor, threshold: float) -> Tensor:
    """Values at or above `threshold` inverted where `drawn` (B,) is not 0."""
    return torch.where((x >= threshold) & (_each(drawn) > 0), 1 - x, x)


def normalize(x: Tensor, mean: Triple, std: Triple, dtype: torch.dtype = torch.float32) -> Tensor:
    """(x - mean) / std of each channel, in `dtype` and channels-last."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)
    for channel in range(3):
        out[:, channel] = (x[:, channel] - mean[channel]).div_(std[channel])
    return out


def _each(values: Tensor) -> Tensor:
    """(B,) as (B, 1, 1, 1)."""
    return values[:, None, None, None]
