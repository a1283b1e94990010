"""`fastrdm explore`: a page to look at the images of a source as trained encoders see them."""

import csv
import math
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastrdm.commands import parsers
from fastrdm.commands.pretrained import Pretrained, from_path
from fastrdm.commands.source_word import loader_of
from fastrdm.evaluation.evaluator import Machine, sized
from fastrdm.explore import space
from fastrdm.explore.gather import DRAWS, Gathered, gather, views_of
from fastrdm.explore.page import packed, page
from fastrdm.explore.thumbnails import sheets
from fastrdm.files import write_whole
from fastrdm.live_line import LiveLine
from fastrdm.loaders.sources.open import open_source
from fastrdm.loaders.sources.source import Source, Subset
from fastrdm.models.encoders import build_encoder
from fastrdm.runtime import checkpoint, distributed
from fastrdm.runtime.checkpoint import META
from fastrdm.schema import require

MOST_RUNS = 4
PICTURE_BYTES, VIEW_BYTES = 6_000_000, 2_000_000  # of the JPEG sheets in the page, before base64
OUTLIERS = 100


def main(arguments: Sequence[str]) -> int:
    """Write the page that `arguments` ask for; the exit status."""
    options = parsers.explore().parse_intermixed_args(arguments)
    for key in ("size", "batch_size", "workers", "images"):
        value = getattr(options, key)
        require(value is None or value > 0, f"--{key.replace('_', '-')}", "above 0", value)
    require(options.views >= 0, "--views", "at least 0", options.views)
    layouts = options.map.split(",")
    require(set(layouts) <= {"pca", "umap"}, "--map", "of pca, umap", options.map)
    if "umap" in layouts and find_spec("umap") is None:
        raise ValueError("--map umap needs umap-learn: pip install 'fastrdm[explore]'")
    runs = [word for word in options.words if _is_encoder(Path(word))]
    others = [word for word in options.words if word not in runs]
    if not runs:
        from_path(Path(options.words[0]), options.branch)  # says what is wrong with it
    require(len(others) <= 1, "SOURCE", "one folder or name beside run folders with checkpoints", others)
    require(len(runs) <= MOST_RUNS, "RUN", f"at most {MOST_RUNS} of them", len(runs))
    began, live = time.monotonic(), LiveLine()
    given = loader_of(others[0], options.root, None).source if others else None
    trained = [from_path(Path(run), options.branch, None, given, trust=options.trust) for run in runs]
    data = loader_of(others[0] if others else None, options.root, trained[0].loader)
    source = open_source(data, options.split)
    require(len(source) > 1, "SOURCE", f"at least two images in its {options.split} split", data.root or data.source)
    if len(source) > options.images:
        live.say(f"the page holds {options.images:,} of the {len(source):,} images, spread evenly")
        source = Subset(source, np.linspace(0, len(source) - 1, options.images).round().astype(np.int64))
    device = distributed.start(options.device).device
    machine = Machine(device, options.precision == "bf16", options.batch_size, options.workers)
    encoders = [(one.encoder, sized(one.view, options.size)) for one in trained]
    torch.manual_seed(0)
    encoders.append((build_encoder(trained[0].config).eval(), encoders[0][1]))
    placed = [(e.to(device).to(memory_format=torch.channels_last), view) for e, view in encoders]
    found = gather(source, placed, machine, live.tell)
    require(len(found.numbers) > 1, "SOURCE", "at least two images that can be read", len(found.numbers))
    live.tell("maps and neighbors")
    extra = read_columns(options.columns, [source.key(n) for n in found.numbers.tolist()]) if options.columns else []
    content = contents(found, source, runs, trained, layouts, extra, options.views)
    unread = f", {len(found.faults)} unreadable images left out" if found.faults else ""
    content["about"] = (
        f"{len(found.numbers):,} images of {data.root or data.source} ({options.split}){unread}; "
        f"{trained[0].config.name}, {encoders[0][1].size} px. Point at the map to see an image, click to choose it."
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(options.out, page(f"{', '.join(Path(run).name for run in runs)}: images", content))
    for reason in list(found.faults.values())[:5]:
        live.say(f"left out, cannot be read: {reason}")
    megabytes = options.out.stat().st_size / 1e6
    live.say(f"{options.out}: {len(found.numbers):,} images, {megabytes:.1f} MB, {time.monotonic() - began:.0f} s")
    return 0


def _is_encoder(path: Path) -> bool:
    return path.is_file() or (path / META).exists() or bool(checkpoint.existing(path))


def contents(
    found: Gathered,
    source: Source,
    runs: Sequence[str],
    trained: Sequence[Pretrained],
    layouts: Sequence[str],
    extra: list[dict[str, Any]],
    views: int,
) -> dict[str, Any]:
    """Everything that the page shows. Images are numbered by their row in `found`."""
    labels = np.asarray(source.labels, np.int64)[found.numbers]
    *own, random = found.features
    pixels, nearest = space.nearest(found.pixels), [space.nearest(features) for features in own]
    names = [Path(run).name for run in runs]
    spaces = {"pixels": pixels, "a random encoder": space.nearest(random), **dict(zip(names, nearest, strict=True))}
    makers = {"pca": space.pca_map, "umap": space.umap_map}
    scores = space.outlier_scores(nearest[0])
    farthest = np.argsort(-scores, kind="stable")[:OUTLIERS]
    known = bool((labels >= 0).any())
    columns = [_classes("label", labels, source.classes)] if known else []
    groups = space.clusters(own[0], len(source.classes))
    columns.append(_classes("cluster", groups, [f"cluster {i}" for i in range(int(groups.max()) + 1)]))
    columns.append({"name": "outlier score", "values": packed(scores)})
    votes = space.voted(nearest[0], labels)
    if known:
        columns.append(_classes("class of its neighbors", votes, source.classes))
    return {
        "names": [source.key(n) for n in found.numbers.tolist()],
        "spaces": [
            {"name": name, "near": packed(near.images), "cosine": packed(near.cosine)} for name, near in spaces.items()
        ],
        "maps": [
            {"name": name, "layouts": [{"name": how, "places": packed(makers[how](x))} for how in layouts]}
            for name, x in zip(names, own, strict=True)
        ],
        "columns": columns + extra,
        "pictures": sheets(found.pictures, PICTURE_BYTES),
        "pairs": space.closest_pairs(pixels, nearest[0]),
        "outliers": [(int(i), float(scores[i])) for i in farthest],
        "confused": space.confused(labels, votes) if known else [],
        "views": _views(found, source, trained[0], views),
    }


def _classes(name: str, values: NDArray[np.int64], classes: Sequence[str]) -> dict[str, Any]:
    """A column of classes; a value that is none of them stands for unknown."""
    inside = np.where((values >= 0) & (values < len(classes)), values, len(classes))
    return {"name": name, "classes": list(classes), "values": packed(inside)}


def _views(found: Gathered, source: Source, first: Pretrained, count: int) -> dict[str, Any]:
    """Augmented views of `count` images, spread evenly, as the first run draws them."""
    if first.loader is None or not count:
        reason = (
            "No views were kept (--views)." if first.loader else "A file of weights does not know the training views."
        )
        return {"numbers": [], "each": 0, "titles": [], "note": reason, "side": 1, "columns": 1, "sheets": []}
    rows = np.unique(np.linspace(0, len(found.numbers) - 1, min(count, len(found.numbers))).round().astype(np.int64))
    specs = first.loader.views
    pictures = views_of(source, found.numbers[rows].tolist(), specs, seed=0)
    titles = [f"epoch {epoch}\nview {i}" for epoch in range(DRAWS) for i in range(len(specs))]
    note = f"Views are kept for {len(rows)} of the images (--views)."
    return {
        "numbers": rows.tolist(),
        "each": len(titles),
        "titles": titles,
        "note": note,
        **sheets(pictures.reshape(-1, *pictures.shape[2:]), VIEW_BYTES),
    }


def read_columns(file: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Columns of a CSV for the images `names`: numbers where every value is one, else classes."""
    require(file.is_file(), "--columns", "a CSV file", str(file))
    with file.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as opened:
        table = list(csv.DictReader(opened))
    require(bool(table) and "name" in table[0], "--columns", "a CSV with a column `name`", str(file))
    rows = {row["name"]: row for row in table}
    missing = [name for name in names if name not in rows]
    require(not missing, "--columns", "a CSV with a row for every image", f"none for {missing[:1]} in {file}")
    out = []
    for title in (key for key in table[0] if key and key not in ("name", "index")):
        texts = [rows[name][title] or "" for name in names]
        numbers = [_number(text) for text in texts]
        if all(map(math.isfinite, numbers)):
            out.append({"name": title, "values": packed(np.array(numbers, np.float32))})
        else:
            classes, values = np.unique(texts, return_inverse=True)
            out.append(_classes(title, values.astype(np.int64), classes.tolist()))
    return out


def _number(text: str) -> float:
    """The number that `text` is, nan for anything else."""
    try:
        return float(text)
    except ValueError:
        return math.nan
