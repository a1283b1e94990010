"""Every operation of the reference augmentation, pixel by pixel, against torchvision v2 with the same parameters."""

import itertools
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrdm.kernels.augment.layout import COLUMNS, Column
from fastrdm.loaders.augment import reference
from fastrdm.loaders.augment.parameters import sample_parameters
from fastrdm.loaders.spec import ViewSpec

pytestmark = pytest.mark.traced

tv = pytest.importorskip("torchvision.transforms.v2.functional")
LEVEL = 1 / 255  # one step of an 8-bit image


def pictures(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """(N, H, W, 3) uint8 with smooth parts, flat parts, pure black, white and gray ones."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (count, height, width, 3), generator=generator, dtype=torch.uint8)
    ramp = torch.linspace(0, 255, height)[:, None, None] * torch.linspace(0, 1, width)[None, :, None]
    noise[1::4] = (ramp * torch.tensor([1.0, 0.5, 0.2])).byte()
    noise[2::4, : height // 2] = 0
    noise[2::4, height // 2 :, : width // 2] = 255
    noise[3::4] = noise[3::4, :, :, :1]
    return noise


def unit(images: Tensor) -> Tensor:
    return images.permute(0, 3, 1, 2).float().div(255)


def identity(count: int, height: int, width: int) -> Tensor:
    """Parameters that leave everything as it is."""
    parameters = torch.zeros(count, COLUMNS)
    parameters[:, Column.HEIGHT], parameters[:, Column.WIDTH] = height, width
    parameters[:, Column.BRIGHTNESS : Column.HUE] = 1
    parameters[:, Column.ORDER : Column.ORDER + 4] = torch.arange(4.0)
    return parameters


def expected_crop(image: Tensor, row: Tensor, spec: ViewSpec) -> Tensor:
    """Torchvision's crop and flip of one (3, H, W) image."""
    top, left, height, width = row[:4].int().tolist()
    mode = tv.InterpolationMode(spec.interpolation)
    x = tv.resized_crop(image, top, left, height, width, [spec.size] * 2, interpolation=mode, antialias=True)
    flipped: Tensor = tv.horizontal_flip(x) if row[Column.FLIP] else x
    return flipped.clamp(0, 1)


def expected_jitter(x: Tensor, row: Tensor) -> Tensor:
    """Torchvision's four operations in the row's order."""
    operations = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    for turn in row[Column.ORDER : Column.ORDER + 4].int().tolist():
        x = operations[turn](x, row[Column.BRIGHTNESS + turn].item())
    return x


def expected(image: Tensor, row: Tensor, spec: ViewSpec) -> Tensor:
    """The whole chain for one (3, H, W) image."""
    x = expected_jitter(expected_crop(image, row, spec), row)
    if row[Column.GRAYSCALE]:
        x = tv.rgb_to_grayscale(x, 3)
    if row[Column.BLUR]:
        reach = min(spec.blur_kernel // 2, spec.size - 1)
        x = tv.gaussian_blur(x, [2 * reach + 1] * 2, [row[Column.BLUR].item()] * 2)
    if row[Column.SOLARIZE]:
        x = tv.solarize(x, spec.solarize_threshold / 255)
    normalized: Tensor = tv.normalize(x, spec.mean, spec.std)
    return normalized


def worst(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


BOXES = [(0, 0, 9, 14), (2, 3, 5, 7), (8, 13, 1, 1), (0, 0, 1, 14), (3, 0, 6, 1), (1, 2, 8, 9)]


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [1, 4, 9, 23])
def test_crop_resize(mode: Any, size: int) -> None:
    spec = ViewSpec(size=size, interpolation=mode)
    images = pictures(2 * len(BOXES), 9, 14)
    parameters = identity(len(images), 9, 14)
    parameters[:, :4] = torch.tensor(BOXES * 2)
    parameters[len(BOXES) :, Column.FLIP] = 1
    got = reference.crop_resize(images, parameters, spec)
    wanted = torch.stack([expected_crop(*pair, spec) for pair in zip(unit(images), parameters, strict=True)])
    assert worst(got, wanted) < 1e-5
    ragged = [reference.crop_resize_one(*pair, spec) for pair in zip(images, parameters, strict=True)]
    assert worst(torch.stack(ragged), wanted) < 1e-5


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_crop_resize_of_a_photograph(mode: Any) -> None:
    spec = ViewSpec(size=64, interpolation=mode)
    images = pictures(4, 375, 500)
    parameters = identity(4, 375, 500)
    parameters[1:, :4] = torch.tensor([(10, 20, 311, 403), (100, 7, 77, 93), (1, 300, 374, 200)])
    parameters[2, Column.FLIP] = 1
    wanted = torch.stack([expected_crop(*pair, spec) for pair in zip(unit(images), parameters, strict=True)])
    assert worst(reference.crop_resize(images, parameters, spec), wanted) < 3e-5
    ragged = [reference.crop_resize_one(*pair, spec) for pair in zip(images, parameters, strict=True)]
    assert worst(torch.stack(ragged), wanted) < 1e-5


def test_crop_of_the_whole_image_copies_it() -> None:
    images = pictures(5, 16, 16)
    x = reference.crop_resize(images, identity(5, 16, 16), ViewSpec(size=16))
    assert torch.equal(x, unit(images))


@pytest.mark.parametrize("shape", [(16, 16), (7, 7), (1, 1)])
def test_single_operations(shape: tuple[int, int]) -> None:
    x = unit(pictures(12, *shape))
    factor = torch.linspace(0, 2, 12)
    for operation, function in enumerate((tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)):
        wanted = torch.stack([function(image, f.item()) for image, f in zip(x, factor, strict=True)])
        assert worst(reference.blend(x, torch.full((12,), operation), factor), wanted) < 1e-6, function.__name__
    turns = torch.linspace(-0.5, 0.5, 12)
    wanted = torch.stack([tv.adjust_hue(image, t.item()) for image, t in zip(x, turns, strict=True)])
    assert worst(reference.adjust_hue(x, turns), wanted) < 5e-6
    drawn = torch.arange(12) % 2
    gray = torch.stack([tv.rgb_to_grayscale(i, 3) if d else i for i, d in zip(x, drawn, strict=True)])
    assert worst(reference.grayscale(x, drawn), gray) < 1e-6
    inverted = torch.stack([tv.solarize(i, 128 / 255) if d else i for i, d in zip(x, drawn, strict=True)])
    assert worst(reference.solarize(x, drawn, 128 / 255), inverted) == 0
    wanted = tv.normalize(x, [0.4, 0.5, 0.6], [0.2, 0.3, 0.4])
    assert worst(reference.normalize(x, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)), wanted) < 1e-6


def test_hue_of_every_sector_edge() -> None:
    """Colors on the borders of the six sectors, where the formula changes branch."""
    levels = torch.tensor(list(itertools.product([0.0, 0.25, 0.5, 1.0], repeat=3)))
    x = levels.T.reshape(1, 3, 8, 8).expand(25, -1, -1, -1)
    turns = torch.linspace(-0.5, 0.5, 25)
    wanted = torch.stack([tv.adjust_hue(image, t.item()) for image, t in zip(x, turns, strict=True)])
    assert worst(reference.adjust_hue(x, turns), wanted) < 5e-6


def test_solarize_inverts_the_threshold_itself() -> None:
    x = (torch.arange(256.0) / 255).reshape(1, 1, 16, 16).expand(1, 3, -1, -1)
    changed = (reference.solarize(x, torch.ones(1), 128 / 255) != x)[0, 0].flatten()
    assert changed.nonzero().flatten().tolist() == list(range(128, 256))


@pytest.mark.parametrize(("size", "kernel"), [(32, 23), (32, 3), (9, 23), (2, 5), (1, 23)])
def test_blur(size: int, kernel: int) -> None:
    x = unit(pictures(8, size, size))
    sigma = torch.tensor([0.0, 0.1, 0.3, 0.5, 1.0, 1.5, 2.0, 0.0])
    used = 2 * min(kernel // 2, size - 1) + 1
    wanted = [tv.gaussian_blur(i, [used] * 2, [s.item()] * 2) if s else i for i, s in zip(x, sigma, strict=True)]
    got = reference.blur(x, sigma, kernel)
    assert worst(got, torch.stack(wanted)) < 1e-5
    assert torch.equal(got[[0, -1]], x[[0, -1]])


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_jitter_in_every_order(order: tuple[int, ...]) -> None:
    x = unit(pictures(6, 11, 11, seed=sum(v * 4**k for k, v in enumerate(order))))
    parameters = identity(6, 11, 11)
    parameters[:, Column.ORDER : Column.ORDER + 4] = torch.tensor(order)
    parameters[:, Column.BRIGHTNESS : Column.HUE] = 0.6 + 0.8 * torch.rand(6, 3)
    parameters[:, Column.HUE] = torch.linspace(-0.1, 0.1, 6)
    wanted = torch.stack([expected_jitter(*pair) for pair in zip(x, parameters, strict=True)])
    assert worst(reference.jitter(x, parameters), wanted) < 2e-5


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("size", "shape"), [(32, (32, 32)), (17, (40, 23)), (24, (8, 8)), (8, (1, 1))])
@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_the_whole_chain(interpolation: Any, size: int, shape: tuple[int, int], implementation: str) -> None:
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # so that the error is in units of the image
    spec = ViewSpec(size=size, interpolation=interpolation, blur=0.5, solarize=0.3, mean=mean, std=std)
    images = pictures(64, *shape)
    sides = (torch.full((64,), side) for side in shape)
    parameters = sample_parameters(spec, 7, 3, torch.arange(64), 1, *sides)
    wanted = torch.stack([expected(*pair, spec) for pair in zip(unit(images), parameters, strict=True)])
    rare = replace(spec, jitter=0.01, grayscale=0.01, blur=0.01, solarize=0.01)  # drawn is drawn, however rarely
    error = (
        (reference.augment(images, parameters, rare, implementation=implementation) - wanted).abs().amax(dim=(1, 2, 3))
    )
    assert error.max() <= 2 * LEVEL
    assert error.median() < 1e-5


def test_output_is_normalized_channels_last_and_of_the_dtype() -> None:
    spec = ViewSpec(size=8, jitter=0, grayscale=0)
    images = pictures(3, 8, 8)
    full = reference.augment(images, identity(3, 8, 8), spec)
    assert full.is_contiguous(memory_format=torch.channels_last) and full.dtype == torch.float32
    assert worst(full, tv.normalize(unit(images), spec.mean, spec.std)) < 1e-6
    half = reference.augment(images, identity(3, 8, 8), spec, torch.bfloat16)
    assert half.dtype == torch.bfloat16 and torch.equal(half, full.bfloat16())


@pytest.mark.parametrize("operation", range(3))
def test_blending_a_large_image_rounds_alike_on_any_number_of_threads(operation: int) -> None:
    x = torch.rand(20, 3, 200, 200, generator=torch.Generator().manual_seed(0))
    operations, factor = torch.full((20,), operation), torch.linspace(0.5, 1.5, 20)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        together = reference.blend(x, operations, factor)
        torch.set_num_threads(2)
        alone = [reference.blend(x[k : k + 1], operations[:1], factor[k : k + 1]) for k in range(20)]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.cat(alone), together)


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
@pytest.mark.parametrize("side", [8, 17, 32])
def test_a_view_does_not_depend_on_the_rest_of_the_batch(side: int, implementation: str) -> None:
    """Bit for bit: in any batch, at any place, alone, on one thread or two."""
    spec = ViewSpec(size=side, blur=0.5, solarize=0.2)
    images = pictures(70, side, side)
    height = torch.full((70,), side)
    parameters = sample_parameters(spec, 0, 0, torch.arange(70), 0, height, height)
    augment = partial(reference.augment, implementation=implementation)
    together = augment(images, parameters, spec)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for part in (torch.arange(1), torch.arange(69, 2, -1), torch.tensor([5, 50, 7]), torch.arange(3, 36)):
                assert torch.equal(augment(images[part], parameters[part], spec), together[part])
    finally:
        torch.set_num_threads(threads)


def test_augment_compiles_to_one_graph() -> None:
    """No data-dependent shape and no host read: what a CUDA graph needs."""
    spec = ViewSpec(size=8, blur=0.5, solarize=0.2)
    index, side = torch.arange(4), torch.full((4,), 8)

    def views(images: Tensor, epoch: Tensor) -> Tensor:
        parameters = sample_parameters(spec, 0, epoch, index, 0, side, side)
        return reference.augment(images, parameters, spec, implementation="reference")

    images = pictures(4, 8, 8)
    graph = torch.compile(views, backend="eager", fullgraph=True)
    for epoch in (0, 5):
        found, expected = (make(images, torch.tensor(epoch)) for make in (graph, views))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # torch 2.11 rounds the traced sums otherwise
