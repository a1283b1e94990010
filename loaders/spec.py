"""The contract of every loading engine: settings of views and loader, and the batch that it yields."""

import os
from collections.abc import Iterator
from dataclasses import dataclass as plain_dataclass
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from pydantic import BeforeValidator
from pydantic.dataclasses import dataclass

from fastrdm.kernels.augment.layout import OPERATIONS
from fastrdm.schema import STRICT, Pair, Triple, require

if TYPE_CHECKING:
    from torch import Tensor


def _workers(value: object) -> object:
    whole = (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, str) and value.isdecimal())
    require(value == "auto" or whole, "workers", "auto or a whole number of threads", value)
    return value


Workers = Annotated[int | Literal["auto"], BeforeValidator(_workers)]
Engine = Literal["auto", "resident", "native", "dali", "ffcv", "torchcodec", "synthetic"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ViewSpec:
    """The augmentation of one view; torchvision v2 (on float images) defines every operation.

    Order: random resized crop, color jitter (its four operations in a drawn order), grayscale, blur, solarize, flip,
    normalize. Defaults are those of solo-learn's CIFAR script for SimSiam (bash_files/pretrain/cifar), and the crop's
    `scale` that of SimSiam's ImageNet code (main_simsiam.py, lines 209 to 249).
    """

    size: int = 32
    """Height and width of the view, in pixels."""

    progressive: tuple[tuple[int, int], ...] = ()
    """Pairs of an epoch and a size in pixels: before that epoch views have that smaller size. `[[30, 16], [60, 24]]`
    trains at 16 px for 30 epochs, at 24 px until epoch 60, then at `size`.
    """

    scale: Pair = (0.2, 1.0)
    """Least and largest share of the image's area that the random crop covers. SimSiam on ImageNet uses 0.2 to 1,
    solo-learn's CIFAR scripts 0.08 to 1.
    """

    ratio: Pair = (3 / 4, 4 / 3)
    """Least and largest width over height of the random crop, drawn on a logarithmic scale."""

    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """How the crop is resized; both filters are antialiased."""

    flip: float = 0.5
    """Probability of a horizontal flip."""

    jitter: float = 0.8
    """Probability that brightness, contrast, saturation and hue are changed, in a drawn order."""

    brightness: float = 0.4
    """Strength b of the brightness change: the image is multiplied by a factor drawn from 1 - b, at least 0, to 1 + b.
    """

    contrast: float = 0.4
    """Strength c of the contrast change: the image is blended with its mean gray level, by a factor drawn from 1 - c,
    at least 0, to 1 + c.
    """

    saturation: float = 0.4
    """Strength s of the saturation change: the image is blended with its grayscale version, by a factor drawn from 1 -
    s, at least 0, to 1 + s.
    """

    hue: float = 0.1
    """Largest rotation of the hue, in turns of the color circle, at most 0.5; the rotation is drawn from both
    directions.
    """

    grayscale: float = 0.2
    """Probability that the view loses its color."""

    blur: float = 0.0
    """Probability of a Gaussian blur."""

    blur_kernel: int = 23
    """Width of the blur's kernel in pixels, odd. Small views use the largest odd width that reflection at the border
    allows.
    """

    blur_sigma: Pair = (0.1, 2.0)
    """Least and largest standard deviation of the blur, in pixels; it is drawn uniformly."""

    solarize: float = 0.0
    """Probability of solarization, which inverts bright values."""

    solarize_threshold: int = 128
    """Level, on the scale 0 to 255, from which on solarization inverts a value."""

    mean: Triple = (0.485, 0.456, 0.406)
    """Means of red, green and blue on the scale 0 to 1, which normalization subtracts. The default is ImageNet's."""

    std: Triple = (0.229, 0.224, 0.225)
    """Standard deviations of red, green and blue on the scale 0 to 1, by which normalization divides. The default is
    ImageNet's.
    """

    def __post_init__(self) -> None:
        require(self.size > 0, "size", "above 0 pixels", self.size)
        epochs = [0, *(until for until, _ in self.progressive)]
        grows = all(a < b for a, b in pairwise(epochs)) and all(0 < s <= self.size for _, s in self.progressive)
        wanted = f"pairs of an epoch, rising, and a size of at most {self.size} pixels"
        require(grows, "progressive", wanted, self.progressive)
        require(0 < self.scale[0] <= self.scale[1] <= 1, "scale", "0 < low <= high <= 1", self.scale)
        require(0 < self.ratio[0] <= self.ratio[1], "ratio", "0 < low <= high", self.ratio)
        for name in ("flip", *OPERATIONS):
            require(0 <= getattr(self, name) <= 1, name, "a probability in [0, 1]", getattr(self, name))
        for name in ("brightness", "contrast", "saturation"):
            require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        require(0 <= self.hue <= 0.5, "hue", "in [0, 0.5]", self.hue)
        odd = self.blur_kernel > 0 and self.blur_kernel % 2 == 1
        require(odd, "blur_kernel", "an odd number of pixels", self.blur_kernel)
        require(0 < self.blur_sigma[0] <= self.blur_sigma[1], "blur_sigma", "0 < low <= high", self.blur_sigma)
        require(0 <= self.solarize_threshold <= 256, "solarize_threshold", "in [0, 256]", self.solarize_threshold)
        require(min(self.std) > 0, "std", "above 0", self.std)

    def plain(self) -> "ViewSpec":
        """The view with every operation off, so that crop and flip alone are random."""
        off: dict[str, Any] = dict.fromkeys(OPERATIONS, 0.0)
        return replace(self, **off)

    def at(self, epoch: int) -> "ViewSpec":
        """The view as it is drawn in `epoch`: `size` is the one that `progressive` gives."""
        size = next((size for until, size in self.progressive if epoch < until), self.size)
        return replace(self, size=size, progressive=()) if self.progressive else self


STATISTICS: dict[str, tuple[Triple, Triple]] = {
    "digits": ((0.305, 0.305, 0.305), (0.376, 0.376, 0.376)),
    "fashion_mnist": ((0.286, 0.286, 0.286), (0.353, 0.353, 0.353)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
"""Mean and standard deviation of the training images of each set that is held in memory, on the scale 0 to 1."""

MOST_WORKERS = 16  # threads of a process; more were never faster


def cores_of_a_process() -> int:
    """Cores for each of the processes that share those which this one may use: from 1 to MOST_WORKERS."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    together = os.environ.get("LOCAL_WORLD_SIZE", "")
    return min(max(cores // (int(together) if together.isdecimal() and int(together) else 1), 1), MOST_WORKERS)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoaderConfig:
    """The data set, and the engine that turns it into batches of views."""

    source: str = "digits"
    """The data set: digits, fashion_mnist, cifar10, cifar100, folder (images in a folder of any shape), packed (made by
    `fastrdm pack`), imagenet (as image-net.org or Kaggle deliver it), tar (folders of images in tar files), webdataset,
    parquet, or your own as pkg.mod:Class.
    """

    root: str | None = None
    """Folder of the data set. The digits need none, and fashion_mnist has a default folder. tar, webdataset and parquet
    take a file or a brace pattern of files too. Packs, tar and webdataset take the URL of a store, such as
    s3://bucket/pack.
    """

    labels: str = "auto"
    """Where labels come from: `folders`, `none`, or a file (CSV with the columns file and label, Kaggle's solution, a
    devkit's ground truth). `auto` takes folders where there are two or more, and what stands beside an image in other
    sources; WebDataset takes the suffix of a member too.
    """

    cache: str | None = None
    """Folder for indexes of tar files and for shards that come from a store. null keeps an index beside its file where
    that can be written, and everything else in $XDG_CACHE_HOME/fastrdm or ~/.cache/fastrdm.
    """

    cache_gb: float = 100.0
    """Gigabytes (10^9 bytes) that shards from a store may take in the cache of one machine."""

    download: bool = False
    """Download the CIFAR archives when they are not in `root`."""

    classes: str | None = None
    """Keep only the classes of this list: a text file with one class a line, or a shipped list such as imagenet100.
    `null` keeps all.
    """

    subset: int | None = None
    """Number of training images to use, the first ones of each class, as nearly the same number of each as there are.
    `null` uses all.
    """

    engine: Engine = "auto"
    """The engine that decodes and augments the images. `auto` takes resident for sets that are held in memory and
    native for the rest.
    """

    batch_size: int = 256
    """Images of one optimizer step, over all processes. It must be a multiple of the number of processes."""

    views: tuple[ViewSpec, ...] = (ViewSpec(), ViewSpec())
    """The augmentation of each view. The first two are the global views, further ones are local crops;
    `loader.views.*.size=224` sets a field of all of them.
    """

    max_enlarge: float = 4.0
    """Largest size of a view, as a multiple of the size of the images, for sets that are held in memory. Larger views
    are refused.
    """

    augment: Literal["auto", "reference", "cpu", "triton", "dali"] = "auto"
    """Implementation of the augmentation: reference (PyTorch), cpu (compiled C++), triton, or dali, the operators of
    NVIDIA DALI, with `engine=dali` only. `auto` takes cpu on a CPU and triton on a GPU.
    """

    workers: Workers = "auto"
    """Decoding threads of each process. `auto` takes the cores that the process may use, divided among the processes of
    the machine, and 16 at most.
    """

    prefetch: int = 4
    """Batches prepared ahead of the training step."""

    prefetch_mb: int = 1024
    """Most memory for decoded images of the batches in preparation, in MiB of one process. One batch is always
    prepared.
    """

    order: Literal["full", "windowed"] = "full"
    """Order of an epoch: full is a random permutation of all images. `windowed` mixes the images of a few random shards
    at a time, for packed sets larger than memory.
    """

    window: int = 8
    """Shards that are mixed at a time where `order` is windowed."""

    max_corrupt: float = 0.001
    """Share of unreadable images above which the run stops. Up to there, a readable image takes the place of each."""

    @property
    def threads(self) -> int:
        """Number of decoding threads, whether it was set or is left to the number of cores."""
        return cores_of_a_process() if self.workers == "auto" else self.workers

    def __post_init__(self) -> None:
        require(self.batch_size >= 2, "batch_size", "at least 2 images", self.batch_size)
        require(len(self.views) >= 2, "views", "at least two views", len(self.views))
        sizes = [view.size for view in self.views]
        fits = max(sizes[2:], default=0) <= max(sizes[:2])
        require(fits, "views", "two global views and local crops that are no larger (sizes in pixels)", sizes)
        require(self.max_enlarge > 0, "max_enlarge", "above 0", self.max_enlarge)
        require(self.workers == "auto" or self.workers >= 1, "workers", "at least 1 thread", self.workers)
        require(self.prefetch >= 1, "prefetch", "at least 1 batch", self.prefetch)
        require(self.prefetch_mb >= 1, "prefetch_mb", "at least 1 MiB", self.prefetch_mb)
        require(self.cache_gb > 0, "cache_gb", "above 0", self.cache_gb)
        require(self.window >= 1, "window", "at least 1 shard", self.window)
        require(0 <= self.max_corrupt <= 1, "max_corrupt", "a share in [0, 1]", self.max_corrupt)
        require(self.subset is None or self.subset > 0, "subset", "above 0 images", self.subset)


@plain_dataclass(frozen=True)
class Batch:
    """One batch for the training step; global views first, then local crops."""

    views: (
        "tuple[Tensor, ...]"  # each (B, 3, H_v, W_v), channels-last, on the device, normalized, in the training dtype
    )
    index: "Tensor"  # (B,) int64, the sample's number in the source
    label: "Tensor"  # (B,) int64, -1 where unknown


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
