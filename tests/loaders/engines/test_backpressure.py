"""How far engines run ahead of the device, and that what they copy comes from pinned memory."""

import ast
import inspect
from types import ModuleType

import numpy as np
import pytest
import torch

from fastrdm.kernels.augment.ragged import ragged
from fastrdm.loaders.engines import dali, ffcv, native, torchcodec
from fastrdm.loaders.engines.backpressure import STEPS_AHEAD, Backpressure, moved
from fastrdm.loaders.engines.ffcv import gathered
from fastrdm.loaders.engines.ring import Slot

CPU = torch.device("cpu")


class Recorded:
    """A device that notes which steps were waited for."""

    def __init__(self) -> None:
        self.queued, self.waited = 0, list[int]()

    def record(self) -> "Recorded.Mark":
        self.queued += 1
        return Recorded.Mark(self, self.queued)

    class Mark:
        def __init__(self, device: "Recorded", number: int) -> None:
            self.device, self.number = device, number

        def synchronize(self) -> None:
            self.device.waited.append(self.number)


def test_no_more_than_two_steps_are_queued_behind_the_one_that_runs() -> None:
    device = Recorded()
    limit = Backpressure(CPU, device.record)
    for step in range(1, 8):
        limit.step()
        assert device.queued - len(device.waited) <= STEPS_AHEAD, step
    assert device.waited == [1, 2, 3, 4, 5], "each step is waited for once, in order, and none before it is due"


def test_nothing_is_recorded_on_a_cpu() -> None:
    limit = Backpressure(CPU)
    limit.step()
    assert not limit.queued


def test_what_lies_on_the_device_is_handed_on_as_it_is() -> None:
    x = torch.arange(3)
    assert moved(x, CPU) is x


def test_copies_to_a_gpu_are_pinned_and_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda x: False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: (asked.append("pinned"), x)[1])
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *place, **how: (asked.append((*place, how)), x)[1])
    moved(torch.arange(3), torch.device("cuda", 0))
    assert asked == ["pinned", (torch.device("cuda", 0), {"non_blocking": True})]


@pytest.mark.parametrize("engine", [dali, ffcv, native, torchcodec], ids=lambda module: module.__name__.split(".")[-1])
def test_every_engine_holds_the_host_back_and_copies_no_index_or_label_by_itself(engine: ModuleType) -> None:
    tree = ast.parse(inspect.getsource(engine))
    calls = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert "self.backpressure.step()" in calls
    blocking = [call for call in calls if call.endswith(".to(self.device)")]
    assert not [call for call in blocking if "index" in call or "label" in call or "parameters" in call], blocking


@pytest.mark.parametrize("engine", [ffcv, native, torchcodec], ids=lambda module: module.__name__.split(".")[-1])
def test_parameters_of_all_views_are_drawn_at_once(engine: ModuleType) -> None:
    """On a GPU that is one kernel; view by view it would be more than two hundred each."""
    names = [node.id for node in ast.walk(ast.parse(inspect.getsource(engine))) if isinstance(node, ast.Name)]
    assert names.count("sample_all_parameters") == 1 and "sample_parameters" not in names


def test_rows_with_gaps_are_joined_in_the_slots_memory() -> None:
    drawn = np.random.default_rng(0)
    images = [torch.from_numpy(drawn.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((4, 5), (7, 3), (2, 2))]
    given, slot = ragged(images), Slot()
    for _ in range(2):
        slot.begin(3)
        joined = gathered(slot, given)
        assert all(torch.equal(joined.image(k), image) for k, image in enumerate(images))
    assert joined.pixels.data_ptr() == slot.buffer.data_ptr(), "the second batch is written where the first one was"
