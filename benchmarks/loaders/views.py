"""Contestants of benchmarks.loaders.throughput that make finished batches of two views: engines, floors, others."""

import io
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.loaders.augment import BARS, TASKS, torchvision_view
from benchmarks.loaders.contestants import (
    Batches,
    Contestant,
    Epoch,
    Setup,
    by_opencv,
    by_torchvision,
    in_threads,
    paths_of,
)
from benchmarks.loaders.pillow_view import pillow_view
from fastrdm.kernels.augment.layout import Column
from fastrdm.loaders.augment.parameters import sample_parameters
from fastrdm.loaders.build import build_loader
from fastrdm.loaders.order import epoch_order
from fastrdm.loaders.sources.open import open_source
from fastrdm.loaders.spec import LoaderConfig, ViewSpec

EPOCH = 1  # whose order and parameters everybody gets
PLAIN = "DataLoader torchvision v2"
Engine = Literal["native", "resident", "dali", "ffcv", "synthetic"]
LARGE, SMALL = TASKS["imagenet 224 px"], TASKS["cifar10 32 px"]
# levels: DALI's crops differ at their border, ffcv decodes in another way; kornia neither filters what it shrinks
# nor gives each image its own order of the jitter
ENGINE_BARS = {"dali": 0.2, "ffcv": 2.5}
KORNIA_BAR = 12.0
ALBUMENTATIONS = "OpenCV + albumentations"  # draws its own parameters
BATCH = 100
IMAGES = 200  # at the end of an epoch's order; more would take minutes a round where views take 30 ms each
SUBSET = 5000  # images of CIFAR-10, of which all are taken


def ours(engine: Engine, source: str, mode: str, views: tuple[ViewSpec, ...], setup: Setup) -> Epoch:
    """One of our engines; `mode` of the packed folder, empty: the folder itself."""
    config = LoaderConfig(
        source=source,
        root=str(setup.packs / mode if mode else setup.folder),
        batch_size=BATCH,
        workers=setup.workers,
        views=views,
        engine=engine,
        subset=SUBSET if source == "cifar10" else None,
    )
    images = open_source(config, "train")
    loader = build_loader(config, images, seed=0, device=setup.device)

    def epoch() -> Batches:
        loader.load_state_dict({"epoch": EPOCH, "position": start(len(images))})
        for batch in loader:
            yield batch.views, batch.index

    return epoch


def start(samples: int) -> int:
    """Position in the order from which an epoch is timed, so that IMAGES are left, or the whole of a SUBSET."""
    return 0 if samples == SUBSET else max(0, samples - IMAGES)


class Images(Dataset[Any]):
    """Images of a folder or a set in memory with our parameters: finished views by `library`, or decoded for kornia."""

    def __init__(self, setup: Setup, views: Sequence[ViewSpec], library: str) -> None:
        self.library, self.views = library, views
        self.paths = [] if views is SMALL else paths_of(setup.folder)
        self.pixels = cifar(setup.folder).images if views is SMALL else None
        if self.pixels is not None:
            sizes = torch.tensor(self.pixels.shape[1:3]).expand(len(self.pixels), 2)
        else:
            sizes = torch.tensor([Image.open(path).size[::-1] for path in self.paths])
        height, width = sizes.unbind(1)
        index = torch.arange(len(sizes))
        self.drawn = [sample_parameters(s, 0, EPOCH, index, v, height, width) for v, s in enumerate(views)]
        self.chains = [albumentations_chain(s) for s in views] if library == ALBUMENTATIONS else []

    def __len__(self) -> int:
        return len(self.drawn[0])

    def __getitem__(self, number: int) -> Any:
        if self.library == "kornia":
            return self._decoded(number), number
        if self.library == ALBUMENTATIONS:
            pixels = self.pixels[number] if self.pixels is not None else by_opencv()(self.paths[number].read_bytes())
            return *(chain(image=pixels)["image"] for chain in self.chains), number
        view: Callable[[Any, list[float], ViewSpec], Tensor]
        view = pillow_view if self.library == "Pillow" else torchvision_view
        image: Any = self._pillow(number) if self.library == "Pillow" else self._planes(number)
        made = (view(image, d[number].tolist(), s) for d, s in zip(self.drawn, self.views, strict=True))
        return *made, number

    def _pillow(self, number: int) -> Any:
        if self.pixels is not None:
            return Image.fromarray(self.pixels[number])
        return Image.open(io.BytesIO(self.paths[number].read_bytes())).convert("RGB")

    def _planes(self, number: int) -> Tensor:
        if self.pixels is not None:
            return torch.from_numpy(self.pixels[number]).permute(2, 0, 1).contiguous()
        planes: Tensor = by_torchvision()(self.paths[number].read_bytes())
        return planes

    def _decoded(self, number: int) -> Any:
        if self.pixels is not None:
            return torch.from_numpy(self.pixels[number])
        return torch.from_numpy(simplejpeg.decode_jpeg(self.paths[number].read_bytes(), "RGB"))


def albumentations_chain(spec: ViewSpec) -> Callable[..., Any]:
    """A view as albumentations' users write it, on 8-bit images by OpenCV in one thread, with parameters of its own."""
    # It would look for a newer version of itself on the network.
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    import albumentations
    import cv2

    cv2.setNumThreads(0)
    modes = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}
    chain: Callable[..., Any] = albumentations.Compose(
        [
            albumentations.RandomResizedCrop(
                (spec.size, spec.size), spec.scale, spec.ratio, interpolation=modes[spec.interpolation]
            ),
            albumentations.ColorJitter(
                *((1 - x, 1 + x) for x in (spec.brightness, spec.contrast, spec.saturation)),
                hue=(-spec.hue, spec.hue),
                p=spec.jitter,
            ),
            albumentations.ToGray(p=spec.grayscale),
            albumentations.GaussianBlur((spec.blur_kernel, spec.blur_kernel), spec.blur_sigma, p=spec.blur),
            albumentations.Solarize((spec.solarize_threshold / 255,) * 2, p=spec.solarize),
            albumentations.HorizontalFlip(p=spec.flip),
            albumentations.Normalize(spec.mean, spec.std),
            albumentations.ToTensorV2(),
        ]
    )
    return chain


def cifar(root: Path) -> Any:
    """The training images."""
    return open_source(LoaderConfig(source="cifar10", root=str(root), subset=SUBSET), "train")


def joined(items: list[Any]) -> Any:
    """Images of different sizes back to back, their (height, width), their numbers: one shared memory a batch."""
    images, numbers = zip(*items, strict=True)
    sizes = torch.tensor([image.shape[:2] for image in images])
    return torch.cat([image.flatten() for image in images]), sizes, torch.tensor(numbers)


def data_loader(images: Images, setup: Setup) -> Any:
    """PyTorch's own, in our order; its processes live as long as it."""
    order = epoch_order(len(images), 0, EPOCH)[start(len(images)) :]
    return DataLoader(
        images,
        BATCH,
        sampler=order.tolist(),
        drop_last=True,
        num_workers=setup.workers,
        persistent_workers=True,
        pin_memory=setup.device.type == "cuda",
        collate_fn=joined if images.library == "kornia" else None,
    )


def by_loader(library: str, views: Sequence[ViewSpec], setup: Setup) -> Epoch:
    """Everything in the processes of a DataLoader, finished batches to the device."""
    loader = data_loader(Images(setup, views, library), setup)

    def epoch() -> Batches:
        for *made, index in loader:
            yield [view.to(setup.device, non_blocking=True) for view in made], index

    return epoch


def by_kornia(views: Sequence[ViewSpec], setup: Setup) -> Epoch:
    """Decoded in the processes of a DataLoader, views by kornia's modules with our parameters, on the device.

    Images of many sizes are cropped one by one, which is also what kornia does inside. Kornia has one order of the
    jitter for a whole batch: it draws its own.
    """
    import kornia.augmentation as kornia

    def chain(spec: ViewSpec) -> dict[str, Any]:
        size, mode = (spec.size, spec.size), spec.interpolation.upper()
        crop = kornia.RandomResizedCrop(size, resample=mode, align_corners=False, cropping_mode="slice")
        jitter = kornia.ColorJitter(spec.brightness, spec.contrast, spec.saturation, spec.hue, p=spec.jitter)
        blur = kornia.RandomGaussianBlur((spec.blur_kernel,) * 2, spec.blur_sigma, p=spec.blur)
        flip, gray = kornia.RandomHorizontalFlip(), kornia.RandomGrayscale(p=spec.grayscale)
        normal = kornia.Normalize(torch.tensor(spec.mean), torch.tensor(spec.std))
        names = ("crop", "jitter", "grayscale", "blur", "solarize", "flip", "normal")
        parts = (crop, jitter, gray, blur, kornia.RandomSolarize(p=spec.solarize), flip, normal)
        used = {"blur": spec.blur > 0, "solarize": spec.solarize > 0}
        return {name: part for name, part in zip(names, parts, strict=True) if used.get(name, True)}

    def view(images: list[Tensor], drawn: Tensor, spec: ViewSpec, parts: dict[str, Any]) -> Tensor:
        crops = [parts["crop"](image, params=box(row, spec)) for image, row in zip(images, drawn, strict=True)]
        x = torch.cat(crops)
        given = colors(drawn.to(x.device), spec)
        for name, part in list(parts.items())[1:]:
            x = part(x, params=given[name]) if name in given else part(x)
        return x

    dataset = Images(setup, views, "kornia")
    loader, chains = data_loader(dataset, setup), [chain(spec) for spec in views]

    def epoch() -> Batches:
        for joint, sizes, index in loader:
            pixels = joint.to(setup.device).split((3 * sizes.prod(dim=1)).tolist())
            images = [
                p.view(*size, 3).permute(2, 0, 1)[None].float().div_(255)
                for p, size in zip(pixels, sizes.tolist(), strict=True)
            ]
            trio = zip(dataset.drawn, views, chains, strict=True)
            yield [view(images, drawn[index], spec, parts) for drawn, spec, parts in trio], index

    return epoch


def box(row: Tensor, spec: ViewSpec) -> dict[str, Tensor]:
    """Kornia's parameters of a crop (1, 4, 2), corners included."""
    top, left, tall, wide = row[:4].tolist()
    right, bottom, end = left + wide - 1, top + tall - 1, spec.size - 1
    corners = ((left, top), (right, top), (right, bottom), (left, bottom))
    return {
        "src": torch.tensor([corners]),
        "dst": torch.tensor([[[0.0, 0.0], [end, 0.0], [end, end], [0.0, end]]]),
        "batch_prob": torch.ones(1),
    }


def colors(drawn: Tensor, spec: ViewSpec) -> dict[str, dict[str, Tensor]]:
    """Kornia's parameters of what follows the crop."""
    column = drawn.unbind(1)
    ones = torch.ones(len(drawn), device=drawn.device)
    jitter = {f"{name.name.lower()}_factor": column[name] for name in (Column.BRIGHTNESS, Column.CONTRAST)}
    jitter |= {f"{name.name.lower()}_factor": column[name] for name in (Column.SATURATION, Column.HUE)}
    threshold = ones * spec.solarize_threshold / 255
    return {
        "jitter": {**jitter, "order": torch.randperm(4), "batch_prob": ones},
        "grayscale": {"batch_prob": column[Column.GRAYSCALE]},
        "blur": {"sigma": column[Column.BLUR].clamp(min=0.1), "batch_prob": (column[Column.BLUR] > 0).float()},
        "solarize": {"thresholds": threshold, "additions": 0 * ones, "batch_prob": column[Column.SOLARIZE]},
        "flip": {"batch_prob": column[Column.FLIP]},
    }


def floor(views: Sequence[ViewSpec], copied: bool, setup: Setup) -> Epoch:
    """Each file decoded once and dropped; `copied`: and as many bytes moved as its crops are read and views written."""
    dataset = Images(setup, views, "kornia")
    crops = sum(3 * d[:, Column.HEIGHT] * d[:, Column.WIDTH] for d in dataset.drawn).long().tolist()  # type: ignore[union-attr]
    made = sum(4 * 3 * spec.size**2 for spec in views)
    source = np.ones((max(crops) + made) // 2, np.uint8)
    order = epoch_order(len(dataset), 0, EPOCH)[start(len(dataset)) :].tolist()

    def work(number: int) -> None:
        k = order[number]
        dataset._decoded(k)
        if copied:
            source[: (crops[k] + made) // 2].copy()

    return in_threads(work, len(order), setup.workers)


def others(views: tuple[ViewSpec, ...]) -> dict[str, Contestant]:
    """Other libraries."""
    table = {
        f"DataLoader {library}": Contestant(
            partial(by_loader, library, views), PLAIN, BARS[library], needs=("torchvision",)
        )
        for library in ("torchvision v2", "Pillow")
    }
    table[f"DataLoader {ALBUMENTATIONS}"] = Contestant(
        partial(by_loader, ALBUMENTATIONS, views), PLAIN, BARS["kornia"], own=True, needs=("cv2", "albumentations")
    )
    table["DataLoader kornia"] = Contestant(partial(by_kornia, views), PLAIN, KORNIA_BAR, needs=("kornia",))
    return table


def by_dali(setup: Setup) -> Epoch:
    """A pipeline of DALI's own operators."""
    from benchmarks.loaders import dali_contestant

    return dali_contestant.by_dali(LARGE, BATCH, IMAGES, setup)


def contestant(engine: Engine, source: str, mode: str, views: tuple[ViewSpec, ...]) -> Contestant:
    """One of our engines, with the package that it needs."""
    bar = None if engine == "synthetic" else ENGINE_BARS.get(engine, 0.2)
    needs = {"dali": ("nvidia.dali",), "ffcv": ("ffcv",)}.get(engine, ())
    return Contestant(partial(ours, engine, source, mode, views), PLAIN, bar, needs=needs)


def views_table() -> dict[str, Contestant]:
    """Files to two views of 224 px."""
    table = others(LARGE)
    table["native files"] = contestant("native", "folder", "", LARGE)
    table["native packed jpeg"] = contestant("native", "packed", "jpeg", LARGE)
    table["DALI files"] = contestant("dali", "folder", "", LARGE)
    table["DALI, its own operators"] = Contestant(by_dali, PLAIN, BARS["kornia"], own=True, needs=("nvidia.dali",))
    table["ffcv beton"] = contestant("ffcv", "packed", "beton", LARGE)
    table["synthetic"] = contestant("synthetic", "folder", "", LARGE)
    table["floor: decoding"] = Contestant(partial(floor, LARGE, False), PLAIN)
    table["floor: decoding and a copy"] = Contestant(partial(floor, LARGE, True), PLAIN)
    return table


def memory_table() -> dict[str, Contestant]:
    """CIFAR-10 in memory to two views of 32 px."""
    table = others(SMALL)
    engines: dict[str, Engine] = {"resident": "resident", "native": "native", "DALI": "dali", "synthetic": "synthetic"}
    for name, engine in engines.items():
        table[name] = contestant(engine, "cifar10", "", SMALL)
    table["floor: a copy"] = Contestant(partial(floor, SMALL, True), PLAIN)
    return table
