"""Every setting is used: a small run with another value differs in more than the configuration that it writes down.

What is looked at: the weights after a few steps, metrics, alarms, spectra, the analysis, the files of the run, what is
printed, what is refused, and a few facts about what was built. A new setting needs a row in CASES.
"""

import io
import json
import re
import sys
import tarfile
import types
import urllib.error
import urllib.request
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastrdm import trainer
from fastrdm.commands import train
from fastrdm.config import help, run_config
from fastrdm.errors import RunError
from fastrdm.kernels.batchnorm import ViewBatchNorm
from fastrdm.loaders.evaluation import evaluation_batches
from fastrdm.methods.dual_branch import DualBranch
from fastrdm.methods.losses import ALIGNMENTS, loss_settings
from fastrdm.methods.transform_settings import TRANSFORMS, transform_settings
from fastrdm.models import encoders
from fastrdm.runtime import checkpoint
from fastrdm.trainer import Trainer

SMALL = (
    *("encoder.name=resnet_small", "encoder.width=4", "method.projector.hidden=16", "method.projector.out=12"),
    *("loader.subset=48", "loader.batch_size=16", "loader.views.*.size=8", "train.length=4st", "optim.warmup=1st"),
    *("evaluate.every=0st", "evaluate.baselines=false", "checkpoint.every=0st", "log.every=1", "log.report=false"),
    "monitor.every=0st",
)
SPEED = {  # metrics that differ between two runs of the same settings
    *("time", "images_per_second", "data_wait", "monitor_seconds", "monitor_share", "gflops", "flop_utilization"),
    *("filter_share", "peak_memory_mib", "seconds_to_first_step"),
}
ECHO = (
    "fastrdm:",
    "run:",
    "assumed",
    "chosen automatically",
    "first step:",
    "epoch ",
    "speed at",
    "memory",
    "finished",
)
"""Lines that repeat settings, or tell times."""

# Settings beside the one that is changed, for what a plain run does not have.
FLATTENED = ("method.target=[{name: filter, kind: whiten, strength: 0.5}]",)
WHITE = ("method.online=[whiten]", "method.projector.out=6")
EMA = ("preset=byol", "method.online.0.hidden=16")
SCORES = ("preset=swav", "method.online.0.count=20", "method.target.0.count=20", "method.target.1.queue=0")
SCORES += ("method.online.0.freeze=0ep", "method.target.0.freeze=0ep")
QUEUE = (*SCORES, "method.target.1.queue=32", "method.target.1.queue_start=2st")
DINO = ("preset=dino", "method.online.0.count=20", "method.target.0.count=20", "method.target.1.warmup=3st")
FILTER = ("preset=rdm_simsiam",)
LARS = ("optim.name=lars", "optim.weight_decay=0.01")
ADAM = ("optim.name=adamw",)
WINDOW = ("monitor.every=1st", "monitor.rows=64")
POINT = ("monitor.alarms.complete_std=100", "monitor.alarms.complete_rank=100", "monitor.alarms.complete_patience=0st")
LOW = ("monitor.alarms.dimensional_rank=100", "monitor.alarms.dimensional_patience=0st")
FALLING = ("monitor.alarms.falling_share=1", "monitor.alarms.falling_after=0st", "monitor.alarms.falling_patience=0st")
FLOOR = ("monitor.alarms.floor_share=1", "monitor.alarms.floor_patience=0st")
ANALYSIS = ("analysis.every=4st", "analysis.images=40", "analysis.replicates=10")
FILES = ("loader.source=folder", "loader.root=FOLDER", "loader.subset=null", "loader.batch_size=8")
TARS = ("loader.source=webdataset", "loader.root=TARS", "loader.subset=null", "loader.batch_size=4")
WINDOWED = (*TARS, "loader.order=windowed")
OTHER = (*FILES, "evaluate.source=folder", "evaluate.root=FOLDER")
VIT = ("encoder.name=timm/vit_tiny_patch16_224", "encoder.width=null")
VIT += ("encoder.options={patch_size: 4, embed_dim: 8, depth: 1, num_heads: 2, img_size: 8}",)

CASES: dict[str, tuple[str, tuple[str, ...]]] = {  # key: another value of it, and what it needs
    "preset": ("preset=byol", ("method.online=[predictor]",)),
    "run": ("run=ELSEWHERE", ()),
    "train.length": ("train.length=3st", ()),
    "train.seed": ("train.seed=1", ()),
    "train.init": ("train.init=RUN", ()),
    "train.precision": ("train.precision=fp64", ()),
    "train.accumulate": ("train.accumulate=2", ()),
    "train.compile": ("train.compile=true", ()),
    "train.channels_last": ("train.channels_last=false", ()),
    "train.hang_timeout": ("train.hang_timeout=60", ()),
    "method.projector.layers": ("method.projector.layers=2", ()),
    "method.projector.hidden": ("method.projector.hidden=20", ()),
    "method.projector.out": ("method.projector.out=8", ()),
    "method.projector.bias": ("method.projector.bias=true", ()),
    "method.projector.activation": ("method.projector.activation=gelu", ()),
    "method.projector.norm": ("method.projector.norm=false", ()),
    "method.projector.last_norm": ("method.projector.last_norm=affine", ()),
    "method.projector.init": ("method.projector.init=trunc_normal", ()),
    "method.online": ("method.online=[]", ()),
    "method.target": ("method.target=[]", ()),
    "method.ema": ("method.ema={}", ()),
    "method.ema.momentum": ("method.ema.momentum=0.5", EMA),
    "method.ema.final": ("method.ema.final=0.5", EMA),
    "method.alignment.name": ("method.alignment=byol", ()),
    "method.alignment.directions": ("method.alignment.directions=sum", ()),
    "method.bn_views": ("method.bn_views=joint", ()),
    "encoder.name": ("encoder.name=resnet18", ()),
    "encoder.stem": ("encoder.stem=imagenet", ()),
    "encoder.width": ("encoder.width=6", ()),
    "encoder.zero_init_residual": ("encoder.zero_init_residual=false", ()),
    "encoder.sync_bn": ("encoder.sync_bn=false", ()),
    "encoder.options": ("encoder.options.embed_dim=16", VIT),
    "encoder.freeze_patch_embed": ("encoder.freeze_patch_embed=true", VIT),
    "encoder.checkpointing": ("encoder.checkpointing=true", ()),
    "loader.source": ("loader.source=folder", ("loader.root=FOLDER", "loader.batch_size=8", "loader.subset=16")),
    "loader.root": ("loader.root=OTHER", FILES),
    "loader.labels": ("loader.labels=none", FILES),
    "loader.cache": ("loader.cache=CACHE", TARS),
    "loader.download": ("loader.download=true", ("loader.source=cifar10", "loader.root=EMPTY")),
    "loader.classes": ("loader.classes=CLASSES", (*FILES, "loader.batch_size=4")),
    "loader.subset": ("loader.subset=32", ()),
    "loader.engine": ("loader.engine=synthetic", ()),
    "loader.batch_size": ("loader.batch_size=12", ()),
    "loader.views": ("loader.views=[{size: 8, flip: 0}, {size: 8}, {size: 4}]", ()),
    "loader.views.*.size": ("loader.views.*.size=10", ()),
    "loader.views.*.progressive": ("loader.views.*.progressive=[[1, 4]]", ()),
    "loader.views.*.scale": ("loader.views.*.scale=[0.8, 1.0]", ()),
    "loader.views.*.ratio": ("loader.views.*.ratio=[1.0, 1.0]", ()),
    "loader.views.*.interpolation": ("loader.views.*.interpolation=bilinear", ()),
    "loader.views.*.flip": ("loader.views.*.flip=1", ()),
    "loader.views.*.jitter": ("loader.views.*.jitter=0", ()),
    "loader.views.*.brightness": ("loader.views.*.brightness=0", ()),
    "loader.views.*.contrast": ("loader.views.*.contrast=0", ()),
    "loader.views.*.saturation": ("loader.views.*.saturation=0", FILES),
    "loader.views.*.hue": ("loader.views.*.hue=0.5", FILES),
    "loader.views.*.grayscale": ("loader.views.*.grayscale=1", FILES),
    "loader.views.*.blur": ("loader.views.*.blur=1", ()),
    "loader.views.*.blur_kernel": ("loader.views.*.blur_kernel=3", ("loader.views.*.blur=1",)),
    "loader.views.*.blur_sigma": ("loader.views.*.blur_sigma=[1.0, 1.0]", ("loader.views.*.blur=1",)),
    "loader.views.*.solarize": ("loader.views.*.solarize=1", ()),
    "loader.views.*.solarize_threshold": ("loader.views.*.solarize_threshold=20", ("loader.views.*.solarize=1",)),
    "loader.views.*.mean": ("loader.views.*.mean=[0.1, 0.1, 0.1]", ()),
    "loader.views.*.std": ("loader.views.*.std=[0.5, 0.5, 0.5]", ()),
    "loader.max_enlarge": ("loader.max_enlarge=0.5", ()),
    "loader.augment": ("loader.augment=reference", FILES),
    "loader.workers": ("loader.workers=3", FILES),
    "loader.prefetch": ("loader.prefetch=2", FILES),
    "loader.prefetch_mb": ("loader.prefetch_mb=7", FILES),
    "loader.order": ("loader.order=windowed", (*TARS, "loader.window=1")),
    "loader.window": ("loader.window=1", WINDOWED),
    "loader.max_corrupt": ("loader.max_corrupt=0.5", (*FILES, "loader.root=CORRUPT")),
    "optim.name": ("optim.name=adamw", ()),
    "optim.backend": ("optim.backend=apex", ADAM),
    "optim.lr": ("optim.lr=0.1", ()),
    "optim.schedule": ("optim.schedule=linear", ()),
    "optim.min_lr": ("optim.min_lr=0.01", ()),
    "optim.warmup": ("optim.warmup=2st", ()),
    "optim.warmup_lr": ("optim.warmup_lr=0.01", ()),
    "optim.momentum": ("optim.momentum=0.5", ()),
    "optim.weight_decay": ("optim.weight_decay=0.1", ()),
    "optim.weight_decay_end": ("optim.weight_decay_end=1.0", ()),
    "optim.exclude_bias_norm": ("optim.exclude_bias_norm=true", LARS),
    "optim.eta": ("optim.eta=0.1", LARS),
    "optim.clip": ("optim.clip=true", (*LARS, "optim.eta=10")),
    "optim.betas": ("optim.betas=[0.5, 0.9]", ADAM),
    "optim.clip_grad": ("optim.clip_grad=0.01", ()),
    "optim.clip_grad_of": ("optim.clip_grad_of=each", ("optim.clip_grad=0.01",)),
    "evaluate.every": ("evaluate.every=2st", ()),
    "evaluate.k": ("evaluate.k=1", ()),
    "evaluate.bank": ("evaluate.bank=20", ()),
    "evaluate.temperature": ("evaluate.temperature=100", ("evaluate.k=40",)),
    "evaluate.baselines": ("evaluate.baselines=true", ()),
    "evaluate.probe": ("evaluate.probe=false", ()),
    "evaluate.probe_lr": ("evaluate.probe_lr=1", ()),
    "evaluate.batch_size": ("evaluate.batch_size=7", ()),
    "evaluate.source": ("evaluate.source=digits", FILES),
    "evaluate.root": ("evaluate.root=OTHER", OTHER),
    "evaluate.labels": ("evaluate.labels=none", OTHER),
    "evaluate.holdout": ("evaluate.holdout=0.5", (*FILES, "loader.root=FOLDER/train")),
    "monitor.every": ("monitor.every=2st", WINDOW),
    "monitor.rows": ("monitor.rows=32", WINDOW),
    "monitor.max_width": ("monitor.max_width=8", WINDOW),
    "monitor.groups": ("monitor.groups=4", WINDOW),
    "monitor.conventions": ("monitor.conventions=[erank_l/unit/moment, erank_l/unit/cov, erank_s/raw/cov]", WINDOW),
    "monitor.alarms.action": ("monitor.alarms.action=stop", POINT),
    "monitor.alarms.complete_std": ("monitor.alarms.complete_std=0.0", POINT),
    "monitor.alarms.complete_rank": ("monitor.alarms.complete_rank=0.0", POINT),
    "monitor.alarms.complete_patience": ("monitor.alarms.complete_patience=2st", POINT),
    "monitor.alarms.dimensional_rank": ("monitor.alarms.dimensional_rank=0.0", LOW),
    "monitor.alarms.dimensional_patience": ("monitor.alarms.dimensional_patience=2st", LOW),
    "monitor.alarms.falling_share": ("monitor.alarms.falling_share=0.0", FALLING),
    "monitor.alarms.falling_after": ("monitor.alarms.falling_after=4st", FALLING),
    "monitor.alarms.falling_patience": ("monitor.alarms.falling_patience=3st", FALLING),
    "monitor.alarms.floor_share": ("monitor.alarms.floor_share=0.0", FLOOR),
    "monitor.alarms.floor_patience": ("monitor.alarms.floor_patience=3st", FLOOR),
    "analysis.every": ("analysis.every=2st", ANALYSIS),
    "analysis.images": ("analysis.images=44", ANALYSIS),
    "analysis.split": ("analysis.split=test", ANALYSIS),
    "analysis.replicates": ("analysis.replicates=12", ANALYSIS),
    "checkpoint.every": ("checkpoint.every=2st", ()),
    "checkpoint.keep": ("checkpoint.keep=1", ("checkpoint.every=2st", "checkpoint.best=false")),
    "checkpoint.best": (
        "checkpoint.best=false",
        ("checkpoint.every=1st", "checkpoint.keep=1", "evaluate.every=1st", "optim.lr=50"),
    ),
    "log.every": ("log.every=2", ()),
    "log.tensorboard": ("log.tensorboard=true", ()),
    "log.wandb": ("log.wandb=project", ()),
    "log.report": ("log.report=true", ()),
    "log.profile": ("log.profile={start: 1st, steps: 1}", ()),
    "log.profile.start": ("log.profile.start=2st", ("log.profile={start: 1st, steps: 1}",)),
    "log.profile.steps": ("log.profile.steps=2", ("log.profile={start: 1st, steps: 1}",)),
    "log.peak_tflops": ("log.peak_tflops=1", ()),
    "predictor.hidden": ("method.online.0.hidden=7", ()),
    "predictor.bias": ("method.online.0.bias=true", ()),
    "predictor.constant_lr": ("method.online.0.constant_lr=false", ()),
    "filter.kind": ("method.online.0.kind=log", ("preset=rdm_simsiam_log1p",)),
    "filter.power": ("method.target.0.power=-1", FILTER),
    "filter.basis": ("method.target.0.basis=other", FILTER),
    "filter.scale": ("method.target.0.scale=rms", FILTER),
    "filter.cutoff": ("method.target.0.cutoff=0.5", FILTER),
    "filter.solver": ("method.target.0.solver=newton_schulz", FILTER),
    "prototypes.count": ("method.online.0.count=24", (*SCORES, "method.target.0.count=24")),
    "prototypes.freeze": ("method.online.0.freeze=3st", (*SCORES, "method.target.0.freeze=3st")),
    "sinkhorn.epsilon": ("method.target.1.epsilon=0.5", SCORES),
    "sinkhorn.iterations": ("method.target.1.iterations=1", SCORES),
    "sinkhorn.queue": ("method.target.1.queue=48", QUEUE),
    "sinkhorn.queue_start": ("method.target.1.queue_start=3st", QUEUE),
    "center_sharpen.temperature": ("method.target.1.temperature=0.5", DINO),
    "center_sharpen.warmup_temperature": ("method.target.1.warmup_temperature=0.5", DINO),
    "center_sharpen.warmup": ("method.target.1.warmup=1st", DINO),
    "center_sharpen.momentum": ("method.target.1.momentum=0.0", DINO),
    "cross_entropy.temperature": ("method.alignment.temperature=1", SCORES),
    "cross_correlation.redundancy": ("method.alignment.redundancy=0.5", ("preset=barlow_twins",)),
    "cross_correlation.epsilon": ("method.alignment.epsilon=0.5", ("preset=barlow_twins",)),
    "method.alignment.weight": ("method.alignment.weight=0.1", ()),
    "method.alignment.targets": ("method.alignment.targets=center", ()),
    "method.regularize": ("method.regularize=[koleo]", ()),
    "method.target_views": ("method.target_views=3", ("loader.views=[{size: 8}, {size: 8}, {size: 8}]",)),
    "filter.power_end": ("method.target.0.power_end=-1", FILTER),
    "filter.anneal": ("method.target.0.anneal=50%", (*FILTER, "method.target.0.power_end=-1")),
    "filter.strength": (
        "method.target.0.strength=0.9",
        ("method.target=[{name: filter, kind: whiten, strength: 0.5}]",),
    ),
    "filter.epsilon": ("method.target.0.epsilon=0.5", FILTER),
    "filter.gradient": ("method.online.0.gradient=isotropic", ("preset=rdm_simsiam_power1",)),
    "filter.momentum": ("method.target.0.momentum=0.5", FILTER),
    "sinkhorn.warmup_epsilon": ("method.target.1.warmup_epsilon=0.5", SCORES),
    "sinkhorn.warmup": ("method.target.1.warmup=1st", (*SCORES, "method.target.1.warmup_epsilon=0.5")),
    "whiten.root": ("method.online.0.root=newton", WHITE),
    "whiten.epsilon": ("method.online.0.epsilon=0.5", WHITE),
    "whiten.size": ("method.online.0.size=8", WHITE),
    "whiten.iterations": ("method.online.0.iterations=1", ("method.online=[{name: whiten, root: newton}]",)),
}
REFUSED = {"optim.backend", "loader.max_enlarge", "loader.download"}
"""Settings whose other value is not taken here: a refusal, or another one, is the change."""

FREE_IN_ANOTHER_SENSE = ("loader.root", "loader.augment", "monitor.alarms.action")
"""Free settings that may change the weights: other images, other roundings, an earlier end."""

EXCEPTIONS = {
    "train.device": "one device is here; tests/test_recipes.py and tests/training/test_automatic.py have the choice",
    "train.capture": "needs CUDA; tests/kernels/test_cuda_graph.py",
    "train.cudnn_benchmark": "needs CUDA; tests/training/test_automatic.py has the choice",
    "checkpoint.store": "needs a store; tests/runtime/test_checkpoint_store.py goes on from one",
    "loader.cache_gb": "needs a store; tests/loaders/sources/test_remote.py fills a cache and sees shards leave it",
}


def all_keys() -> list[str]:
    """Every setting of a run, and those of each transform and loss under its name; not their names."""
    found = [setting.key for setting in help.walk(run_config.Config)]
    for name in TRANSFORMS:
        found += [s.key for s in help.walk(transform_settings(name), f"{name}.") if s.key != f"{name}.name"]
    common = {field.key for field in help.walk(loss_settings("negative_cosine"))}
    for name in ALIGNMENTS:
        found += [s.key for s in help.walk(loss_settings(name), f"{name}.") if s.key.partition(".")[2] not in common]
    return found


def test_every_setting_has_a_row() -> None:
    """A setting without one is to be given a row in CASES, or a reason in EXCEPTIONS."""
    assert sorted([*CASES, *EXCEPTIONS]) == sorted(all_keys())


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Replaces the words in capitals of a setting by folders and files that hold what they say."""
    root = tmp_path_factory.mktemp("settings")
    random = np.random.default_rng(0)

    def folder(name: str, seed: int, corrupt: bool = False) -> None:
        images = np.random.default_rng(seed).integers(0, 256, (40, 12, 14, 3), np.uint8)
        for split, count in (("train", 8), ("val", 3)):
            for number, label in enumerate("ab"):
                place = root / name / split / label
                place.mkdir(parents=True)
                for i in range(count):
                    Image.fromarray(images[16 * number + i]).save(place / f"{i}.png")
        if corrupt:
            (root / name / "train" / "a" / "0.png").write_bytes(b"no image")

    folder("folder", 0)
    folder("other", 1)
    folder("corrupt", 0, corrupt=True)
    (root / "tars").mkdir()
    for number in range(4):
        with tarfile.open(root / "tars" / f"train-{number}.tar", "w") as tar:
            for i in range(4):
                file = io.BytesIO()
                Image.fromarray(random.integers(0, 256, (12, 14, 3), np.uint8)).save(file, "PNG")
                info = tarfile.TarInfo(f"{number}{i}.png")
                info.size = file.tell()
                file.seek(0)
                tar.addfile(info, file)
    (root / "empty").mkdir()
    (root / "classes.txt").write_text("a\n")
    train.train((*SMALL, f"run={root / 'run'}", "train.seed=5"))
    named = {"FOLDER": "folder", "OTHER": "other", "CORRUPT": "corrupt", "TARS": "tars", "EMPTY": "empty"}
    named |= {"CLASSES": "classes.txt", "CACHE": "cache", "RUN": "run"}
    return lambda text: re.sub(
        r"\b[A-Z]{3,}\b", lambda word: str(root / named[word[0]]) if word[0] in named else word[0], text
    )


@pytest.fixture(scope="module")
def observe(places: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """What can be seen of a run with these settings; each is run once."""

    @cache
    def observe(words: tuple[str, ...]) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("run") / "run"
        with pytest.MonkeyPatch.context() as patch:
            return _observe(patch, folder, [places(word) for word in words])

    return observe


def _observe(patch: pytest.MonkeyPatch, folder: Path, words: list[str]) -> dict[str, Any]:
    seen: dict[str, Any] = {"events": [], "refused": None}
    trainers: list[Trainer] = []

    class Watched(Trainer):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            trainers.append(self)

    def no_network(*_: Any, **__: Any) -> Any:
        raise urllib.error.URLError("no network")

    def note(name: str) -> Callable[..., Any]:
        return lambda *_, **__: seen["events"].append(name)

    def blocks_again(block: Any, x: Any) -> Any:
        seen["events"].append("checkpointed")
        return block(x)

    def batches(*arguments: Any, **more: Any) -> Any:
        for batch in evaluation_batches(*arguments, **more):
            seen["events"].append(f"{len(batch[0])} images evaluated")
            yield batch

    def wandb_init(**_: Any) -> Any:
        seen["events"].append("wandb")
        return types.SimpleNamespace(log=note("wandb log"), finish=note("wandb end"), summary={})

    patch.chdir(folder.parent)
    patch.setattr(train, "Trainer", Watched)
    patch.setattr(trainer, "evaluation_batches", batches)
    patch.setattr(urllib.request, "urlopen", no_network)
    patch.setattr(DualBranch, "compile", note("compiled"))
    patch.setattr(encoders, "_checkpointed", blocks_again)
    patch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=wandb_init, Image=lambda picture: picture))
    try:
        folder = train.train((*SMALL, f"run={folder}", *words)).folder
    except (ValueError, RunError) as error:
        seen["refused"] = str(error)
        return seen
    (built,) = trainers
    seen["folder"] = folder.name
    seen["files"] = sorted(
        re.sub(r"tfevents.*", "tfevents", str(path.relative_to(folder))) for path in folder.rglob("*") if path.is_file()
    )
    seen["weights"] = [(path / checkpoint.WEIGHTS).read_bytes() for path in checkpoint.existing(folder)[:1]]
    for name in ("metrics", "spectra", "alarms", "analysis"):
        file = folder / f"{name}.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        seen[name] = [{key: value for key, value in line.items() if key not in SPEED} for line in lines]
        seen[f"{name} of speed"] = [sorted(line.keys() & SPEED) for line in lines]
    seen["printed"] = [
        line for line in (folder / "train.log").read_text().splitlines() if not line.strip().startswith(ECHO)
    ]
    seen["printed"] = [line.replace(str(folder), "RUN") for line in seen["printed"]]
    modules = list(built.method.modules())
    seen["synchronized"] = [module.sync for module in modules if isinstance(module, ViewBatchNorm)]
    seen["layout"] = [p.stride() for p in built.method.parameters() if p.ndim == 4]
    seen["patience"] = built.watch.timeout
    loader = built.loader
    seen["ahead"] = [getattr(loader, name, None) for name in ("prefetch", "limit")]
    seen["threads"] = getattr(getattr(loader, "pool", None), "_max_workers", None)
    seen["cache"] = sorted(str(p) for p in Path(built.settings.loader.cache or "nowhere").rglob("*.npz"))
    return seen


@pytest.mark.parametrize("key", CASES)
def test_another_value_makes_another_run(key: str, observe: Callable[..., dict[str, Any]]) -> None:
    change, needs = CASES[key]
    if needs == VIT:
        pytest.importorskip("timm")
    if key == "log.tensorboard":
        pytest.importorskip("tensorboard")
    before, after = observe(needs), observe((*needs, change))
    if key in REFUSED:
        assert after["refused"] and after["refused"] != before["refused"]
        return
    assert after["refused"] is None, after["refused"]
    different = [name for name in after if after[name] != before.get(name)]
    assert different, f"{change} changes nothing"
    free = key.startswith(run_config.FREE) and key not in FREE_IN_ANOTHER_SENSE
    assert not free or before["refused"] or "weights" not in different, f"{change} is free and changes the weights"
