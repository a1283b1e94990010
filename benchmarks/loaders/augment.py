"""Decoded images to two finished views, by ours and by others, checked and then timed in turns; CSV to stdout.

    python -m benchmarks.loaders.augment --imagenet FOLDER --cifar FILE.npy > benchmarks/results/augment_cpu.csv

FOLDER holds one folder of JPEGs a class, FILE.npy (N, 32, 32, 3) uint8. Views: BYOL's two at 224 px of ragged images
(one always blurred, one solarized at times), SimSiam's for CIFAR at 32 px. On one thread; with CUDA on the device.

ms, p20, p80: median, 20th and 80th percentile, a view; with --clock cpu processor time, for a machine that others use.
times_ours: this over the first row's. mean_levels, max_levels: difference from the reference before normalization, in
levels of 255; torchvision v2 (on uint8) and Pillow get our parameters, kornia draws its own from images of one size,
so its row is the difference of the two means. floor: a copy of as many bytes as the crops and views have.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import kornia.augmentation as kornia
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from benchmarks.kernels.spectral import clock, environment
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
LOOPS = ("torchvision v2", "Pillow")  # one image at a time, with our parameters
BARS = {"torchvision v2": 2.0, "Pillow": 4.0, "kornia": 20.0}  # mean levels; torchvision truncates on uint8
LEAST = ("brightness", "contrast", "saturation")


@dataclass
class Work:
    """Images (H, W, 3) uint8, and of each view its spec and parameters (B, 16)."""

    images: list[Tensor]
    specs: Sequence[ViewSpec]
    drawn: list[Tensor]


def work_of(images: list[Tensor], specs: Sequence[ViewSpec]) -> Work:
    height, width = torch.tensor([image.shape[:2] for image in images]).unbind(1)
    index = torch.arange(len(images))
    return Work(images, specs, [sample_parameters(s, 0, 0, index, view, height, width) for view, s in enumerate(specs)])


def by_ours(work: Work, name: str, device: torch.device) -> Callable[[], list[Tensor]]:
    """Images and parameters lie on the device before the clock runs."""
    images = ragged(work.images).to(device)
    moved = [drawn.to(device) for drawn in work.drawn]
    return lambda: [
        augment(images, drawn, spec, implementation=name) for drawn, spec in zip(moved, work.specs, strict=True)
    ]


def torchvision_view(image: Tensor, row: list[float], spec: ViewSpec) -> Tensor:
    """(3, S, S) of (3, H, W) uint8; uint8 up to the normalization, which is torchvision's fast way."""
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
    return tv.normalize(tv.to_dtype(x, torch.float32, scale=True), spec.mean, spec.std)


def by_loop(work: Work, name: str) -> Callable[[], list[Tensor]]:
    if name == "Pillow":
        images, view = [Image.fromarray(image.numpy()) for image in work.images], pillow_view
    else:
        images, view = [image.permute(2, 0, 1).contiguous() for image in work.images], torchvision_view
    rows = [drawn.tolist() for drawn in work.drawn]

    def run() -> list[Tensor]:
        views = zip(rows, work.specs, strict=True)
        return [torch.stack([view(*pair, spec) for pair in zip(images, drawn, strict=True)]) for drawn, spec in views]

    return run


def by_kornia(work: Work, device: torch.device) -> Callable[[], list[Tensor]]:
    """Kornia's modules on one float batch: all images cut and filled to one size before the clock runs."""
    height, width = (sorted(image.shape[side] for image in work.images)[len(work.images) // 2] for side in (0, 1))
    sized = [tv.resize(image.permute(2, 0, 1), [height, width], antialias=True) for image in work.images]
    x = torch.stack(sized).to(device).float().div_(255)
    chains = []
    for s in work.specs:
        crop = kornia.RandomResizedCrop((s.size, s.size), s.scale, s.ratio, resample=s.interpolation.upper())
        parts = [crop, kornia.RandomHorizontalFlip(s.flip)]
        parts.append(kornia.ColorJitter(*(getattr(s, name) for name in LEAST), s.hue, p=s.jitter))
        parts.append(kornia.RandomGrayscale(p=s.grayscale))
        if s.blur > 0:
            parts.append(kornia.RandomGaussianBlur((s.blur_kernel,) * 2, s.blur_sigma, p=s.blur))
        if s.solarize > 0:
            parts.append(kornia.RandomSolarize((s.solarize_threshold / 255,) * 2, (0.0, 0.0), p=s.solarize))
        chains.append(torch.nn.Sequential(*parts, kornia.Normalize(torch.tensor(s.mean), torch.tensor(s.std))))
    return lambda: [chain(x) for chain in chains]


def by_copy(work: Work, device: torch.device) -> Callable[[], list[Tensor]]:
    """Half of the bytes of crops and views, read and written: the least that any route moves."""
    crops = 3 * sum(int((drawn[:, Column.HEIGHT] * drawn[:, Column.WIDTH]).sum()) for drawn in work.drawn)
    views = sum(4 * 3 * spec.size**2 * len(work.images) for spec in work.specs)
    source = torch.ones((crops + views) // 2, dtype=torch.uint8, device=device)
    return lambda: [source.clone()]


def providers(work: Work, device: torch.device) -> dict[str, Callable[[], list[Tensor]]]:
    first, others = ("triton", ("reference",)) if device.type == "cuda" else ("cpu", ("reference",))
    out = {f"ours {name}": by_ours(work, name, device) for name in (first, *others)}
    out |= {name: by_loop(work, name) for name in LOOPS if device.type == "cpu"}
    return out | {"kornia": by_kornia(work, device), "floor": by_copy(work, device)}


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


def rows_of(task: str, work: Work, repeats: int, now: Callable[[], float], device: torch.device) -> Iterator[str]:
    calls, views = providers(work, device), len(work.images) * len(work.specs)
    wanted = by_ours(work, "reference", torch.device("cpu"))()
    errors = {name: difference(name, work, call(), wanted) for name, call in calls.items() if name != "floor"}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(clock(call, device.type == "cuda", now) / views)  # type: ignore[arg-type]
    ours = statistics.median(next(iter(times.values())))
    for name, taken in times.items():
        p20, ms, p80 = (torch.tensor(taken).quantile(q).item() for q in (0.2, 0.5, 0.8))
        mean, largest = errors.get(name, (0.0, 0.0))
        yield f"{task},{name},{views},{repeats},{ms:.4f},{p20:.4f},{p80:.4f},{ms / ours:.2f},{mean:.2g},{largest:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--imagenet", type=Path, required=True, help="folder of folders of JPEGs")
    parser.add_argument("--cifar", type=Path, required=True, help=".npy of (N, 32, 32, 3) uint8")
    parser.add_argument("--images", type=int, default=32, help="files, and eight times as many of CIFAR")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    now = time.process_time if args.clock == "cpu" else time.perf_counter
    files = sorted(args.imagenet.glob("*/*.JPEG"))
    files = files[:: max(1, len(files) // args.images)][: args.images]
    photographs = [torch.from_numpy(decode(file.read_bytes(), file.name)) for file in files]
    small = list(torch.from_numpy(np.load(args.cifar, mmap_mode="r")[: 8 * args.images].copy()))
    names = "provider,views,repeats,ms,p20,p80,times_ours,mean_levels,max_levels"
    print(f"task,{names},clock,device,threads,torch,commit,torchvision,kornia,pillow")
    others = ",".join(version(name) for name in ("torchvision", "kornia", "pillow"))
    for (task, specs), images in zip(TASKS.items(), (photographs, small), strict=True):
        for row in rows_of(task, work_of(images, specs), args.repeats, now, device):
            print(f"{row},{args.clock},{environment(device)},{others}", flush=True)


if __name__ == "__main__":
    main()
