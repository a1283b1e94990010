"""The contract of every loading engine: what a view is, what a loader is told, and what it hands out."""

from collections.abc import Iterator
from dataclasses import dataclass as plain_dataclass
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal, Protocol

from pydantic.dataclasses import dataclass
from torch import Tensor

from fastrdm.schema import STRICT, Pair, Triple, require

Engine = Literal["auto", "resident", "native", "dali", "ffcv", "torchcodec", "synthetic"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ViewSpec:
    """The augmentation of one view; torchvision v2 (on float images) defines every operation.

    Order: random resized crop, color jitter (its four operations in a drawn order), grayscale, blur, solarize, flip,
    normalize. Defaults are SimSiam's CIFAR view (paper.md 5.1).
    """

    size: int = 32  # output height and width, pixels
    progressive: tuple[tuple[int, int], ...] = ()  # (epoch, size): smaller before that epoch, as [[30, 16], [60, 24]]
    scale: Pair = (0.2, 1.0)  # share of the image's area that is cropped
    ratio: Pair = (3 / 4, 4 / 3)  # width over height of the crop
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"  # antialiased
    flip: float = 0.5  # probability
    jitter: float = 0.8  # probability that the four strengths below are applied
    brightness: float = 0.4  # factor drawn from 1 - this to 1 + this, at least 0; so are the next two
    contrast: float = 0.4  # blend with the mean gray level
    saturation: float = 0.4  # blend with the gray image
    hue: float = 0.1  # turns of the color circle, at most 0.5
    grayscale: float = 0.2  # probability
    blur: float = 0.0  # probability
    blur_kernel: int = 23  # pixels, odd; reduced to the largest odd number that reflection padding allows
    blur_sigma: Pair = (0.1, 2.0)  # pixels
    solarize: float = 0.0  # probability
    solarize_threshold: int = 128  # of 0 to 255; values at or above are inverted
    mean: Triple = (0.485, 0.456, 0.406)  # of red, green and blue in [0, 1]: subtracted
    std: Triple = (0.229, 0.224, 0.225)  # then divided by

    def __post_init__(self) -> None:
        require(self.size > 0, "size", "above 0 pixels", self.size)
        epochs = [0, *(until for until, _ in self.progressive)]
        grows = all(a < b for a, b in pairwise(epochs)) and all(0 < s <= self.size for _, s in self.progressive)
        wanted = f"pairs of an epoch, rising, and a size of at most {self.size} pixels"
        require(grows, "progressive", wanted, self.progressive)
        require(0 < self.scale[0] <= self.scale[1] <= 1, "scale", "0 < low <= high <= 1", self.scale)
        require(0 < self.ratio[0] <= self.ratio[1], "ratio", "0 < low <= high", self.ratio)
        for name in ("flip", "jitter", "grayscale", "blur", "solarize"):
            require(0 <= getattr(self, name) <= 1, name, "a probability in [0, 1]", getattr(self, name))
        for name in ("brightness", "contrast", "saturation"):
            require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        require(0 <= self.hue <= 0.5, "hue", "in [0, 0.5]", self.hue)
        odd = self.blur_kernel > 0 and self.blur_kernel % 2 == 1
        require(odd, "blur_kernel", "an odd number of pixels", self.blur_kernel)
        require(0 < self.blur_sigma[0] <= self.blur_sigma[1], "blur_sigma", "0 < low <= high", self.blur_sigma)
        require(0 <= self.solarize_threshold <= 256, "solarize_threshold", "in [0, 256]", self.solarize_threshold)
        require(min(self.std) > 0, "std", "above 0", self.std)

    def at(self, epoch: int) -> "ViewSpec":
        """The view as it is drawn in `epoch`: `size` is the one that `progressive` gives."""
        size = next((size for until, size in self.progressive if epoch < until), self.size)
        return replace(self, size=size, progressive=()) if self.progressive else self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoaderConfig:
    """Where images come from and how they become batches of views."""

    source: str = "digits"  # digits, fashion_mnist, cifar10, cifar100, folder, packed, or pkg.mod:Class
    root: str | None = None  # folder of the data set; digits needs none
    labels: str = "auto"
    """Where labels come from. `auto`: from the folders of images where there are two or more, from what stands beside
    an image in other sources. `folders` and `none` say so; else a file: CSV with the columns file and label, Kaggle's
    LOC_val_solution.csv, or a devkit's ground truth. WebDataset takes the suffix of a member too, such as `cls`.
    """

    cache: str | None = None
    """Folder for indexes of tar files and for shards of remote packs. null keeps an index beside its file where that
    can be written, and everything else in $XDG_CACHE_HOME/fastrdm or ~/.cache/fastrdm.
    """

    cache_gb: float = 100.0
    """Gigabytes (10^9 bytes) that the shards of a remote pack may take in the cache of one machine."""

    download: bool = False  # CIFAR archives may be fetched when they are not in root
    classes: str | None = None  # keep these classes only: a file with one a line, or a shipped list (imagenet100)
    subset: int | None = None  # train on so many images, the same number of each class
    engine: Engine = "auto"  # auto: resident or native
    batch_size: int = 256  # images a step, over all processes
    views: tuple[ViewSpec, ...] = (ViewSpec(), ViewSpec())  # numbered from 0; views.*.size sets the size of all
    max_enlarge: float = 4.0  # a view may be so many times as large as the images of a set held in memory
    augment: Literal["auto", "reference", "cpu", "triton"] = "auto"  # auto: compiled on a CPU, triton on a GPU
    workers: int = 2  # decoding threads of this process
    prefetch: int = 4  # batches made ahead of the training step
    prefetch_mb: int = 1024  # MiB of decoded images held at most, over the batches in the making; one always is
    order: Literal["full", "windowed"] = "full"  # windowed: for packed sets larger than memory, a few shards at a time
    window: int = 8  # shards that are mixed at a time, where order is windowed
    max_corrupt: float = 0.001  # share of unreadable images above which the run stops

    def __post_init__(self) -> None:
        require(self.batch_size >= 2, "batch_size", "at least 2 images", self.batch_size)
        require(len(self.views) >= 2, "views", "at least two views", len(self.views))
        sizes = [view.size for view in self.views]
        fits = max(sizes[2:], default=0) <= max(sizes[:2])
        require(fits, "views", "two global views and local crops that are no larger (sizes in pixels)", sizes)
        require(self.max_enlarge > 0, "max_enlarge", "above 0", self.max_enlarge)
        require(self.workers >= 1, "workers", "at least 1 thread", self.workers)
        require(self.prefetch >= 1, "prefetch", "at least 1 batch", self.prefetch)
        require(self.prefetch_mb >= 1, "prefetch_mb", "at least 1 MiB", self.prefetch_mb)
        require(self.cache_gb > 0, "cache_gb", "above 0", self.cache_gb)
        require(self.window >= 1, "window", "at least 1 shard", self.window)
        require(0 <= self.max_corrupt <= 1, "max_corrupt", "a share in [0, 1]", self.max_corrupt)
        require(self.subset is None or self.subset > 0, "subset", "above 0 images", self.subset)


@plain_dataclass(frozen=True)
class Batch:
    """What a loader hands to the training step; global views first, then local crops."""

    views: tuple[Tensor, ...]  # each (B, 3, H_v, W_v), channels-last, on the device, normalized, in the training dtype
    index: Tensor  # (B,) int64, the sample's number in the source
    label: Tensor  # (B,) int64, -1 where unknown


class Loader(Protocol):
    """One epoch of batches; position is exact in the middle of an epoch, prefetched batches not counted."""

    faults: dict[int, str]  # unreadable images met so far: index in the source -> name and reason

    def set_epoch(self, epoch: int) -> None: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...

    def diagnosis(self) -> str | None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def close(self) -> None: ...
