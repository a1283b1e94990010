"""The layout of drawn parameters and the description of a view, which every implementation of the augmentation reads.

csrc/augment_cpu.cpp repeats Column, Adjustment and augment_cpu.Spec; a test compares them.
"""

from enum import IntEnum
from typing import Protocol


class Column(IntEnum):
    """Columns of the drawn parameters (B, COLUMNS) float32. Each row says what is done to one image."""

    # The crop's box in pixels of the image.
    TOP = 0
    LEFT = 1
    HEIGHT = 2
    WIDTH = 3
    # 0 or 1.
    FLIP = 4
    # Factors of the color jitter; 1 leaves the image as it is. HUE is in turns of the circle, 0 leaves it as it is.
    BRIGHTNESS = 5
    CONTRAST = 6
    SATURATION = 7
    HUE = 8
    # ORDER to ORDER + 3 hold the Adjustment of each of the jitter's four turns.
    ORDER = 9
    # 0 or 1.
    GRAYSCALE = 13
    # Sigma in pixels, 0 for none.
    BLUR = 14
    # 0 or 1.
    SOLARIZE = 15


COLUMNS = max(Column) + 1


class Adjustment(IntEnum):
    """The four operations of the color jitter, as torchvision numbers them; column BRIGHTNESS + n holds its factor."""

    BRIGHTNESS = 0
    CONTRAST = 1
    SATURATION = 2
    HUE = 3


# What a view can go through behind crop and flip, in this order: fields of ViewRecipe that hold a probability. An
# operation whose probability is 0 is left out of the work.
OPERATIONS = ("jitter", "grayscale", "blur", "solarize")

# The operations that are drawn as 0 or 1 in the column of their name, in the order of their random numbers. A new one
# goes to the end, so that the draws of the others stay as they are.
SWITCHES = ("grayscale", "solarize")


class ViewRecipe(Protocol):
    """The part of fastrdm.loaders.spec.ViewSpec that kernels read; ViewSpec explains the fields."""

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


class DrawRecipe(Protocol):
    """The part of fastrdm.loaders.spec.ViewSpec that decides how a view's parameters are drawn, SWITCHES beside it."""

    @property
    def scale(self) -> tuple[float, float]: ...
    @property
    def ratio(self) -> tuple[float, float]: ...
    @property
    def flip(self) -> float: ...
    @property
    def jitter(self) -> float: ...
    @property
    def brightness(self) -> float: ...
    @property
    def contrast(self) -> float: ...
    @property
    def saturation(self) -> float: ...
    @property
    def hue(self) -> float: ...
    @property
    def blur(self) -> float: ...
    @property
    def blur_sigma(self) -> tuple[float, float]: ...
