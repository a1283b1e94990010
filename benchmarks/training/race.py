"""Training with its loader against other libraries' loops on the same machine; CSV to stdout.

    python -m benchmarks.training.race simsiam byol --source cifar10 --root FOLDER > benchmarks/results/race_cpu.csv
    python -m benchmarks.training.race simsiam --source folder --root FOLDER --size 96 --precision bf16

Contestants: fastrdm with probe, log line and an open monitor window; fastrdm-outside, the same with no window open;
lightly, a plain loop over its heads, losses and transforms; stable-pretraining, its method's class in the same loop.
Libraries that are not installed are left out and named. All take the same encoder, widths of heads and batch.
The others load by torch's DataLoader with persistent workers, one a thread, and train by SGD.

Each contestant is a session of processes of its own, stopped by a signal with all its workers while it is not its turn.
A turn is one step that is not counted, then --steps that are. Before the first turn all say what they work on, and the
race is called off where they differ: images and views of a step, trainable parameters (by more than 2 %), and a loss
that is no number. images_per_second goes by the clock; per_core_second counts images for each second of processor time,
over all processes of a contestant, for a machine that others use too. to_fastest: the median over turns of this
contestant's rate per processor second, over that of the best of the other libraries in the same turn.
"""

import argparse
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from importlib import import_module
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks import common
from benchmarks.common import Row
from benchmarks.training.end_to_end import monitored
from fastrdm.config import run_config
from fastrdm.config.run_config import Config
from fastrdm.efficiency.speed import forever
from fastrdm.kernels.batchnorm import set_views
from fastrdm.kernels.ema import ema_update
from fastrdm.loaders.sources.open import open_source
from fastrdm.loaders.sources.source import Source
from fastrdm.loaders.spec import ViewSpec
from fastrdm.methods.prototypes import PrototypesConfig
from fastrdm.models.encoders import build_encoder
from fastrdm.trainer import Trainer
from fastrdm.training.learner import DTYPES

FIELDS = ["method", "encoder", "width", "source", "size", "batch", "precision", "contestant", "turns", "steps"]
FIELDS += ["parameters", "images_per_second", "per_core_second", "p20", "p80", "to_fastest", *common.ENVIRONMENT]
METHODS = ("simsiam", "byol", "swav", "dino")
OURS = ("fastrdm", "fastrdm-outside")
NEEDS = {"lightly": ("lightly",), "stable-pretraining": ("stable_pretraining",)}
CONTESTANTS = (*OURS, *NEEDS)
PARAMETERS_APART = 0.02  # prototypes with a norm of their own, biases
LOG_EVERY = 50  # steps, as log.every
TICKS = os.sysconf("SC_CLK_TCK")
Step = Callable[[], float]


class Work(NamedTuple):
    """What a contestant does in a step, and a function that does one and returns the loss."""

    parameters: int
    images: int
    views: int
    step: Step


class Pictures(Dataset[Any]):
    """Views of a source's images, decoded and transformed by Pillow and lightly as their users do."""

    def __init__(self, source: Source, transforms: Sequence[Callable[[Image.Image], Tensor]]) -> None:
        self.source, self.transforms = source, transforms

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> list[Tensor]:
        if self.source.images is None:
            image = Image.open(io.BytesIO(self.source.fetch(index)[0])).convert("RGB")
        else:
            image = Image.fromarray(np.asarray(self.source.images[index]))
        return [transform(image) for transform in self.transforms]


def settings_of(method: str, args: argparse.Namespace) -> list[str]:
    """The run of a method; SwAV without its queue, which the others' classes do not have."""
    settings = [f"preset={method}", f"loader.source={args.source}", f"encoder.name={args.encoder}"]
    settings += [f"loader.root={args.root}"] if args.root else []
    settings += [f"encoder.width={args.width}", f"encoder.stem={'cifar' if args.size < 64 else 'imagenet'}"]
    settings += [
        f"loader.batch_size={args.batch}",
        f"loader.views.*.size={args.size}",
        f"train.precision={args.precision}",
    ]
    settings += ["train.length=100000ep", "train.compile=false", "log.report=false", "evaluate.baselines=false"]
    settings += ["loader.subset=null", f"monitor.conventions={json.dumps(['erank_l/unit/moment', 'erank_l/unit/cov'])}"]
    settings += ["method.target.1.queue=0"] if method == "swav" else []
    return [*settings, *args.settings]


def by_us(settings: Sequence[str], folder: str, window: bool) -> Work:
    """The trainer's step with its loader, probe, monitor and what a log line measures."""
    # The next window is far off, so that this one takes its share of many batches, as in a run.
    every = "1000st" if window else "0st"
    trainer = Trainer(run_config.load([*settings, f"run={folder}/run", f"monitor.every={every}"]))
    batches, numbers = forever(trainer.loader), count(1)

    def step() -> float:
        output = monitored(trainer, next(batches))
        if next(numbers) % LOG_EVERY == 0:
            trainer.monitor.batch(output)
        trainer.monitor.poll()
        return output.loss.item()

    method = trainer.method
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    return Work(trained, trainer.settings.loader.batch_size, len(trainer.settings.loader.views), step)


def transform_of(spec: ViewSpec) -> Callable[[Image.Image], Tensor]:
    """Lightly's transform with the settings of a view."""
    lightly: Any = import_module("lightly.transforms.byol_transform")
    transform: Callable[[Image.Image], Tensor] = lightly.BYOLView2Transform(
        input_size=spec.size,
        cj_prob=spec.jitter,
        cj_strength=1.0,
        cj_bright=spec.brightness,
        cj_contrast=spec.contrast,
        cj_sat=spec.saturation,
        cj_hue=spec.hue,
        min_scale=spec.scale[0],
        random_gray_scale=spec.grayscale,
        gaussian_blur=spec.blur,
        solarization_prob=spec.solarize,
        hf_prob=spec.flip,
        normalize={"mean": list(spec.mean), "std": list(spec.std)},
    )
    return transform


class LightlyMethod(nn.Module):
    """An encoder under lightly's heads and loss, one pass for each view, as in lightly's examples."""

    def __init__(self, method: str, c: Config) -> None:
        loss: Any = import_module("lightly.loss")
        modules: Any = import_module("lightly.models.modules")
        prototypes: Any = import_module("lightly.models.modules.heads").SwaVPrototypes
        super().__init__()
        self.method, self.encoder, head = method, build_encoder(c.encoder), c.method.projector
        set_views(self.encoder, 1)
        features, self.predictor = self.encoder.features, nn.Identity()
        counts = [t.count for t in c.method.online if isinstance(t, PrototypesConfig)]
        if method == "simsiam":
            self.projector: nn.Module = modules.SimSiamProjectionHead(features, head.hidden, head.out)
            self.predictor = modules.SimSiamPredictionHead(head.out, head.out // 4, head.out)
            self.loss: Any = loss.NegativeCosineSimilarity()
        elif method == "byol":
            self.projector = modules.BYOLProjectionHead(features, head.hidden, head.out)
            self.predictor = modules.BYOLPredictionHead(head.out, head.hidden, head.out)
            self.loss = loss.NegativeCosineSimilarity()
        elif method == "swav":
            self.projector = modules.SwaVProjectionHead(features, head.hidden, head.out)
            self.predictor, self.loss = prototypes(head.out, counts[0]), loss.SwaVLoss()
        else:
            self.projector = modules.DINOProjectionHead(features, head.hidden, head.out, counts[0])
            self.loss = loss.DINOLoss(output_dim=counts[0])
        self.target: nn.ModuleList | None = None
        if c.method.ema:
            copies = build_encoder(c.encoder), type(self.projector)(*self._sizes(features, c, counts))
            self.target = nn.ModuleList(copies)
            for mine, theirs in zip(self.pair.parameters(), self.target.parameters(), strict=True):
                theirs.data.copy_(mine.data)
                theirs.requires_grad_(False)
        self.momentum = torch.tensor(c.method.ema.momentum if c.method.ema else 0.0)

    @property
    def pair(self) -> nn.ModuleList:
        """The online encoder and projector, which a target copies."""
        return nn.ModuleList([self.encoder, self.projector])

    def _sizes(self, features: int, c: Config, counts: list[int]) -> list[int]:
        return [features, c.method.projector.hidden, c.method.projector.out, *(counts if self.method == "dino" else [])]

    def forward(self, views: list[Tensor]) -> Tensor:
        """The loss of two views (B, 3, S, S), 0-d."""
        z = [self.projector(self.encoder(view)) for view in views]
        p = [self.predictor(x) for x in z]
        if self.target is None and self.method == "simsiam":
            return 0.5 * (self.loss(p[0], z[1].detach()) + self.loss(p[1], z[0].detach()))  # type: ignore[no-any-return]
        if self.target is None:
            with torch.no_grad():
                self.predictor.heads[0].weight.data = nn.functional.normalize(self.predictor.heads[0].weight.data)  # type: ignore[index,union-attr]
            return self.loss([self.predictor(nn.functional.normalize(x)) for x in z], [])  # type: ignore[no-any-return]
        with torch.no_grad():
            t = [self.target[1](self.target[0](view)) for view in views]
        if self.method == "byol":
            return self.loss(p[0], t[1]) + self.loss(p[1], t[0])  # type: ignore[no-any-return]
        return self.loss(t, p, epoch=1)  # type: ignore[no-any-return]

    def after_step(self) -> None:
        """Move the target."""
        if self.target is not None:
            ema_update(list(self.target.parameters()), list(self.pair.parameters()), self.momentum)


class StableMethod(nn.Module):
    """The method's class of stable-pretraining."""

    def __init__(self, method: str, c: Config) -> None:
        methods: Any = import_module("stable_pretraining.methods")
        super().__init__()
        encoder, head = build_encoder(c.encoder), c.method.projector
        if method == "simsiam":
            self.model = methods.SimSiam(encoder, projector_dim=head.out, predictor_hidden_dim=head.out // 4)
        elif method == "byol":
            sizes = (head.hidden, head.out)
            self.model = methods.BYOL(encoder, projector_dims=sizes, predictor_dims=sizes)
        else:
            raise ValueError(f"stable-pretraining takes part with simsiam and byol, got {method}")

    def forward(self, views: list[Tensor]) -> Tensor:
        """The loss of two views (B, 3, S, S), 0-d."""
        return self.model(*views).loss  # type: ignore[no-any-return]

    def after_step(self) -> None:
        """Move the target, as its callback does."""
        for part in (getattr(self.model, name, None) for name in ("backbone", "projector")):
            if hasattr(part, "update_teacher"):
                part.update_teacher()  # type: ignore[union-attr]


def by_library(settings: Sequence[str], made: Callable[[str, Config], Any]) -> Work:
    """A plain loop: DataLoader, autocast where asked for, SGD."""
    c = run_config.load(settings)
    torch.manual_seed(c.train.seed)
    source, model = open_source(c.loader, "train"), made(c.preset, c)
    data = Pictures(source, [transform_of(spec) for spec in c.loader.views])
    workers = torch.get_num_threads()
    loader = DataLoader(
        data, c.loader.batch_size, shuffle=True, num_workers=workers, persistent_workers=True, drop_last=True
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, c.optim.lr * c.loader.batch_size / 256, 0.9, weight_decay=1e-5)
    dtype = DTYPES[c.train.precision]
    batches: Iterator[list[Tensor]] = (batch for _ in count() for batch in loader)

    def step() -> float:
        views = next(batches)
        with nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype):
            loss = model(views)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.after_step()
        return float(loss.detach())

    return Work(sum(p.numel() for p in trained), c.loader.batch_size, len(c.loader.views), step)


def contestant(name: str, method: str, args: argparse.Namespace) -> None:
    """A contestant's process: say what a step works on, then take the number of steps that each line asks for."""
    torch.set_num_threads(args.threads)
    settings = settings_of(method, args)
    with TemporaryDirectory() as folder:
        if name in OURS:
            work = by_us(settings, folder, name == "fastrdm")
        else:
            work = by_library(settings, LightlyMethod if name == "lightly" else StableMethod)
        loss = work.step()
        told = {"parameters": work.parameters, "images": work.images, "views": work.views, "loss": loss}
        print(json.dumps(told), flush=True)
        for line in sys.stdin:
            began = time.perf_counter()
            for _ in range(int(line)):
                work.step()
            print(json.dumps({"seconds": time.perf_counter() - began}), flush=True)


class Runner:
    """A contestant's processes, stopped but for its turns."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=common.ROOT, start_new_session=True
        )
        self.work = self._answer()
        self._signal(signal.SIGSTOP)

    def turn(self, steps: int) -> tuple[float, float]:
        """Seconds by the clock and of processor time for `steps` steps, after one that is not counted."""
        self._signal(signal.SIGCONT)
        self._ask(1)
        before = processor_seconds(self.process.pid)
        seconds = self._ask(steps)["seconds"]
        spent = processor_seconds(self.process.pid) - before
        self._signal(signal.SIGSTOP)
        return seconds, spent

    def close(self) -> None:
        """End the contestant: it reads to the end of its input, and removes what it wrote."""
        self._signal(signal.SIGCONT)
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self.process.wait()

    def _ask(self, steps: int) -> Any:
        assert self.process.stdin is not None
        print(steps, file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        # What a library prints of its own accord comes before the answer.
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise ValueError(f"{self.name} ended without an answer, status {self.process.wait()}")

    def _signal(self, number: int) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)


def processor_seconds(group: int) -> float:
    """Processor time so far of all processes of a process group, and of its children that have ended."""
    total = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group:
            total += sum(map(int, fields[11:15]))
    return total / TICKS


def called_off(runners: Sequence[Runner]) -> str | None:
    """Why the contestants' work is not the same, or None where it is."""
    first = runners[0].work
    for runner in runners:
        work = runner.work
        if (work["images"], work["views"]) != (first["images"], first["views"]):
            return f"{runner.name} takes {work['images']} images in {work['views']} views, {runners[0].name} does not"
        if abs(work["parameters"] / first["parameters"] - 1) > PARAMETERS_APART:
            return f"{runner.name} trains {work['parameters']:,} parameters, {runners[0].name} {first['parameters']:,}"
        if not np.isfinite(work["loss"]):
            return f"{runner.name}'s first loss is {work['loss']}"
    return None


def rows(method: str, names: Sequence[str], args: argparse.Namespace) -> Iterator[Row]:
    """A row for each contestant of one method, after all of them were timed in turns."""
    own = [sys.executable, "-m", "benchmarks.training.race", method, *args.words]
    runners: list[Runner] = []
    try:
        for name in names:
            runners.append(Runner(name, [*own, "--contestant", name]))
        if reason := called_off(runners):
            sys.exit(f"{method}: {reason}")
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for _ in range(args.turns):
            for runner in runners:
                found[runner.name].append(runner.turn(args.steps))
    finally:
        for runner in runners:
            runner.close()
    images = args.steps * args.batch
    rates = {name: [images / max(spent, 1 / TICKS) for _, spent in turns] for name, turns in found.items()}
    others = [rates[name] for name in names if name not in OURS]
    environment = {**common.environment(torch.device("cpu")), "threads": args.threads}
    for runner in runners:
        low, middle, high = common.percentiles(rates[runner.name])
        best = [max(turn) for turn in zip(*others, strict=True)]
        yield {
            "method": method,
            "encoder": args.encoder,
            "width": args.width,
            "source": args.source,
            "size": args.size,
            "batch": args.batch,
            "precision": args.precision,
            "contestant": runner.name,
            "turns": args.turns,
            "steps": args.steps,
            "parameters": runner.work["parameters"],
            "images_per_second": f"{images / statistics.median(s for s, _ in found[runner.name]):.1f}",
            "per_core_second": f"{middle:.1f}",
            "p20": f"{low:.1f}",
            "p80": f"{high:.1f}",
            "to_fastest": f"{statistics.median(a / b for a, b in zip(rates[runner.name], best, strict=True)):.3f}"
            if best
            else "",
            **environment,
        }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("methods", nargs="+", choices=METHODS)
    parser.add_argument("--source", default="cifar10")
    parser.add_argument("--root")
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--steps", type=int, default=4, help="steps of a turn")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=CONTESTANTS)
    parser.add_argument("--settings", nargs="*", default=[], metavar="a.b=c")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.contestant:
        return contestant(args.contestant, args.methods[0], args)
    # Ended from outside, it must not leave stopped processes behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    words = list(sys.argv[1:] if arguments is None else arguments)
    args.words = [word for word in words if word not in args.methods]
    names = []
    for name in args.contestants:
        reason = common.import_error(*NEEDS.get(name, ()))
        if reason:
            print(f"{name} does not take part: {reason}", file=sys.stderr)
        else:
            names.append(name)

    def every() -> Iterator[Row]:
        for method in args.methods:
            yield from rows(method, [n for n in names if n != "stable-pretraining" or method in METHODS[:2]], args)

    common.print_rows(FIELDS, every())


if __name__ == "__main__":
    main()
