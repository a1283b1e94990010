"""The draw by Triton against the reference; without a GPU it runs in Triton's interpreter (conftest.py)."""

import pytest
import torch

pytest.importorskip("triton")

from fastrdm.kernels.augment.layout import COLUMNS
from fastrdm.kernels.augment.parameters_triton import draw_triton
from fastrdm.loaders.augment.parameters import _settings, sample_parameters, settings_table
from fastrdm.loaders.spec import ViewSpec

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SPECS = (
    ViewSpec(),
    ViewSpec(scale=(0.08, 1.0), blur=0.5, solarize=0.2, hue=0.5, brightness=1.4, jitter=0.9),
    ViewSpec(scale=(0.9, 1.0), ratio=(3.0, 4.0), grayscale=0.0, flip=0.0),
    ViewSpec(size=96, scale=(0.05, 0.14), blur=1.0, blur_sigma=(0.3, 1.1), saturation=0.0),
)


@pytest.mark.parametrize("seed", [0, -1, 2**40 + 12345])
def test_the_draw_is_the_references_bit_for_bit(seed: int) -> None:
    index = torch.cat((torch.arange(130), torch.tensor([2**31, 2**32 - 1, 2**32 + 5]))).to(DEVICE)
    generator = torch.Generator().manual_seed(1)
    height, width = (torch.randint(1, 500, (len(index),), generator=generator).to(DEVICE) for _ in range(2))
    height[:3], width[:3] = 1, torch.tensor([1, 9, 400], device=DEVICE)
    table = settings_table(tuple(tuple(_settings(spec)) for spec in SPECS), DEVICE)
    epoch = 0 if seed == 0 else torch.tensor(123, device=DEVICE)
    got = draw_triton(table, seed, epoch, index, height.int(), width)
    assert got.shape == (len(SPECS), len(index), COLUMNS)
    for view, spec in enumerate(SPECS):
        want = sample_parameters(spec, seed, epoch, index, view, height, width)
        assert torch.equal(got[view], want), f"view {view}: {(got[view] != want).nonzero()[:5].tolist()}"


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a CUDA device")
def test_compiled_too_the_draw_is_the_references() -> None:
    test_the_draw_is_the_references_bit_for_bit(-1)


def test_all_views_are_drawn_in_one_launch() -> None:
    launches = pytest.importorskip("benchmarks.kernels.launches").launches
    index, sides = torch.arange(5, device=DEVICE), torch.full((5,), 32, device=DEVICE)
    table = settings_table(tuple(tuple(_settings(spec)) for spec in SPECS), DEVICE)
    epoch = torch.zeros((), dtype=torch.int64, device=DEVICE)
    drawn = launches(lambda: draw_triton(table, 3, epoch, index, sides, sides))
    assert drawn == ["_draw_kernel"]
    replaced = launches(lambda: sample_parameters(SPECS[0], 3, epoch, index, 0, sides, sides))
    assert len(replaced) > 200, "for each view"
