"""The labelled runs of the verdict's record: every preset, runs that are made to collapse, and border cases.

An arm is a base (a data set with settings that suit it) and what is changed in it. `expected` is the state that the
construction leads to in the literature; an empty one marks a border case. The label that counts is the outcome,
measured in truth.py with frozen weights.
"""

from typing import NamedTuple

from fastrdm.methods.presets import PRESETS

Settings = tuple[str, ...]


class Arm(NamedTuple):
    """Runs that differ in their seed alone."""

    name: str
    data: str  # digits or cifar10
    expected: str  # healthy, collapsed or weak; empty: a border case
    settings: Settings
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6)


# Seeds 0 to 5 chose labels, figures, thresholds and the order of the rule. Seed 6 was run when all of these were fixed,
# and judges them.
CHOOSE, JUDGE = (0, 1, 2, 3, 4, 5), (6,)
THREE = (0, 2, 4)

DIGITS: Settings = (
    "encoder.width=8",
    "method.projector.hidden=128",
    "method.projector.out=128",
    "train.length=14ep",
    "log.every=8",
    "evaluate.every=25%",
    "monitor.every=20%",
)
CIFAR: Settings = (
    "loader.subset=2000",
    "encoder.width=16",
    "method.projector.hidden=128",
    "method.projector.out=128",
    "train.length=10ep",
    "log.every=8",
    "evaluate.every=25%",
    "monitor.every=20%",
)
SGD: Settings = ("optim.name=sgd", "optim.lr=0.3", "optim.weight_decay=1e-5")
AVERAGE: Settings = ("method.ema.momentum=0.95", *SGD)
BYOL: Settings = ("preset=byol", "method.online.0.hidden=128", *AVERAGE)
SWAV: Settings = (
    "preset=swav",
    "method.online.0.count=50",
    "method.target.0.count=50",
    "method.online.0.freeze=4%",
    "method.target.0.freeze=4%",
    "method.target.1.queue=0",
    "method.target.1.epsilon=0.02",
    "optim.min_lr=0",
    *SGD,
)
DINO: Settings = (
    "preset=dino",
    "method.projector.init=torch",
    "method.projector.norm=true",
    "method.online.0.count=128",
    "method.target.0.count=128",
    "method.online.0.freeze=4%",
    "method.target.0.freeze=4%",
    "method.target.1.warmup_temperature=0.01",
    "method.target.1.temperature=0.02",
    "method.target.1.warmup=30%",
    "method.ema.momentum=0.95",
    "optim.name=adamw",
    "optim.lr=0.002",
    "optim.weight_decay=0.01",
)
PROTOTYPES = "{name: prototypes, count: 50, freeze: 4%}"
SHARPEN = "{name: center_sharpen, warmup_temperature: 0.04, temperature: 0.04, warmup: 0st"


def _of_preset(preset: str) -> Settings:
    if preset in ("byol", "swav", "dino"):
        return {"byol": BYOL, "swav": SWAV, "dino": DINO}[preset]
    if preset == "swav_target":
        target = (
            f"method.target=[{{name: filter, power: -0.5}}, {PROTOTYPES}, {{name: sinkhorn, queue: 0, epsilon: 0.02}}]"
        )
        return ("preset=swav_target", f"method.online=[{PROTOTYPES}]", target, "optim.min_lr=0", *SGD)
    if preset == "dino_online":
        count = "{name: prototypes, count: 128, freeze: 4%}"
        online = f"method.online=[{{name: filter, kind: log1p}}, {count}]"
        target = f"method.target=[{count}, {{name: center_sharpen, warmup_temperature: 0.01, temperature: 0.02}}]"
        return (f"preset={preset}", online, target, *DINO[1:3], *DINO[-4:])
    return (f"preset={preset}", *(AVERAGE if "ema" in PRESETS[preset]["method"] else ()))


MAIN = ("simsiam", "byol", "swav", "dino", "rdm_simsiam", "rdm_byol", "symsimsiam")
SAME = ("rdm_simsiam_target0.5", "rdm_byol_target0.5")  # rdm_simsiam and rdm_byol by another name

# what is dropped from a method: each of these collapses by the literature on it
DROPPED = {
    "simsiam_no_stop": ("preset=simsiam", "method.target=[]"),
    "simsiam_no_predictor": ("preset=simsiam", "method.online=[]"),
    "symsimsiam_no_batchnorm": ("preset=symsimsiam", "method.projector.last_norm=none"),
    "byol_no_predictor_no_ema": (*BYOL[2:], "preset=byol", "method.ema=null", "method.online=[]"),
    "byol_no_stop_no_ema": (*BYOL[:2], *SGD, "method.ema=null", "method.target=[]"),
    "swav_no_sinkhorn": (*SWAV[:1], f"method.online=[{PROTOTYPES}]", f"method.target=[{PROTOTYPES}, {SHARPEN}, "
                         "momentum: 1.0}]", "optim.min_lr=0", *SGD),
    "dino_no_centering": (*DINO, "method.target.1.momentum=1.0"),
    "dino_no_sharpening": (*DINO, "method.target.1.warmup_temperature=1.0", "method.target.1.temperature=1.0"),
    "rdm_simsiam_low_pass_target": ("preset=rdm_simsiam", "method.target.0.power=1.0"),
    "rdm_simsiam_high_pass_online": ("preset=rdm_simsiam_power1", "method.online.0.power=-0.5"),
}  # fmt: skip
BORDER = {
    "byol_no_predictor": (*BYOL[2:], "preset=byol", "method.online=[]"),
    "simsiam_lr_4": ("preset=simsiam", "optim.lr=4"),
    "swav_epsilon_0.05": (*SWAV, "method.target.1.epsilon=0.05"),
    "dino_no_norm": (*DINO, "method.projector.norm=false"),
    "byol_lars": ("preset=byol", "optim.lr=0.5"),
    "dino_published": (*DINO, "method.target.1.warmup_temperature=0.04", "method.target.1.temperature=0.07"),
    "byol_ema_0": (*BYOL, "method.ema.momentum=0.0", "method.ema.final=0.0"),
    "byol_ema_frozen": (*BYOL, "method.ema.momentum=1.0"),
    "simsiam_lr_0.001": ("preset=simsiam", "optim.lr=0.001"),
    "simsiam_weight_decay_0.05": ("preset=simsiam", "optim.weight_decay=0.05"),
    "byol_lr_4": (*BYOL, "optim.lr=4"),
    "dino_lr_0.03": (*DINO, "optim.lr=0.03"),
    "dino_temperature_0.2": (*DINO, "method.target.1.warmup_temperature=0.2", "method.target.1.temperature=0.2"),
    "dino_lars": ("preset=dino",),
    "swav_epsilon_1": (*SWAV, "method.target.1.epsilon=1.0"),
    "swav_lr_5": (*SWAV, "optim.lr=5"),
}  # fmt: skip
COMPLETE_ON_CIFAR = ("symsimsiam_no_batchnorm", "byol_no_stop_no_ema", "dino_no_centering", "dino_no_sharpening")
ON_CIFAR = (*COMPLETE_ON_CIFAR, "simsiam_no_stop", "simsiam_no_predictor", "swav_no_sinkhorn")


def _expected(preset: str) -> str:
    return "collapsed" if preset == "symsimsiam" else "healthy"


def groups() -> list[list[Arm]]:
    """All arms: main presets, methods with a part left out, other presets, the same on CIFAR-10, and border cases."""
    main = [Arm(p, "digits", _expected(p), (*DIGITS, *_of_preset(p))) for p in MAIN]
    dropped = [Arm(name, "digits", "collapsed", (*DIGITS, *changes)) for name, changes in DROPPED.items()]
    others = [p for p in PRESETS if p not in (*MAIN, *SAME)]
    rest = [Arm(p, "digits", "healthy", (*DIGITS, *_of_preset(p)), (THREE[i % 2], 4, 6)) for i, p in enumerate(others)]
    cifar = [Arm(p, "cifar10", _expected(p), (*CIFAR, *_of_preset(p)), THREE) for p in MAIN]
    cifar += [Arm(n, "cifar10", "collapsed", (*CIFAR, *DROPPED[n]), THREE) for n in ON_CIFAR]
    border = [Arm(name, "digits", "", (*DIGITS, *changes), (*THREE, 6)) for name, changes in BORDER.items()]
    return [main, dropped, rest, cifar, border]


def jobs() -> list[tuple[Arm, int]]:
    """All runs, each group giving one in turn, so that a part of them is of use: seeds 0, 2 and 4, then 1, 3 and 5.

    Seed 6 comes last, with an arm of each group in turn as long as CPU time lasts.
    """
    turns = []
    for group in groups():
        before = [(arm, seed) for arm in group for seed in arm.seeds if seed in CHOOSE]
        turns += [(seed % 2, number, arm, seed) for number, (arm, seed) in enumerate(before)]
        turns += [(2, number, arm, seed) for number, arm in enumerate(group) for seed in arm.seeds if seed in JUDGE]
    return [(arm, seed) for _, _, arm, seed in sorted(turns, key=lambda turn: turn[:2])]
