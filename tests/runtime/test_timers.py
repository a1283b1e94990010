"""The watch over losses and the clock of the loop."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastrdm.runtime.timers import LossTracker, NonFiniteLoss, Stopwatch, TrainingClock

CPU = torch.device("cpu")


def watch() -> LossTracker:
    return LossTracker(CPU)


def test_mean_is_of_the_steps_since_the_last_look() -> None:
    losses = watch()
    for step, loss in enumerate([1.0, 2.0, 6.0], start=1):
        losses.add(torch.tensor(loss), step)
    assert losses.mean() == 3.0
    losses.add(torch.tensor(-5.0), 4)
    assert losses.mean() == -5.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("looks", "where", "told"), [([], 3, "1 to 5"), ([2], 3, "3 to 5"), ([2, 4], 5, "5 to 5")])
def test_a_loss_that_is_no_number_is_told_with_its_steps(bad: float, looks: list[int], where: int, told: str) -> None:
    losses = watch()
    for step in range(1, 6):
        losses.add(torch.tensor(bad if step == where else 1.0), step)
        if step in looks:
            assert losses.mean() == 1.0
    with pytest.raises(NonFiniteLoss, match=rf"^the loss was not finite in steps {told}; .* optim\.lr"):
        losses.check()


def test_checks_without_a_look_at_the_mean_narrow_the_range() -> None:
    losses = watch()
    losses.add(torch.tensor(1.0), 1)
    losses.check()
    losses.add(torch.tensor(float("nan")), 2)
    with pytest.raises(NonFiniteLoss, match="steps 2 to 2;"):
        losses.mean()


def test_a_watch_goes_on_from_its_state() -> None:
    first, second = watch(), watch()
    first.add(torch.tensor(1.0), 1)
    first.add(torch.tensor(2.0), 2)
    second.load_state_dict(first.state_dict())
    second.add(torch.tensor(6.0), 3)
    assert second.mean() == 3.0
    second.add(torch.tensor(float("nan")), 4)
    with pytest.raises(NonFiniteLoss, match="steps 4 to 4;"):
        second.check()


def test_adding_keeps_no_graph() -> None:
    losses = watch()
    losses.add(torch.ones((), requires_grad=True) * 2, 1)
    assert not losses.sum.requires_grad


def test_the_clock_leaves_out_what_is_not_training(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0

    def pass_time(seconds: float) -> None:
        nonlocal now
        now += seconds

    def slow_batches() -> Iterator[Any]:
        for _ in range(2):
            pass_time(3.0)
            yield object()

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock = TrainingClock(CPU)
    for _ in clock.waiting(slow_batches()):
        pass_time(5.0)
        with clock.paused():
            pass_time(1000.0)
    assert clock.lap() == (2, 16.0, 6.0)
    pass_time(2.0)
    assert clock.lap() == (0, 2.0, 0.0)


def test_a_stopwatch_adds_up_what_happens_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 3.0, 10.0, 10.5, 20.0, 24.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    watch, laps = Stopwatch(CPU, "a name"), []
    for _ in range(2):
        with watch:
            pass
    laps.append(watch.lap())
    with watch:
        pass
    assert [*laps, watch.lap(), watch.lap()] == [2.5, 4.0, 0.0]
    assert watch.total == 6.5


class Device:
    """A device that works off its queue: events carry the time at which it will reach them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.busy_until = 0.0  # of the host, and of what the device was given

        class Event:
            def __init__(event, enable_timing: bool) -> None:
                assert enable_timing

            def record(event) -> None:
                self.busy_until = event.at = max(self.now, self.busy_until)

            def synchronize(event) -> None:
                self.now = max(self.now, event.at)

            def elapsed_time(event, other: Any) -> float:
                assert self.now >= other.at, "read before the device was there"
                return float(1000 * (other.at - event.at))

        class Stream:
            def synchronize(stream) -> None:
                self.now = max(self.now, self.busy_until)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def give(self, launch: float, work: float) -> None:
        self.now += launch
        self.busy_until = max(self.now, self.busy_until) + work


@pytest.mark.parametrize(("loading", "waited"), [(1.0, 1.0), (6.0, 6.0 + 4 * 1.5)])
def test_waiting_is_what_the_device_waits(monkeypatch: pytest.MonkeyPatch, loading: float, waited: float) -> None:
    device = Device(monkeypatch)

    def batches() -> Iterator[Any]:
        for _ in range(5):
            device.now += loading
            yield object()

    clock = TrainingClock(torch.device("cuda"))
    for _ in clock.waiting(batches()):
        device.give(launch=0.5, work=4.5)
    steps, seconds, idle = clock.lap()
    assert (steps, device.now) == (5, seconds), "the lap ends when the device has done its work"
    assert idle == pytest.approx(waited)  # the first batch always; later ones where loading takes longer than the work
    with clock.paused():
        device.give(launch=1.0, work=100.0)
    assert clock.lap() == (0, 1e-9, 0.0)
