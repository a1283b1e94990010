"""Images of any sizes, in one buffer or each in its own memory, as the kernels of the augmentation take them."""

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


class Strided(NamedTuple):
    """B images (H, W, 3) uint8 of any sizes, each where it lies and with its own strides: nothing is copied."""

    images: list[Tensor]
    """Views of the memory that the addresses name, which keep it from being freed."""
    place: Tensor
    """(B, 4) int64 on the images' device: the address of an image, and its bytes from row to row, from pixel to pixel
    and from channel to channel."""


def strided(images: Sequence[Tensor]) -> Strided:
    """The table of `images`, (H, W, 3) uint8 each, such as planes (3, H, W) permuted.

    On CUDA it is one copy that nobody waits for. The memory of the images is then held for the stream that is current
    here, on which the kernels that read them are to run, whichever stream it was made on.
    """
    place, device = torch.tensor([(image.data_ptr(), *image.stride()) for image in images]), images[0].device
    if device.type == "cuda":
        place, stream = place.pin_memory().to(device, non_blocking=True), torch.cuda.current_stream(device)
        for image in images:
            image.record_stream(stream)
    return Strided(list(images), place)
