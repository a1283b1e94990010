"""Which files below a folder are images, and what is passed over on the way."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from PIL import features

EXTENSIONS = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"),
        *(".ppm", ".pgm", ".pbm", ".pnm"),
        *((".jp2", ".j2k") if features.check("jpg_2000") else ()),
        *((".avif",) if features.check("avif") else ()),
    )
)
# Folders that storage systems and archivers leave behind; what they hold only looks like images.
SYSTEM_FOLDERS = frozenset(
    ("@eaDir", "#recycle", "#snapshot", "$RECYCLE.BIN", "System Volume Information", "lost+found", "__MACOSX")
)
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip", ".parquet")
EXAMPLES = 2


class PassedOver:
    """Counts, by kind, what a listing left out, with a few examples of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, kind: str, name: str) -> None:
        self.counts[kind] += 1
        shown = self.examples.setdefault(kind, [])
        if len(shown) < EXAMPLES:
            shown.append(name)

    def __str__(self) -> str:
        """`passed over: 3 hidden files (a/.x, ...), 2 files of other kinds (notes.txt, b/c.xml)`; '' for nothing."""
        kinds = []
        for kind, count in self.counts.items():
            more = ", ..." if count > len(self.examples[kind]) else ""
            kinds.append(f"{count:,} {kind} ({', '.join(self.examples[kind])}{more})")
        return f"passed over: {'; '.join(kinds)}" if kinds else ""


def is_image(file: str) -> bool:
    """Whether the suffix of a file's name is that of an image format that is read."""
    return file[file.rfind(".") :].lower() in EXTENSIONS and not file.startswith(".")


def find_images(folder: Path, passed: PassedOver) -> Iterator[str]:
    """Path below `folder` of every image at any depth, in no particular order; links are followed.

    What is left out is noted in `passed`. ValueError names a folder that cannot be listed.
    """
    root = str(folder)
    pending = [""]
    while pending:
        below = pending.pop()
        try:
            with os.scandir(os.path.join(root, below)) as entries:
                for entry in entries:
                    name = below + entry.name
                    if entry.is_dir():
                        if reason := _not_entered(entry):
                            passed.add(reason, name)
                        else:
                            pending.append(f"{name}/")
                    elif entry.name.startswith("."):
                        passed.add("hidden files", name)
                    elif is_image(entry.name):
                        yield name
                    else:
                        passed.add("archives" if name.endswith(ARCHIVES) else "files of other kinds", name)
        except OSError as error:
            raise ValueError(f"{os.path.join(root, below)} cannot be listed: {error.strerror}") from None


def _not_entered(entry: "os.DirEntry[str]") -> str | None:
    """Why a folder is not looked into, None where it is."""
    if entry.name.startswith("."):
        return "hidden folders"
    if entry.name in SYSTEM_FOLDERS:
        return "system folders"
    if entry.is_symlink():
        here, there = os.path.realpath(os.path.dirname(entry.path)), os.path.realpath(entry.path)
        if os.path.commonpath((here, there)) == there:
            return "links to a folder that they lie in"
    return None


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in `folder` that may hold images, sorted."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not _not_entered(entry))
    except OSError as error:
        raise ValueError(f"{folder} cannot be listed: {error.strerror}") from None


def holds_images(folder: Path) -> bool:
    """Whether there is an image in `folder` or below it."""
    return next(find_images(folder, PassedOver()), None) is not None
