"""(seed, epoch, position) -> index: one order for all processes, kept to the sample in the middle of an epoch."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fastrdm.loaders.sources.source import NoImages, Source
from fastrdm.schema import require

Indices = NDArray[np.int64]


def epoch_order(samples: int, seed: int, epoch: int, shards: Indices | None = None, window: int = 1) -> Indices:
    """Permutation (samples,) int64 of one epoch, the same on every machine, process and NumPy version.

    With `shards` (samples,), the shard that each sample lies in: the samples of `window` shards drawn at random, mixed,
    then those of the next ones.
    """
    # The raw Philox stream is fixed by its definition; NumPy may change Generator.permutation between versions.
    stream = np.random.Philox(key=np.array([seed % 2**64, epoch], np.uint64))
    words = stream.random_raw(samples)
    if shards is None:
        return sorted_places(words)
    turn = np.argsort(np.argsort(stream.random_raw(int(shards.max()) + 1), kind="stable"), kind="stable")
    return np.lexsort((words, turn[shards] // window))


def sorted_places(words: NDArray[np.uint64]) -> Indices:
    """np.argsort(words, kind="stable") of random 64-bit words, in a fraction of its time.

    torch sorts the high 31 bits of each word by radix, which keeps equal ones in their order; so the places are fixed,
    whatever the version. The few words whose high bits are alike are then put in order by all of their bits.
    """
    keys = np.right_shift(words, np.uint64(33), out=np.empty(len(words), np.int32), casting="unsafe")
    high, places = torch.sort(torch.from_numpy(keys), stable=True)
    order: Indices = places.numpy()
    alike = (high[1:] == high[:-1]).numpy()
    if alike.any():
        some = np.flatnonzero(np.append(alike, False) | np.insert(alike, 0, False))
        order[some] = order[some][np.argsort(words[order[some]], kind="stable")]
    return order


def shard_groups(order: Indices, shards: Indices, window: int) -> list[list[int]]:
    """The shards of an order in groups of `window`, as epoch_order mixes them: those that come first, first."""
    used, first = np.unique(shards[order], return_index=True)
    by_use: list[int] = used[np.argsort(first)].tolist()
    return [by_use[start : start + window] for start in range(0, len(by_use), window)]


def batch_indices(order: Indices, step: int, batch_size: int, rank: int, world: int) -> Indices:
    """The slice (batch_size / world,) of global batch `step` that belongs to process `rank` of `world`."""
    if batch_size % world:
        raise ValueError(f"loader.batch_size must be divisible by the {world} processes, got {batch_size}")
    share = batch_size // world
    start = step * batch_size + rank * share
    return order[start : start + share]


class Process(NamedTuple):
    """The process that an engine feeds."""

    seed: int  # of the run's order and views
    rank: int
    world: int  # processes in all
    device: torch.device  # where its views go
    dtype: torch.dtype  # of the views

    def check(self, engine: str) -> None:
        """Refuse a device that `engine` cannot feed, or that is not there."""
        kind = self.device.type
        require(kind in ("cpu", "cuda"), "train.device", f"cpu or cuda with loader.engine={engine}", kind)
        require(kind == "cpu" or torch.cuda.is_available(), "train.device", "cpu where no GPU is seen", kind)


class EpochLoader:
    """Position of an engine in the run: `position` counts the samples of `epoch` returned so far over all processes."""

    def __init__(
        self,
        samples: int,
        batch_size: int,
        seed: int,
        rank: int,
        world: int,
        *,
        shards: Indices | None = None,
        window: int = 1,
        source: Source | None = None,
    ) -> None:
        """`shards` and `window` as in epoch_order; `source` is told which of its shards are read next."""
        if batch_size > samples:
            raise ValueError(f"loader.batch_size must be at most the {samples} images of the set, got {batch_size}")
        batch_indices(np.empty(0, np.int64), 0, batch_size, rank, world)  # refused here, not at the first batch
        assert 0 <= rank < world
        self.samples, self.batch_size, self.seed, self.rank, self.world = samples, batch_size, seed, rank, world
        self.shards, self.window, self.source = shards, window, source or NoImages("none")
        self.epoch = self.position = 0
        self.faults: dict[int, str] = {}

    def __len__(self) -> int:
        """Steps of a whole epoch; fewer than `batch_size` samples at its end are dropped."""
        return self.samples // self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of `epoch`; the epoch at hand keeps its position."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """Epoch and position of the batch handed out last; batches made ahead are not counted."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue behind the samples of `state`, whatever batch size and number of processes consumed them."""
        if not 0 <= state["position"] <= self.samples:
            raise ValueError(
                f"loader position must lie in the {self.samples} images of the set, got {state['position']}: "
                "the checkpoint was made with another set"
            )
        self.epoch, self.position = state["epoch"], state["position"]

    def diagnosis(self) -> str | None:
        """A line on what slows the loading, None without. The source's own, unless an engine measures itself."""
        return self.source.news()

    def close(self) -> None:
        """Free what the engine holds; nothing unless an engine overrides it."""

    def _remaining(self) -> Iterator[Indices]:
        """This process's indices (batch_size / world,) of every global batch still to come."""
        rest = epoch_order(self.samples, self.seed, self.epoch, self.shards, self.window)[self.position :]
        asked: set[int] = set()
        with self.source.planned(self._groups(rest)):
            for step in range(len(rest) // self.batch_size):
                if self.shards is not None:
                    batch = self.shards[rest[step * self.batch_size : (step + 1) * self.batch_size]]
                    if new := set(batch.tolist()) - asked:
                        asked |= new
                        self._read_ahead_of(new)
                yield batch_indices(rest, step, self.batch_size, self.rank, self.world)

    def _groups(self, rest: Indices) -> list[list[int]]:
        """The shards of what is left of an epoch, in groups that are mixed: all of them in the full order."""
        if self.shards is not None:
            return shard_groups(rest, self.shards, self.window)
        shards = self.source.shards
        return [] if shards is None else shard_groups(rest, shards, len(shards))

    def _read_ahead_of(self, shards: set[int]) -> None:
        """Tell the source that these shards come next."""
        self.source.read_ahead(shards)
