"""The word SOURCE of `embed`, `explore` and `bench`: a folder, a file, a URL or a name, as settings of the loader."""

import difflib
from dataclasses import replace
from pathlib import Path

from fastrdm import parts
from fastrdm.loaders.sources.open import SOURCES
from fastrdm.loaders.sources.packed import META
from fastrdm.loaders.sources.store import is_remote
from fastrdm.loaders.spec import LoaderConfig
from fastrdm.schema import require

BY_ENDING = {".tar": "tar", ".parquet": "parquet"}


def named_source(word: str) -> str | None:
    """The name for loader.source of what `word` stands for; None where there is no such thing."""
    path = Path(word)
    if path.is_dir():
        return "packed" if any((path / part / META).is_file() for part in ("", "train")) else "folder"
    ending = BY_ENDING.get(path.suffix)
    if is_remote(word):
        return ending or "packed"
    if ending is not None and path.is_file():
        return ending
    return word if word in SOURCES or parts.is_own(word) else None


def loader_of(word: str | None, root: str | None, own: LoaderConfig | None) -> LoaderConfig:
    """Loader settings of the images that a command names, or of the run's own without a word.

    ValueError where there is nothing of that name, and where `root` is given beside a place.
    """
    if word is None:
        if own is None:
            raise ValueError("SOURCE must name the images: a file of weights does not know them")
        return replace(own, root=root or own.root, subset=None)
    source = named_source(word)
    if source is None:
        near = difflib.get_close_matches(word, SOURCES, n=1)
        known = f"did you mean {near[0]!r}?" if near else f"names are {', '.join(SOURCES)}, or pkg.mod:Class"
        expected = "a folder, a .tar or .parquet file, a URL, or a name"
        raise ValueError(f"SOURCE must be {expected}, got {word!r}, which is none of them: {known}")
    if source == word:
        return LoaderConfig(source=source, root=root)
    require(root is None, "--root", f"left out for {word}", root)
    return LoaderConfig(source=source, root=word)
