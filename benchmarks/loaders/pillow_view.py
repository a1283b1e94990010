"""Views by Pillow with our parameters, one image at a time, as reference codes make them."""

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor

from fastrdm.kernels.augment.layout import Column
from fastrdm.loaders.spec import ViewSpec


def turn_hue(image: Image.Image, turns: float) -> Image.Image:
    """The image with its hue turned by a share of the circle, on 8-bit HSV."""
    hue, saturation, value = image.convert("HSV").split()
    shifted = (np.asarray(hue).astype(np.int16) + round(255 * turns)).astype(np.uint8)
    return Image.merge("HSV", (Image.fromarray(shifted), saturation, value)).convert("RGB")


def pillow_view(image: Image.Image, row: list[float], spec: ViewSpec) -> Tensor:
    """A normalized view (3, S, S) of a Pillow image, with the row of drawn parameters."""
    from torchvision.transforms.v2 import functional as tv

    top, left, height, width = row[:4]
    mode = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[spec.interpolation]
    x = image.resize((spec.size, spec.size), mode, box=(left, top, left + width, top + height))
    enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for turn in row[Column.ORDER : Column.ORDER + 4]:
        factor = row[Column.BRIGHTNESS + int(turn)]
        if factor != (turn != 3):
            x = turn_hue(x, factor) if turn == 3 else enhance[int(turn)](x).enhance(factor)
    x = x.convert("L").convert("RGB") if row[Column.GRAYSCALE] else x
    x = x.filter(ImageFilter.GaussianBlur(row[Column.BLUR])) if row[Column.BLUR] else x
    x = ImageOps.solarize(x, spec.solarize_threshold) if row[Column.SOLARIZE] else x
    x = x.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if row[Column.FLIP] else x
    view: Tensor = tv.normalize(tv.to_dtype(tv.pil_to_tensor(x), torch.float32, scale=True), spec.mean, spec.std)
    return view
