"""Decoded images to two finished views, by ours and by others, checked and then timed in turns; CSV to stdout.

    python -m benchmarks.loaders.augment --imagenet FOLDER --cifar FILE.npy > benchmarks/results/augment_cpu.csv

FOLDER holds one folder of JPEGs a class, FILE.npy (N, 32, 32, 3) uint8. Views: BYOL's two at 224 px of ragged images
(one always blurred, one solarized at times), SimSiam's for CIFAR at 32 px. On one thread; with CUDA on the device.

ms, p20, p80: median, 20th and 80th percentile, a view; with --clock cpu processor time, for a machine that others use.
times_ours: this over the first row's. mean_levels, max_levels: difference from the reference before normalization, in
levels of 255; torchvision v2 (on uint8) and Pillow get our parameters, kornia draws its own from images of one size,
so its row is the difference of the two means. floor: a copy of as many bytes as the crops and views have.
"""

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks import common
from benchmarks.common import Clock, Row
from benchmarks.loaders.pillow_view import pillow_view
from fastrdm.kernels.augment.layout import Column
from fastrdm.kernels.augment.ragged import ragged
from fastrdm.loaders.augment.parameters import sample_parameters
from fastrdm.loaders.augment.reference import augment
from fastrdm.loaders.sources.decode import decode
from fastrdm.loaders.spec import ViewSpec

BYOL = ViewSpec(size=224, scale=(0.08, 1.0), saturation=0.2, blur=1.0)
TASKS = {
    "imagenet 224 px": (BYOL, replace(BYOL, blur=0.1, solarize=0.2)),
    "cifar10 32 px": (ViewSpec(), ViewSpec()),
}
FIELDS = [
    "task",
    "provider",
    "views",
    "repeats",
    "ms",
    "p20",
    "p80",
    "times_ours",
    "mean_levels",
    "max_levels",
    "clock",
]
PACKAGES = ("torchvision", "kornia", "pillow")
FIELDS += [*common.ENVIRONMENT, *PACKAGES]
BARS = {"torchvision v2": 2.0, "Pillow": 4.0, "kornia": 20.0}  # mean levels; torchvision truncates on uint8
JITTERED = ("brightness", "contrast", "saturation")
Call = Callable[[], list[Tensor]]


@dataclass
class Work:
    """Images (H, W, 3) uint8, and the spec and the drawn parameters (B, 16) of each view."""

    images: list[Tensor]
    specs: Sequence[ViewSpec]
    drawn: list[Tensor]


def work_of(images: list[Tensor], specs: Sequence[ViewSpec]) -> Work:
    """The images with parameters of epoch 0."""
    height, width = torch.tensor([image.shape[:2] for image in images]).unbind(1)
    index = torch.arange(len(images))
    return Work(images, specs, [sample_parameters(s, 0, 0, index, view, height, width) for view, s in enumerate(specs)])


def by_ours(work: Work, name: str, device: torch.device) -> Call:
    """Images and parameters lie on the device before the clock runs."""
    images = ragged(work.images).to(device)
    moved = [drawn.to(device) for drawn in work.drawn]
    return lambda: [
        augment(images, drawn, spec, implementation=name) for drawn, spec in zip(moved, work.specs, strict=True)
    ]


def torchvision_view(image: Tensor, row: list[float], spec: ViewSpec) -> Tensor:
    """A view (3, S, S) of (3, H, W) uint8; uint8 up to the normalization, which is torchvision's fast way."""
    from torchvision.transforms.v2 import functional as tv

    top, left, height, width = (int(value) for value in row[:4])
    mode = tv.InterpolationMode(spec.interpolation)
    x = tv.resized_crop(image, top, left, height, width, [spec.size] * 2, interpolation=mode, antialias=True)
    jitter = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    for turn in row[Column.ORDER : Column.ORDER + 4]:
        factor = row[Column.BRIGHTNESS + int(turn)]
        if factor != (turn != 3):
            x = jitter[int(turn)](x, factor)
    x = tv.rgb_to_grayscale(x, 3) if row[Column.GRAYSCALE] else x
    x = tv.gaussian_blur(x, [spec.blur_kernel] * 2, [row[Column.BLUR]] * 2) if row[Column.BLUR] else x
    x = tv.solarize(x, spec.solarize_threshold) if row[Column.SOLARIZE] else x
    x = tv.horizontal_flip(x) if row[Column.FLIP] else x
    view: Tensor = tv.normalize(tv.to_dtype(x, torch.float32, scale=True), spec.mean, spec.std)
    return view


def by_loop(work: Work, name: str) -> Call:
    """One image at a time by Pillow or by torchvision, decoded before the clock runs."""
    images: list[Any]
    if name == "Pillow":
        images = [Image.fromarray(image.numpy()) for image in work.images]
    else:
        images = [image.permute(2, 0, 1).contiguous() for image in work.images]
    view: Callable[[Any, list[float], ViewSpec], Tensor] = pillow_view if name == "Pillow" else torchvision_view
    rows = [drawn.tolist() for drawn in work.drawn]

    def run() -> list[Tensor]:
        views = zip(rows, work.specs, strict=True)
        return [torch.stack([view(*pair, spec) for pair in zip(images, drawn, strict=True)]) for drawn, spec in views]

    return run


def by_kornia(work: Work, device: torch.device) -> Call:
    """Kornia's modules on one float batch: all images are resized to one size before the clock runs."""
    import kornia.augmentation as kornia
    from torchvision.transforms.v2 import functional as tv

    height, width = (sorted(image.shape[side] for image in work.images)[len(work.images) // 2] for side in (0, 1))
    sized = [tv.resize(image.permute(2, 0, 1), [height, width], antialias=True) for image in work.images]
    x = torch.stack(sized).to(device).float().div_(255)
    chains = []
    for s in work.specs:
        crop = kornia.RandomResizedCrop((s.size, s.size), s.scale, s.ratio, resample=s.interpolation.upper())
        parts = [crop, kornia.RandomHorizontalFlip(s.flip)]
        parts.append(kornia.ColorJitter(*(getattr(s, name) for name in JITTERED), s.hue, p=s.jitter))
        parts.append(kornia.RandomGrayscale(p=s.grayscale))
        if s.blur > 0:
            parts.append(kornia.RandomGaussianBlur((s.blur_kernel,) * 2, s.blur_sigma, p=s.blur))
        if s.solarize > 0:
            parts.append(kornia.RandomSolarize((s.solarize_threshold / 255,) * 2, (0.0, 0.0), p=s.solarize))
        chains.append(torch.nn.Sequential(*parts, kornia.Normalize(torch.tensor(s.mean), torch.tensor(s.std))))
    return lambda: [chain(x) for chain in chains]


def by_copy(work: Work, device: torch.device) -> Call:
    """Half of the bytes of crops and views, read and written: the least that any route moves."""
    crops = 3 * sum(int((drawn[:, Column.HEIGHT] * drawn[:, Column.WIDTH]).sum()) for drawn in work.drawn)
    views = sum(4 * 3 * spec.size**2 * len(work.images) for spec in work.specs)
    source = torch.ones((crops + views) // 2, dtype=torch.uint8, device=device)
    return lambda: [source.clone()]


def providers(work: Work, device: torch.device) -> dict[str, Call]:
    """Our implementations, then what other packages do; a package that is missing is named on stderr and left out."""
    made = {
        f"ours {name}": by_ours(work, name, device)
        for name in ("triton" if device.type == "cuda" else "cpu", "reference")
    }
    others: dict[str, tuple[str, Callable[[], Call]]] = {}
    if device.type == "cpu":
        others["torchvision v2"] = "torchvision", partial(by_loop, work, "torchvision v2")
        others["Pillow"] = "torchvision", partial(by_loop, work, "Pillow")
    others["kornia"] = "kornia", partial(by_kornia, work, device)
    for name, (package, make) in others.items():
        error = common.import_error(package)
        if error:
            print(f"{name}: skipped, {error}", file=sys.stderr)
        else:
            made[name] = make()
    return {**made, "floor": by_copy(work, device)}


def difference(name: str, work: Work, got: list[Tensor], wanted: list[Tensor]) -> tuple[float, float]:
    """Mean and largest difference in levels; stops where a route makes other views than the reference."""
    errors = []
    for spec, a, b in zip(work.specs, got, wanted, strict=True):
        std = 255 * torch.tensor(spec.std, device=a.device)[:, None, None]
        a, b = a * std, b.to(a.device) * std
        errors.append((a.mean() - b.mean()).abs() if name == "kornia" else (a - b).abs())
    mean, largest = (max(float(f(error)) for error in errors) for f in (torch.mean, torch.max))
    assert mean <= BARS.get(name, 0.1), f"{name} makes other views: {mean} levels in the mean"
    assert not name.startswith("ours") or largest <= 2, f"{name} is {largest} levels off"
    return mean, largest


def rows_of(task: str, work: Work, repeats: int, clock: Clock, device: torch.device) -> Iterator[Row]:
    """A row for each provider, after all of them were checked and timed."""
    calls, views = providers(work, device), len(work.images) * len(work.specs)
    wanted = by_ours(work, "reference", torch.device("cpu"))()
    errors = {name: difference(name, work, call(), wanted) for name, call in calls.items() if name != "floor"}
    times = common.in_turns(calls, repeats, clock, device.type == "cuda")
    ours = statistics.median(next(iter(times.values())))
    for name, taken in times.items():
        mean, largest = errors.get(name, (0.0, 0.0))
        yield {
            "task": task,
            "provider": name,
            "views": views,
            "repeats": repeats,
            **common.times([ms / views for ms in taken], 4),
            "times_ours": f"{statistics.median(taken) / ours:.2f}",
            "mean_levels": f"{mean:.2g}",
            "max_levels": f"{largest:.2g}",
        }


def package_versions() -> Iterator[tuple[str, str]]:
    """The columns PACKAGES; empty for a package that is not installed."""
    for name in PACKAGES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            yield name, ""


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--imagenet", type=Path, required=True, help="folder of folders of JPEGs")
    parser.add_argument("--cifar", type=Path, required=True, help=".npy of (N, 32, 32, 3) uint8")
    parser.add_argument("--images", type=int, default=32, help="files, and eight times as many of CIFAR")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--clock", choices=common.CLOCKS, default="wall")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device, clock = common.available_device(), common.CLOCKS[args.clock]
    files = sorted(args.imagenet.glob("*/*.JPEG"))
    files = files[:: max(1, len(files) // args.images)][: args.images]
    photographs = [torch.from_numpy(decode(file.read_bytes(), file.name)) for file in files]
    small = list(torch.from_numpy(np.load(args.cifar, mmap_mode="r")[: 8 * args.images].copy()))
    where = {"clock": args.clock, **common.environment(device), **dict(package_versions())}
    tasks = [
        (task, work_of(images, specs))
        for (task, specs), images in zip(TASKS.items(), (photographs, small), strict=True)
    ]
    rows = (row for task, work in tasks for row in rows_of(task, work, args.repeats, clock, device))
    common.print_rows(FIELDS, ({**row, **where} for row in rows))


if __name__ == "__main__":
    main()
