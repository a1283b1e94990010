"""Class lists: what they keep, and lists or sizes that do not fit the data."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastrdm.loaders.build import build_loader
from fastrdm.loaders.sources.class_list import read_class_list
from fastrdm.loaders.sources.open import open_source
from fastrdm.loaders.spec import LoaderConfig, ViewSpec


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """train: cat 2 images, dog 1, eel 3; val: one of each; the image tells class and number."""
    for split, counts in {"train": (2, 1, 3), "val": (1, 1, 1)}.items():
        for label, (name, count) in enumerate(zip(("cat", "dog", "eel"), counts, strict=True)):
            folder = tmp_path / "set" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                image = np.full((8, 8, 3), 40 * label + 10 * number, np.uint8)
                Image.fromarray(image).save(folder / f"{number}.png")
    return tmp_path / "set"


def listed(root: Path, text: str) -> str:
    path = root.parent / "list.txt"
    path.write_text(text)
    return str(path)


def test_kept_as_in_a_folder_that_holds_no_others(root: Path) -> None:
    config = LoaderConfig(source="folder", root=str(root), classes=listed(root, "# fish\neel\n\n  cat  # pet\n"))
    train, test = open_source(config, "train"), open_source(config, "test")
    assert train.classes == test.classes == ["cat", "eel"]
    assert train.labels.tolist() == [0, 0, 1, 1, 1] and test.labels.tolist() == [0, 1]
    assert [int(train.read(i)[0, 0, 0]) for i in range(5)] == [0, 10, 80, 90, 100]
    half = open_source(LoaderConfig(source="folder", root=str(root), classes=config.classes, subset=4), "train")
    assert half.labels.tolist() == [0, 0, 1, 1]


def test_images_in_memory_are_kept_with_their_labels(root: Path) -> None:
    everything = open_source(LoaderConfig(), "train")
    kept = open_source(LoaderConfig(classes=listed(root, "7\n1\n")), "train")
    assert kept.classes == ["1", "7"] and kept.images is not None and everything.images is not None
    assert np.array_equal(kept.images[kept.labels == 1], everything.images[everything.labels == 7])
    assert len(kept) == int(np.isin(everything.labels, (1, 7)).sum()) == len(kept.images)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "cat\nfox\nape\n",
            r"loader.classes=.*list.txt: 2 of its 3 classes are not among the 3 of .*set \(train\): ape, fox",
        ),
        ("cat\ndog\ncat\n", r"loader.classes=.*list.txt must hold each class once, got cat twice"),
        ("# nothing\n", r"loader.classes=.*list.txt must hold one class a line, got none"),
    ],
)
def test_lists_that_do_not_fit_are_refused_by_name(root: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_source(LoaderConfig(source="folder", root=str(root), classes=listed(root, text)), "train")


def test_the_shipped_list_is_not_for_any_folder(root: Path) -> None:
    with pytest.raises(ValueError, match=r"classes=imagenet100: 100 of its 100 .*: n01558993, .*, \.\.\.$"):
        open_source(LoaderConfig(source="folder", root=str(root), classes="imagenet100"), "train")


def test_unknown_list_and_unreadable_list(root: Path) -> None:
    with pytest.raises(ValueError, match=r"or a shipped list \(imagenet100\), got 'imagenet10'"):
        read_class_list("imagenet10")
    (root.parent / "list.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match=r"loader.classes=.*list.txt cannot be read: "):
        read_class_list(str(root.parent / "list.txt"))


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("\ufeffcat\ndog\n", encoding="utf-8")
    assert read_class_list(str(tmp_path / "list.txt")) == ["cat", "dog"]
    (tmp_path / "list.txt").write_bytes("dog\nhöhle\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"list\.txt cannot be read: .*list\.txt, line 2: not UTF-8"):
        read_class_list(str(tmp_path / "list.txt"))


def test_imagenet100_is_the_published_list() -> None:
    names = read_class_list("imagenet100")
    assert len(names) == 100 and names == sorted(set(names))
    assert all(len(name) == 9 and name[0] == "n" and name[1:].isdecimal() for name in names)
    assert {"n02869837", "n01749939", "n02488291", "n02107142", "n13037406", "n02090622"} <= set(names)  # CMC's order


def test_views_far_larger_than_the_images_are_refused() -> None:
    source = open_source(LoaderConfig(), "train")  # digits, 8 px
    views = (ViewSpec(size=8), ViewSpec(size=33))
    with pytest.raises(ValueError, match=r"views.\*.size must be at most loader.max_enlarge=4 times .* 8x8 px, got 33"):
        build_loader(LoaderConfig(views=views), source, seed=0)
    build_loader(LoaderConfig(views=views, max_enlarge=5.0), source, seed=0)


def test_local_crops_larger_than_the_global_views_are_refused() -> None:
    sizes = r"two global views and local crops that are no larger \(sizes in pixels\), got \[8, 16, 17\]"
    with pytest.raises(ValueError, match=sizes):
        LoaderConfig(views=(ViewSpec(size=8), ViewSpec(size=16), ViewSpec(size=17)))
