"""Reading from every form: decoded images a second in random order, beside a plain simplejpeg loop over files.

    python -m benchmarks.loaders.forms FOLDER [--images 1000] [--turns 5] [--peers PYTHON ...] [--parts PART ...]

FOLDER holds JPEG files, one folder a class. Part `reading` writes them as tar files of folders and of tar files,
WebDataset, parquet and a pack behind a web server on 127.0.0.1, whose shards are in the cache when the clock starts.
Each contestant reads each image once in a turn, on one thread; a turn is one pass of each, so that what slows the
machine slows all. --peers: Pythons that have webdataset, litdata, datasets or mosaicml-streaming, whose own readers
then read the same files; each of them by the first Python that has it. Part `waiting` is how long training at 1,000
images/s waits for a store of 100 MB/s that answers after 20 ms, part `listing` how long listing 1,000,000 files takes.
"""

import io
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

from benchmarks import common
from fastrdm.loaders.build import build_loader
from fastrdm.loaders.order import epoch_order
from fastrdm.loaders.packing import pack
from fastrdm.loaders.sources.decode import decode
from fastrdm.loaders.sources.folder import FolderSource
from fastrdm.loaders.sources.open import open_source
from fastrdm.loaders.sources.source import Source
from fastrdm.loaders.spec import LoaderConfig, ViewSpec

STORE = common.ROOT / "tests" / "programs" / "slow_store.py"
RESULT = common.FOLDER / "results" / "loader_forms.csv"
LOOP = "files: simplejpeg in a plain loop"
FIELDS = ["what", "images_per_cpu_second", "ratio", "p20", "p80", "value"]
PARTS = ("reading", "waiting", "listing")
SHARD = 100  # images of a WebDataset shard, a parquet row group and, about, a shard of the pack
WINDOW = 4
PEERS = {
    "webdataset": "import webdataset as w; r = (s['jpg'] for s in w.WebDataset([str(p) for p in sorted((root / "
    "'webdataset').glob('*.tar'))], shardshuffle=False, empty_check=False).shuffle(400))",
    "datasets": "import datasets as d; s = d.load_dataset('parquet', data_files=str(root / 'parquet' / '*.parquet'), "
    "split='train', streaming=True, cache_dir=str(root / 'hf')).cast_column('image', d.Image(decode=False)); "
    "r = (x['image']['bytes'] for x in s.shuffle(seed=0, buffer_size=400))",
    "mosaicml-streaming": "import streaming as s; d = globals().get('d') or s.StreamingDataset(local=str(root / "
    "'mds'), shuffle=True, batch_size=1); r = (x['image'] for x in d)",
    "litdata": "import litdata as l; r = (x['image'] for x in l.StreamingDataset(str(root / 'litdata'), shuffle=True))",
}
WRITE_LITDATA = """
import sys
from pathlib import Path
from litdata import optimize
root = Path(sys.argv[1])
def sample(path):
    return {"image": Path(path).read_bytes(), "label": 0}
if __name__ == "__main__":
    files = [str(p) for p in sorted(root.glob("folder/*/*"))]
    optimize(sample, files, str(root / "litdata"), chunk_bytes="16MB", num_workers=1)
"""
WRITE_MDS = """
import sys
from pathlib import Path
from streaming import MDSWriter
root = Path(sys.argv[1])
with MDSWriter(out=str(root / "mds"), columns={"image": "bytes", "label": "int"}, size_limit=16_000_000) as out:
    for path in sorted(root.glob("folder/*/*")):
        out.write({"image": path.read_bytes(), "label": 0})
"""
WRITERS = {"litdata": WRITE_LITDATA, "mosaicml-streaming": WRITE_MDS}
READ_PEER = """
import sys, time
from pathlib import Path
import simplejpeg
root = Path(sys.argv[1])
for _ in range(int(sys.argv[2])):
    {make}
    began, count = time.process_time(), 0
    for data in r:
        simplejpeg.decode_jpeg(data, "RGB")
        count += 1
    print(count, time.process_time() - began, flush=True)
"""


def write_forms(files: list[Path], root: Path) -> None:
    """Write the images in every form, repeated up to the number asked for."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name in ("imagenet/ILSVRC2012_img_train.tar", "tar/x", "webdataset/x", "parquet/x"):
        (root / name).parent.mkdir(parents=True)
    by_class: dict[str, list[Path]] = {}
    for k, path in enumerate(files):
        name = f"n{k % 10:08}"
        target = root / "folder" / name / f"{name}_{k:06}.JPEG"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
        by_class.setdefault(name, []).append(target)
    with tarfile.open(root / "imagenet" / "ILSVRC2012_img_train.tar", "w") as outer:
        for name, targets in by_class.items():
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for target in targets:
                    _into(tar, target.name, target.read_bytes())
            _into(outer, f"{name}.tar", inner.getvalue())
    with tarfile.open(root / "tar" / "set.tar", "w") as tar:
        for name, targets in by_class.items():
            for target in targets:
                _into(tar, f"set/train/{name}/{target.name}", target.read_bytes())
    for start in range(0, len(files), SHARD):
        some = files[start : start + SHARD]
        with tarfile.open(root / "webdataset" / f"{start // SHARD:05}.tar", "w") as shard:
            for k, path in enumerate(some, start):
                _into(shard, f"{k:06}.jpg", path.read_bytes())
                _into(shard, f"{k:06}.cls", b"0")
    images = [{"bytes": path.read_bytes(), "path": path.name} for path in files]
    table = pa.table({"image": images, "label": [0] * len(files)})
    pq.write_table(table, root / "parquet" / "train-00000-of-00001.parquet", row_group_size=SHARD)
    pack_by(SHARD, root / "folder", root / "pack")


def _into(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def pack_by(each: int, folder: Path, out: Path) -> None:
    """Pack a folder in shards of `each` images."""

    def plan(sizes: list[int], options: Namespace) -> list[tuple[int, int]]:
        return [(k, min(k + each, len(sizes))) for k in range(0, len(sizes), each)]

    whole, pack.plan = pack.plan, plan
    pack.main([str(folder), str(out)])
    pack.plan = whole


def serve(folder: Path, *more: str) -> tuple["subprocess.Popen[str]", str]:
    """The web server as a process of its own, and its address."""
    process = subprocess.Popen([sys.executable, str(STORE), str(folder), *more], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    return process, f"http://127.0.0.1:{int(process.stdout.readline())}"


def plain_loop(source: FolderSource) -> Callable[[], object]:
    """Read and decode each file, in the full order."""
    order = epoch_order(len(source), 0, 0).tolist()
    paths = [f"{source.root}/{source.files[k]}" for k in order]

    def run() -> None:
        for path in paths:
            with open(path, "rb") as file:
                simplejpeg.decode_jpeg(file.read(), "RGB")

    return run


def reading(source: Source, windowed: bool) -> Callable[[], object]:
    """Fetch and decode each image of a source, in the full or the windowed order."""
    order = epoch_order(len(source), 0, 0, source.shards if windowed else None, WINDOW).tolist()

    def run() -> None:
        for index in order:
            data, name = source.fetch(index)
            decode(data, name)

    return run


def forms(root: Path, url: str) -> dict[str, Callable[[], object]]:
    """One pass of each contestant."""

    def opened(source: str, place: str, **more: Any) -> Source:
        return open_source(LoaderConfig(source=source, root=place, cache=str(root / "cache"), **more), "train")

    parquet = opened("parquet", str(root / "parquet"), order="windowed", window=WINDOW)
    return {
        LOOP: plain_loop(FolderSource(root / "folder")),
        "folder": reading(opened("folder", str(root / "folder")), False),
        "tar of tars": reading(opened("imagenet", str(root / "imagenet")), False),
        "tar of folders": reading(opened("tar", str(root / "tar")), False),
        "WebDataset": reading(opened("webdataset", str(root / "webdataset")), False),
        f"parquet, windows of {WINDOW} row groups": reading(parquet, True),
        "pack": reading(opened("packed", str(root / "pack")), False),
        "remote pack, cached": reading(opened("packed", url), False),
    }


def peers(pythons: Sequence[str], root: Path, turns: int) -> dict[str, list[float]]:
    """Images a second of the readers of other projects, in a process of their own each."""
    found = {}
    for name, make in PEERS.items():
        for python in pythons:
            if name in WRITERS:
                writer = root / f"write_{name}.py"
                writer.write_text(WRITERS[name])
                subprocess.run([python, str(writer), str(root)], check=False, capture_output=True)
            command = [python, "-c", READ_PEER.format(make=make), str(root), str(turns)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=600)
            if done.returncode == 0:
                rows = [line.split() for line in done.stdout.splitlines()]
                found[name] = [int(count) / float(seconds) for count, seconds in rows]
                break
            print(f"{name} by {python}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
    return found


def listing(root: Path, count: int) -> tuple[float, float]:
    """Seconds to list `count` files of 1,000 classes, and bytes an image that the source keeps."""
    import tracemalloc

    for k in range(1000):
        (root / f"n{k:08}").mkdir(parents=True)
    for k in range(count):
        (root / f"n{k % 1000:08}" / f"n{k % 1000:08}_{k}.JPEG").touch()
    began = time.perf_counter()
    source = FolderSource(root)
    seconds, images = time.perf_counter() - began, len(source)
    del source
    tracemalloc.start()
    source = FolderSource(root)
    held = tracemalloc.get_traced_memory()[0] / images
    tracemalloc.stop()
    return seconds * count / len(source), held


def waiting(root: Path, rate: float) -> tuple[float, int]:
    """Share of time that a loop at `rate` images/s waits in its first epoch from a slow store, and images seen."""
    random = np.random.default_rng(0)
    for k in range(6000):
        path = root / "small" / f"{k % 2}" / f"{k:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        path.write_bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(coarse), quality=90))
    pack_by(250, root / "small", root / "small_pack")
    process, url = serve(root / "small_pack", "--mb-per-second", "100", "--latency", "0.02")
    views = (ViewSpec(size=32), ViewSpec(size=32))
    config = LoaderConfig(
        source="packed", root=url, cache=str(root / "slow"), order="windowed", window=4, batch_size=250, views=views
    )
    try:
        loader = build_loader(config, open_source(config, "train"), seed=0)
        waited, seen, began = 0.0, 0, 0.0
        due = time.perf_counter()
        for number, batch in enumerate(loader):
            now = time.perf_counter()
            if number == 0:
                began = due = now  # the first batch is waited for by every loader
            waited += max(now - due, 0)
            seen += len(batch.index)
            due = max(now, due) + len(batch.index) / rate
            time.sleep(max(due - time.perf_counter(), 0))
        loader.close()
        return waited / (time.perf_counter() - began), seen
    finally:
        process.kill()


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--peers", nargs="+", metavar="PYTHON", default=[])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path, default=RESULT, help="CSV that rows are added to")
    parser.add_argument("--listed", type=int, default=1_000_000)
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if "reading" in options.parts:
            rows += race(root, options)
        if "waiting" in options.parts:
            share, seen = waiting(root, 1000.0)
            what = f"data wait, {seen:,} images at 1,000 images/s from a store of 100 MB/s and 20 ms, share"
            rows.append({"what": what, "value": f"{share:.4f}"})
        if "listing" in options.parts:
            seconds, held = listing(root / "listed", options.listed)
            rows.append({"what": f"listing {options.listed:,} files, seconds", "value": f"{seconds:.2f}"})
            rows.append({"what": f"listing {options.listed:,} files, bytes an image", "value": f"{held:.0f}"})
    common.print_rows(FIELDS, rows)
    with common.added_rows(options.out, [*FIELDS, *common.MACHINE]) as table:
        for row in rows:
            table.writerow({**row, **common.machine(common.available_device())})


def race(root: Path, options: Namespace) -> list[dict[str, object]]:
    """A row for each form, and for each peer's own reader."""
    sources = sorted(options.folder.rglob("*.JPEG"))
    files = [sources[k % len(sources)] for k in range(options.images)]
    write_forms(files, root)
    process, url = serve(root / "pack")
    try:
        contestants = forms(root, url)
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        for turn in range(options.turns + 1):  # the first fills caches and is not counted
            for name, run in contestants.items():
                began = time.thread_time()
                run()
                if turn:
                    seconds[name].append(time.thread_time() - began)
    finally:
        process.kill()
    loop = [len(files) / t for t in seconds[LOOP]]
    rows = []
    for name, times in seconds.items():
        rates = [len(files) / t for t in times]
        rows.append(_row(name, rates, [rate / base for rate, base in zip(rates, loop, strict=True)]))
    for name, rates in peers(options.peers, root, options.turns).items():
        rows.append(_row(f"{name}'s own reader", rates, [rate / statistics.median(loop) for rate in rates]))
    return rows


def _row(name: str, rates: Sequence[float], ratios: Sequence[float]) -> dict[str, object]:
    low, middle, high = (f"{value:.3f}" for value in common.percentiles(ratios))
    rate = f"{statistics.median(rates):.0f}"
    return {"what": name, "images_per_cpu_second": rate, "ratio": middle, "p20": low, "p80": high}


if __name__ == "__main__":
    main()
