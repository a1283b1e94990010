"""ImageNet (ILSVRC 2012) in every form that it comes in, read in place.

train   ILSVRC2012_img_train.tar (a tar file a class inside), a folder of these inner tar files, or class folders
val     ILSVRC2012_img_val.tar or a flat folder, with the devkit or Kaggle's LOC_val_solution.csv, or class folders

Folders are looked for at `root` and where Kaggle's archive puts them.
"""

import tarfile
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np

from fastrdm.loaders.sources.archives import Split
from fastrdm.loaders.sources.folder import FolderSource, class_folders
from fastrdm.loaders.sources.index_cache import Arrays, indexed, text_array, texts_of
from fastrdm.loaders.sources.label_file import Labels, read_labels
from fastrdm.loaders.sources.source import NoImages, Source
from fastrdm.loaders.sources.tar import TarSource, members, one_line
from fastrdm.loaders.spec import LoaderConfig

FOLDERS = {
    "train": ("train", "ILSVRC2012_img_train"),
    "test": ("val", "ILSVRC2012_img_val"),
}
ARCHIVES = {"train": "ILSVRC2012_img_train.tar", "test": "ILSVRC2012_img_val.tar"}
BELOW = ("", "ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC")  # Kaggle's tree, and parts of it
TRUTH, META_MAT = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
SOLUTION = "LOC_val_solution.csv"
DEVKITS = ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_devkit_t12.tar")


class Form(NamedTuple):
    """Where one split lies."""

    folder: Path | None = None
    archives: tuple[Path, ...] = ()


def open_imagenet(config: LoaderConfig, split: Split) -> Source:
    """The images of `split`, with classes in the order of their WordNet ids; ValueError tells what is missing."""
    root = Path(config.root or "")
    if config.root is None or not root.is_dir():
        raise ValueError(f"loader.root must be the folder of ImageNet's files, got {config.root!r}, which is no folder")
    form, other = _find(root, split), _find(root, "test" if split == "train" else "train")
    if form is None:
        if split == "test":
            return NoImages("imagenet")
        raise ValueError(
            f"loader.root must hold {ARCHIVES['train']}, or train/ or ILSVRC/Data/CLS-LOC/train/ of class folders, got "
            f"{root}"
        )
    elsewhere = _classes(other, root, config) if other else []
    source: Source
    if form.archives:
        source = _of_archives(form.archives, config, elsewhere)
    else:
        assert form.folder is not None
        source = FolderSource(form.folder, "folders" if class_folders(form.folder) else "none", elsewhere)
    if int(source.labels.max()) < 0:
        _relabel(source, _labels(root, config, _flat_files(form, config)), elsewhere)
    source.name = "imagenet"
    return source


def _find(root: Path, split: Split) -> Form | None:
    if (archive := root / ARCHIVES[split]).is_file():
        return Form(archives=(archive,))
    folders = [root / below / name for below in BELOW for name in FOLDERS[split]]
    for folder in filter(Path.is_dir, folders):
        inner = tuple(sorted(folder.glob("n*.tar")))
        return Form(archives=inner) if inner else Form(folder)
    return None


def _classes(form: Form, root: Path, config: LoaderConfig) -> list[str]:
    """The classes of a split, by its folders or archives, else by the file of its labels."""
    if form.folder is not None:
        named = class_folders(form.folder)
    else:
        named = [name for path in form.archives for name in texts_of(_index(path, config)["classes"])]
    return named or _labels(root, config, _flat_files(form, config)).classes


def _flat_files(form: Form, config: LoaderConfig) -> list[str]:
    """Names of the images of a split without classes, in the order of its source."""
    if form.folder is not None:
        return FolderSource(form.folder, "none").files
    return [name for path in form.archives for name in texts_of(_index(path, config)["names"])]


def _of_archives(archives: Sequence[Path], config: LoaderConfig, elsewhere: list[str]) -> TarSource:
    found = [_index(path, config) for path in archives]
    names = [texts_of(index["classes"]) for index in found]
    shards = np.repeat(np.arange(len(found)), [len(index["offset"]) for index in found])
    offset, length = (np.concatenate([index[name] for index in found]) for name in ("offset", "length"))
    classes = sorted({*elsewhere, *(name for part in names for name in part)})
    number = {name: k for k, name in enumerate(classes)}
    codes = [
        np.array([*(number[name] for name in part), -1])[index["code"]]
        for part, index in zip(names, found, strict=True)
    ]
    return TarSource("imagenet", archives, shards, offset, length, np.concatenate(codes), classes)


def _index(path: Path, config: LoaderConfig) -> Arrays:
    return indexed(path, "imagenet", config.cache, partial(_build, path))


def _build(path: Path) -> Arrays:
    """Images of an archive sorted by name; their class is the tar file within it, or its own name, or unknown."""
    found = sorted(members(path))
    if not found:
        raise ValueError(f"{path} holds no image")
    if twice := next((a.name for a, b in pairwise(found) if a.name == b.name), None):
        raise ValueError(f"{path} holds {one_line(twice)} twice")
    own = path.stem if path.stem.startswith("n") else ""
    names = [member.name.rpartition("/")[0] or own for member in found]
    classes = sorted(set(names) - {""})
    number = {name: k for k, name in enumerate(classes)}
    return {
        "offset": np.array([member.offset for member in found], np.int64),
        "length": np.array([member.size for member in found], np.int64),
        "code": np.array([number.get(name, -1) for name in names], np.int64),
        "classes": text_array(classes),
        # those of training are long to keep and are never asked for
        "names": text_array([] if classes else [member.name for member in found]),
    }


def _labels(root: Path, config: LoaderConfig, files: list[str]) -> Labels:
    """Labels of the flat validation images, from what lies beside them."""
    if config.labels == "none":
        return Labels(np.full(len(files), -1), [], [])
    if config.labels not in ("auto", "folders"):
        return read_labels(Path(config.labels), files)
    places = (root, root / "ILSVRC", root / "ILSVRC2012_devkit_t12" / "data", root / "data", root.parent)
    for name in (SOLUTION, TRUTH):
        for place in places:
            if (place / name).is_file():
                return read_labels(place / name, files)
    for name in DEVKITS:
        if (root / name).is_file():
            return _of_devkit(root / name, files)
    raise ValueError(
        f"the validation images of {root} lie flat: put the devkit ({DEVKITS[0]}) or Kaggle's {SOLUTION} beside them"
    )


def _of_devkit(path: Path, files: list[str]) -> Labels:
    with TemporaryDirectory() as folder:
        try:
            with tarfile.open(path) as tar:
                for member in tar:
                    name = Path(member.name).name
                    stream = tar.extractfile(member) if name in (TRUTH, META_MAT) else None
                    if stream is not None:
                        (Path(folder) / name).write_bytes(stream.read())
        except (tarfile.TarError, OSError, EOFError) as error:
            raise ValueError(f"{path} cannot be read as a tar file: {error}") from None
        if not (Path(folder) / TRUTH).is_file():
            raise ValueError(f"{path} holds no {TRUTH}")
        return read_labels(Path(folder) / TRUTH, files)


def _relabel(source: Source, labels: Labels, elsewhere: list[str]) -> None:
    """Give `source` labels from a file, with classes numbered together with those of the training images."""
    source.classes = sorted({*labels.classes, *elsewhere})
    place = np.array([*(source.classes.index(name) for name in labels.classes), -1], np.int64)
    source.labels = place[labels.numbers]
    if unknown := int((source.labels < 0).sum()):
        source.note = f"{unknown:,} of the {len(source):,} validation images have no label"
