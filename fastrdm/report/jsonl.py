"""Files of JSON lines of any length, read a line at a time and thinned: a report does not grow with its run."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from fastrdm.config.tree import Tree

MOST_LINES = 2048  # kept of one kind; a chart draws 600
MOST_KINDS = 1024  # told apart in one file
MOST_BYTES = 1 << 26  # of one line; the analysis of 8,192 dimensions has 1 MB
Kind = tuple[str, ...]


class Lines(NamedTuple):
    """Contents of a file of JSON lines."""

    trees: list[Tree]  # in the order of the file
    total: int  # lines that are not empty
    unread: int  # of these, lines that are no object with the keys that are needed
    cut: bool  # whether the last line is one of them and has no end


class _Thinned:
    """Every n-th line of one kind from the first on, n a power of 2 that grows with their number, and the last."""

    def __init__(self) -> None:
        self.seen, self.stride = 0, 1
        self.kept: list[tuple[int, Tree]] = []
        self.last: tuple[int, str] | None = None  # left out so far

    def add(self, place: int, text: str, read: Callable[[str], Tree | None]) -> bool:
        """Take or leave a line; False where it was read in vain."""
        wanted = self.seen % self.stride == 0
        self.last = None if wanted else (place, text)
        if not wanted:
            self.seen += 1
            return True
        tree = read(text)
        if tree is None:
            return False
        self.seen += 1
        self.kept.append((place, tree))
        if len(self.kept) > MOST_LINES:
            self.kept = self.kept[::2]
            self.stride *= 2
        return True


def read_lines(file: Path, usable: Callable[[Tree], bool]) -> Lines:
    """The objects in `file` that are `usable`, a thousand and more of each kind; raises OSError.

    A kind is the sequence of all names and texts in a line: lines of the same figures, or of the same tap.
    """
    kinds: dict[Kind, _Thinned] = {}
    total = unread = 0
    ended = sound = True

    def read(text: str) -> Tree | None:
        return _object(text, usable)

    with file.open("rb") as stream:
        for text, end in _texts(stream):
            ended, total = end, total + 1
            kind = tuple(text.split('"')[1::2])
            if kind not in kinds and len(kinds) >= MOST_KINDS:
                kind = ()
            sound = kinds.setdefault(kind, _Thinned()).add(total, text, read)
            unread += not sound
    found = [pair for thinned in kinds.values() for pair in thinned.kept]
    for place, text in (thinned.last for thinned in kinds.values() if thinned.last):
        if tree := read(text):
            found.append((place, tree))
    trees = [tree for _, tree in sorted(found, key=lambda pair: pair[0])]
    return Lines(trees, total, unread, not ended and not sound)


def first_lines(file: Path, usable: Callable[[Tree], bool], names: Sequence[str]) -> Lines:
    """The first object of each combination of the values `names`, with the number of all of them as "times"."""
    firsts: dict[Kind, Tree] = {}
    total = unread = 0
    ended, tree = True, None
    with file.open("rb") as stream:
        for text, end in _texts(stream):
            ended, total, tree = end, total + 1, _object(text, usable)
            if tree is None:
                unread += 1
                continue
            kind = tuple(str(tree.get(name) or "") for name in names)
            if len(firsts) < MOST_KINDS or kind in firsts:
                first = firsts.setdefault(kind, {**tree, "times": 0})
                first["times"] += 1
    return Lines(list(firsts.values()), total, unread, not ended and tree is None)


def _texts(stream: IO[bytes]) -> Iterator[tuple[str, bool]]:
    """Each line that is not blank, and whether it has an end; of one that is too long nothing."""
    while line := stream.readline(MOST_BYTES):
        ended = line.endswith(b"\n")
        if not ended and len(line) == MOST_BYTES:
            while (rest := stream.readline(MOST_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield "", True
        elif not line.isspace():
            yield line.decode("utf-8", "replace"), ended


def _object(text: str, usable: Callable[[Tree], bool]) -> Tree | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and usable(value) else None
