"""Draw views of a few images beside torchvision's for the same parameters: docs/views.jpg.

    python -m benchmarks.plots.views docs/views.jpg

Rows: 8 cuts of scikit-learn's two photographs. First column: the image. Then both views of each preset and
two blurred ones; of each pair the left is ours and the right torchvision's. Prints their largest difference.
"""

from dataclasses import replace

import torch
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_images
from torch import Tensor

from benchmarks import common
from fastrdm.config.run_config import load
from fastrdm.kernels.augment.layout import Column
from fastrdm.loaders.augment.parameters import sample_parameters
from fastrdm.loaders.augment.reference import augment
from fastrdm.loaders.spec import ViewSpec

SIDE, GAP, HEAD = 64, 2, 14  # pixels of a view, between views, and of the line above
SEED = 1
PRESETS = ("simsiam", "byol", "swav", "dino")


def pictures() -> list[Tensor]:
    """8 cuts (H, W, 3) uint8 of various sizes from the photographs of a temple and of a flower."""
    boxes = [(0, 0, 250, 320), (100, 320, 300, 300), (150, 60, 270, 210), (0, 250, 427, 390)]
    photographs = [torch.tensor(photograph) for photograph in load_sample_images().images]
    return [photo[y : y + h, x : x + w].contiguous() for photo in photographs for y, x, h, w in boxes]


def specs() -> dict[str, ViewSpec]:
    """The views to draw, not normalized: both of each preset, and BYOL's for ImageNet, which blurs."""
    views = {f"{name} {n}": view for name in PRESETS for n, view in enumerate(load([f"preset={name}"]).loader.views)}
    byol = ViewSpec(scale=(0.08, 1.0), saturation=0.2, blur=1.0)
    views |= {"blurred 0": byol, "blurred 1": replace(byol, blur=0.1, solarize=0.2)}
    return {name: replace(view, size=SIDE, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)) for name, view in views.items()}


def by_torchvision(image: Tensor, row: Tensor, spec: ViewSpec) -> Tensor:
    """View (3, S, S) in [0, 1] of (H, W, 3) uint8 and its parameters (16,)."""
    from torchvision.transforms.v2 import functional as tv

    top, left, height, width = row[:4].int().tolist()
    x, mode = image.permute(2, 0, 1).float().div(255), tv.InterpolationMode(spec.interpolation)
    x = tv.resized_crop(x, top, left, height, width, [spec.size] * 2, interpolation=mode, antialias=True).clamp(0, 1)
    jitter = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    for turn in row[Column.ORDER : Column.ORDER + 4].int().tolist():
        x = jitter[turn](x, row[Column.BRIGHTNESS + turn].item())
    x = tv.rgb_to_grayscale(x, 3) if row[Column.GRAYSCALE] else x
    x = tv.gaussian_blur(x, [spec.blur_kernel] * 2, [row[Column.BLUR].item()] * 2) if row[Column.BLUR] else x
    x = tv.solarize(x, spec.solarize_threshold / 255) if row[Column.SOLARIZE] else x
    view: Tensor = tv.horizontal_flip(x) if row[Column.FLIP] else x
    return view


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("out", help="picture to write")
    args = parser.parse_args()
    common.require_packages("torchvision")
    images, wide = pictures(), 2 * (SIDE + GAP) + 3 * GAP
    sheet = Image.new("RGB", (SIDE + 3 * GAP + wide * len(specs()), HEAD + (SIDE + GAP) * len(images)), "white")
    draw, worst = ImageDraw.Draw(sheet), 0.0
    draw.text((0, 1), "image", "black")
    height, width = torch.tensor([image.shape[:2] for image in images]).unbind(1)
    for row, image in enumerate(images):
        small = Image.fromarray(image.numpy()).resize((SIDE, SIDE))
        sheet.paste(small, (0, HEAD + row * (SIDE + GAP)))
    for column, (name, spec) in enumerate(specs().items()):
        left = SIDE + 3 * GAP + column * wide
        draw.text((left, 1), name, "black")
        drawn = sample_parameters(spec, SEED, 0, torch.arange(len(images)), column % 2, height, width)
        ours = augment(images, drawn, spec)
        theirs = torch.stack([by_torchvision(*pair, spec) for pair in zip(images, drawn, strict=True)])
        worst = max(worst, (ours - theirs).abs().max().item())
        for row, pair in enumerate(zip(ours, theirs, strict=True)):
            for k, view in enumerate(pair):
                pixels = view.mul(255).round().byte().permute(1, 2, 0).numpy()
                sheet.paste(Image.fromarray(pixels), (left + k * (SIDE + GAP), HEAD + row * (SIDE + GAP)))
    sheet.save(args.out, quality=88)
    print(f"{args.out}: {sheet.size}, largest difference {255 * worst:.4f} levels of 255")


if __name__ == "__main__":
    main()
