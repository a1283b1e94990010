"""Packing: right pixels for every trap, the same bytes for any workers and after a kill, all that is odd reported."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from fastrdm.loaders.packing import pack
from fastrdm.loaders.packing.pack import main
from fastrdm.loaders.packing.shard_writer import TURNS, Settings, center_square, entry
from fastrdm.loaders.sources.decode import CorruptImage
from fastrdm.loaders.sources.folder import FolderSource
from fastrdm.loaders.sources.packed import PackedSource

Array = np.ndarray[Any, np.dtype[Any]]
RANDOM = np.random.default_rng(0)


def photo(height: int, width: int) -> Array:
    """Smooth colors: what JPEG keeps to a few levels."""
    coarse = RANDOM.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


PHOTO = photo(60, 80)


def encoded(image: Image.Image | Array, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(PHOTO, "JPEG", quality=95, exif=exif)


def settings(mode: str, size: int = 32, exif: str = "ignore") -> Settings:
    return Settings(".", mode, size, exif)


TRAPS = {
    "plain": encoded(PHOTO, "JPEG", quality=95),
    "grayscale": encoded(PHOTO[..., 0], "JPEG", quality=95),
    "cmyk": encoded(Image.fromarray(PHOTO).convert("CMYK"), "JPEG", quality=95),
    "png": encoded(PHOTO, "PNG"),
    "progressive": encoded(PHOTO, "JPEG", quality=95, progressive=True),
    "palette": encoded(Image.fromarray(PHOTO).convert("P"), "PNG"),
    "alpha": encoded(Image.fromarray(np.dstack([PHOTO, PHOTO[..., :1]])), "PNG"),
    "pixel": encoded(PHOTO[:1, :1], "JPEG", quality=95),
    "wide": encoded(photo(40, 6000), "JPEG", quality=95),
    "tall": encoded(photo(90, 2), "PNG"),
}
REPAIRS = {
    "cmyk": "CMYK turned into RGB",
    "png": "a PNG by the name of a JPEG",
    "palette": "a PNG by the name of a JPEG",
    "alpha": "a PNG by the name of a JPEG",
    "tall": "a PNG by the name of a JPEG",
}


def by_pillow(data: bytes) -> Array:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def distance(a: Array, b: Array) -> int:
    assert a.shape == b.shape
    return int(np.abs(a.astype(int) - b.astype(int)).max())


TRANSCODING = 6  # levels that 8-bit YCbCr at quality 100 may cost a pixel; the median is 1


@pytest.mark.parametrize("trap", TRAPS)
def test_jpeg_mode_keeps_plain_files_and_transcodes_the_rest(trap: str) -> None:
    stored = entry(TRAPS[trap], "x.JPEG", settings("jpeg"))
    expected = by_pillow(TRAPS[trap])
    assert (stored.height, stored.width) == expected.shape[:2]
    assert stored.repairs == ([REPAIRS[trap]] if trap in REPAIRS else [])
    assert (stored.data == TRAPS[trap]) == (trap not in REPAIRS) and stored.flags == int(trap in REPAIRS)
    assert distance(simplejpeg.decode_jpeg(stored.data), expected) <= (TRANSCODING if trap in REPAIRS else 1)


@pytest.mark.parametrize("trap", TRAPS)
def test_raw_mode_is_what_torchvision_resizes_and_cuts(trap: str) -> None:
    v2 = pytest.importorskip("torchvision.transforms.v2")
    stored = entry(TRAPS[trap], "x.JPEG", settings("raw"))
    pixels = np.frombuffer(stored.data, np.uint8).reshape(32, 32, 3)
    image = Image.open(io.BytesIO(TRAPS[trap])).convert("RGB")
    resized = v2.Resize(32, interpolation=v2.InterpolationMode.BICUBIC, antialias=True, max_size=None)(image)
    assert distance(pixels, np.asarray(v2.CenterCrop(32)(resized))) <= 1
    assert stored.repairs == ([REPAIRS[trap]] if trap in REPAIRS else [])


@pytest.mark.parametrize("shape", [(500, 333), (333, 500), (489, 139), (460, 58), (91, 489), (64, 48)])
@pytest.mark.parametrize("size", [32, 95, 224])
def test_center_square_is_torchvisions_pixel_by_pixel(shape: tuple[int, int], size: int) -> None:
    v2 = pytest.importorskip("torchvision.transforms.v2")
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    transform = v2.Compose([v2.Resize(size, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(size)])
    expected = np.asarray(transform(Image.fromarray(noise)))
    np.testing.assert_array_equal(center_square(noise, size), expected)


def test_center_square_of_a_strip_takes_no_more_memory_than_its_square() -> None:
    pixels = np.arange(60_000, dtype=np.uint16).astype(np.uint8).reshape(60_000, 1, 1).repeat(3, axis=2)
    assert center_square(pixels, 288).shape == (288, 288, 3)


@pytest.mark.parametrize("shape", [(256, 256), (32, 33), (7, 100), (501, 375), (1, 1)])
def test_center_square(shape: tuple[int, int]) -> None:
    image, size = Image.fromarray(photo(*shape)), 32
    short = min(shape)
    tall, wide = (int(size * side / short) for side in shape)
    whole = image.resize((wide, tall), Image.Resampling.BICUBIC)
    left, top = round((wide - size) / 2), round((tall - size) / 2)
    expected = np.asarray(whole.crop((left, top, left + size, top + size)))
    assert distance(center_square(np.asarray(image), size), expected) <= 1


def test_sixteen_bits_keep_their_range() -> None:
    deep = (PHOTO[..., 0].astype(np.uint16) << 8) + 77
    stored = entry(encoded(Image.fromarray(deep), "PNG"), "x.png", settings("jpeg"))
    assert stored.repairs == ["PNG turned into JPEG"]
    assert distance(simplejpeg.decode_jpeg(stored.data), PHOTO[..., :1].repeat(3, axis=2)) <= TRANSCODING


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    data = turned(orientation)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    stored = entry(data, "x.jpg", settings("jpeg", exif="apply"))
    assert (stored.height, stored.width) == expected.shape[:2]
    assert distance(simplejpeg.decode_jpeg(stored.data), expected) <= TRANSCODING
    odd = orientation in TURNS
    assert stored.repairs == ([f"turned upright, EXIF orientation {orientation}"] if odd else [])
    assert stored.flags == (3 if odd else 0)
    assert entry(data, "x.jpg", settings("jpeg")).data == data, "ignored unless asked for, as torchvision does"


@pytest.mark.parametrize("data", [b"", TRAPS["plain"][:400], TRAPS["png"][:400], b"no image"])
def test_what_cannot_be_decoded_is_refused(data: bytes) -> None:
    for mode in ("raw", "jpeg"):
        with pytest.raises(CorruptImage, match=r"^a/x\.jpg: \S"):
            entry(data, "a/x.jpg", settings(mode))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of small images, every trap among them, and two files that cannot be read."""
    files = {f"b/{name}.JPEG": data for name, data in TRAPS.items()}
    files |= {f"a/{k:02}.jpg": encoded(photo(30 + k, 50 - k), "JPEG") for k in range(20)}
    files |= {"c/0.png": TRAPS["png"], "c/cut.jpg": TRAPS["plain"][:500], "c/empty.jpg": b"", "c/turned.jpg": turned(6)}
    for name, data in files.items():
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "images"


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 16 KiB, which --shard-mb cannot ask for."""
    plan = pack.plan

    def small(sizes: Any, options: Any) -> Any:
        options.shard_mb = 1 / 64
        return plan(sizes, options)

    monkeypatch.setattr(pack, "plan", small)


def content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("mode", ["raw", "jpeg"])
@pytest.mark.usefixtures("small_shards")
def test_a_folder_is_packed(folder: Path, tmp_path: Path, mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(folder), "", "--mode", mode, "--size", "32", "--max-bad", "0.1", "--exif", "apply"]
    for workers in (1, 3):
        arguments[1] = str(tmp_path / f"out{workers}")
        assert main([*arguments, "--workers", str(workers), "--verify"]) == 0
    told = capsys.readouterr().out
    one, three = content(tmp_path / "out1"), content(tmp_path / "out3")
    assert one == three and len(one) > 4, "several shards, the same whatever the number of workers"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "out1", "out3"]

    source, files = PackedSource(tmp_path / "out1"), FolderSource(folder)
    left = [k for k, name in enumerate(files.files) if name not in ("c/cut.jpg", "c/empty.jpg")]
    assert source.classes == ["a", "b", "c"] and source.labels.tolist() == files.labels[left].tolist()
    for k, number in enumerate(left):
        expected = files.read(number)
        if files.files[number] == "c/turned.jpg":
            expected = np.rot90(expected, -1)
        if mode == "raw":
            expected = center_square(expected, 32)
        assert distance(source.read(k), expected) <= TRANSCODING, files.files[number]
    meta = source.meta
    assert meta["count"] == 32 and meta["mode"] == mode and meta["source"] == "images"
    assert dict(meta["refused"])["c/empty.jpg"] == "the file is empty" and len(meta["refused"]) == 2
    repaired = dict(meta["repaired"])
    assert {f"b/{name}.JPEG": what for name, what in REPAIRS.items()}.items() <= repaired.items()
    assert repaired["c/turned.jpg"] == "turned upright, EXIF orientation 6"
    assert ("c/0.png" in repaired) == (mode == "jpeg")
    assert "refused: c/empty.jpg: the file is empty" in told and "repaired: b/cmyk.JPEG: CMYK turned into RGB" in told
    assert f"{tmp_path / 'out1'}: 32 images of 3 classes" in told and "bytes are what was written" in told


@pytest.mark.parametrize("mode", ["raw", "jpeg"])
@pytest.mark.usefixtures("small_shards")
def test_numpy_alone_reads_a_pack(folder: Path, tmp_path: Path, mode: str) -> None:
    out = tmp_path / "out"
    main([str(folder), str(out), "--mode", mode, "--size", "32", "--max-bad", "0.1", "--workers", "1"])
    script = """
import io, json, sys
import numpy as np
root = sys.argv[1]
meta, index = json.load(open(f"{root}/meta.json")), np.load(f"{root}/index.npy")
total = 0
for row in index:
    if meta["mode"] == "raw":
        shard = np.load(f"{root}/shards/{row['shard']:05}.npy", mmap_mode="r")
        image = shard[(row["offset"] - shard.offset) // row["bytes"]]
    else:
        from PIL import Image
        data = np.memmap(f"{root}/shards/{row['shard']:05}.bin", np.uint8, "r", row["offset"], (row["bytes"],))
        image = np.asarray(Image.open(io.BytesIO(data.tobytes())).convert("RGB"))
    assert image.shape == (row["height"], row["width"], 3)
    total += int(image.astype(int).sum())
assert not [name for name in sys.modules if name.startswith(("fastrdm", "torch", "simplejpeg"))]
print(total, meta["classes"][index["label"][0]])
"""
    done = subprocess.run([sys.executable, "-c", script, str(out)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    total, name = done.stdout.split()
    source = PackedSource(out)
    expected = sum(int(source.read(k).astype(int).sum()) for k in range(len(source)))
    assert abs(int(total) / expected - 1) < 1e-3 and name == "a"


SLOW = """
import sys, time
from fastrdm.loaders.packing import pack
from fastrdm.loaders.packing import shard_writer as shards
plan = pack.plan
def small(sizes, options):
    options.shard_mb = 1 / 64
    return plan(sizes, options)
pack.plan = small
add = pack.Journal.add
def slow(self, record):
    add(self, record)
    print("shard", record["shard"], flush=True)
    time.sleep(0.3)
pack.Journal.add = slow
sys.exit(pack.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("mode", ["raw", "jpeg"])
@pytest.mark.usefixtures("small_shards")
def test_a_killed_pack_goes_on_and_is_the_same(
    folder: Path, tmp_path: Path, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        str(folder),
        str(tmp_path / "out"),
        "--mode",
        mode,
        "--size",
        "32",
        "--max-bad",
        "0.1",
        "--workers",
        "2",
    ]
    process = subprocess.Popen([sys.executable, "-c", SLOW, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    while not process.stdout.readline().startswith("shard"):
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    partial = tmp_path / "out.partial"
    finished = len(list((partial / "records").glob("*.json")))
    assert finished >= 1 and not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"must be a packed folder, got .*, which has no meta\.json"):
        PackedSource(partial / "pack")
    with pytest.raises(ValueError, match="begun with other files or options: remove it, or repeat"):
        main([*arguments, "--exif", "apply"])
    begun = {path: path.stat().st_mtime_ns for path in (partial / "records").glob("*.json")}
    broken = min(begun)
    broken.write_text("{")
    capsys.readouterr()
    assert main(arguments) == 0
    assert finished == 1 or "going on: " in capsys.readouterr().out
    arguments[1] = str(tmp_path / "unbroken")
    assert main(arguments) == 0
    assert content(tmp_path / "out") == content(tmp_path / "unbroken")
    assert not list(tmp_path.glob("*.partial"))


def test_workers_end_with_a_killed_parent(folder: Path, tmp_path: Path) -> None:
    script = "import subprocess, sys, time; from fastrdm.loaders.packing.worker_processes import _start\n"
    script += "from fastrdm.loaders.packing.shard_writer import Settings\n"
    script += "print(_start(Settings('.', 'raw', 8, 'ignore')).pid, flush=True); time.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        if Path(f"/proc/{child}/stat").read_text().rsplit(")")[-1].split()[0] == "Z":
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{child}").exists()


def test_two_packers_do_not_share_a_folder(folder: Path, tmp_path: Path) -> None:
    plan = {"shards": [[]]}
    with (
        pack.Journal(tmp_path / "out", plan),
        pytest.raises(ValueError, match=r"another process is packing into .*out"),
    ):
        pack.Journal(tmp_path / "out", plan)


def test_too_many_bad_files_stop_but_keep_what_is_done(folder: Path, tmp_path: Path) -> None:
    arguments = [str(folder), str(tmp_path / "out"), "--workers", "1"]
    with pytest.raises(
        CorruptImage, match=r"[12] of 34 files cannot be read, above --max-bad 0\.01: c/cut\.jpg: .*What is packed"
    ):
        main(arguments)
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "--max-bad", "0.5"]) == 0


def test_a_full_disk_is_told(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = pack.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(pack.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ValueError, match=r"OUT needs [\d,]+ bytes more, 1,000 are free there"):
        main([str(folder), str(tmp_path / "out")])


def test_a_dying_worker_is_told(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack.Journal, "finish", lambda *_: pytest.fail("nothing was made"))
    start = pack.make_shards.__globals__["_start"]

    def dies(options: Settings) -> Any:
        process = start(options)
        process.kill()
        return process

    monkeypatch.setitem(pack.make_shards.__globals__, "_start", dies)
    with pytest.raises(ValueError, match=r"process died"):
        main([str(folder), str(tmp_path / "out"), "--workers", "1"])


def labeled(tmp_path: Path, rows: str) -> str:
    path = tmp_path / "labels.csv"
    path.write_text(rows)
    return str(path)


def test_labels_from_a_csv(folder: Path, tmp_path: Path) -> None:
    csv = labeled(tmp_path, "file,label\na/00.jpg,10\na/01.jpg,9\nb/plain.JPEG,10\n")
    main([str(folder), str(tmp_path / "out"), "--labels", csv, "--max-bad", "0.5", "--workers", "1"])
    source = PackedSource(tmp_path / "out")
    assert source.classes == ["9", "10"]
    assert source.labels[:2].tolist() == [1, 0] and (source.labels >= 0).sum() == 3 and len(source) == 32


def test_no_labels(folder: Path, tmp_path: Path) -> None:
    main([str(folder), str(tmp_path / "out"), "--labels", "none", "--max-bad", "0.5", "--workers", "1"])
    source = PackedSource(tmp_path / "out")
    assert source.classes == [] and set(source.labels) == {-1} and len(source) == 32


def test_splits_are_packed_one_by_one(folder: Path, tmp_path: Path) -> None:
    for part in ("train", "val"):
        (tmp_path / "set" / part / "a").mkdir(parents=True)
        (tmp_path / "set" / part / "a" / f"{part}.jpg").write_bytes(TRAPS["plain"])
    main([str(tmp_path / "set"), str(tmp_path / "out"), "--workers", "1"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train", "val"]
    assert len(PackedSource(tmp_path / "out" / "val")) == 1
    with pytest.raises(ValueError, match=r"OUT exists already: .*train, made with other files or options"):
        main([str(tmp_path / "set"), str(tmp_path / "out"), "--exif", "apply"])
    shutil.rmtree(tmp_path / "out" / "val")  # as if killed between the two
    main([str(tmp_path / "set"), str(tmp_path / "out"), "--workers", "1", "--verify"])
    assert len(PackedSource(tmp_path / "out" / "val")) == 1


WRONG: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "one argument": (lambda p: [str(p / "images")], r"takes SRC and OUT, or one packed folder and --verify"),
    "no folder": (
        lambda p: [str(p / "nowhere"), str(p / "o")],
        r"loader\.root must be a folder of images, got .*nowhere",
    ),
    "there already": (lambda p: [str(p / "images"), str(p)], r"OUT exists already: .* --verify"),
    "below the source": (lambda p: [str(p / "images"), str(p / "images" / "o")], r"OUT must not lie in SRC"),
    "the source": (lambda p: [str(p / "images"), str(p / "images")], r"OUT must not lie in SRC"),
    "no CSV": (lambda p: [str(p / "images"), str(p / "o"), "--labels", "x.csv"], r"got 'x\.csv', which is no file"),
    "other columns": (
        lambda p: [str(p / "images"), str(p / "o"), "--labels", labeled(p, "name,kind\n")],
        r"columns file and label in its first line, got 'name,kind'",
    ),
    "absent file": (
        lambda p: [str(p / "images"), str(p / "o"), "--labels", labeled(p, "file,label\nz.jpg,1\n")],
        r"names none of the images of .*, but for instance z\.jpg",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments(folder: Path, tmp_path: Path, wrong: str) -> None:
    arguments, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message):
        main(arguments(tmp_path))
    assert not list(tmp_path.glob("o*"))


def test_progress_tells_rate_and_time_left(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    progress = pack.Progress(1000, [{"rows": [1] * 100, "refused": []}], 0.01)
    progress.began -= 10
    progress.add(200, ["a", "b", "c"])
    assert "going on: 100 of 1,000 images are packed" in capsys.readouterr().out
    monkeypatch.setattr(pack.time, "monotonic", lambda: progress.began + 10)
    assert progress.line() == "packed 300 of 1,000 images, 20 images/s, 35 s left, 3 refused"


def test_meta_is_plain_json(folder: Path, tmp_path: Path) -> None:
    main([str(folder), str(tmp_path / "out"), "--max-bad", "0.5", "--workers", "1"])
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert set(meta["files"]) == {"index.npy", "shards/00000.bin"}
    assert all(len(told["sha256"]) == 64 for told in meta["files"].values())
    assert str(os.sep + "images") not in json.dumps(meta), "no path of this machine"


def test_the_same_command_on_a_finished_pack_does_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(folder), str(tmp_path / "out"), "--max-bad", "0.5", "--workers", "1"]
    assert main(arguments) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    capsys.readouterr()
    assert main(arguments) == 0
    assert f"{tmp_path / 'out'} is packed already" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    (folder / "a" / "00.jpg").write_bytes(TRAPS["plain"])
    with pytest.raises(ValueError, match=r"OUT exists already: .*, made with other files or options"):
        main(arguments)


def test_verify_takes_what_pack_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("train", "val"):
        (tmp_path / "set" / part / "a").mkdir(parents=True)
        (tmp_path / "set" / part / "a" / "1.jpg").write_bytes(TRAPS["plain"])
    main([str(tmp_path / "set"), str(tmp_path / "out"), "--workers", "1"])
    capsys.readouterr()
    assert main([str(tmp_path / "out"), "--verify"]) == 0
    told = capsys.readouterr().out
    assert "out/train: " in told and "out/val: " in told and told.count("bytes are what was written") == 2
    shard = tmp_path / "out" / "val" / "shards" / "00000.bin"
    shard.write_bytes(b"x" + shard.read_bytes()[1:])
    with pytest.raises(ValueError, match=r"out/val: damaged files, .*shards/00000\.bin"):
        main([str(tmp_path / "out"), "--verify"])
    with pytest.raises(ValueError, match=r"must be a packed folder, got .*set, which has no meta\.json"):
        main([str(tmp_path / "set"), "--verify"])


def test_every_part_is_listed_before_one_is_written(tmp_path: Path) -> None:
    for name, data in (("train/a/1.jpg", TRAPS["plain"]), ("val/a/1.jpg", TRAPS["plain"]), ("val/x.tar", b"")):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(data)
    with pytest.raises(ValueError, match=r"archives beside images in .*val"):
        main([str(tmp_path / "set"), str(tmp_path / "out"), "--workers", "1"])
    assert not list(tmp_path.glob("out*"))


def test_a_dangling_link_is_refused_like_any_file_that_cannot_be_read(folder: Path, tmp_path: Path) -> None:
    (folder / "a" / "zz.jpg").symlink_to("/nowhere")
    main([str(folder), str(tmp_path / "out"), "--max-bad", "0.5", "--workers", "1"])
    refused = dict(PackedSource(tmp_path / "out").meta["refused"])
    assert refused["a/zz.jpg"] == "No such file or directory" and len(refused) == 3


def test_one_bad_file_of_a_small_set_is_named(tmp_path: Path) -> None:
    for k in range(9):
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / f"{k}.jpg").write_bytes(TRAPS["plain"] if k else b"")
    with pytest.raises(CorruptImage, match=r"1 of 9 files cannot be read, .*: 0\.jpg: the file is empty\. What"):
        main([str(tmp_path / "set"), str(tmp_path / "out"), "--workers", "1"])


OWN = """
import numpy as np
from fastrdm.loaders.sources.source import Source

print("a module that prints as it is imported")

class Pixels(Source):
    name, classes = "pixels", ["dark", "light"]

    def __init__(self, root, split):
        self.labels = np.arange(6) % 2

    def read(self, index):
        if index == 4:
            raise RuntimeError("the lens cap was on")
        return np.full((8, 9, 3), 40 + 100 * (index % 2), np.uint8)

class Good(Pixels):
    def read(self, index):
        return np.full((8, 9, 3), 40 + 100 * (index % 2), np.uint8)

class Stuck(Good):
    def __init__(self, root, split):
        super().__init__(root, split)
        self.handle = open(__file__)
"""


@pytest.mark.parametrize("mode", ["raw", "jpeg"])
def test_a_source_of_ones_own_is_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    (tmp_path / "own_pixels.py").write_text(OWN)
    (tmp_path / "set").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = ["--source", "own_pixels:Good", "--mode", mode, "--size", "4", "--workers", "2"]
    main([str(tmp_path / "set"), str(tmp_path / "out"), *arguments])
    parts = [PackedSource(tmp_path / "out" / name) for name in ("train", "val")]
    for source in parts:
        assert source.classes == ["dark", "light"] and source.labels.tolist() == [0, 1] * 3
        assert source.read(3).shape == ((4, 4, 3) if mode == "raw" else (8, 9, 3))
        assert abs(int(source.read(3).mean()) - 140) <= 1
    for name, said in (
        ("Pixels", "shard 0, image 0 to image 5: RuntimeError: the lens cap was on"),
        ("Stuck", "loader.source pixels cannot be sent to another process"),
    ):
        with pytest.raises(ValueError, match=said):
            main([str(tmp_path / "set"), str(tmp_path / name), "--source", f"own_pixels:{name}"])


def test_files_called_like_modules_do_not_matter(folder: Path, tmp_path: Path) -> None:
    for name in ("signal", "inspect", "queue", "json", "numpy"):
        (tmp_path / f"{name}.py").write_text("print('mine')\n")
    script = f"import sys; sys.path[:] = {sys.path!r}\n"
    script += "from fastrdm.loaders.packing.pack import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-I", "-c", script, str(folder), "out", "--max-bad", "0.5", "--workers", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(PackedSource(tmp_path / "out")) == 32


@pytest.mark.parametrize("mode", ["raw", "jpeg"])
def test_a_pack_of_many_shards_needs_few_descriptors(tmp_path: Path, mode: str) -> None:
    (tmp_path / "set").mkdir()
    for k in range(90):
        Image.fromarray(RANDOM.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(tmp_path / "set" / f"{k:03}.jpg")
    script = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))
from pathlib import Path
import numpy as np
from fastrdm.loaders.packing import pack
from fastrdm.loaders.sources.packed import PackedSource
plan = pack.plan
pack.plan = lambda sizes, options: [(k, k + 1) for k in range(len(sizes))]
pack.main([*sys.argv[1:], "--size", "8", "--workers", "1"])
source = PackedSource(Path(sys.argv[2]))
assert len(source.paths) == 90
print(sum(int(source.read(k).mean() > 0) for k in np.random.default_rng(0).permutation(180) % 90))
"""
    command = [sys.executable, "-c", script, str(tmp_path / "set"), str(tmp_path / "out"), "--mode", mode]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "180", done.stderr
