"""The table of sources, and how a source is opened by its name."""

import difflib
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fastrdm import parts
from fastrdm.loaders.sources.archives import CIFAR, FASHION_ROOT, Arrays, Split, read_cifar, read_fashion_mnist
from fastrdm.loaders.sources.beton import BETON, BetonSource
from fastrdm.loaders.sources.checks import check_labels, check_pixels
from fastrdm.loaders.sources.class_list import check_classes, read_class_list
from fastrdm.loaders.sources.folder import FolderSource
from fastrdm.loaders.sources.packed import PackedSource
from fastrdm.loaders.sources.source import ArraySource, Source, Subset
from fastrdm.loaders.spec import LoaderConfig

DIGITS_TRAIN = 1437  # of 1,797 images, in scikit-learn's order


def open_source(config: LoaderConfig, split: Split) -> Source:
    """The images of `split`; `config.subset` shortens the training split. Raises ValueError naming what is amiss."""
    if parts.is_own(config.source):
        source = _open_class(config, split)
    elif config.source in SOURCES:
        source = SOURCES[config.source](config, split)
    else:
        near = difflib.get_close_matches(config.source, SOURCES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(SOURCES)}, or pkg.mod:Class"
        raise ValueError(f"loader.source is unknown: {config.source!r}; {hint}")
    check_labels(source.labels, source.classes, f"loader.source={config.source} ({split})")
    if config.classes is not None:
        source = of_classes(source, config.classes, f"{config.root or config.source} ({split})")
    return source if config.subset is None or split == "test" else balanced(source, config.subset)


def of_classes(source: Source, name: str, where: str) -> Subset:
    """Only the images of the classes in list `name`, numbered and labeled as in a folder that holds no others."""
    wanted = read_class_list(name)
    check_classes(wanted, source.classes, name, where)
    old = np.array([source.classes.index(label) for label in wanted])
    kept = Subset(source, np.flatnonzero(np.isin(source.labels, old)))
    new = np.full(len(source.classes), -1)
    new[old] = np.arange(len(old))
    kept.classes, kept.labels = wanted, new[kept.labels]
    return kept


def balanced(source: Source, size: int) -> Subset:
    """The first images of each class, the same number of each, `size` in all."""
    classes, counts = np.unique(source.labels, return_counts=True)
    share, rest = divmod(size, len(classes))
    if rest or share > counts.min():
        raise ValueError(
            f"loader.subset must be a multiple of the {len(classes)} classes and at most {counts.min() * len(classes)} "
            f"(the smallest class has {counts.min()} images), got {size}"
        )
    chosen = [np.flatnonzero(source.labels == label)[:share] for label in classes]
    return Subset(source, np.sort(np.concatenate(chosen)))


def _root(config: LoaderConfig) -> Path:
    fetched = config.download and config.source in CIFAR
    if config.root is None or not (Path(config.root).is_dir() or fetched):
        raise ValueError(f"loader.root must be the folder of {config.source}, got {config.root!r}, which is no folder")
    return Path(config.root)


def _open_digits(_: LoaderConfig, split: Split) -> Source:
    from sklearn.datasets import load_digits  # takes half a second: only who needs it waits

    digits = load_digits()
    part = slice(DIGITS_TRAIN) if split == "train" else slice(DIGITS_TRAIN, None)
    gray = np.round(digits.images[part] * (255 / 16)).astype(np.uint8)
    return ArraySource("digits", Arrays(np.repeat(gray[..., None], 3, axis=3), digits.target[part], list("0123456789")))


def _open_fashion_mnist(config: LoaderConfig, split: Split) -> Source:
    return ArraySource("fashion_mnist", read_fashion_mnist(Path(config.root or FASHION_ROOT), split))


def _open_cifar(config: LoaderConfig, split: Split) -> Source:
    return ArraySource(config.source, read_cifar(config.source, _root(config), split, config.download))


def _open_folder(config: LoaderConfig, split: Split) -> Source:
    return FolderSource(_part(_root(config), split))


def _open_packed(config: LoaderConfig, split: Split) -> Source:
    root = _root(config)
    if split == "train" or not (root / "meta.json").is_file():
        part = _part(root, split)
        return BetonSource(part) if (part / BETON).is_file() else PackedSource(part)
    whole = PackedSource(root)
    if whole.classes:
        raise ValueError(f"loader.root must hold packed folders train and val, got {root}, which is one packed folder")
    return whole  # without labels nothing is measured on it


def _part(root: Path, split: Split) -> Path:
    """The folder of `split`: root itself for training where it has no folders of that kind."""
    parts = {part for part in ("train", "val", "test") if (root / part).is_dir()}
    if not parts and split == "train":
        return root
    found = [part for part in (("train",) if split == "train" else ("val", "test")) if part in parts]
    if not found:
        missing = "train" if split == "train" else "val or test"
        raise ValueError(f"loader.root must hold a folder {missing}, got {root}, which has none")
    return root / found[0]


def _open_class(config: LoaderConfig, split: Split) -> Source:
    """What pkg.mod:Class gives for (root, split), once it is known to be a Source and to have all that one has."""
    expected = "a subclass of fastrdm.Source, or a function annotated as returning one"
    make = parts.load(config.source, "loader.source", lambda found: parts.makes(found, Source), expected)
    source = make(config.root, split)
    if not isinstance(source, Source):
        raise ValueError(f"loader.source {config.source!r} must give a fastrdm.Source (docs/extending.md)")
    missing = [attribute for attribute in ("name", "classes", "labels") if not hasattr(source, attribute)]
    if type(source).read is Source.read and not source.encoded:
        missing.append("fetch or read")
    if missing:
        raise ValueError(f"loader.source {config.source!r} lacks {', '.join(missing)} (docs/extending.md)")
    _check_own(source, config.source)
    if len(source.labels) != len(source):
        raise ValueError(f"loader.source {config.source!r} has {len(source)} images and {len(source.labels)} labels")
    return source


def _check_own(source: Source, name: str) -> None:
    """ValueError where an attribute of a user's source is not what Source says; it would give wrong pixels silently."""
    if not isinstance(source.labels, np.ndarray):
        raise ValueError(f"labels of loader.source {name!r} must be a numpy array, got {type(source.labels).__name__}")
    if source.images is not None:
        check_pixels(source.images, (len(source), None, None, 3), f"images of loader.source {name!r}")
    for key, least in (("mean", -math.inf), ("std", 0.0)):
        value = getattr(source, key)
        if value is not None and not (len(value) == 3 and all(math.isfinite(v) and v > least for v in value)):
            wanted = "three finite numbers" + (" above 0" if key == "std" else "")
            raise ValueError(f"loader.source {name!r} must have {wanted} as {key}, got {value!r}")


SOURCES: dict[str, Callable[[LoaderConfig, Split], Source]] = {
    "digits": _open_digits,
    "fashion_mnist": _open_fashion_mnist,
    **dict.fromkeys(CIFAR, _open_cifar),
    "folder": _open_folder,
    "packed": _open_packed,
}
