"""Seconds from the start of training to the end of its first step, with an empty and a filled cache; CSV to stdout.

    python -m benchmarks.training.first_step --encoder resnet50 --size 224 --batch 256 --compile yes > first_step.csv

Runs `fastrdm train` twice on noise, in new processes, with caches of torch.compile and Triton in a folder that is empty
at first: cold, then warm. seconds: as the run itself counts, from the start of its process (interpreter and imports
included) to the first step's end on the device. graphs: what the run says of the cache. torchrun's own start and the
reading of a data set are not in it.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import common
from benchmarks.common import Row

TRAIN = common.ROOT / "fastrdm" / "train.py"
FIELDS = ["cache", "preset", "encoder", "size", "batch", "precision", "compile", "capture", "seconds", "graphs"]
FIELDS += common.ENVIRONMENT


def first_step(cache: Path, run: Path, settings: Sequence[str]) -> tuple[float, str]:
    """Seconds to the end of the first step, and what the run says of the cache."""
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"), "TRITON_CACHE_DIR": str(cache / "triton")}
    command = [sys.executable, str(TRAIN), *settings, f"run={run}"]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    (told,) = (line for line in done.stdout.splitlines() if line.startswith("first step: "))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = next(line["seconds_to_first_step"] for line in lines if "seconds_to_first_step" in line)
    return seconds, told.partition("; ")[2]


def rows(settings: Sequence[str], where: Row) -> Iterator[Row]:
    """One row with the empty cache, one with the cache that the first run filled."""
    with tempfile.TemporaryDirectory() as folder:
        for cache in ("cold", "warm"):
            seconds, graphs = first_step(Path(folder), Path(folder) / cache, settings)
            yield {"cache": cache, "seconds": f"{seconds:.1f}", "graphs": graphs, **where}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--preset", default="simsiam")
    parser.add_argument("--encoder", default="resnet_small")
    parser.add_argument("--size", type=int, default=32, help="px")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--compile", default="no", choices=["no", "yes"])
    parser.add_argument("--capture", default="no", choices=["no", "yes"])
    parser.add_argument("--settings", nargs="*", default=[], metavar="a.b=c", help="more of fastrdm train's settings")
    args = parser.parse_args(arguments)
    settings = [
        "quickstart.yaml",
        f"preset={args.preset}",
        f"encoder.name={args.encoder}",
        "encoder.width=null",
        "encoder.stem=imagenet",
    ]
    settings += [f"loader.batch_size={args.batch}", f"loader.views.*.size={args.size}", "loader.max_enlarge=1000"]
    settings += [f"train.precision={args.precision}", f"train.compile={str(args.compile == 'yes').lower()}"]
    settings += [f"train.capture={str(args.capture == 'yes').lower()}", "loader.engine=synthetic", "loader.subset=null"]
    settings += ["train.length=1st", "optim.warmup=0st", "evaluate.baselines=false", "log.report=false"]
    named = ("preset", "encoder", "size", "batch", "precision", "compile", "capture")
    where = {name: getattr(args, name) for name in named} | common.environment(common.available_device())
    common.print_rows(FIELDS, rows([*settings, *args.settings], where))


if __name__ == "__main__":
    main()
