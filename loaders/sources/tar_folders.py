"""Folders of images inside tar files, as `tar cf set.tar SET` makes them, read in place."""

import os
from collections.abc import Collection
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastrdm.loaders.sources.archives import Split
from fastrdm.loaders.sources.folder import SPLIT_FOLDERS, class_names, label_by_file, name_splits
from fastrdm.loaders.sources.index_cache import Arrays, text_array, texts_of
from fastrdm.loaders.sources.listing import SYSTEM_FOLDERS, PassedOver, is_image
from fastrdm.loaders.sources.shard_set import ShardSet, open_shards
from fastrdm.loaders.sources.source import NoImages, Source
from fastrdm.loaders.sources.tar import TarSource, members, one_line
from fastrdm.loaders.spec import LoaderConfig

SPLITS: tuple[Split, Split] = ("train", "test")


class Image(NamedTuple):
    """An image inside a tar file."""

    name: str  # its path in the tar file, below the folders that lead to the set
    shard: int  # number of the tar file
    offset: int  # of its first byte
    length: int  # bytes


class Listing(NamedTuple):
    """The images of some tar files."""

    files: ShardSet
    images: list[Image]
    passed: int  # members that are no images, and links


def open_tar(config: LoaderConfig, split: Split) -> Source:
    """The images of `split`, which the names of the tar files tell, else folders train, val and test within them.

    The first folder of an image's path is its class, under the rules of FolderSource; a tar file inside a tar file is a
    folder of its name.
    """
    train, test = (open_shards(config, ".tar", "tar", name) for name in SPLITS)
    found = {"train": _listed(train)}
    if test.names:
        found["val"] = _listed(test)
    else:
        found = _by_folder(found["train"])
        if "train" not in found:
            raise ValueError(
                f"loader.root must hold images of a folder train, got those of {', '.join(found)} in {train.names[0]}"
            )
    wanted = found["train"] if split == "train" else found.get("val", found.get("test"))
    if wanted is None:
        return NoImages("tar")
    others = {_top(image.name) for listing in found.values() if listing is not wanted for image in listing.images}
    return TarFolders(wanted, config, others - {""} if config.labels in ("auto", "folders") else ())


class TarFolders(TarSource):
    """Encoded images in tar files, labeled by their folders or by a file."""

    def __init__(self, listing: Listing, config: LoaderConfig, classes_elsewhere: Collection[str]) -> None:
        """`config.labels` and `classes_elsewhere` as for FolderSource."""
        labels, files = config.labels, listing.files
        place = files.names[0] if len(files.names) == 1 else str(config.root)
        images, notes, passed = listing.images, list[str](), PassedOver()
        classes = class_names([_top(image.name) for image in images], labels, classes_elsewhere, place)
        if classes:
            for image in images:
                if not _top(image.name):
                    passed.add("images outside the class folders", image.name)
            number = {name: k for k, name in enumerate(classes)}
            kept = (image for image in images if _top(image.name))
            images = sorted(kept, key=lambda image: (number[_top(image.name)], image.name, image.shard))
            codes = np.array([number[_top(image.name)] for image in images], np.int64)
        else:
            images = sorted(images)
            codes = np.full(len(images), -1)
            if labels in ("auto", "none"):
                notes.append(f"the images of {place} are used without labels")
            else:
                codes, classes = label_by_file(Path(labels), [image.name for image in images], place, notes)
        shards, offset, length = np.array([image[1:] for image in images], np.int64).T
        super().__init__("tar", files.names, shards, offset, length, codes, classes or [], files.cache)
        self.names: NDArray[np.bytes_] = text_array([image.name for image in images])
        other = f"passed over: {listing.passed:,} members that are links or no images" if listing.passed else ""
        self.note = "; ".join(filter(None, (*notes, str(passed), other))) or None

    def called(self, index: int) -> str:
        return f"{self.paths[self.shards.item(index)]}, {one_line(self._name(index))}"

    def key(self, index: int) -> str:
        name = self._name(index)
        return name if len(self.paths) == 1 else f"{os.path.basename(self.paths[self.shards.item(index)])}/{name}"

    def _name(self, index: int) -> str:
        return texts_of(self.names[index : index + 1])[0]


def _top(name: str) -> str:
    """The first folder of a path, '' for a file without one."""
    return name[: max(name.find("/"), 0)]


def _listed(files: ShardSet) -> Listing:
    """The images of tar files, named below the folders that all of them lie in."""
    found = files.indexes("tar", _build)
    images = [
        Image(*image)
        for shard, index in enumerate(found)
        for image in zip(
            texts_of(index["names"]),
            [shard] * len(index["offset"]),
            index["offset"].tolist(),
            index["length"].tolist(),
            strict=True,
        )
    ]
    if not images:
        raise ValueError(f"loader.root must hold images, got none in {files.names[0]}")
    # `tar cf set.tar SET` puts SET/ before every name. A folder that holds images itself may be a class.
    while len(tops := {_top(image.name) for image in images}) == 1 and "" not in tops:
        if not tops <= SPLIT_FOLDERS and any(image.name.count("/") < 2 for image in images):
            break
        images = [image._replace(name=image.name.partition("/")[2]) for image in images]
    return Listing(files, images, sum(int(index["passed"]) for index in found))


def _build(path: Path) -> Arrays:
    """Names, offsets and lengths of the images of one tar file; ValueError names one that is there twice."""
    passed, images = list[str](), []
    for member in members(path, passed):
        *folders, file = member.name.split("/")
        if is_image(file) and not any(name.startswith(".") or name in SYSTEM_FOLDERS for name in folders):
            images.append(member)
        else:
            passed.append(member.name)
    if twice := next((a for a, b in pairwise(sorted(member.name for member in images)) if a == b), None):
        raise ValueError(f"{path} holds {one_line(twice)} twice")
    return {
        "names": text_array([member.name for member in images]),
        "offset": np.array([member.offset for member in images], np.int64),
        "length": np.array([member.size for member in images], np.int64),
        "passed": np.array(len(passed)),
    }


def _by_folder(listing: Listing) -> dict[str, Listing]:
    """The images of each split, by the folders train, val and test where there are such."""
    tops: dict[str, list[Image]] = {}
    for image in listing.images:
        tops.setdefault(_top(image.name), []).append(image._replace(name=image.name[image.name.find("/") + 1 :]))
    itself = {top for top, images in tops.items() if any("/" not in image.name for image in images)}
    splits = name_splits(tops.keys() - {""}, lambda _: True, lambda name: name in itself)
    return {split: listing._replace(images=tops[name]) for split, name in splits.items()} or {"train": listing}
