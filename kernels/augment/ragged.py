"""Images of any sizes in one buffer, as the kernels of the augmentation take them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Ragged(NamedTuple):
    """B images (H, W, 3) uint8 of any sizes, back to back or with gaps, in one buffer."""

    pixels: Tensor
    """(bytes,) uint8."""
    offset: Tensor
    """(B,) int64: the byte at which an image starts."""
    height: Tensor
    """(B,) int32, pixels."""
    width: Tensor
    """(B,) int32, pixels."""

    def image(self, number: int) -> Tensor:
        """Image `number` (H, W, 3); waits for the device."""
        offset, height, width = int(self.offset[number]), int(self.height[number]), int(self.width[number])
        return self.pixels[offset : offset + 3 * height * width].view(height, width, 3)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Ragged":
        """A copy of the images on `device`."""
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
