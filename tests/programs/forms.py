"""A small set of photographs in every form that ImageNet and other sets come in, for tests."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

CLASSES = ("n01440764", "n01443537", "n01484850")
TRAIN, VAL = 12, 6  # images in all


def photographs(count: int, seed: int) -> list[bytes]:
    """JPEG files: crops of scikit-learn's two photographs, from 40 to 90 px a side."""
    random = np.random.default_rng(seed)
    whole = load_sample_images().images
    files = []
    for k in range(count):
        height, width = (int(n) for n in random.integers(40, 90, 2))
        top, left = int(random.integers(0, 427 - height)), int(random.integers(0, 640 - width))
        file = io.BytesIO()
        Image.fromarray(whole[k % 2][top : top + height, left : left + width]).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def train_files() -> list[tuple[str, str, bytes]]:
    """Class, file name and bytes of each training image."""
    data = photographs(TRAIN, 0)
    return [(CLASSES[k * 3 // TRAIN], f"{CLASSES[k * 3 // TRAIN]}_{k}.JPEG", data[k]) for k in range(TRAIN)]


def val_files() -> list[tuple[str, str, bytes]]:
    """Class, file name and bytes of each validation image, whose classes are in no order."""
    data = photographs(VAL, 1)
    return [(CLASSES[(2 * k + 1) % 3], f"ILSVRC2012_val_{k + 1:08}.JPEG", data[k]) for k in range(VAL)]


def put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def tar_of(files: list[tuple[str, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def folders(root: Path) -> None:
    for split, files in (("train", train_files()), ("val", val_files())):
        for name, file, data in files:
            put(root / split / name / file, data)


def archives(root: Path) -> None:
    """image-net.org's tar files, with the devkit packed."""
    by_class = {name: [(file, data) for n, file, data in train_files() if n == name] for name in CLASSES}
    inner = [(f"{name}.tar", tar_of(files)) for name, files in by_class.items()]
    put(root / "ILSVRC2012_img_train.tar", tar_of(inner))
    put(root / "ILSVRC2012_img_val.tar", tar_of([(file, data) for _, file, data in reversed(val_files())]))
    devkit(root / "devkit")
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        tar.add(root / "devkit", "ILSVRC2012_devkit_t12/data")
    for file in (root / "devkit").iterdir():
        file.unlink()
    (root / "devkit").rmdir()


def devkit(folder: Path) -> None:
    """The devkit's two files that tell the labels; its class numbers are not in the order of the names."""
    from scipy.io import savemat

    folder.mkdir(parents=True, exist_ok=True)
    number = {name: k for k, name in zip((2, 3, 1), CLASSES, strict=True)}
    synsets = np.zeros(4, [("ILSVRC2012_ID", "O"), ("WNID", "O")])
    for row, (name, k) in enumerate([*number.items(), ("n00000001", 1001)]):
        synsets[row] = (k, name)
    savemat(folder / "meta.mat", {"synsets": synsets})
    lines = [str(number[name]) for name, _, _ in val_files()]
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text("\n".join(lines) + "\n")


def unpacked_once(root: Path) -> None:
    """The outer training tar unpacked, a flat validation folder, the devkit unpacked."""
    for name in CLASSES:
        files = [(file, data) for n, file, data in train_files() if n == name]
        put(root / "train" / f"{name}.tar", tar_of(files))
    for _, file, data in val_files():
        put(root / "ILSVRC2012_img_val" / file, data)
    devkit(root / "ILSVRC2012_devkit_t12" / "data")


def kaggle(root: Path) -> None:
    """What Kaggle's archive holds."""
    data = root / "ILSVRC" / "Data" / "CLS-LOC"
    for name, file, content in train_files():
        put(data / "train" / name / file, content)
    for _, file, content in val_files():
        put(data / "val" / file, content)
    put(data / "test" / "ILSVRC2012_test_00000001.JPEG", photographs(1, 2)[0])
    rows = [f"{file.removesuffix('.JPEG')},{name} 1 2 3 4 {name} 5 6 7 8 " for name, file, _ in val_files()]
    (root / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "\n".join(reversed(rows)) + "\n")


def webdataset(root: Path) -> None:
    """Shards as the hub's ImageNet has them; the labels are numbers, whose names stand beside."""
    root.mkdir(parents=True, exist_ok=True)
    for split, files, each in (("train", train_files(), 5), ("validation", val_files(), 6)):
        for shard, start in enumerate(range(0, len(files), each)):
            members = []
            for k, (name, _, data) in enumerate(files[start : start + each], start):
                label = CLASSES.index(name)
                members += [(f"{k:06}.jpg", data), (f"{k:06}.cls", str(label).encode())]
                members.append((f"{k:06}.json", json.dumps({"label": label, "width": 3}).encode()))
            put(root / f"set-{split}-{shard:04}.tar", tar_of(members))
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")


def parquet(root: Path, rows: int = 3) -> None:
    """Files as the hub's ImageNet has them, `rows` in a row group."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    root.mkdir(parents=True, exist_ok=True)
    feature = {"image": {"_type": "Image"}, "label": {"names": list(CLASSES), "_type": "ClassLabel"}}
    told: Any = {b"huggingface": json.dumps({"info": {"features": feature}}).encode()}
    for split, files, each in (("train", train_files(), 7), ("validation", val_files(), 6)):
        parts = range(0, len(files), each)
        for part, start in enumerate(parts):
            some = files[start : start + each]
            images = [{"bytes": data, "path": file} for _, file, data in some]
            table = pa.table({"image": images, "label": [CLASSES.index(name) for name, _, _ in some]})
            path = root / "data" / f"{split}-{part:05}-of-{len(parts):05}.parquet"
            path.parent.mkdir(exist_ok=True)
            pq.write_table(table.replace_schema_metadata(told), path, row_group_size=rows)


def tar_of_folders(root: Path) -> None:
    """One tar file of a folder with both splits, as `tar cf set.tar set` makes it."""
    members = [(f"./set/train/{name}/{file}", data) for name, file, data in train_files()]
    members += [(f"./set/val/{name}/{file}", data) for name, file, data in val_files()]
    put(root / "set.tar", tar_of([*members, ("./set/README.txt", b"two splits")]))


def tars_of_tars(root: Path) -> None:
    """Two training files and one for validation, in which each class is a tar file or a folder."""
    by_class = {name: [(file, data) for n, file, data in train_files() if n == name] for name in CLASSES}
    inner = [(f"{name}.tar", tar_of(files)) for name, files in by_class.items()]
    put(root / "train-0.tar", tar_of(inner[:2]))
    put(root / "train-1.tar", tar_of(inner[2:]))
    put(root / "val.tar", tar_of([(f"val/{name}/{file}", data) for name, file, data in val_files()]))


FORMS = {  # name: loader.source and how the form is made
    "folders": ("folder", folders),
    "imagenet folders": ("imagenet", folders),
    "imagenet archives": ("imagenet", archives),
    "imagenet unpacked once": ("imagenet", unpacked_once),
    "kaggle": ("imagenet", kaggle),
    "tar of folders": ("tar", tar_of_folders),
    "tars of tars": ("tar", tars_of_tars),
    "webdataset": ("webdataset", webdataset),
    "parquet": ("parquet", parquet),
}
