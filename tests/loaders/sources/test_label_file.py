"""Label files: the forms that are understood, and one line with file and row for what is wrong."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastrdm.loaders.sources.folder import FolderSource
from fastrdm.loaders.sources.label_file import read_labels, sort_classes

FILES = ["a/1.jpg", "a/2.jpg", "b/1.jpg"]


def put(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(root / name)
    return root


def written(tmp_path: Path, text: str | bytes, name: str = "labels.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    "text",
    [
        "file,label\na/1.jpg,cat\nb/1.jpg,dog\n",
        "\ufefffile,label\na/1.jpg,cat\nb/1.jpg,dog\n",
        "label;id;path\r\ncat;7; a/1.jpg \r\n dog;8;b/1.jpg\r\n",
        "ImageId,PredictionString\na/1,cat 10 20 30 40 cat 1 2 3 4\nb/1,dog 1 2 3 4\n",
        "filename\tclass\nimages/x,cat\n".replace("images/x,", "a/1.jpg\t") + "b/1.jpg\tdog\n\n",
    ],
)
def test_tables(tmp_path: Path, text: str) -> None:
    found = read_labels(written(tmp_path, text), FILES)
    if "\tclass" in text or "a/1.jpg" in text:
        assert found.numbers.tolist() == [0, -1, 1] and found.classes == ["cat", "dog"] and found.unmatched == []
    else:
        assert found.unmatched == ["a/1", "b/1"], "a name with a folder has its suffix"


def test_kaggle_names_images_without_folder_and_suffix(tmp_path: Path) -> None:
    told = "ImageId,PredictionString\nILSVRC2012_val_2,n02 1 2 3 4 \nILSVRC2012_val_1,n01 1 2 3 4 n01 5 6 7 8\n"
    found = read_labels(written(tmp_path, told), ["val/ILSVRC2012_val_1.JPEG", "val/ILSVRC2012_val_2.JPEG"])
    assert found.numbers.tolist() == [0, 1] and found.classes == ["n01", "n02"]


def test_numbers_are_sorted_as_numbers() -> None:
    assert sort_classes(["10", "9", "2", "9"]) == ["2", "9", "10"] and sort_classes(["10", "9", "x"]) == [
        "10",
        "9",
        "x",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("file,label\na/1.jpg,a\na/2.jpg\n", r"labels\.csv, row 3: has 1 of the 2 columns of the first line"),
        ("file,label\na/1.jpg,a\na/1.jpg,b\n", r"labels\.csv, row 3: names a/1\.jpg again, after row 2"),
        ("file,label\na/1.jpg, \n", r"labels\.csv, row 2: gives a/1\.jpg no label: leave the row out"),
        ("file,label\n,a\n", r"labels\.csv, row 2: names no image"),
        ('file,label\na/1.jpg,"a\n', r"labels\.csv, row 2: unexpected end of data"),
        ("image,kind\na/1.jpg,a\n", r"must have the columns file and label in its first line, got 'image,kind'"),
        ("", r"must have the columns file and label in its first line, got ''"),
        ("file,label\na/1.jpg,caf\xe9\n".encode("latin-1"), r"labels\.csv, line 2: not UTF-8"),
        ("file,label\na/1.jpg,a\n".encode("utf-16"), r"labels\.csv, line 1: not UTF-8"),
    ],
)
def test_one_line_names_file_and_row(tmp_path: Path, text: str | bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said) as refused:
        read_labels(written(tmp_path, text), FILES)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"loader\.labels must be auto, folders, none or a file, got .*nowhere"):
        read_labels(tmp_path / "nowhere", FILES)


def test_ground_truth_of_a_devkit(tmp_path: Path) -> None:
    scipy_io = pytest.importorskip("scipy.io")
    files = ["val_2.JPEG", "val_1.JPEG", "val_3.JPEG"]
    path = written(tmp_path, "3\n10\n3\n", "truth.txt")
    plain = read_labels(path, files)
    assert plain.classes == ["3", "10"] and plain.numbers.tolist() == [1, 0, 0]
    synsets = np.zeros(4, [("ILSVRC2012_ID", "O"), ("WNID", "O")])
    synsets["ILSVRC2012_ID"], synsets["WNID"] = [1, 3, 10, 1001], ["n03", "n09", "n01", "n00"]
    scipy_io.savemat(tmp_path / "meta.mat", {"synsets": synsets})
    named = read_labels(path, files)
    assert named.classes == ["n01", "n03", "n09"], "inner nodes of WordNet are no classes"
    assert [named.classes[k] for k in named.numbers] == ["n01", "n09", "n09"]
    for text, said in (
        ("1\n", r"truth\.txt has 1 lines, one for each image in sorted order; there are 3"),
        ("1\nx\n3\n", r"truth\.txt, line 2: must be the number of a class, got 'x'"),
        ("1\n3\n4\n", r"truth\.txt, line 3: class 4 is not among the 3 of"),
    ):
        with pytest.raises(ValueError, match=said):
            read_labels(written(tmp_path, text, "truth.txt"), files)
    (tmp_path / "meta.mat").write_bytes(b"no matrix")
    with pytest.raises(ValueError, match=r"meta\.mat cannot be read as the devkit's list of classes"):
        read_labels(path, files)


def test_a_folder_with_a_label_file(tmp_path: Path) -> None:
    put(tmp_path / "set", *FILES)
    path = written(tmp_path, "file,label\n1.jpg,x\n")
    with pytest.raises(ValueError, match=r"names 1\.jpg"):
        # the end of a path is found, and here it is the end of two
        read_labels(written(tmp_path, "file,label\n1.jpg,x\n1.jpg,y\n", "twice.csv"), FILES)
    source = FolderSource(tmp_path / "set", str(path))
    assert source.classes == ["x"] and source.labels.tolist() == [0, -1, 0]
    assert "has a label for 2 of the 3 images" in str(source.note)
    with pytest.raises(ValueError, match=r"names none of the images of .*set, but for instance z\.jpg"):
        FolderSource(tmp_path / "set", str(written(tmp_path, "file,label\nz.jpg,x\n")))
