"""Lists of classes: which folders of a larger set make a published smaller one."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from fastrdm.loaders.sources.label_file import read_text

SHIPPED = Path(__file__).parent / "class_lists"


def read_class_list(name: str) -> list[str]:
    """The names in a file, one a line, # for comments, or in the shipped list of that name; sorted.

    ValueError if there is no such file, or if it holds no name or one twice.
    """
    path = next((path for path in (Path(name), SHIPPED / f"{name}.txt") if path.is_file()), None)
    if path is None:
        known = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.txt")))
        raise ValueError(
            f"loader.classes must be a file with one class a line or a shipped list ({known}), got {name!r}"
        )
    try:
        lines = [line.partition("#")[0].strip() for line in read_text(path).splitlines()]
    except (OSError, ValueError) as error:
        raise ValueError(f"loader.classes={name} cannot be read: {error}") from None
    names = sorted(filter(None, lines))
    if not names:
        raise ValueError(f"loader.classes={name} must hold one class a line, got none")
    twice = next((a for a, b in pairwise(names) if a == b), None)
    if twice is not None:
        raise ValueError(f"loader.classes={name} must hold each class once, got {twice} twice")
    return names


def check_classes(wanted: Sequence[str], known: Sequence[str], name: str, where: str) -> None:
    """Raise ValueError naming the classes of list `name` that the set at `where` lacks."""
    missing = sorted(set(wanted) - set(known))
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise ValueError(
            f"loader.classes={name}: {len(missing)} of its {len(wanted)} classes are not among the {len(known)} of "
            f"{where}: {shown}"
        )
