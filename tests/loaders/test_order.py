"""Every sample once an epoch, whoever reads it and wherever it was interrupted."""

import numpy as np
import pytest

from fastrdm.loaders.order import EpochLoader, batch_indices, epoch_order, sorted_places


def test_order_is_a_permutation_that_depends_on_seed_and_epoch() -> None:
    order = epoch_order(1000, 3, 5)
    assert order.dtype == np.int64 and sorted(order) == list(range(1000))
    np.testing.assert_array_equal(order, epoch_order(1000, 3, 5))
    for other in (epoch_order(1000, 3, 6), epoch_order(1000, 4, 5), np.arange(1000)):
        assert (order == other).mean() < 0.02


def test_order_is_pinned() -> None:
    """A checkpoint of today continues tomorrow: the order may never change with NumPy or the machine."""
    assert epoch_order(8, 0, 0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert epoch_order(8, 2**63 + 1, 7).tolist() == [1, 4, 7, 3, 6, 5, 0, 2]


@pytest.mark.parametrize("size", [1, 2, 3, 1000, 70_000])
@pytest.mark.parametrize("bits", [1, 12, 64])
def test_places_are_those_of_a_stable_sort(size: int, bits: int) -> None:
    """Words of few bits are often equal; shifted up or down, they differ in their high bits alone or in their low."""
    words = np.random.default_rng(bits).integers(0, 2**bits, size, dtype=np.uint64, endpoint=bits < 64)
    for shifted in (words, words << np.uint64(64 - bits)):
        assert np.array_equal(sorted_places(shifted), np.argsort(shifted, kind="stable"))


def test_places_are_uniform() -> None:
    """Where sample 0 lands over 4,000 epochs: chi-square over 10 places, 9 degrees of freedom, p = 1e-4."""
    places = [int(np.flatnonzero(epoch_order(10, 0, epoch) == 0)[0]) for epoch in range(4000)]
    counts = np.bincount(places, minlength=10)
    assert ((counts - 400) ** 2 / 400).sum() < 33.7


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_the_global_batch(world: int) -> None:
    order = epoch_order(50, 0, 0)
    for step in range(3):
        parts = [batch_indices(order, step, 16, rank, world) for rank in range(world)]
        assert {len(part) for part in parts} == {16 // world}
        np.testing.assert_array_equal(np.concatenate(parts), order[step * 16 : step * 16 + 16])


def test_batch_must_divide() -> None:
    with pytest.raises(ValueError, match=r"loader\.batch_size must be divisible by the 3 processes, got 16"):
        batch_indices(np.arange(50), 0, 16, 0, 3)
    with pytest.raises(ValueError, match=r"loader\.batch_size must be divisible by the 3 processes, got 16"):
        EpochLoader(50, 16, 0, 0, 3)


def test_batch_must_fit() -> None:
    with pytest.raises(ValueError, match=r"loader\.batch_size must be at most the 50 images of the set, got 64"):
        EpochLoader(50, 64, 0, 0, 1)


def consume(loader: EpochLoader, steps: int) -> list[int]:
    """Indices of some steps, counted as an engine counts them."""
    out = []
    for indices in list(loader._remaining())[:steps]:
        loader.position += loader.batch_size
        out += indices.tolist()
    return out


def test_tail_is_dropped() -> None:
    loader = EpochLoader(50, 16, 0, 0, 1)
    seen = consume(loader, 99)
    assert len(loader) == 3 and len(seen) == len(set(seen)) == 48
    assert loader.state_dict() == {"epoch": 0, "position": 48} and consume(loader, 99) == []


@pytest.mark.parametrize(("before", "after", "batch"), [(2, 1, 16), (2, 4, 16), (4, 2, 16), (1, 2, 10), (1, 1, 48)])
def test_another_number_of_processes_reads_the_rest(before: int, after: int, batch: int) -> None:
    first = [EpochLoader(100, 16, 9, rank, before) for rank in range(before)]
    seen = [index for loader in first for index in consume(loader, 3)]
    state = first[0].state_dict()
    assert state == {"epoch": 0, "position": 48} and all(loader.state_dict() == state for loader in first)
    second = [EpochLoader(100, batch, 9, rank, after) for rank in range(after)]
    for loader in second:
        loader.load_state_dict(state)
        loader.set_epoch(0)
        seen += consume(loader, 99)
    rest = 52 // batch * batch
    assert len(seen) == len(set(seen)) == 48 + rest
    assert set(seen) == set(epoch_order(100, 9, 0)[: 48 + rest].tolist())


def test_set_epoch_keeps_the_place_in_the_epoch_at_hand_only() -> None:
    loader = EpochLoader(50, 10, 0, 0, 1)
    loader.load_state_dict({"epoch": 4, "position": 20})
    loader.set_epoch(4)
    assert loader.state_dict() == {"epoch": 4, "position": 20} and len(loader) == 5
    loader.set_epoch(5)
    assert loader.state_dict() == {"epoch": 5, "position": 0}


def test_state_of_a_larger_set_is_refused() -> None:
    with pytest.raises(ValueError, match="got 51: the checkpoint was made with another set"):
        EpochLoader(50, 10, 0, 0, 1).load_state_dict({"epoch": 0, "position": 51})


@pytest.mark.parametrize("window", [1, 3, 7, 100])
def test_windowed_order_mixes_a_few_shards_at_a_time(window: int) -> None:
    shards = np.repeat(np.arange(7), [40, 30, 50, 1, 20, 60, 9])
    orders = [epoch_order(210, 3, epoch, shards, window) for epoch in (0, 0, 1)]
    assert sorted(orders[0]) == list(range(210)) and (orders[0] == orders[1]).all() and (orders[0] != orders[2]).any()
    seen, place = [], 0
    while place < 210:
        together = set(shards[orders[0][place:]][:1])
        while place < 210 and (len(together | {shards[orders[0][place]]}) <= window):
            together.add(shards[orders[0][place]])
            place += 1
        assert not together & set(seen), "a window was left before all of it was read"
        seen += together
    assert sorted(seen) == list(range(7))


def test_windowed_order_is_pinned() -> None:
    assert epoch_order(8, 0, 0, np.arange(8) // 2, 2).tolist() == [2, 3, 6, 7, 0, 1, 5, 4]


def test_windowed_loader_goes_on_in_the_middle() -> None:
    shards = np.arange(100) // 10
    first, whole = (EpochLoader(100, 10, 1, 0, 1, shards=shards, window=2) for _ in range(2))
    everything = consume(whole, 99)
    seen = consume(first, 4)
    second = EpochLoader(100, 10, 1, 0, 1, shards=shards, window=2)
    second.load_state_dict(first.state_dict())
    assert seen + consume(second, 99) == everything and sorted(everything) == list(range(100))
