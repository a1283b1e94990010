"""Drawn parameters: torchvision's rule for the crop, the right distributions, nothing but the sample and its place."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrdm.kernels.augment.layout import TRIES, Column
from fastrdm.loaders.augment.parameters import sample_parameters
from fastrdm.loaders.augment.philox import uniforms
from fastrdm.loaders.spec import ViewSpec


def draw(
    spec: ViewSpec, count: int, height: int, width: int, *, seed: int = 0, epoch: int = 0, view: int = 0
) -> Tensor:
    sides = (torch.full((count,), side) for side in (height, width))
    return sample_parameters(spec, seed, epoch, torch.arange(count), view, *sides)


def box_by_python(u: list[float], spec: ViewSpec, height: int, width: int) -> tuple[int, int, int, int]:
    """RandomResizedCrop as torchvision documents it, one image, Python's arithmetic, from the same uniforms."""
    low, high = (math.log(r) for r in spec.ratio)
    for k in range(TRIES):
        area = height * width * (spec.scale[0] + u[k] * (spec.scale[1] - spec.scale[0]))
        ratio = math.exp(low + u[TRIES + k] * (high - low))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return math.floor(u[-2] * (height - h + 1)), math.floor(u[-1] * (width - w + 1)), h, w
    h, w = height, width
    if width / height < spec.ratio[0]:
        h = round(w / spec.ratio[0])
    elif width / height > spec.ratio[1]:
        w = round(h * spec.ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("shape", [(32, 32), (375, 500), (500, 31), (3, 201), (1, 1), (1, 9), (2, 3)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.9, 1.0), (0.05, 0.14)])
def test_crop_boxes_follow_the_rule(shape: tuple[int, int], scale: tuple[float, float]) -> None:
    spec = ViewSpec(scale=scale)
    got = draw(spec, 300, *shape)[:, :4].int().tolist()
    u = uniforms(0, 0, torch.arange(300), 0, 2 * TRIES + 2).tolist()
    assert [tuple(row) for row in got] == [box_by_python(row, spec, *shape) for row in u]


def test_ratio_that_no_pixel_satisfies_still_gives_a_box() -> None:
    boxes = draw(ViewSpec(ratio=(3.0, 4.0)), 50, 100, 1)
    assert (boxes[:, Column.HEIGHT] == 1).all() and (boxes[:, Column.WIDTH] == 1).all()


def test_crops_have_torchvisions_statistics() -> None:
    transforms = pytest.importorskip("torchvision.transforms.v2")
    torch.manual_seed(0)
    crop, count = transforms.RandomResizedCrop(32, scale=(0.2, 1.0)), 4000
    image = torch.empty(3, 40, 60)
    theirs = torch.tensor([list(crop.make_params([image]).values()) for _ in range(count)]).double()
    ours = draw(ViewSpec(scale=(0.2, 1.0)), count, 40, 60)[:, :4].double()
    for a, b in zip(ours.T, theirs.T, strict=True):  # two samples: the empirical distributions within the 1e-4 bound
        values = torch.cat([a, b]).unique()
        distance = torch.stack([(a <= v).double().mean() - (b <= v).double().mean() for v in values]).abs().max()
        assert distance < 2.23 * math.sqrt(2 / count)


def test_probabilities() -> None:
    spec = ViewSpec(flip=0.5, jitter=0.8, grayscale=0.2, blur=0.3, solarize=0.1)
    parameters = draw(spec, 20000, 32, 32)
    jittered = (parameters[:, Column.BRIGHTNESS : Column.HUE] != 1).any(dim=1)
    drawn = {Column.FLIP: 0.5, Column.GRAYSCALE: 0.2, Column.BLUR: 0.3, Column.SOLARIZE: 0.1}
    for column, probability in drawn.items():
        assert (parameters[:, column] != 0).double().mean().item() == pytest.approx(probability, abs=0.015), column.name
    assert jittered.double().mean().item() == pytest.approx(0.8, abs=0.015)
    sigma = parameters[parameters[:, Column.BLUR] != 0, Column.BLUR]
    assert sigma.mean().item() == pytest.approx(1.05, abs=0.03)  # its own draw, not what is left of blur's
    left = parameters[~jittered]
    assert (left[:, Column.BRIGHTNESS : Column.HUE] == 1).all() and (left[:, Column.HUE] == 0).all()


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_never_and_always(probability: float) -> None:
    settings: dict[str, Any] = dict.fromkeys(("flip", "jitter", "grayscale", "blur", "solarize"), probability)
    parameters = draw(ViewSpec(**settings), 2000, 32, 32)
    columns = [Column.FLIP, Column.HUE, Column.GRAYSCALE, Column.BLUR, Column.SOLARIZE]
    assert ((parameters[:, columns] != 0) == bool(probability)).all()


def test_factors_are_uniform_in_their_ranges() -> None:
    spec = ViewSpec(jitter=1, brightness=0.4, contrast=1.5, saturation=0.0, hue=0.1, blur=1, blur_sigma=(0.1, 2.0))
    parameters = draw(spec, 20000, 32, 32).double()
    ranges = {Column.BRIGHTNESS: (0.6, 1.4), Column.CONTRAST: (0, 2.5), Column.HUE: (-0.1, 0.1), Column.BLUR: (0.1, 2)}
    for column, (low, high) in ranges.items():
        u = ((parameters[:, column] - low) / (high - low)).sort().values
        assert u[0] >= -1e-6 and u[-1] <= 1 + 1e-6
        assert (u - torch.linspace(0, 1, 20000)).abs().max() < 2.23 / math.sqrt(20000), column.name
    assert (parameters[:, Column.SATURATION] == 1).all()


def test_every_order_is_as_frequent() -> None:
    turns = draw(ViewSpec(), 24000, 32, 32)[:, Column.ORDER : Column.ORDER + 4].int().tolist()
    counts = {order: 0 for order in itertools.permutations(range(4))}
    for row in turns:
        counts[tuple(row)] += 1
    assert sum((n - 1000) ** 2 / 1000 for n in counts.values()) < 57  # chi-square, 23 degrees of freedom, p = 1e-4


def test_parameters_belong_to_the_sample() -> None:
    spec = ViewSpec(blur=0.5, solarize=0.5)
    index = torch.tensor([7, 2, 900, 41, 2**31])
    height, width = torch.tensor([32, 20, 375, 1, 64]), torch.tensor([32, 31, 500, 1, 8])
    together = sample_parameters(spec, 5, 6, index, 1, height, width)
    assert together.dtype == torch.float32
    for k in range(5):
        part = slice(k, k + 1)
        assert torch.equal(sample_parameters(spec, 5, 6, index[part], 1, height[part], width[part]), together[part])
    assert torch.equal(sample_parameters(spec, 5, 6, index.flip(0), 1, height.flip(0), width.flip(0)), together.flip(0))
    assert torch.equal(sample_parameters(spec, 5, torch.tensor(6), index, 1, height, width), together)


def test_seed_epoch_and_view_change_every_sample() -> None:
    spec = ViewSpec()
    base = draw(spec, 200, 32, 32)
    for other in ({"seed": 1}, {"epoch": 1}, {"view": 1}):
        assert (draw(spec, 200, 32, 32, **other) != base).any(dim=1).all(), other
