"""What might make a short run better: each lever as the settings that it changes in one recipe.

All levers change the same contestant, the base: the preset that leads the short CIFAR-10 table
(benchmarks/records/cifar10_cpu.md), on its recipe, with an encoder of width 16 and 10,000 images.
"""

from typing import NamedTuple

from benchmarks.cifar10.reproduce import recipe
from fastrdm.methods.presets import PRESETS

Settings = tuple[str, ...]

BASE: Settings = (
    "cifar10/cpu_ema.yaml",
    "preset=rdm_byol_target1",
    "encoder.width=16",
    "loader.subset=10000",
    "evaluate.probe=false",
    "evaluate.baselines=false",
    "train.device=cpu",
)
STEPS = 500  # optimizer steps of the base; they set the processor time that every contestant gets
_ALL = BASE[2:]
_LOCAL = "{size: 20, scale: [0.05, 0.3], saturation: 0.2}"
_GLOBAL = "{size: 32, scale: [0.2, 1.0], saturation: 0.2}"
_SOLARIZED = "{size: 32, scale: [0.2, 1.0], saturation: 0.2, solarize: 0.2}"
_LARS = ("optim.name=lars", "optim.lr=1.0", "optim.eta=0.02", "optim.clip=true", "optim.exclude_bias_norm=true")
_CIFAR = "loader.views.*.mean=[0.4914, 0.4822, 0.4465]", "loader.views.*.std=[0.247, 0.2435, 0.2616]"


class Lever(NamedTuple):
    """One contestant."""

    group: str
    name: str
    settings: Settings  # all of them, the recipe first
    what: str = ""  # for the record, where the name does not say it


def _over(group: str, name: str, *changes: str, what: str = "") -> Lever:
    """The base with some settings changed."""
    return Lever(group, name, (*BASE, *changes), what)


def _method(preset: str) -> Lever:
    """Another method, on the terms that its own recipe for a CPU sets."""
    return Lever("method", preset, (recipe(preset, "cpu"), f"preset={preset}", *_ALL))


NEWER = ("fastsiam", "vicreg", "lejepa", "barlow_twins", "simdino", "directpred")  # those that this version has
FIRST = [
    Lever("base", "base", BASE, "rdm_byol_target1, batch 128, sgd at 0.3, momentum of the average 0.95 to 1"),
    _over("rate", "lr x 2", "optim.lr=0.6"),
    _over("batch", "batch 64", "loader.batch_size=64"),
    _method("byol"),
    _method("simsiam"),
    _over("views", "progressive 24, 32", "loader.views.*.progressive=[[5, 24]]", what="24 px for five epochs, then 32"),
    _over("views", "2 x 32 + 4 x 20", f"loader.views=[{_GLOBAL}, {_SOLARIZED}, {', '.join([_LOCAL] * 4)}]", *_CIFAR),
    _method("rdm_byol_target0.7"),
    _over("average", "average 0.9 to 1", "method.ema.momentum=0.9"),
    _over("schedule", "linear to zero", "optim.schedule=linear"),
    _over("optimizer", "adamw", "optim.name=adamw", "optim.lr=0.004", "optim.weight_decay=0.01"),
    _over("augmentation", "crops from 0.08", "loader.views.*.scale=[0.08, 1.0]"),
    _over("batchnorm", "joint BatchNorm", "method.bn_views=joint"),
]
SECOND = [
    _over("batch", "batch 256", "loader.batch_size=256"),
    _over("head", "head 512, 512", "method.projector.hidden=512", "method.projector.out=512"),
    _method("swav_target"),
    _method("rdm_simsiam_target1"),
    _over("schedule", "one-cycle", "optim.schedule=linear", "optim.warmup=30%"),
    _over("rate", "lr x 4", "optim.lr=1.2"),
    _over("average", "average 0.99 to 1", "method.ema.momentum=0.99"),
    _over("augmentation", "blur 0.5", "loader.views.*.blur=0.5", "loader.views.*.blur_kernel=5"),
    _over("augmentation", "no solarization", "loader.views.1.solarize=0"),
    _over("augmentation", "grayscale 0.1", "loader.views.*.grayscale=0.1"),
    _over("augmentation", "weak color", "loader.views.*.jitter=0.4", "loader.views.*.grayscale=0.1"),
    _over("optimizer", "lars", *_LARS),
    _over("views", "4 x 32", f"loader.views=[{_GLOBAL}, {_SOLARIZED}, {_GLOBAL}, {_GLOBAL}]", *_CIFAR,
          what="targets of two of them"),
    _over("average", "no average", "method.ema=null"),
    _over("head", "head 128, 128", "method.projector.hidden=128", "method.projector.out=128"),
    _over("rate", "lr x 0.5", "optim.lr=0.15"),
    _over("optimizer", "lamb", "optim.name=lamb", "optim.lr=0.01", "optim.weight_decay=0.01"),
    _over("optimizer", "weight decay x 10", "optim.weight_decay=1e-4"),
    _method("swav"),
    _method("dino"),
    *(_method(preset) for preset in NEWER if preset in PRESETS),
]  # fmt: skip
TOGETHER = [  # levers that were ahead of the base alone, joined
    _over("together", "lr x 2, linear to zero, joint BatchNorm", "optim.lr=0.6", "optim.schedule=linear",
          "method.bn_views=joint"),
    _over("together", "head 512, 512, one-cycle", "method.projector.hidden=512", "method.projector.out=512",
          "optim.schedule=linear", "optim.warmup=30%"),
    _over("together", "no average, lr x 2, linear to zero, joint BatchNorm", "method.ema=null", "optim.lr=0.6",
          "optim.schedule=linear", "method.bn_views=joint"),
    _over("together", "no average, lars, linear to zero, joint BatchNorm", "method.ema=null", *_LARS,
          "optim.schedule=linear", "method.bn_views=joint"),
]  # fmt: skip


def jobs(seeds: int) -> list[tuple[Lever, int]]:
    """All runs in order of priority: the first levers seed by seed, then the others lever by lever."""
    first = [(lever, seed) for seed in range(seeds) for lever in FIRST]
    return first + [(lever, seed) for lever in (*TOGETHER, *SECOND) for seed in range(seeds)]
