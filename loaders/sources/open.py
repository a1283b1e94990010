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
from fastrdm.loaders.sources.folder import FolderSource, class_folders, split_folders
from fastrdm.loaders.sources.imagenet import open_imagenet
from fastrdm.loaders.sources.packed import META, PackedSource
from fastrdm.loaders.sources.parquet import open_parquet
from fastrdm.loaders.sources.remote import open_remote
from fastrdm.loaders.sources.source import ArraySource, NoImages, Source, Subset
from fastrdm.loaders.sources.store import is_remote
from fastrdm.loaders.sources.tar_folders import open_tar
from fastrdm.loaders.sources.webdataset import open_webdataset
from fastrdm.loaders.spec import LoaderConfig
from fastrdm.schema import require

PARTS = ("train", "val", "test")
DIGITS_TRAIN = 1437  # of 1,797 images, in scikit-learn's order


def open_source(config: LoaderConfig, split: Split) -> Source:
    """The images of `split`; `config.subset` shortens the training split. Raises ValueError naming what is amiss.

    A set that has no images to evaluate on gives none of them for "test".
    """
    source = open_whole(config, split)
    return source if config.subset is None or split == "test" else balanced(source, config.subset, "loader.subset")


def open_whole(config: LoaderConfig, split: Split) -> Source:
    """The images of `split`, of the classes that are asked for."""
    if parts.is_own(config.source):
        source = _open_class(config, split)
    elif config.source in SOURCES:
        source = SOURCES[config.source](config, split)
    else:
        near = difflib.get_close_matches(config.source, SOURCES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(SOURCES)}, or pkg.mod:Class"
        raise ValueError(f"loader.source is unknown: {config.source!r}; {hint}")
    check_labels(source.labels, source.classes, f"loader.source={config.source} ({split})")
    if config.classes is not None and len(source):
        source = of_classes(source, config.classes, f"{config.root or config.source} ({split})")
    return source


def open_parts(config: LoaderConfig) -> dict[str, Source]:
    """Every split of a set by its name in a packed set, train, val and test; {"": source} for a set without splits."""
    if config.source == "folder" and (splits := split_folders(_root(config))):
        return {name: _open_part(config, folder, splits) for name, folder in splits.items()}
    train, test = open_whole(config, "train"), open_whole(config, "test")
    return {"train": train, "val": test} if len(test) else {"": train}


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


def balanced(source: Source, size: int, key: str) -> Subset:
    """The first images of each class, `size` in all, as nearly the same number of each class as there are images.

    ValueError, naming the setting `key`, where the source has fewer.
    """
    require(size <= len(source), key, f"at most the {len(source):,} images of {source.name}", size)
    classes, counts = np.unique(source.labels, return_counts=True)
    left, shares = size, np.zeros_like(counts)
    for place, k in enumerate(np.argsort(counts, kind="stable")):
        # small classes first: what they lack is spread over the larger ones behind them
        shares[k] = min(counts[k], left // (len(counts) - place))
        left -= shares[k]
    chosen = [np.flatnonzero(source.labels == label)[:share] for label, share in zip(classes, shares, strict=True)]
    return Subset(source, np.sort(np.concatenate(chosen)))


def _root(config: LoaderConfig) -> Path:
    fetched = config.download and config.source in CIFAR
    if config.root is None or not (Path(config.root).is_dir() or fetched):
        wanted = "a folder of images" if config.source == "folder" else f"the folder of {config.source}"
        raise ValueError(f"loader.root must be {wanted}, got {config.root!r}, which is no folder")
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
    splits = split_folders(_root(config))
    root = _part(_root(config), split, splits)
    return NoImages("folder") if root is None else _open_part(config, root, splits)


def _open_part(config: LoaderConfig, root: Path, splits: dict[str, Path]) -> FolderSource:
    """The folder of one split, with classes numbered over all of them."""
    others = [folder for folder in splits.values() if folder != root]
    by_folder = config.labels in ("auto", "folders")
    return FolderSource(root, config.labels, {name for folder in others if by_folder for name in class_folders(folder)})


def _open_packed(config: LoaderConfig, split: Split) -> Source:
    if is_remote(config.root):
        return open_remote(config, split)
    root = _root(config)
    if (root / META).is_file():
        return PackedSource(root) if split == "train" else NoImages("packed")
    part = _part(root, split, {name: root / name for name in PARTS if (root / name).is_dir()})
    if part is None:
        return NoImages("packed")
    return BetonSource(part) if (part / BETON).is_file() else PackedSource(part)


def _part(root: Path, split: Split, splits: dict[str, Path]) -> Path | None:
    """The folder of `split`, None where there is none to evaluate on: root itself is for training without splits."""
    if split == "test":
        return splits.get("val", splits.get("test"))
    if splits and "train" not in splits:
        raise ValueError(f"loader.root must hold a folder train, got {root}, which has {', '.join(splits)}")
    return splits.get("train", root)


def _open_class(config: LoaderConfig, split: Split) -> Source:
    """Build pkg.mod:Class from (root, split), after checking that it is a complete Source."""
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
    "imagenet": open_imagenet,
    "tar": open_tar,
    "webdataset": open_webdataset,
    "parquet": open_parquet,
}
