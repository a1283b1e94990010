"""Everything that needs a GPU, in parts of at most nine minutes; started again it goes on with what is left.

    python -m benchmarks.gpu_suite OUT --cifar FOLDER [--imagenet FOLDER]
    python -m benchmarks.gpu_suite OUT --dry-run

Each part is a command with a time limit: the tests that are marked gpu, the kernels, the first step, training steps
(compiled, captured, eager, with local crops, of a ViT, beside the method that is varied, beside two SVDs),
augmentation, loading, training with its loader, and a short training on CIFAR-10. Its output lies in OUT/<part>.txt (a
table of a benchmark is its CSV), its end in OUT/<part>.json. A part that succeeded at this commit is not run again.
--minutes ends the call before a part that would not fit any more. After each part OUT/record.json and OUT/record.md
tell what there is. FOLDER of --cifar holds cifar-10 as `loader.root` takes it, that of --imagenet one folder of images
a class, some thousand files, which are packed into OUT/packed; parts without their data, or a second GPU, are left out
and named. --dry-run takes sizes that a CPU does in a minute.
"""

import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import common
from benchmarks.common import ROOT, commit

LIMIT = 540  # seconds of a part
RESNET18 = ["--encoder", "resnet18", "--width", "64", "--stem", "cifar", "--size", "32", "--batch", "512"]
RESNET50 = ["--encoder", "resnet50", "--width", "64", "--stem", "imagenet", "--size", "224"]
CROPS = ["--crops", "6", "--crop-size", "96", "--batch", "128"]
VIT = ["--encoder", "timm/vit_small_patch16_224", "--size", "224"]
VIT += ["--settings", "encoder.options={dynamic_img_size: true}"]
COMPILED = ["--precision", "bf16", "--compile", "yes"]
FAST = [*COMPILED, "--capture", "yes"]
METHODS = ("simsiam", "byol", "swav", "dino")
VARIANTS = ("rdm_simsiam", "rdm_simsiam_log1p", "rdm_byol", "rdm_byol_log1p")
SMALLEST = ["--width", "4", "--size", "8", "--batch", "16", "--repeats", "1"]
NEEDS = {"cifar": "--cifar", "imagenet": "--imagenet", "gpus": "two GPUs"}


class Part(NamedTuple):
    """A command after `python`, and what it needs: a key of NEEDS, or nothing."""

    name: str
    command: list[str]
    needs: str | None = None


def bench(name: str, *arguments: str) -> list[str]:
    """The command of a module of this package."""
    return ["-m", f"benchmarks.{name}", *arguments]


def parts(cifar: str | None, imagenet: str | None, out: Path) -> Iterator[Part]:
    """The whole suite; tests and kernels first."""
    yield Part("tests", ["-m", "pytest", "-q", "-m", "gpu", str(ROOT / "tests")])
    yield Part("spectral", bench("kernels.spectral"))
    yield Part("spectral_bars", bench("kernels.spectral_bars"))
    yield Part("products", bench("kernels.products"))
    yield from step_parts()
    yield from ddp_parts()
    yield from data_parts(cifar or "", imagenet or "", out)


def step_parts() -> Iterator[Part]:
    """Steps on noise. Each compiles for itself, but torch keeps what it compiled for the parts after it."""
    sizes = {"resnet50": [*RESNET50, "--batch", "256"], "resnet18": RESNET18}
    first = ["--encoder", "resnet50", "--size", "224", "--batch", "256"]
    yield Part("first_step", bench("training.first_step", *first, *FAST))
    for name, size in sizes.items():
        for preset in METHODS:
            yield Part(f"step_{name}_{preset}", bench("training.step", *size, *FAST, "--presets", preset))
    for preset in VARIANTS:
        named = ["--presets", preset, "--contestants", "step", "ceiling", "base"]
        yield Part(f"step_resnet50_{preset}", bench("training.step", *sizes["resnet50"], *FAST, *named))
        yield Part(f"step_resnet18_{preset}", bench("training.step", *RESNET18, *FAST, *named, "svd", "reference"))
    eager = ["--precision", "bf16"]
    ways = {"compiled": COMPILED, "captured": [*eager, "--capture", "yes"], "eager": eager}
    ways["fp16"] = ["--precision", "fp16", "--compile", "yes"]
    for way, how in ways.items():
        for name, size in sizes.items():
            yield Part(f"step_{name}_{way}", bench("training.step", *size, *how, "--presets", "simsiam"))
    for preset in ("swav", "dino"):
        yield Part(f"step_crops_{preset}", bench("training.step", *RESNET50, *CROPS, *FAST, "--presets", preset))
    yield Part("step_vit_dino", bench("training.step", *CROPS, *VIT, *FAST, "--presets", "dino"))


def ddp_parts() -> Iterator[Part]:
    """The compiled step of all GPUs of this machine, its graph split at the buckets of DDP or not."""
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    count = max(torch.cuda.device_count(), 2)
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(count), *rendezvous]
    named = ["--batch", str(256 * count), "--presets", "simsiam", "--contestants", "step", "ceiling"]
    for choice in ("ddp_optimizer", "no_optimization"):
        step = bench("training.step", *RESNET50, *COMPILED, *named, "--optimize-ddp", choice)
        yield Part(f"ddp_{choice}", [*launch, *step], "gpus")


def data_parts(cifar: str, imagenet: str, out: Path) -> Iterator[Part]:
    """Views, loading, and training with its loader."""
    images, packed = f"{cifar}/train.images.npy", out / "packed"
    yield Part("augment", bench("loaders.augment", "--imagenet", imagenet, "--cifar", images), "imagenet")
    loading = ["--threads", "16", "--rounds", "3", "--minutes", "7"]
    yield Part("load_decode", bench("loaders.throughput", "decode", imagenet, *loading), "imagenet")
    for words in (["native", "synthetic", "floor"], ["DALI", "ffcv"], ["torchvision", "Pillow"], ["kornia"]):
        name = f"load_views_{words[0]}"
        yield Part(name, bench("loaders.throughput", "views", imagenet, *loading, "--only", *words), "imagenet")
    yield Part("load_memory", bench("loaders.throughput", "memory", cifar, *loading), "cifar")
    for split in (s for s in ("train", "val") if not (packed / s).exists()):  # the same images: training asks for both
        pack = ["-m", "fastrdm.cli", "pack", imagenet, str(packed / split), "--mode", "jpeg"]
        yield Part(f"pack_{split}", pack, "imagenet")
    fast = ["train.precision=bf16", "train.compile=true", "train.capture=true"]
    real = ["imagenet/simsiam.yaml", "loader.source=packed", f"loader.root={packed}", "loader.engine=native"]
    real += ["loader.workers=16", "loader.batch_size=256"]
    yield Part("end_to_end_imagenet", bench("training.end_to_end", *real, *fast), "imagenet")
    recipe = ["cifar10/resnet18.yaml", f"loader.root={cifar}", *fast]
    yield Part("end_to_end_cifar10", bench("training.end_to_end", *recipe, "loader.batch_size=512"), "cifar")
    short = ["train.length=5ep", "optim.warmup=1ep", f"run={out / 'run'}", "evaluate.every=0st"]
    yield Part("train_cifar10", [str(ROOT / "fastrdm" / "train.py"), *recipe, *short], "cifar")


def dry_parts(out: Path) -> Iterator[Part]:
    """Parts of the same kinds as the whole suite, at sizes for a CPU."""
    small = ["preset=simsiam", "encoder.width=4", "loader.batch_size=16", "loader.subset=80"]
    tests = str(ROOT / "tests" / "optim" / "test_optimizers.py")
    yield Part("tests", ["-m", "pytest", "-q", "-m", "gpu", "--collect-only", tests])
    every = ["--contestants", "step", "ceiling", "reference", "svd", "base"]
    yield Part("step", bench("training.step", *SMALLEST, *every, "--presets", "rdm_byol_log1p"))
    crops = ["--crops", "2", "--crop-size", "4", "--contestants", "step", "ceiling"]
    yield Part("step_crops", bench("training.step", *SMALLEST, *crops, "--presets", "dino"))
    brief = ["train.length=100ep", "--blocks", "1", "--steps", "1"]
    yield Part("end_to_end", bench("training.end_to_end", *small, *brief))
    yield Part("left_out", bench("loaders.throughput", "decode", ""), "imagenet")
    ends = ["train.length=2st", "optim.warmup=0st", f"run={out / 'run'}", "log.report=false"]
    yield Part("train", [str(ROOT / "fastrdm" / "train.py"), *small, *ends])


def machine() -> dict[str, Any]:
    """The machine and the versions that the record was made with."""
    return {
        "device": common.device_name(common.available_device()),
        "driver_cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
    }


def run_part(part: Part, out: Path, limit: float) -> dict[str, Any]:
    """Run a part and write its end; status is ok, failed or over time."""
    began, code = time.monotonic(), None
    text = out / f"{part.name}.txt"
    with text.open("w") as stdout, (out / f"{part.name}.err").open("w") as stderr:
        try:
            done = subprocess.run(
                [sys.executable, *part.command], stdout=stdout, stderr=stderr, timeout=limit, cwd=ROOT
            )
            code = done.returncode
        except subprocess.TimeoutExpired:
            pass
    status = "over time" if code is None else "failed" if code else "ok"
    end = {"part": part.name, "status": status, "seconds": round(time.monotonic() - began, 1), "commit": commit()}
    end |= {
        "command": ["python", *(c.replace(f"{ROOT}/", "").replace(str(out.resolve()), "OUT") for c in part.command)]
    }
    (out / f"{part.name}.json").write_text(json.dumps(end, indent=1))
    return end


def ended(part: Part, out: Path) -> dict[str, Any] | None:
    """The end of a part as an earlier call wrote it, or None."""
    path = out / f"{part.name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def record(all_parts: Sequence[Part], left_out: dict[str, str], out: Path) -> None:
    """Write record.json and record.md from what lies in `out`."""
    ends = {part.name: ended(part, out) for part in all_parts}
    (out / "record.json").write_text(json.dumps({"machine": machine(), "parts": ends, "left out": left_out}, indent=1))
    lines = ["# GPU suite", "", *(f"- {key}: {value}" for key, value in machine().items()), ""]
    lines += ["| part | status | seconds | commit |", "|---|---|---|---|"]
    for name, end in ends.items():
        told = [end["status"], str(end["seconds"]), end["commit"]] if end else [left_out.get(name, "not run"), "", ""]
        lines.append(f"| {' | '.join([name, *told])} |")
    for name, end in ends.items():
        if end:
            tail = (out / f"{name}.txt").read_text().splitlines()[-40:]
            lines += ["", f"## {name}", "", "```", " ".join(end["command"]), "", *tail, "```"]
    (out / "record.md").write_text("\n".join(lines) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = common.parser(__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cifar")
    parser.add_argument("--imagenet")
    parser.add_argument("--only", nargs="+", help="words of parts' names")
    parser.add_argument("--minutes", type=float, default=9.0, help="time that this call may take")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args(arguments)
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --dry-run works without")
    args.out.mkdir(parents=True, exist_ok=True)
    place, args.gpus = args.out.resolve(), torch.cuda.device_count() > 1
    everything = list(dry_parts(place) if args.dry_run else parts(args.cifar, args.imagenet, place))
    wanted = [p for p in everything if not args.only or any(word in p.name for word in args.only)]
    left_out = {p.name: f"needs {NEEDS[p.needs]}" for p in wanted if p.needs and not getattr(args, p.needs)}
    end_of_call, now = time.monotonic() + 60 * args.minutes, commit()
    for part in wanted:
        end = ended(part, args.out)
        if part.name in left_out or (end and end["status"] == "ok" and end["commit"] == now):
            continue
        seconds = end_of_call - time.monotonic()
        if seconds < 30:
            print(f"stopped before {part.name}: the same command goes on")
            break
        end = run_part(part, args.out, min(seconds, LIMIT))
        print(f"{part.name}: {end['status']} in {end['seconds']:.0f} s", flush=True)
        record(wanted, left_out, args.out)
    record(wanted, left_out, args.out)
    return int(any((end := ended(p, args.out)) and end["status"] == "failed" for p in wanted))


if __name__ == "__main__":
    sys.exit(main())
