"""What every augmentation kernel takes: images of any sizes in one buffer, and the description of a view."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

COLUMNS = 16  # of the parameters; fastrdm.loaders.augment.parameters.Column names them


class Ragged(NamedTuple):
    """B images (H, W, 3) uint8 of any sizes, back to back or with gaps, in one buffer."""

    pixels: Tensor  # (bytes,) uint8
    offset: Tensor  # (B,) int64, where an image starts
    height: Tensor  # (B,) int32, pixels
    width: Tensor  # (B,) int32

    def image(self, number: int) -> Tensor:
        """Image `number` (H, W, 3); waits for the device."""
        offset, height, width = int(self.offset[number]), int(self.height[number]), int(self.width[number])
        return self.pixels[offset : offset + 3 * height * width].view(height, width, 3)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Ragged":
        """The same images on `device`."""
        return Ragged(*(part.to(device, non_blocking=non_blocking) for part in self))


def ragged(images: Tensor | Sequence[Tensor]) -> Ragged:
    """`images` (B, H, W, 3) uint8 as they lie, or a list of (H, W, 3) uint8 copied into one buffer."""
    if isinstance(images, Tensor):
        count, height, width, _ = images.shape
        offset = torch.arange(count, device=images.device) * (3 * height * width)
        tall, wide = (torch.full((count,), side, dtype=torch.int32, device=images.device) for side in (height, width))
        return Ragged(images.contiguous().view(-1), offset, tall, wide)
    sizes = torch.tensor([0, *(image.numel() for image in images)])
    sides = torch.tensor([image.shape[:2] for image in images], dtype=torch.int32, device=images[0].device)
    pixels = torch.cat([image.reshape(-1) for image in images])
    return Ragged(pixels, sizes.cumsum(0)[:-1].to(pixels.device), *sides.T.contiguous().unbind(0))


class ViewRecipe(Protocol):
    """What a kernel reads of fastrdm.loaders.spec.ViewSpec, which explains the fields."""

    @property
    def size(self) -> int: ...
    @property
    def interpolation(self) -> str: ...
    @property
    def jitter(self) -> float: ...
    @property
    def grayscale(self) -> float: ...
    @property
    def blur(self) -> float: ...
    @property
    def solarize(self) -> float: ...
    @property
    def blur_kernel(self) -> int: ...
    @property
    def solarize_threshold(self) -> int: ...
    @property
    def mean(self) -> tuple[float, float, float]: ...
    @property
    def std(self) -> tuple[float, float, float]: ...
