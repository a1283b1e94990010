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


TRIES = 10  # boxes drawn before the central crop is taken, as in torchvision


class Draw(IntEnum):
    """Places of the random numbers of one image and view, which every implementation of the draw takes from there."""

    # TRIES shares of the image's area, then as many ratios of width to height, and the place of the box.
    AREA = 0
    RATIO = TRIES
    TOP = 2 * TRIES
    LEFT = 2 * TRIES + 1
    FLIP = 2 * TRIES + 2
    JITTER = 2 * TRIES + 3
    # Four numbers, whose order is that of the jitter's turns, and the factors of brightness, contrast and saturation.
    TURNS = 2 * TRIES + 4
    FACTORS = 2 * TRIES + 8
    HUE = 2 * TRIES + 11
    BLUR = 2 * TRIES + 12
    SIGMA = 2 * TRIES + 13
    # One for each of SWITCHES.
    SWITCHES = 2 * TRIES + 14


DRAWS = Draw.SWITCHES + len(SWITCHES)


class Number(IntEnum):
    """Places of a view's settings in the table (V, NUMBERS) float64 that the draw by Triton reads.

    A range is its lower end and its length. FACTORS holds three lower ends, then three lengths.
    """

    SCALE = 0
    LOG_RATIO = 2
    # The ends of the range of width over height.
    RATIO = 4
    FLIP = 6
    JITTER = 7
    FACTORS = 8
    HUE = 14
    BLUR = 16
    SIGMA = 17
    # The probability of each of SWITCHES.
    SWITCHES = 19


NUMBERS = Number.SWITCHES + len(SWITCHES)


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
