"""The files of a set that comes in many: brace patterns, as WebDataset writes them, and the split of each file."""

import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TypeVar

from fastrdm.loaders.sources.archives import Split

SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test",)}
File = TypeVar("File")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def expand_braces(pattern: str) -> list[str]:
    """The names that `a-{000..012}.tar` and `{a,b}.tar` stand for, each once; a name without braces is its own."""
    found = _BRACES.search(pattern)
    if found is None:
        return [pattern]
    numbers = _RANGE.fullmatch(found[1])
    if numbers:
        first, last = numbers.groups()
        width = len(first) if first.startswith("0") else 0
        choices: Sequence[str] = [f"{k:0{width}}" for k in range(int(first), int(last) + 1)]
    else:
        choices = found[1].split(",")
    expanded = (expand_braces(f"{pattern[: found.start()]}{choice}{pattern[found.end() :]}") for choice in choices)
    return list(dict.fromkeys(chain.from_iterable(expanded)))  # braces within braces would name some twice


def shard_files(root: str | None, suffix: str, source: str, split: Split) -> list[Path]:
    """The files ending in `suffix` that hold `split` of the set at `root`, a folder, a file or a brace pattern; sorted.

    Names or folders that say train, val or validation, or test decide; where none does, all are for training. For
    "test" the validation files are taken, test files where there are none; [] without either. ValueError names what is
    missing.
    """
    if root is not None and Path(root).is_dir():
        files = sorted(path for path in Path(root).rglob(f"*{suffix}") if not path.name.startswith("."))
        below = Path(root)
    else:
        files = [Path(name) for name in expand_braces(root or "")]
        below = Path(files[0]).parent
        missing = [path for path in files if not (path.suffix == suffix and path.is_file())]
        if root is None or missing:
            raise ValueError(
                f"loader.root must be a folder of {suffix} files or their pattern for loader.source={source}, got "
                f"{root!r}" + (f": there is no {missing[0]}" if root else "")
            )
    if strange := next((path for path in files if not path.is_file()), None):
        raise ValueError(f"{strange} must be a regular file for loader.source={source}")
    if not files:
        raise ValueError(f"loader.root must hold {suffix} files for loader.source={source}, got none in {root}")
    relative = [str(path.relative_to(below) if path.is_relative_to(below) else path.name) for path in files]
    return of_split(files, relative, str(root), split)


def of_split(files: Sequence[File], names: Sequence[str], root: str, split: Split) -> list[File]:
    """Those of `files` that hold `split`, by their `names` below `root`."""
    found = [_split_of(name) for name in names]
    by_split = {name: [file for file, own in zip(files, found, strict=True) if own == name] for name in SPLIT_NAMES}
    if split == "test":
        return by_split["val"] or by_split["test"]
    if any(by_split.values()) and not by_split["train"]:
        raise ValueError(f"loader.root must hold files for training, got {names[0]} and the like in {root}")
    return by_split["train"] or list(files)


def _split_of(name: str) -> str | None:
    words = [word.lower() for part in name.split("/") for word in re.split(r"[^A-Za-z]+", part)]
    return next((split for split, names in SPLIT_NAMES.items() if any(name in words for name in names)), None)
