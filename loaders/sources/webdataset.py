"""WebDataset: tar files whose members of one name are one sample, as `000123.jpg` and `000123.cls`."""

import json
import os
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np

from fastrdm.loaders.sources.archives import Split
from fastrdm.loaders.sources.index_cache import Arrays, text_array, texts_of
from fastrdm.loaders.sources.label_file import sort_classes
from fastrdm.loaders.sources.listing import EXTENSIONS
from fastrdm.loaders.sources.shard_set import ShardSet, open_shards
from fastrdm.loaders.sources.source import NoImages, Source
from fastrdm.loaders.sources.tar import Member, TarSource, members, one_line
from fastrdm.loaders.spec import LoaderConfig

CLASS_NAMES = "classes.txt"  # beside the files: the names of the classes 0, 1, ..., one a line
JSON_KEYS = ("label", "cls", "class", "class_id", "target")


def open_webdataset(config: LoaderConfig, split: Split) -> Source:
    """The samples of `split`, indexed once; labels from `.cls` or a `.json`, or from the suffix `loader.labels`."""
    files = open_shards(config, ".tar", "webdataset", split)
    if not files.names:
        return NoImages("webdataset")
    found = _indexes(files, config)
    shards = np.repeat(np.arange(len(found)), [len(index["offset"]) for index in found])
    offset, length = (np.concatenate([index[name] for index in found]) for name in ("offset", "length"))
    if not len(offset):
        raise ValueError(f"loader.root must hold images, got none in {files.names[0]} and the like")
    others = open_shards(config, ".tar", "webdataset", "test" if split == "train" else "train")
    elsewhere = [name for index in _indexes(others, config) for name in texts_of(index["classes"])]
    names = [texts_of(index["classes"]) for index in found]
    classes = sort_classes([*(name for part in names for name in part), *elsewhere])
    number = {name: k for k, name in enumerate(classes)}
    labels = np.concatenate(
        [
            # the last place is for samples without a label, whose code is -1
            np.array([*(number[name] for name in part), -1], np.int64)[index["code"]]
            for part, index in zip(names, found, strict=True)
        ]
    )
    named = _class_names(files.beside(CLASS_NAMES), classes)
    source = TarSource("webdataset", files.names, shards, offset, length, labels, named, files.cache)
    notes = []
    if passed := sum(int(index["passed"]) for index in found):
        notes.append(f"passed over: {passed:,} samples without an image, or further images of a sample")
    if not classes and config.labels == "auto":
        notes.append("no sample has a label in .cls or .json; loader.source=tar takes folders as classes")
    source.note = "; ".join(notes) or None
    return source


def _indexes(files: ShardSet, config: LoaderConfig) -> list[Arrays]:
    kind = "labels" if config.labels in ("auto", "folders", "none") else config.labels
    if not kind.isalnum():
        raise ValueError(f"loader.labels must be auto, none or the suffix of a member, such as cls, got {kind!r}")
    found = files.indexes(f"webdataset-{kind}", partial(_build, labels=kind))
    if config.labels != "none":
        return found
    return [{**index, "code": index["code"] * 0 - 1, "classes": index["classes"][:0]} for index in found]


def _build(path: Path, labels: str) -> Arrays:
    """Offset and length of each sample's image, and code and names of the classes, of one tar file."""
    images: dict[str, Member] = {}
    told: list[str | None] = []
    passed = 0
    with path.open("rb") as file:
        for _, sample in groupby(members(path), lambda member: _parts(member.name)[0]):
            parts: dict[str, Member] = {}
            for member in sample:
                suffix = _parts(member.name)[1]
                if suffix in parts:
                    raise ValueError(f"{path} holds {one_line(member.name)} twice")
                parts[suffix] = member
            pictures = [member for suffix, member in parts.items() if f".{suffix.rpartition('.')[2]}" in EXTENSIONS]
            passed += abs(len(pictures) - 1)
            if pictures:
                if pictures[0].name in images:
                    raise ValueError(f"{path} holds {one_line(pictures[0].name)} twice")
                images[pictures[0].name] = pictures[0]
                told.append(next(_labels(file.fileno(), path, parts, labels), None))
    classes = sorted({label for label in told if label is not None})
    number = {name: k for k, name in enumerate(classes)}
    return {
        "offset": np.array([member.offset for member in images.values()], np.int64),
        "length": np.array([member.size for member in images.values()], np.int64),
        "code": np.array([-1 if label is None else number[label] for label in told], np.int64),
        "classes": text_array(classes),
        "passed": np.array(passed),
    }


def _parts(name: str) -> tuple[str, str]:
    """Key and suffix of a member: the suffix is all behind the first dot of the last part of its path."""
    folder, slash, file = name.rpartition("/")
    key, _, suffix = file.partition(".")
    return folder + slash + key, suffix.lower()


def _labels(file: int, path: Path, parts: dict[str, Member], labels: str) -> Iterator[str]:
    """The label of a sample, of the first of its members that has one; ValueError names a member that is no text."""
    for suffix in ("cls", "json") if labels == "labels" else (labels,):
        if suffix not in parts:
            continue
        member = parts[suffix]
        try:
            text = os.pread(file, member.size, member.offset).decode("utf-8-sig").strip()
            value = _of_json(json.loads(text)) if suffix == "json" else text
        except ValueError as error:
            raise ValueError(f"{path}, {one_line(member.name)}: {error}") from None
        if value:
            yield value


def _of_json(content: object) -> str | None:
    if isinstance(content, dict):
        content = next((content[key] for key in JSON_KEYS if key in content), None)
    return str(content) if isinstance(content, int | str) and not isinstance(content, bool) else None


def _class_names(told: tuple[str, str] | None, classes: list[str]) -> list[str]:
    """The names in a file (path, text), where there is one and labels are numbers; ValueError where it has too few."""
    if told is None or not all(name.isdecimal() for name in classes):
        return classes
    path, names = told[0], told[1].splitlines()
    if beyond := [name for name in classes if int(name) >= len(names)]:
        raise ValueError(f"{path} has {len(names)} lines, and there is a label {beyond[-1]}")
    return [names[int(name)] for name in classes]
