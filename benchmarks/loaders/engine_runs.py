"""Short runs through every engine over seeds, and whether they end alike: benchmarks/records/loader_engines.md.

    python -m benchmarks.loaders.engine_runs --cifar FOLDER --imagenet FOLDER [--seeds 3] [--most N]

Two tasks. cifar10: 2,000 images of CIFAR-10 (--cifar is what loader.root takes), as arrays for `resident`, as PNG
files for `native` and `dali`, and as a .beton file for `ffcv`; k-NN on 1,000 test images. photos: files of ImageNet
(--imagenet holds one folder for each WordNet number; five hundred files are enough), three of five for training, at
64 px; k-NN tells animals from other things. The images have the same numbers for every engine, so that a seed gives
them the same order and the same parameters of every view.

One row a finished run in results/loader_engines.csv; rows that are there are not run again, and --most N ends a call
after so many runs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from PIL import Image

from benchmarks import common
from fastrdm.loaders.packing import pack
from fastrdm.loaders.sources.open import open_source
from fastrdm.loaders.spec import LoaderConfig

ENGINES = {"cifar10": ("native", "resident", "dali", "ffcv"), "photos": ("native", "dali", "ffcv")}
RECIPES = {
    "cifar10": ["cifar10/cpu.yaml", "train.length=10ep", "encoder.width=16", "loader.subset=null"],
    "photos": ["imagenet/sample_cpu.yaml", "train.length=10ep", "encoder.width=16", "loader.views.*.size=64"],
}
IMAGES, TESTED = 2000, 1000  # of CIFAR-10
LAST_ANIMAL = "n02655020"  # of ImageNet's 1,000 classes in the order of their numbers; things follow
EVERY = 5  # steps between two lines of the log
METRICS = {"start": f"loss at step {EVERY}", "loss": f"loss, mean of the last {EVERY} lines", "knn": "k-NN, trained"}
METRICS |= {"knn_random": "k-NN, random encoder"}
FIELDS = ["task", "engine", "seed", *METRICS, "cpu_seconds", "cpu", "cores", "versions", "commit"]
ALIKE = 3.0  # standard errors of a difference of two means


def arrays(root: str, out: Path) -> None:
    """The subset, sorted by class, as arrays in out/arrays and as files in out/files."""
    (out / "arrays").mkdir(parents=True)
    for split, count, folder in (("train", IMAGES, "train"), ("test", TESTED, "val")):
        source = open_source(LoaderConfig(source="cifar10", root=root), split)  # type: ignore[arg-type]
        by_class = [np.flatnonzero(source.labels == k)[: count // 10] for k in range(10)]
        chosen = np.concatenate(by_class)
        assert source.images is not None
        np.save(out / "arrays" / f"{split}.images.npy", source.images[chosen])
        np.save(out / "arrays" / f"{split}.labels.npy", source.labels[chosen])
        for k in chosen:
            path = out / "files" / folder / source.classes[source.labels[k]] / f"{k:05}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(source.images[k]).save(path)
    (out / "arrays" / "classes.json").write_text(json.dumps(source.classes))


def photos(root: str, out: Path) -> None:
    """Links to the files in out/files, two classes."""
    found = sorted(path for path in Path(root).resolve().glob("n*/*") if path.is_file())
    if not found:
        raise SystemExit(f"--imagenet must hold one folder for each WordNet number (n01440764 ...), got {root}")
    for number, path in enumerate(found):
        kind = "animal" if path.parent.name <= LAST_ANIMAL else "thing"
        link = out / "files" / ("train" if number % 5 < 3 else "val") / kind / path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)


def prepare(task: str, root: str, work: Path) -> Path:
    """The folder of a task's data, made once."""
    out = work / task
    if not (out / "beton").exists():
        (arrays if task == "cifar10" else photos)(root, out)
        pack.main([str(out / "files"), str(out / "beton"), "--format", "beton", "--workers", "1"])
    return out


def loaded(task: str, engine: str, data: Path) -> list[str]:
    """The settings of an engine."""
    source = "packed" if engine == "ffcv" else "folder"
    root = data / ("beton" if engine == "ffcv" else "files")
    if engine == "resident":
        source, root = task, data / "arrays"
    return [f"loader.engine={engine}", f"loader.source={source}", f"loader.root={root}", "loader.workers=1"]


def run(task: str, engine: str, seed: int, data: Path, work: Path) -> dict[str, object]:
    """One training run in a process of its own, on one thread."""
    folder = work / f"{task}-{engine}-{seed}"
    command = [sys.executable, "-m", "fastrdm.cli", "train", *RECIPES[task], *loaded(task, engine, data)]
    command += [f"run={folder}", f"train.seed={seed}", f"log.every={EVERY}", "log.report=false", "monitor.every=0st"]
    command += ["evaluate.every=0st", "evaluate.probe=false", "checkpoint.every=100%"]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "RANK": "0", "WORLD_SIZE": "1"}
    with Path(f"{folder}.log").open("w") as log:
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environ)
        _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{task} by {engine}, seed {seed} failed: see {folder}.log")
    summary = json.loads((folder / "summary.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    metrics = {"start": losses[0], "loss": mean(losses[-EVERY:]), "knn": summary["knn"]}
    metrics["knn_random"] = summary["knn_random_encoder"]
    return (
        {"task": task, "engine": engine, "seed": seed}
        | {key: round(value, 5) for key, value in metrics.items()}
        | {"cpu_seconds": round(usage.ru_utime + usage.ru_stime)}
    )


def comparison(rows: list[dict[str, str]], task: str) -> list[str]:
    """Lines of Markdown: each engine's means and spreads, and which differ from native's by more than chance."""
    mine = {engine: [r for r in rows if (r["task"], r["engine"]) == (task, engine)] for engine in ENGINES[task]}
    mine = {engine: found for engine, found in mine.items() if len(found) > 1}
    heads = ["engine", "seeds", *METRICS.values(), "CPU seconds a run"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    apart = []
    for engine, found in mine.items():
        cells = [engine, str(len(found))]
        for key in METRICS:
            values = [float(r[key]) for r in found]
            percent = 100 if key.startswith("knn") else 1
            unit, digits = (" %", 1) if percent > 1 else ("", 4)
            cells.append(f"{percent * mean(values):.{digits}f} ± {percent * stdev(values):.{digits}f}{unit}")
            gap = abs(mean(values) - mean(float(r[key]) for r in mine["native"]))
            if gap > ALIKE * error(mine, key):
                apart.append(f"{engine} in {METRICS[key]}")
        cells.append(f"{mean(int(r['cpu_seconds']) for r in found):.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    told = f"They differ: {', '.join(apart)}." if apart else "No engine differs from native."
    return [*lines, "", told]


def error(mine: dict[str, list[dict[str, str]]], key: str) -> float:
    """Standard error of the difference of two engines' means, from the spread over seeds that all of them show."""
    variances = [stdev(float(r[key]) for r in found) ** 2 for found in mine.values()]
    return float((mean(variances) * 2 / min(map(len, mine.values()))) ** 0.5)


def record(rows: list[dict[str, str]]) -> str:
    """The page."""
    text = f"""# Short runs through every engine

Made by `python -m benchmarks.loaders.engine_runs --cifar FOLDER --imagenet FOLDER`; every run is a row of
[loader_engines.csv](../results/loader_engines.csv). SimSiam, a small ResNet, 10 epochs, one thread. A seed gives all
engines the same order and the same parameters of every view; what is left are the pixels' rounding, DALI's borders of
crops, and ffcv's JPEG decoder and, of PNG files, their encoding as JPEG (quality 100). Mean ± standard deviation over
seeds. Two engines differ where their means are more than {ALIKE:.0f} standard errors apart, with the spread over seeds
that all engines of the task show. `resident` takes sets in memory, so the photographs do not go through it.

So short a training learns next to nothing: the runs show that the engines feed it alike, not what it can reach.
"""
    titles = {
        "cifar10": f"CIFAR-10, {IMAGES:,} images, k-NN on {TESTED:,} test images",
        "photos": "Photographs of ImageNet at 64 px, 300 for training, k-NN on 200: animal or not",
    }
    for task, title in titles.items():
        if any(r["task"] == task for r in rows):
            text += "\n".join(["", f"## {title}", "", *comparison(rows, task), ""])
    where = sorted({f"{r['cpu']}, {r['cores']} cores; {r['versions']}; commit {r['commit']}." for r in rows})
    return "\n".join([text, *where, ""])


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--cifar", help="folder of CIFAR-10")
    parser.add_argument("--imagenet", help="folder of folders of ImageNet's files")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--most", type=int, default=1000, help="runs of this call")
    parser.add_argument("--work", type=Path, default=Path("runs/loader_engines"), help="folder of data and runs")
    parser.add_argument("--out", type=Path, default=common.FOLDER, help="folder of results/ and records/")
    args = parser.parse_args()
    table, page = args.out / "results" / "loader_engines.csv", args.out / "records" / "loader_engines.md"
    for folder in (args.work, table.parent, page.parent):
        folder.mkdir(parents=True, exist_ok=True)
    known = {(r["task"], r["engine"], int(r["seed"])) for r in common.read_rows(table)}
    roots = {"cifar10": args.cifar, "photos": args.imagenet}
    wanted = [(t, e, s) for s in range(args.seeds) for t in ENGINES if roots[t] for e in ENGINES[t]]
    machine = common.machine(torch.device("cpu"))
    with common.added_rows(table, FIELDS) as writer:
        for task, engine, seed in [job for job in wanted if job not in known][: args.most]:
            row = run(task, engine, seed, prepare(task, roots[task], args.work), args.work)
            writer.writerow({**row, **machine})
            print(row, flush=True)
    page.write_text(record(common.read_rows(table)))
    print(page.read_text())


if __name__ == "__main__":
    main()
