"""Defaults that follow from the data set: the size and the augmentation of views, and the stem."""

from typing import Any, NamedTuple

from fastrdm.loaders.spec import STATISTICS

Tree = dict[str, Any]

SIZES = {"digits": 16, "fashion_mnist": 28, "cifar10": 32, "cifar100": 32}
"""Pixels a side of a view for the sets of small images, whose size is known before they are opened."""

PHOTOGRAPHS = 224
"""Pixels a side of a view for any other set."""

_GRAY: Tree = {"hue": 0.0, "saturation": 0.0, "grayscale": 0.0}
_VIEWS: dict[str, Tree] = {
    # strokes: a mirrored digit is no digit, and a small part of one tells little
    "digits": {**_GRAY, "scale": [0.4, 1.0], "flip": 0.0},
    "fashion_mnist": _GRAY,
}
# The two global views of each method's ImageNet recipe, beside the strengths of color in its preset.
_PUBLISHED: dict[str, Tree] = {
    "simsiam": {"*": {"scale": [0.2, 1.0], "interpolation": "bilinear", "blur": 0.5}},
    "byol": {"0": {"blur": 1.0}, "1": {"blur": 0.1}},
    "swav": {"*": {"scale": [0.08, 1.0], "interpolation": "bilinear", "blur": 0.5}},
    "dino": {"*": {"scale": [0.14, 1.0]}, "0": {"blur": 1.0}, "1": {"blur": 0.1}},
}


class Assumption(NamedTuple):
    """Settings that lie over a preset and under everything that a user sets."""

    tree: Tree
    told: str


def assume(source: str, preset: str, encoder: str) -> Assumption:
    """Settings that suit the data set `source`, the method `preset` and the network `encoder`, given by name."""
    size = SIZES.get(source, PHOTOGRAPHS)
    network: Tree = {}
    if source in SIZES:
        views: Tree = {"*": {"size": size, **_VIEWS.get(source, {})}}
        if source != "digits":
            mean, std = STATISTICS[source]
            views["*"] |= {"mean": list(mean), "std": list(std)}
        told = f"{source} has small images: views of {size} px"
        if encoder.startswith("resnet"):
            network["stem"] = "cifar"
            told += ", encoder.stem=cifar"
    else:
        family = next((name for name in _PUBLISHED if name in preset), "simsiam")  # rdm_byol_log1p is of byol
        views = {**_PUBLISHED[family], "*": {"size": size, **_PUBLISHED[family].get("*", {})}}
        told = f"{source} holds photographs: views of {size} px as {family} draws them of ImageNet"
    return Assumption({"loader": {"views": views}, **({"encoder": network} if network else {})}, told)
