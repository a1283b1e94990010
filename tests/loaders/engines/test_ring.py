"""Buffers that many threads fill: nothing overlaps, nothing is lost when they grow, no more of them than needed."""

import threading

import numpy as np
import pytest
import torch

from fastrdm.loaders.engines.ring import ALIGN, Ring, Slot

SIDES = [(1, 1), (7, 5), (40, 31), (3, 200), (64, 64)]


def filled(slot: Slot, numbers: list[int]) -> None:
    for number in numbers:
        slot.place(number, *SIDES[number % 5])[...] = number


def check(slot: Slot, count: int) -> None:
    images = slot.images()
    for number in range(count):
        image = images.image(number)
        assert tuple(image.shape) == (*SIDES[number % 5], 3) and (image == number).all()
    assert (images.offset % ALIGN == 0).all() and len(images.pixels) == slot.used


@pytest.mark.parametrize("before", [0, 3, 20])
def test_images_survive_growth(before: int) -> None:
    """The buffer holds nothing, some or all of what comes."""
    slot = Slot()
    slot.begin(before)
    filled(slot, list(range(before)))
    slot.images()
    slot.begin(20)
    filled(slot, list(range(20)))
    check(slot, 20)


def test_a_used_buffer_is_used_again() -> None:
    slot = Slot()
    for _ in range(3):
        slot.begin(20)
        filled(slot, list(range(20)))
        check(slot, 20)
    address = slot.buffer.data_ptr()
    slot.begin(20)
    filled(slot, list(range(20)))
    check(slot, 20)
    assert slot.buffer.data_ptr() == address


def test_threads_do_not_overlap() -> None:
    slot = Slot()
    for _ in range(2):
        slot.begin(100)
        threads = [threading.Thread(target=filled, args=(slot, list(range(k, 100, 4)))) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        check(slot, 100)


def test_the_newest_place_of_an_image_counts() -> None:
    slot = Slot()
    slot.begin(1)
    slot.place(0, 9, 9)[...] = 1
    slot.place(0, 2, 3)[...] = 2
    image = slot.images().image(0)
    assert tuple(image.shape) == (2, 3, 3) and (image == 2).all()


def test_squares_lie_back_to_back() -> None:
    slot = Slot()
    slot.begin(5)
    for place in (slice(3, 5), slice(0, 3)):
        slot.rows(place, 6)[...] = np.arange(place.start, place.stop)[:, None, None, None]
    images = slot.images()
    assert torch.equal(images.pixels.view(5, 6, 6, 3)[:, 0, 0, 0], torch.arange(5, dtype=torch.uint8))
    assert images.offset.tolist() == [108 * k for k in range(5)] and set(images.width.tolist()) == {6}


def test_ring_counts_bytes() -> None:
    ring = Ring(pin=False)
    slot = ring.take(20)
    assert not ring.fits(1, 10**9), "nothing is known yet"
    filled(slot, list(range(20)))
    ring.learn(slot)
    assert ring.largest == slot.used > 0
    assert ring.fits(3, 3 * slot.used) and not ring.fits(3, 3 * slot.used - 1)
    ring.give(slot)
    assert ring.take(20) is slot and ring.take(20) is not slot
