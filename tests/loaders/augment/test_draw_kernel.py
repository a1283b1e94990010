"""The kernel that draws parameters: bit for bit the reference's, in one launch."""

from typing import Any

import pytest
import torch

from fastrdm.kernels.augment.layout import COLUMNS
from fastrdm.kernels.triton_support import HAS_TRITON, triton_module
from fastrdm.loaders.augment import parameters
from fastrdm.loaders.augment.parameters import sample_by_torch
from fastrdm.loaders.spec import ViewSpec

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VIEWS = [
    ViewSpec(blur=0.5, solarize=0.2, grayscale=0.3, jitter=0.8),
    ViewSpec(scale=(0.08, 1.0), jitter=0.0, flip=0.0),
    # No try fits, so the middle is taken.
    ViewSpec(scale=(0.9, 1.0), ratio=(3.0, 4.0)),
    ViewSpec(scale=(0.9, 1.0), ratio=(0.2, 0.3), brightness=1.5, hue=0.5),
]


def drawn(spec: ViewSpec, seed: int, epoch: int, index: torch.Tensor, view: int, *sides: torch.Tensor) -> torch.Tensor:
    kernel = triton_module("augment.parameters_triton")
    settings = torch.tensor(kernel.settings_of(spec), dtype=torch.float64, device=DEVICE)
    found: torch.Tensor = kernel.draw_triton(settings, seed, torch.tensor(epoch, device=DEVICE), index, view, *sides)
    return found


@pytest.mark.parametrize("number", range(len(VIEWS)))
def test_the_kernel_draws_what_the_reference_draws(number: int) -> None:
    index = torch.tensor([0, 1, 2**33 + 5, *range(1000, 1009)], device=DEVICE)
    height, width = (torch.randint(1, 600, (len(index),), device=DEVICE) for _ in range(2))
    for seed, epoch, view in ((0, 0, 0), (2**40 + 7, 93, 9)):
        wanted = sample_by_torch(VIEWS[number], seed, epoch, index, view, height, width)
        assert torch.equal(drawn(VIEWS[number], seed, epoch, index, view, height, width), wanted)


def test_an_image_takes_its_own_numbers_whatever_lies_beside_it() -> None:
    index = torch.tensor([7, 3, 9], device=DEVICE)
    sides = torch.tensor([40, 50, 60], device=DEVICE), torch.tensor([60, 40, 50], device=DEVICE)
    whole = drawn(VIEWS[0], 1, 2, index, 0, *sides)
    assert torch.equal(drawn(VIEWS[0], 1, 2, index[1:2], 0, *(side[1:2] for side in sides)), whole[1:2])


def test_a_view_on_a_gpu_is_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU run calls: one kernel for a batch's view, and the view's settings are moved there once."""
    launches: list[tuple[int, ...]] = []

    class Kernel:
        settings_of = staticmethod(lambda spec: [0.0] * 21)

        @staticmethod
        def draw_triton(settings: Any, seed: int, epoch: Any, index: Any, *rest: Any) -> torch.Tensor:
            launches.append((len(index), settings.data_ptr()))
            return torch.empty(len(index), COLUMNS)

    class OnGpu(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(parameters, "_kernel", lambda: Kernel)
    monkeypatch.setattr(parameters, "HAS_TRITON", True)
    parameters._settings.cache_clear()
    index = torch.arange(8).as_subclass(OnGpu)
    for view in range(2):
        parameters.sample_parameters(VIEWS[0], 0, 0, index, view, torch.ones(8), torch.ones(8))
    parameters._settings.cache_clear()
    assert [count for count, _ in launches] == [8, 8] and len({place for _, place in launches}) == 1
