"""Everything that needs a GPU, ordered by value and cut to fit a quarter of an hour; started again it goes on.

    python -m benchmarks.gpu_suite --plan
    python -m benchmarks.gpu_suite OUT --cifar FOLDER [--imagenet FOLDER] [--quarter 1]
    python -m benchmarks.gpu_suite OUT --dry-run

Each part is a command with the seconds that it should take. A part is not begun where they are no longer left, so that
what a call has measured is whole; smaller parts behind it may still fit. Quarter 1: the tests that are marked gpu, a
training on CIFAR-10 to an accuracy, steps beside the method that is varied, cuDNN's choice by measuring, crops,
kernels, a table of what the ResNet-50 step runs. Quarter 2: training with its loaders at 224 px in turns, decoding,
captured views beside crops of a CPU, DistributedDataParallel on one process of NCCL, views of others. Quarter 3: what
is left for a longer loan. One process times all presets of an encoder, and all share one folder of compiled code,
which some parts fill while another one trains.

Outputs lie in a state folder beside OUT, which the next call reads: <part>.txt (a benchmark's table is its CSV),
<part>.err and <part>.json, its end. A part that succeeded at this commit is not run again. OUT gets record.md,
record.json and results.tar, which holds all of the state but the compiled code and what was packed. FOLDER of --cifar
holds cifar-10 as `loader.root` takes it, that of --imagenet one folder of images a class. Parts without their data, or
a second GPU, are left out and named. --dry-run takes sizes that a CPU does in a minute or two.
"""

import json
import os
import platform
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import common
from benchmarks.common import ROOT, commit

LIMIT = 540  # seconds of a part at most: a command on a borrowed machine may be cut off after ten minutes
QUARTER = 15.0  # minutes
OVERHEAD = 90  # seconds of a quarter for starting the machine and moving files
CACHE, PACKED = "compiled", "packed"  # folders of the state that are not among the results
RESNET18 = ["--encoder", "resnet18", "--width", "64", "--stem", "cifar", "--size", "32", "--batch", "512"]
RESNET50 = ["--encoder", "resnet50", "--width", "64", "--stem", "imagenet", "--size", "224", "--batch", "128"]
CROPS = ["--crops", "6", "--crop-size", "96"]
VIT = ["--encoder", "timm/vit_small_patch16_224", "--size", "224", "--batch", "128"]
VIT += ["--settings", "encoder.options={dynamic_img_size: true}"]
COMPILED = ["--precision", "bf16", "--compile", "yes"]
FAST = [*COMPILED, "--capture", "yes"]
METHODS = ("simsiam", "byol", "swav", "dino")
VARIANTS = ("rdm_simsiam", "rdm_simsiam_log1p", "rdm_byol", "rdm_byol_log1p")
SMALLEST = ["--width", "4", "--size", "8", "--batch", "16", "--repeats", "1"]
NEEDS = {"cifar": "--cifar", "imagenet": "--imagenet", "gpus": "two GPUs"}
FEEDS = ("native", "torchcodec", "dali", "ffcv")  # engines that are attached to a training
CROPS_OF_A_CPU = ["loader.engine=native", "loader.augment=reference"]  # threads cut 8 bits, the device colors them


class Part(NamedTuple):
    """A command after `python`."""

    name: str
    command: list[str]
    needs: str | None = None
    """A key of NEEDS, or nothing."""
    seconds: float = 60.0
    """Time that it should take on an H200, the first start of its programs included. Estimates until a run has ended
    with a record."""
    quarter: int = 1
    beside: tuple[list[str], ...] = ()
    """Commands that run meanwhile, whose output nobody reads: they fill the folder of compiled code."""


def bench(name: str, *arguments: str) -> list[str]:
    """The command of a module of this package."""
    return ["-m", f"benchmarks.{name}", *arguments]


def step(*arguments: str, presets: Sequence[str] = ("simsiam",), contestants: Sequence[str] = ()) -> list[str]:
    """The command that times the steps of some presets of one encoder in one process."""
    named = ["--contestants", *contestants] if contestants else []
    return bench("training.step", *arguments, "--presets", *presets, *named)


def parts(cifar: str | None, imagenet: str | None, out: Path) -> Iterator[Part]:
    """The whole suite, by value: what is first is measured first."""
    yield from first_quarter(cifar or "")
    yield from second_quarter(cifar or "", imagenet or "", out)
    yield from further_parts(cifar or "", imagenet or "", out)


def first_quarter(cifar: str) -> Iterator[Part]:
    """What nobody has seen yet and what most depends on."""
    compared = ("step", "ceiling", "base")
    rdm50 = step(*RESNET50, *FAST, presets=VARIANTS[:2], contestants=compared)
    rdm18 = step(*RESNET18, *FAST, presets=VARIANTS[:2], contestants=(*compared, "svd"))
    crops = step(*RESNET50, *CROPS, *FAST, presets=("swav", "dino"), contestants=("step", "ceiling"))
    once = ["--repeats", "1"]
    fast = ["train.precision=bf16", "train.compile=true", "train.capture=true"]
    recipe = ["cifar10/resnet18.yaml", f"loader.root={cifar}", *fast, "loader.engine=resident", "log.report=false"]
    long = ["train.length=200ep", "evaluate.every=50ep", "run=STATE/run"]
    yield Part("tests", ["-m", "pytest", "-q", "-n", "4", "-m", "gpu", str(ROOT / "tests")], seconds=75)
    yield Part(
        "train_cifar10",
        [str(ROOT / "fastrdm" / "train.py"), *recipe, *long],
        "cifar",
        seconds=330,
        beside=([*rdm50, *once], [*crops, *once], [*rdm18, *once]),
    )
    yield Part("step_resnet50_rdm", rdm50, seconds=70)
    for choice in ("true", "false"):
        how = ["--settings", f"train.cudnn_benchmark={choice}"]
        command = step(*RESNET50, *FAST, *how, contestants=("step", "ceiling"))
        yield Part(f"step_resnet50_cudnn_{choice}", command, seconds=35)
    yield Part("step_resnet18_rdm", rdm18, seconds=60)
    yield Part("profile_resnet50", kernels_of(*RESNET50, *COMPILED, "--trace", "STATE/profile.json.gz"), seconds=40)
    yield Part("step_crops", crops, seconds=75)
    yield Part("spectral_bars", bench("kernels.spectral_bars"), seconds=40)
    yield Part("product_ways", bench("kernels.products", "--ways"), seconds=30)


def kernels_of(*arguments: str) -> list[str]:
    """The command that prints what a step runs, by torch's profiler."""
    return bench("training.step_kernels", *arguments)


def attached(*settings: str, loaders: dict[str, list[str]], brief: Sequence[str] = ()) -> list[str]:
    """The command that trains with several loaders, and with noise, in turns."""
    others = [word for name, own in loaders.items() for word in ("--loader", name, *own)]
    return bench("training.end_to_end", *settings, *others, "--no-reference", "--pause", "1", *brief)


def second_quarter(cifar: str, imagenet: str, out: Path) -> Iterator[Part]:
    """Training with its loaders at 224 px, then decoding, views and one process of NCCL."""
    packed, beton = out / PACKED, out / PACKED / "beton"
    fast = ["train.precision=bf16", "train.compile=true", "train.capture=true", "loader.workers=16"]
    fast.append("train.length=100000st")  # of which only blocks are run
    for split in (s for s in ("train", "val") if not (packed / s).exists()):  # the same images: training asks for both
        pack = ["-m", "fastrdm.cli", "pack", imagenet, str(packed / split), "--mode", "jpeg"]
        yield Part(f"pack_{split}", pack, "imagenet", seconds=10, quarter=2)
    if find_spec("ffcv") and not (beton / "train").exists():
        pack = ["-m", "fastrdm.cli", "pack", imagenet, str(beton / "train"), "--format", "beton", "--workers", "1"]
        yield Part("pack_beton", pack, "imagenet", seconds=20, quarter=2)
    real = ["imagenet/simsiam.yaml", "loader.source=packed", f"loader.root={packed}", "loader.batch_size=128", *fast]
    feeds = {engine: [f"loader.engine={engine}"] for engine in FEEDS} | {"crops": CROPS_OF_A_CPU}
    feeds["ffcv"].append(f"loader.root={beton}")
    yield Part("loaders_224", attached(*real, loaders=feeds), "imagenet", seconds=180, quarter=2)
    loading = ["--threads", "16", "--rounds", "3", "--minutes", "1"]
    decode = bench("loaders.throughput", "decode", imagenet, *loading)
    yield Part("load_decode", decode, "imagenet", seconds=70, quarter=2)
    small = ["cifar10/resnet18.yaml", f"loader.root={cifar}", "loader.batch_size=512", *fast]
    ways = {name: [f"loader.engine={name}"] for name in ("resident", "native")} | {"crops": CROPS_OF_A_CPU}
    yield Part("views_captured", attached(*small, loaders=ways), "cifar", seconds=80, quarter=2)
    yield Part("ddp_one_rank", bench("training.ddp_rank", *RESNET18, "--precision", "bf16"), seconds=90, quarter=2)
    for words in (["native", "synthetic", "floor"], ["DALI", "ffcv"]):
        views = bench("loaders.throughput", "views", imagenet, *loading, "--only", *words)
        yield Part(f"load_views_{words[0]}", views, "imagenet", seconds=70, quarter=2)


def further_parts(cifar: str, imagenet: str, out: Path) -> Iterator[Part]:
    """What a longer loan measures: every method, every way of running a step, other libraries, several GPUs."""
    images = f"{cifar}/train.images.npy"
    for name, size in {"resnet50": RESNET50, "resnet18": RESNET18}.items():
        yield Part(f"step_{name}", step(*size, *FAST, presets=METHODS), seconds=240, quarter=3)
        ways = {"compiled": COMPILED, "captured": ["--precision", "bf16", "--capture", "yes"]}
        ways |= {"eager": ["--precision", "bf16"], "fp16": ["--precision", "fp16", "--compile", "yes"]}
        for way, how in ways.items():
            yield Part(f"step_{name}_{way}", step(*size, *how), seconds=60, quarter=3)
    yield Part("step_vit_dino", step(*CROPS, *VIT, *FAST, presets=("dino",)), seconds=120, quarter=3)
    first = ["--encoder", "resnet50", "--size", "224", "--batch", "128", *FAST]
    yield Part("first_step", bench("training.first_step", *first), seconds=120, quarter=3)
    yield Part("spectral", bench("kernels.spectral"), seconds=120, quarter=3)
    yield Part("products", bench("kernels.products"), seconds=60, quarter=3)
    augment = bench("loaders.augment", "--imagenet", imagenet, "--cifar", images)
    yield Part("augment", augment, "imagenet", seconds=60, quarter=3)
    loading = ["--threads", "16", "--rounds", "3", "--minutes", "7"]
    for words in (["torchvision", "Pillow"], ["kornia"]):
        views = bench("loaders.throughput", "views", imagenet, *loading, "--only", *words)
        yield Part(f"load_views_{words[0]}", views, "imagenet", seconds=LIMIT, quarter=3)
    memory = bench("loaders.throughput", "memory", cifar, *loading)
    yield Part("load_memory", memory, "cifar", seconds=LIMIT, quarter=3)
    fast = ["train.precision=bf16", "train.compile=true", "train.capture=true", "loader.batch_size=512"]
    recipe = ["cifar10/resnet18.yaml", f"loader.root={cifar}", *fast]
    yield Part("end_to_end_cifar10", bench("training.end_to_end", *recipe), "cifar", seconds=90, quarter=3)
    yield from ddp_parts()


def ddp_parts() -> Iterator[Part]:
    """The compiled step of all GPUs of this machine, its graph split at the buckets of DDP or not."""
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    count = max(torch.cuda.device_count(), 2)
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(count), *rendezvous]
    for choice in ("ddp_optimizer", "no_optimization"):
        how = ["--optimize-ddp", choice]
        # --batch comes twice: the last one counts
        command = step(*RESNET50, "--batch", str(256 * count), *COMPILED, *how, contestants=("step", "ceiling"))
        yield Part(f"ddp_{choice}", [*launch, *command], "gpus", seconds=120, quarter=3)


def dry_parts(out: Path) -> Iterator[Part]:
    """Parts of the same kinds as the whole suite, at sizes for a CPU."""
    small = ["preset=simsiam", "encoder.width=4", "loader.batch_size=16", "loader.subset=80"]
    tests = str(ROOT / "tests" / "optim" / "test_optimizers.py")
    yield Part("tests", ["-m", "pytest", "-q", "-m", "gpu", "--collect-only", tests], seconds=20)
    every = ["step", "ceiling", "reference", "svd", "base"]
    yield Part("step", step(*SMALLEST, presets=["rdm_byol_log1p"], contestants=every), seconds=30)
    crops = ["--crops", "2", "--crop-size", "4"]
    command = step(*SMALLEST, *crops, presets=["dino"], contestants=["step", "ceiling"])
    yield Part("step_crops", command, seconds=25)
    brief = ["train.length=100ep", "--blocks", "1", "--steps", "1", "--pause", "0"]
    yield Part("end_to_end", bench("training.end_to_end", *small, *brief), seconds=30)
    yield Part("left_out", bench("loaders.throughput", "decode", ""), "imagenet")
    loaders = {"resident": ["loader.engine=resident"], "crops": CROPS_OF_A_CPU}
    command = attached(*small, "train.length=100ep", loaders=loaders, brief=["--blocks", "1", "--steps", "1"])
    yield Part("loaders", command, seconds=25, quarter=2)
    table = kernels_of(*SMALLEST[:-2], "--steps", "2", "--top", "5", "--trace", "STATE/profile.json.gz")
    yield Part("profile", table, seconds=20)
    yield Part("ddp_one_rank", bench("training.ddp_rank", *SMALLEST, "--ways", "eager"), seconds=25, quarter=2)
    ends = ["train.length=2st", "optim.warmup=0st", "run=STATE/run", "log.report=false"]
    beside = (["-c", "print('compiled ahead')"],)
    yield Part("train", [str(ROOT / "fastrdm" / "train.py"), *small, *ends], seconds=25, beside=beside)


def plan(wanted: Sequence[Part], left_out: dict[str, str], minutes: float) -> Iterator[str]:
    """Lines that say when each part would begin, and which do not fit."""
    used = float(OVERHEAD)
    yield f"0.0 min: {OVERHEAD} s for starting the machine and moving files"
    for part in wanted:
        if part.name in left_out:
            yield f"   left out: {part.name} {left_out[part.name]}"
        elif used + part.seconds > 60 * minutes:
            yield f"   does not fit: {part.name}, {part.seconds:.0f} s"
        else:
            beside = f", {len(part.beside)} compile meanwhile" if part.beside else ""
            yield f"{used / 60:4.1f} min: {part.name}, {part.seconds:.0f} s{beside}"
            used += part.seconds
    yield f"{used / 60:4.1f} min of {minutes:g}: the end, results.tar"


def machine() -> dict[str, Any]:
    """The machine and the versions that the record was made with."""
    return {
        "device": common.device_name(common.available_device()),
        "driver_cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
    }


def run_part(part: Part, state: Path, limit: float) -> dict[str, Any]:
    """Run a part and write its end; status is ok, failed or over time."""
    began, code = time.monotonic(), None
    own = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(state / CACHE),
        "TRITON_CACHE_DIR": str(state / CACHE / "triton"),
    }
    command, *others = (
        [sys.executable, *(word.replace("STATE", str(state)) for word in words)]
        for words in (part.command, *part.beside)
    )
    beside = [
        subprocess.Popen(other, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT, env=own)
        for other in others
    ]
    with (state / f"{part.name}.txt").open("w") as stdout, (state / f"{part.name}.err").open("w") as stderr:
        try:
            done = subprocess.run(command, stdout=stdout, stderr=stderr, timeout=limit, cwd=ROOT, env=own)
            code = done.returncode
        except subprocess.TimeoutExpired:
            pass
    for process in beside:
        process.kill()
        process.wait()
    status = "over time" if code is None else "failed" if code else "ok"
    end = {"part": part.name, "status": status, "seconds": round(time.monotonic() - began, 1), "commit": commit()}
    end |= {"expected": part.seconds}
    end |= {"command": ["python", *(c.replace(f"{ROOT}/", "").replace(str(state), "STATE") for c in part.command)]}
    (state / f"{part.name}.json").write_text(json.dumps(end, indent=1))
    return end


def ended(part: Part, state: Path) -> dict[str, Any] | None:
    """The end of a part as an earlier call wrote it, or None."""
    path = state / f"{part.name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def record(all_parts: Sequence[Part], left_out: dict[str, str], state: Path, out: Path) -> None:
    """Write record.json, record.md and results.tar from what lies in `state`."""
    ends = {part.name: ended(part, state) for part in all_parts}
    (out / "record.json").write_text(json.dumps({"machine": machine(), "parts": ends, "left out": left_out}, indent=1))
    lines = ["# GPU suite", "", *(f"- {key}: {value}" for key, value in machine().items()), ""]
    lines += ["| part | status | seconds | expected | commit |", "|---|---|---|---|---|"]
    for name, end in ends.items():
        told = [left_out.get(name, "not run"), "", "", ""]
        if end:
            told = [end["status"], str(end["seconds"]), f"{end['expected']:g}", end["commit"]]
        lines.append(f"| {' | '.join([name, *told])} |")
    for name, end in ends.items():
        if end:
            tail = (state / f"{name}.txt").read_text().splitlines()[-40:]
            lines += ["", f"## {name}", "", "```", " ".join(end["command"]), "", *tail, "```"]
    (out / "record.md").write_text("\n".join(lines) + "\n")
    with tarfile.open(out / "results.tar", "w") as results:
        for path in sorted(state.iterdir()):
            if path.name not in (CACHE, PACKED):
                results.add(path, path.name)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = common.parser(__doc__)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--cifar")
    parser.add_argument("--imagenet")
    parser.add_argument("--quarter", type=int, choices=(1, 2, 3), help="the parts of one quarter of an hour")
    parser.add_argument("--only", nargs="+", help="words of parts' names")
    parser.add_argument("--minutes", type=float, help="time that this call may take, 9; of a plan, 15")
    parser.add_argument("--state", type=Path, help="folder of what is done; OUT.state")
    parser.add_argument("--plan", action="store_true", help="print when each part would begin, and run none")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args(arguments)
    if args.out is None and not args.plan:
        parser.error("give a folder OUT, or --plan")
    if not (args.dry_run or args.plan or torch.cuda.is_available()):
        parser.error("torch sees no CUDA device; --dry-run works without")
    out = (args.out or Path("OUT")).resolve()
    state, args.gpus = (args.state or out.with_name(f"{out.name}.state")).resolve(), torch.cuda.device_count() > 1
    everything = list(dry_parts(state) if args.dry_run else parts(args.cifar, args.imagenet, state))
    wanted = [
        p
        for p in everything
        if (args.quarter is None or p.quarter == args.quarter)
        and (not args.only or any(word in p.name for word in args.only))
    ]
    left_out = {p.name: f"needs {NEEDS[p.needs]}" for p in wanted if p.needs and not getattr(args, p.needs)}
    if args.plan:
        print("\n".join(plan(wanted, {} if args.cifar is None else left_out, args.minutes or QUARTER)))
        return 0
    for folder in (out, state):
        folder.mkdir(parents=True, exist_ok=True)
    end_of_call, now = time.monotonic() + 60 * (args.minutes or 9.0), commit()
    for part in wanted:
        end = ended(part, state)
        if part.name in left_out or (end and end["status"] == "ok" and end["commit"] == now):
            continue
        left = end_of_call - time.monotonic()
        if left < part.seconds:
            print(f"not begun: {part.name} takes {part.seconds:.0f} s, {left:.0f} are left; the same command goes on")
            continue
        end = run_part(part, state, min(left, LIMIT))
        print(f"{part.name}: {end['status']} in {end['seconds']:.0f} s", flush=True)
        record(wanted, left_out, state, out)
    record(wanted, left_out, state, out)
    return int(any((end := ended(p, state)) and end["status"] == "failed" for p in wanted))


if __name__ == "__main__":
    sys.exit(main())
