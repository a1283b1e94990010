"""Labels that stand in a file beside the images: a CSV table, Kaggle's solution, or a devkit's ground truth."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Header names that are understood, in lower case: the image of a row, and its class.
FILE_COLUMNS = ("file", "filename", "file_name", "path", "image", "imageid", "image_id", "id")
LABEL_COLUMNS = ("label", "class", "category", "target", "predictionstring")
SYNSETS = 1000  # classes of the ILSVRC challenge in the devkit's meta.mat; the rows behind them are inner nodes


class Labels(NamedTuple):
    """Labels of some images."""

    numbers: NDArray[np.int64]  # (N,) class of each image, -1 where the file does not name it
    classes: list[str]  # all classes of the file
    unmatched: list[str]  # images that the file names and that are not among those asked for


def read_labels(path: Path, files: Sequence[str]) -> Labels:
    """The label of each of `files` (paths below their folder, in order) from the file at `path`.

    `.txt`: a devkit's ground truth, one number a line for the images in sorted order, turned into WordNet ids where
    the devkit's meta.mat lies beside it. Anything else: a table whose first line names the columns; an image is found
    by its path, by the end of its path, or by its name without the suffix, as Kaggle writes it. ValueError names the
    file and row of what is wrong.
    """
    if not path.is_file():
        raise ValueError(f"loader.labels must be auto, folders, none or a file, got {str(path)!r}, which is no file")
    lines = read_text(path).splitlines()
    return _ground_truth(path, lines, files) if path.suffix == ".txt" else _table(path, lines, files)


def sort_classes(names: Iterable[str]) -> list[str]:
    """Class names in order: by number where all of them are numbers, else by the alphabet."""
    unique = set(names)
    return sorted(unique, key=int) if all(name.isdecimal() for name in unique) else sorted(unique)


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark; ValueError names the line of what is not."""
    return decode_text(path.read_bytes(), str(path))


def decode_text(data: bytes, name: str) -> str:
    """The text of the file `name`, as read_text."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{name}, line {row}: not UTF-8 ({error.reason}): save the file as UTF-8") from None


def _table(path: Path, lines: Sequence[str], files: Sequence[str]) -> Labels:
    header = lines[0] if lines else ""
    delimiter = next((mark for mark in ",;\t" if mark in header), ",")
    columns = [name.strip().lower() for name in next(csv.reader([header], delimiter=delimiter), [])]
    image = next((columns.index(name) for name in FILE_COLUMNS if name in columns), None)
    label = next((columns.index(name) for name in LABEL_COLUMNS if name in columns), None)
    if image is None or label is None:
        raise ValueError(f"{path} must have the columns file and label in its first line, got {header!r}")
    told: dict[str, str] = {}
    rows: dict[str, int] = {}
    number = 1
    try:
        for number, cells in enumerate(csv.reader(lines[1:], delimiter=delimiter, strict=True), start=2):
            if not any(cells):
                continue
            if len(cells) != len(columns):
                raise ValueError(f"has {len(cells)} of the {len(columns)} columns of the first line")
            name, value = cells[image].strip(), cells[label].strip()
            if columns[label] == "predictionstring":
                value = value.partition(" ")[0]  # behind the class Kaggle gives the bounding boxes
            if not name or not value:
                raise ValueError("names no image" if not name else f"gives {name} no label: leave the row out")
            if name in told:
                raise ValueError(f"names {name} again, after row {rows[name]}")
            told[name], rows[name] = value, number
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}, row {number + isinstance(error, csv.Error)}: {error}") from None
    classes = sort_classes(told.values())
    number_of = {name: k for k, name in enumerate(classes)}
    found = [_named(told, file) for file in files]
    numbers = np.array([number_of[told[name]] if name is not None else -1 for name in found], np.int64)
    return Labels(numbers, classes, sorted(told.keys() - set(found)))


def _named(told: dict[str, str], file: str) -> str | None:
    """The name by which a table calls `file`."""
    while file not in told:
        short, slash, rest = file.partition("/")
        if not slash:
            stem = short.rpartition(".")[0]
            return stem if stem in told else None
        file = rest
    return file


def _ground_truth(path: Path, lines: Sequence[str], files: Sequence[str]) -> Labels:
    values = [line.strip() for line in lines]
    if len(values) != len(files):
        raise ValueError(f"{path} has {len(values)} lines, one for each image in sorted order; there are {len(files)}")
    for row, value in enumerate(values, start=1):
        if not value.isdecimal():
            raise ValueError(f"{path}, line {row}: must be the number of a class, got {value!r}")
    meta = path.with_name("meta.mat")
    names = read_synsets(meta) if meta.is_file() else {value: value for value in values}
    for row, value in enumerate(values, start=1):
        if value not in names:
            raise ValueError(f"{path}, line {row}: class {value} is not among the {len(names)} of {meta}")
    classes = sort_classes(names.values())
    number_of = {name: k for k, name in enumerate(classes)}
    by_place = {file: names[value] for file, value in zip(sorted(files), values, strict=True)}
    return Labels(np.array([number_of[by_place[file]] for file in files], np.int64), classes, [])


def read_synsets(path: Path) -> dict[str, str]:
    """WordNet id of each class number ('1' to '1000') of a devkit's meta.mat."""
    from scipy.io import loadmat

    try:
        synsets = loadmat(path, squeeze_me=True)["synsets"]
        pairs = {str(int(row["ILSVRC2012_ID"])): str(row["WNID"]) for row in np.atleast_1d(synsets)}
    except Exception as error:  # scipy's reader raises whatever a damaged file leads it to
        raise ValueError(f"{path} cannot be read as the devkit's list of classes: {error}") from None
    return {number: name for number, name in pairs.items() if int(number) <= SYNSETS}
