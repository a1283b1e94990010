"""Reading with replacement: the next readable image stands in for one that cannot be read, until too many cannot."""

from collections.abc import Callable
from itertools import chain
from typing import TypeVar

from fastrdm.loaders.sources.decode import Allocate, CorruptImage, blame_the_image
from fastrdm.loaders.sources.source import ReadTime, Source

Read = TypeVar("Read")


class Reader:
    """Images of a source, by threads; `faults` are noted as they are met."""

    def __init__(self, source: Source, faults: dict[int, str], max_corrupt: float) -> None:
        self.source, self.faults, self.max_corrupt = source, faults, max_corrupt

    def read(self, index: int, allocate: Allocate, spent: ReadTime) -> int:
        """Put the image, or the next one in order that can be decoded, where `allocate` says; its number."""
        return self.first(index, lambda candidate: self.source.read_into(candidate, allocate, spent))[0]

    def first(self, index: int, read: Callable[[int], Read]) -> tuple[int, Read]:
        """Number and what `read` gives for the image, or for the next one for which it raises no CorruptImage."""
        samples = len(self.source)
        for candidate in chain(range(index, samples), range(index)):
            if len(self.faults) > self.max_corrupt * samples:
                break
            if candidate in self.faults:
                continue
            try:
                return candidate, read(candidate)
            except CorruptImage as error:
                blame_the_image(error)
                self.faults[candidate] = str(error)
        raise CorruptImage(
            f"{len(self.faults)} of {samples} images cannot be read, above loader.max_corrupt={self.max_corrupt}; "
            f"the latest: {list(self.faults.values())[-1]}. Repair them or raise loader.max_corrupt: the run then goes "
            "on, which it does not with fewer images"
        )
