"""The compiled and the Triton augmentation against the reference; without a GPU Triton runs in its interpreter."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrdm.kernels.augment import augment_cpu
from fastrdm.kernels.augment.layout import COLUMNS, Column
from fastrdm.kernels.augment.ragged import Ragged, Strided, ragged, strided
from fastrdm.loaders.augment import reference
from fastrdm.loaders.augment.parameters import sample_parameters
from fastrdm.loaders.spec import ViewSpec

CUDA = torch.cuda.is_available()
SIZES = [(1, 1), (1, 9), (7, 1), (9, 14), (40, 31), (23, 75)]  # height, width
PLAIN = ViewSpec(
    size=19, jitter=1.0, grayscale=1.0, blur=1.0, blur_kernel=9, solarize=1.0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
)
EXACT, EIGHT_BITS = 0.01 / 255, 2 / 255  # bars for values in [0, 1]

Augment = Callable[[Sequence[Tensor], Tensor, ViewSpec], Tensor]


def by_triton(images: Sequence[Tensor], parameters: Tensor, spec: ViewSpec) -> Tensor:
    kernel = pytest.importorskip("fastrdm.kernels.augment.augment_triton")
    device = "cuda" if CUDA else "cpu"
    views: Tensor = kernel.augment_triton(ragged(images).to(device), parameters.to(device), spec).cpu()
    return views


@pytest.fixture(params=["cpu", "triton"])
def kernel(request: pytest.FixtureRequest) -> tuple[Augment, float]:
    """An implementation and what it may differ from the reference."""
    return {"cpu": (augment_cpu.augment_cpu, EXACT), "triton": (by_triton, EIGHT_BITS)}[request.param]


def pictures(sizes: Sequence[tuple[int, int]] = SIZES, seed: int = 0) -> list[Tensor]:
    """One (H, W, 3) uint8 a size: noise, a ramp, black above white, gray noise, in turn."""
    generator, images = torch.Generator().manual_seed(seed), []
    for number, (height, width) in enumerate(sizes):
        image = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
        if number % 4 == 1:
            ramp = torch.linspace(0, 255, height)[:, None] * torch.linspace(0, 1, width)
            image = (ramp[..., None] * torch.tensor([1.0, 0.5, 0.2])).byte()
        elif number % 4 == 2:
            image = torch.zeros_like(image)
            image[: height // 2] = 255
        elif number % 4 == 3:
            image = image[..., :1].expand(-1, -1, 3)
        images.append(image.contiguous())
    return images


def whole(images: Sequence[Tensor], **columns: Any) -> Tensor:
    """Parameters of whole images that change nothing but the columns named."""
    parameters = torch.zeros(len(images), COLUMNS)
    parameters[:, Column.HEIGHT : Column.FLIP] = torch.tensor([image.shape[:2] for image in images])
    parameters[:, Column.BRIGHTNESS : Column.HUE] = 1
    parameters[:, Column.ORDER : Column.ORDER + 4] = torch.arange(4.0)
    for name, values in columns.items():
        parameters[:, Column[name.upper()]] = torch.as_tensor(values)
    return parameters


def wanted(images: Sequence[Tensor], parameters: Tensor, spec: ViewSpec) -> Tensor:
    return reference.augment(images, parameters, spec, implementation="reference")


def worst(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape and a.isfinite().all()
    return (a - b).abs().max().item()


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [1, 8, 33])
def test_crop_of_odd_sizes(kernel: tuple[Augment, float], mode: Any, size: int) -> None:
    augment, bar = kernel
    spec = replace(PLAIN, size=size, interpolation=mode, blur=0.0, solarize=0.0)
    images = pictures()
    parameters = whole(images, flip=torch.arange(6) % 2)
    parameters[3:, :4] = torch.tensor([(8, 13, 1, 1), (3, 2, 30, 29), (0, 70, 23, 5)])
    assert worst(augment(images, parameters, spec), wanted(images, parameters, spec)) < bar


def test_crop_of_the_whole_image_copies_it(kernel: tuple[Augment, float]) -> None:
    images = pictures([(19, 19)] * 4)
    got = kernel[0](images, whole(images), PLAIN)
    assert torch.equal((255 * got).round().byte().permute(0, 2, 3, 1), torch.stack(images))
    assert worst(255 * got, (255 * got).round()) < 1e-4


OPERATIONS = {
    "brightness": {"brightness": [0.0, 0.4, 0.9, 1.0, 1.3, 2.0]},
    "contrast": {"contrast": [0.0, 0.4, 0.9, 1.0, 1.3, 2.0]},
    "saturation": {"saturation": [0.0, 0.4, 0.9, 1.0, 1.3, 2.0]},
    "hue": {"hue": [-0.5, -0.3, -0.1, 0.05, 0.2, 0.5]},
    "grayscale": {"grayscale": [0, 1, 0, 1, 1, 1]},
    "blur": {"blur": [0.0, 0.1, 0.3, 1.0, 2.0, 8.0]},
    "solarize": {"solarize": [0, 1, 0, 1, 1, 1]},
    "flip": {"flip": [0, 1, 0, 1, 1, 1]},
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_operation_alone(kernel: tuple[Augment, float], operation: str) -> None:
    augment, bar = kernel
    images = pictures([(19, 19)] * 6)
    parameters = whole(images, **OPERATIONS[operation])
    expected = wanted(images, parameters, PLAIN)
    assert worst(augment(images, parameters, PLAIN), expected) < bar
    assert worst(expected, wanted(images, whole(images), PLAIN)) > 0.1, "the operation does something"


@pytest.mark.parametrize("spec", [ViewSpec(), ViewSpec(size=37, interpolation="bilinear", scale=(0.05, 1.0))])
def test_all_operations_together(kernel: tuple[Augment, float], spec: ViewSpec) -> None:
    augment, bar = kernel
    spec = replace(spec, jitter=0.9, hue=0.3, grayscale=0.3, blur=0.5, solarize=0.3)
    images = pictures(SIZES * (4 if bar == EXACT else 1))  # the interpreter is slow
    height, width = torch.tensor([image.shape[:2] for image in images]).unbind(1)
    parameters = sample_parameters(spec, 0, 0, torch.arange(len(images)), 0, height, width)
    got, expected, std = augment(images, parameters, spec), wanted(images, parameters, spec), torch.tensor(spec.std)
    error = ((got - expected) * std[:, None, None]).abs()
    assert error.max() < EIGHT_BITS and error.quantile(0.999) < bar


@pytest.mark.parametrize("turns", [[3, 2, 1, 0], [1, 0, 3, 2], [0, 3, 1, 2]])
def test_order_of_the_jitter(kernel: tuple[Augment, float], turns: list[int]) -> None:
    augment, bar = kernel
    images, spec = pictures(), replace(PLAIN, blur=0.0)
    parameters = whole(images, brightness=1.3, contrast=0.6, saturation=1.4, hue=0.2)
    other = wanted(images, parameters, spec)
    parameters[:, Column.ORDER : Column.ORDER + 4] = torch.tensor(turns).float()
    expected = wanted(images, parameters, spec)
    assert worst(augment(images, parameters, spec), expected) < bar < worst(expected, other)


def test_views_do_not_depend_on_their_neighbours(kernel: tuple[Augment, float]) -> None:
    augment, _ = kernel
    images = pictures(SIZES[2:5])
    parameters = whole(images, contrast=0.5, hue=0.1, blur=1.0)
    together = augment(images, parameters, PLAIN)
    assert torch.equal(together, augment(images, parameters, PLAIN)), "two runs are bitwise equal"
    for number, image in enumerate(images):
        assert torch.equal(augment([image], parameters[[number]], PLAIN)[0], together[number])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(augment(images, parameters, PLAIN), together)
    finally:
        torch.set_num_threads(threads)


def test_every_kind_of_input() -> None:
    images = pictures([(11, 13)] * 3)
    parameters = whole(images, contrast=0.5)
    views = reference.augment(images, parameters, PLAIN)
    assert views.is_contiguous(memory_format=torch.channels_last)
    for same in (torch.stack(images), ragged(images), ragged(torch.stack(images)), strided(images)):
        assert torch.equal(reference.augment(same, parameters, PLAIN), views)
        for name in ("cpu", "reference"):
            assert worst(reference.augment(same, parameters, PLAIN, implementation=name), views) < 1e-5
    half = reference.augment(images, parameters, PLAIN, torch.bfloat16)
    assert torch.equal(half, views.bfloat16()) and half.is_contiguous(memory_format=torch.channels_last)


def test_crops_alone() -> None:
    images = pictures()
    parameters = whole(images, flip=torch.arange(6) % 2, brightness=2.0)
    out = {name: torch.empty(6, 3, 19, 19, dtype=torch.uint8) for name in ("cpu", "reference")}
    for name, crops in out.items():
        reference.crop(images, parameters, PLAIN, crops, name)
    difference = (out["cpu"].int() - out["reference"].int()).abs()
    assert difference.max() <= 1 and difference.float().mean() < 1e-3  # 0.5 is rounded either way


@pytest.mark.parametrize(
    ("column", "value"), [("LEFT", 1), ("TOP", -1), ("HEIGHT", 0), ("ORDER", 4), ("WIDTH", float("nan"))]
)
def test_no_pixel_outside_the_image_is_read(column: str, value: float) -> None:
    images = pictures([(5, 6)] * 2)
    parameters = whole(images)
    parameters[1, Column[column]] = value
    with pytest.raises(ValueError, match=r"image 1 of \(height, width\) \(5, 6\) has no such crop"):
        augment_cpu.augment_cpu(images, parameters, PLAIN)


def test_refused_where_it_cannot_run() -> None:
    for name, device in (("cpu", "cuda"), ("triton", "cpu")):
        with pytest.raises(ValueError, match=f"loader.augment={name} does not run on {device}"):
            reference.chosen(name, torch.device(device))


@pytest.mark.parametrize("there", [True, False])
def test_auto_on_cuda_is_triton_where_it_is_installed(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "HAS_TRITON", there)
    best = reference._best_on_cuda.__wrapped__
    monkeypatch.setattr(reference, "_best_on_cuda", best)
    if there:
        assert reference.chosen("auto", torch.device("cuda")) == "triton"
    else:
        with pytest.warns(UserWarning, match="Triton, which is not installed"):
            assert reference.chosen("auto", torch.device("cuda")) == "reference"


def test_ragged_names_its_images() -> None:
    images = pictures()
    packed = ragged(images)
    assert isinstance(packed, Ragged) and all(torch.equal(packed.image(i), image) for i, image in enumerate(images))


def planes(image: Tensor) -> Tensor:
    """The image (H, W, 3) as nvJPEG leaves it, each channel by itself, with bytes between rows and planes."""
    height, width, _ = image.shape
    memory = torch.full((3, height + 1, width + 3), 255, dtype=torch.uint8)
    memory[:, :height, :width] = image.permute(2, 0, 1)
    return memory[:, :height, :width].permute(1, 2, 0)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_images_where_they_lie_give_the_views_of_one_buffer_bit_for_bit(mode: Any) -> None:
    kernel = pytest.importorskip("fastrdm.kernels.augment.augment_triton")
    images = pictures()
    spec = replace(PLAIN, size=33, interpolation=mode)
    parameters = whole(images, flip=torch.arange(6) % 2, contrast=0.6, hue=0.1, blur=1.0)
    parameters[3:, :4] = torch.tensor([(8, 13, 1, 1), (3, 2, 30, 29), (0, 70, 23, 5)])
    wanted = by_triton(images, parameters, spec)
    device = "cuda" if CUDA else "cpu"
    placed = [image.to(device) for image in images]
    kinds = {
        "pixels": placed,
        "planes": [planes(image).to(device) for image in images],
        "a part of a larger image": [torch.nn.functional.pad(x, (0, 0, 2, 5))[:, 2:-5] for x in placed],
    }
    kinds["mixed"] = [kinds[name][k] for k, name in enumerate([*kinds] * 2)]
    for name, found in kinds.items():
        assert all(torch.equal(x.cpu(), image) for x, image in zip(found, images, strict=True)), name
        apart = strided(found)
        assert isinstance(apart, Strided) and apart.place.shape == (6, 4)
        assert torch.equal(kernel.augment_triton(apart, parameters.to(device), spec).cpu(), wanted), name


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_compiled_too_images_lie_where_they_are(mode: Any) -> None:
    test_images_where_they_lie_give_the_views_of_one_buffer_bit_for_bit(mode)


def test_a_batch_is_two_launches_however_many_images_it_has() -> None:
    kernel = pytest.importorskip("fastrdm.kernels.augment.augment_triton")
    launches = pytest.importorskip("benchmarks.kernels.launches").launches
    for sizes in (SIZES[:2], SIZES):
        images = [planes(image) for image in pictures(sizes)]
        parameters = whole(images)
        found = launches(partial(reference._addressed, images))
        assert not [name for name in found if name in ("cat", "copy_", "clone")], found
        apart = strided(images)
        assert launches(partial(kernel.augment_triton, apart, parameters, PLAIN)) == ["_crop_kernel", "_finish_kernel"]


class OnCuda:
    """An image on a GPU that is not there."""

    device = torch.device("cuda", 1)

    def __init__(self) -> None:
        self.held: list[str] = []

    def data_ptr(self) -> int:
        return 4096

    def stride(self) -> tuple[int, ...]:
        return 640, 1, 307200

    def record_stream(self, stream: str) -> None:
        self.held.append(stream)


def test_memory_of_images_is_held_for_the_stream_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda x: (asked.append("pinned"), x)[1])
    monkeypatch.setattr(Tensor, "to", lambda x, *place, **how: (asked.append((*place, how)), x)[1])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    images: Any = [OnCuda(), OnCuda()]
    apart = strided(images)
    assert [image.held for image in images] == [["the stream of cuda:1"]] * 2
    assert asked == ["pinned", (OnCuda.device, {"non_blocking": True})], "one copy for all images"
    assert apart.images == images and apart.place.tolist() == [[4096, 640, 1, 307200]] * 2
