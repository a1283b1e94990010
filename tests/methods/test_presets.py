"""Presets hold the published CIFAR recipes and step the right parameters in the right groups, all written literally."""

import dataclasses
from typing import Any

import pytest

from fastrdm.config import run_config
from fastrdm.config.run_config import Config
from fastrdm.methods.presets import PRESETS
from fastrdm.trainer import Trainer

BASE = ("symsimsiam", "simsiam", "byol", "swav", "dino", "rdm_simsiam", "rdm_byol")
BASE += ("vicreg", "lejepa", "w_mse", "directpred", "fastsiam", "tico")
LIKE = {  # the recipe (projector, optimizer, views, EMA, loss) that a preset shares
    "simsiam": {"symsimsiam", "simsiam_target", "fastsiam", *(p for p in PRESETS if p.startswith("rdm_simsiam"))},
    "byol": {"byol_koleo", "isoloss", *(p for p in PRESETS if p.startswith("rdm_byol"))},
    "swav": {"swav_target"},
    "dino": {"dino_online", "dino_sinkhorn", "dino_koleo"},
    "directpred": {"directcopy"},
}

# name of the group, tensors, rate at 256 images a step, weight decay, schedule, adapted by LARS
GROUPS: dict[str, list[tuple[str, int, float, float, str, bool]]] = {
    "symsimsiam": [
        ("network", 67, 0.5, 1e-5, "cosine", True),
        ("probe", 2, 0.1, 0.0, "cosine", True),
    ],
    "simsiam": [  # decay on everything, BatchNorm included; the predictor's rate is constant
        ("network", 67, 0.5, 1e-5, "cosine", True),
        ("predictor", 5, 0.5, 1e-5, "constant", True),
        ("probe", 2, 0.1, 0.0, "cosine", True),
    ],
    "byol": [  # no decay and no adaptation on biases and BatchNorm; the predictor follows the schedule
        ("network", 22, 1.0, 1e-5, "cosine", True),
        ("network.bias_norm", 44, 1.0, 0.0, "cosine", False),
        ("predictor", 2, 1.0, 1e-5, "cosine", True),
        ("predictor.bias_norm", 4, 1.0, 0.0, "cosine", False),
        ("probe", 1, 0.1, 0.0, "cosine", True),
        ("probe.bias_norm", 1, 0.1, 0.0, "cosine", False),
    ],
    "swav": [  # LARS excludes nothing
        ("network", 67, 0.6, 1e-6, "cosine", True),
        ("probe", 2, 0.1, 0.0, "cosine", True),
    ],
    "dino": [
        ("network", 24, 0.3, 1e-6, "cosine", True),
        ("network.bias_norm", 43, 0.3, 0.0, "cosine", False),
        ("probe", 1, 0.1, 0.0, "cosine", True),
        ("probe.bias_norm", 1, 0.1, 0.0, "cosine", False),
    ],
    "rdm_simsiam": [
        ("network", 67, 0.5, 1e-5, "cosine", True),
        ("probe", 2, 0.1, 0.0, "cosine", True),
    ],
    "rdm_byol": [
        ("network", 22, 1.0, 1e-5, "cosine", True),
        ("network.bias_norm", 44, 1.0, 0.0, "cosine", False),
        ("probe", 1, 0.1, 0.0, "cosine", True),
        ("probe.bias_norm", 1, 0.1, 0.0, "cosine", False),
    ],
    "vicreg": [
        ("network", 23, 0.3, 1e-4, "cosine", True),
        ("network.bias_norm", 47, 0.3, 0.0, "cosine", False),
        ("probe", 1, 0.1, 0.0, "cosine", True),
        ("probe.bias_norm", 1, 0.1, 0.0, "cosine", False),
    ],
    "lejepa": [
        ("network", 70, 5e-4, 5e-2, "cosine", True),
        ("probe", 2, 0.1, 0.0, "cosine", True),
    ],
    "w_mse": [  # whitening learns nothing
        ("network", 66, 2e-3, 1e-6, "cosine", True),
        ("probe", 2, 0.1, 0.0, "cosine", True),
    ],
    "directpred": [  # the predictor is computed
        ("network", 66, 0.06, 4e-4, "cosine", True),
        ("probe", 2, 0.1, 0.0, "cosine", True),
    ],
    "fastsiam": [
        ("network", 67, 0.5, 1e-5, "cosine", True),
        ("predictor", 5, 0.5, 1e-5, "constant", True),
        ("probe", 2, 0.1, 0.0, "cosine", True),
    ],
    "tico": [
        ("network", 22, 1.0, 1e-5, "cosine", True),
        ("network.bias_norm", 44, 1.0, 0.0, "cosine", False),
        ("probe", 1, 0.1, 0.0, "cosine", True),
        ("probe.bias_norm", 1, 0.1, 0.0, "cosine", False),
    ],
}

SIMSIAM_JITTER, BYOL_JITTER, SWAV_JITTER = (0.4, 0.4, 0.4, 0.1), (0.4, 0.4, 0.2, 0.1), (0.8, 0.8, 0.8, 0.2)
# solo-learn's CIFAR scripts (bash_files/pretrain/cifar), and its own defaults where they are silent (solo/methods)
RECIPES: dict[str, dict[str, Any]] = {
    "simsiam": {
        "projector": (3, 2048, 2048, False, "relu", True, "plain", "torch"),
        "ema": None,
        "alignment": ("negative_cosine", "mean"),
        "optim": ("sgd", 0.5, 0.0, 1e-5, 0.9),
        "views": [(*SIMSIAM_JITTER, 0.0, 0.0), (*SIMSIAM_JITTER, 0.0, 0.0)],
        "zero_init_residual": True,
    },
    "byol": {
        "projector": (2, 4096, 256, True, "relu", True, "none", "torch"),
        "ema": (0.99, 1.0),
        "alignment": ("byol", "sum"),
        "optim": ("lars", 1.0, 0.0, 1e-5, 0.9, 0.02, True, True),
        "views": [(*BYOL_JITTER, 0.0, 0.0), (*BYOL_JITTER, 0.0, 0.2)],
        "zero_init_residual": False,
    },
    "swav": {
        "projector": (2, 2048, 128, True, "relu", True, "none", "torch"),
        "ema": None,
        "alignment": ("cross_entropy", "mean", 0.1),
        "optim": ("lars", 0.6, 6e-4, 1e-6, 0.9, 0.02, True, False),
        "views": [(*SWAV_JITTER, 0.0, 0.0), (*SWAV_JITTER, 0.0, 0.0)],
        "zero_init_residual": False,
    },
    "dino": {
        "projector": (3, 2048, 256, True, "gelu", False, "none", "trunc_normal"),
        "ema": (0.9995, 1.0),
        "alignment": ("cross_entropy", "mean", 0.1),
        "optim": ("lars", 0.3, 0.0, 1e-6, 0.9, 0.02, True, True),
        "views": [(*BYOL_JITTER, 0.0, 0.0), (*BYOL_JITTER, 0.0, 0.2)],
        "zero_init_residual": False,
    },
}

WIDE_HEAD = (3, 2048, 2048, True, "relu", True, "none", "torch")
DECORRELATION = ("lars", 0.3, 0.0, 1e-4, 0.9, 0.02, True, True)
RECIPES |= {
    "vicreg": {  # solo-learn's CIFAR script; its covariance is a sum over two views, here their mean: 2 x 1.0
        **RECIPES["simsiam"],
        "projector": WIDE_HEAD,
        "alignment": ("mse", "mean"),
        "optim": DECORRELATION,
        "views": [(*BYOL_JITTER, 0.0, 0.1), (*BYOL_JITTER, 0.0, 0.1)],
        "zero_init_residual": False,
    },
    "barlow_twins": {  # solo-learn's CIFAR script
        **RECIPES["byol"],
        "projector": WIDE_HEAD,
        "ema": None,
        "alignment": ("cross_correlation", "mean"),
        "optim": DECORRELATION,
    },
    "lejepa": {
        **RECIPES["byol"],
        "projector": (3, 2048, 128, True, "relu", True, "none", "torch"),
        "ema": None,
        "alignment": ("mse", "mean"),
        "optim": ("adamw", 5e-4, 0.0, 5e-2, 0.9),
    },
    "w_mse": {  # solo-learn's CIFAR script, with AdamW for Adam
        **RECIPES["swav"],
        "projector": (2, 1024, 64, True, "relu", True, "none", "torch"),
        "alignment": ("byol", "mean"),
        "optim": ("adamw", 2e-3, 0.0, 1e-6, 0.9),
    },
    "directpred": {  # the authors' STL-10 settings, their rate of a batch of 128 at 256
        **RECIPES["byol"],
        "projector": (2, 512, 128, True, "relu", True, "none", "torch"),
        "ema": (0.996, 0.996),
        "optim": ("sgd", 0.06, 0.0, 4e-4, 0.9),
        "views": [(*BYOL_JITTER, 0.0, 0.0), (*BYOL_JITTER, 0.0, 0.0)],
    },
    "simdino": {**RECIPES["dino"], "alignment": ("negative_cosine", "mean")},
    "tico": {**RECIPES["byol"], "alignment": ("negative_cosine", "mean")},
}
# weight and targets of the alignment, global views, and each regularizer with its weight, rows and views
LOSSES: dict[str, tuple[float, str, int, list[tuple[Any, ...]]]] = {
    "vicreg": (25.0, "pairs", 2, [("variance", 25.0, "projection", "all"), ("covariance", 2.0, "projection", "all")]),
    "barlow_twins": (0.1, "pairs", 2, []),
    "lejepa": (0.95, "center", 2, [("sigreg", 0.05, "projection", "all")]),
    "fastsiam": (1.0, "mean", 4, []),
    "simdino": (1.0, "pairs", 2, [("coding_rate", 1.0, "projection", "all")]),
    "tico": (1.0, "pairs", 2, [("tico", 8.0, "projection", "all")]),
    "dino_koleo": (1.0, "pairs", 2, [("koleo", 0.1, "features", "global")]),
    "byol_koleo": (1.0, "pairs", 2, [("koleo", 0.1, "features", "global")]),
}
LARGE_CROPS = {"vicreg": 0.2, "w_mse": 0.2}  # smallest share of an image in a crop, 0.08 elsewhere

SIMSIAM_PREDICTOR = {"name": "predictor", "hidden": None, "bias": False, "constant_lr": True}  # hidden: 2048 / 4 = 512
BYOL_PREDICTOR = {"name": "predictor", "hidden": 4096, "bias": True, "constant_lr": False}
SWAV_PROTOTYPES = {"name": "prototypes", "count": 3000, "freeze": "2ep"}
DINO_PROTOTYPES = {"name": "prototypes", "count": 4096, "freeze": "1ep"}
CONSTANT = {"warmup_epsilon": None, "warmup": "30ep"}
SINKHORN = {"name": "sinkhorn", "epsilon": 0.05, **CONSTANT, "iterations": 3, "queue": 3840, "queue_start": "50ep"}
DINO_SINKHORN = {**SINKHORN, "epsilon": 0.07, "warmup_epsilon": 0.04, "queue": 0}
WHITEN = {"name": "whiten", "root": "cholesky", "epsilon": 0.0, "size": 128, "iterations": 5}
SHARPEN = {
    "name": "center_sharpen",
    "temperature": 0.07,
    "warmup_temperature": 0.04,
    "warmup": "50ep",
    "momentum": 0.9,
}
STOP = {"name": "stop"}


def spectral(kind: str, power: float | None = None) -> dict[str, Any]:
    plain = {"basis": "self", "scale": "raw", "cutoff": None, "solver": "auto"}
    plain |= {
        "gradient": "filtered",
        "power_end": None,
        "anneal": "100%",
        "strength": None,
        "epsilon": 0.0,
        "momentum": None,
    }
    return {"name": "filter", "kind": kind, "power": power, **plain}


BRANCHES: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "symsimsiam": ([], []),
    "simsiam": ([SIMSIAM_PREDICTOR], [STOP]),
    "byol": ([BYOL_PREDICTOR], [STOP]),
    "swav": ([SWAV_PROTOTYPES], [SWAV_PROTOTYPES, SINKHORN]),
    "dino": ([DINO_PROTOTYPES], [DINO_PROTOTYPES, SHARPEN]),
    "rdm_simsiam": ([], [spectral("power", -0.5)]),
    "rdm_byol": ([], [spectral("power", -0.5)]),
    "swav_target": ([SWAV_PROTOTYPES], [spectral("power", -0.5), SWAV_PROTOTYPES, SINKHORN]),
    "dino_online": ([spectral("log1p"), DINO_PROTOTYPES], [DINO_PROTOTYPES, SHARPEN]),
    "simsiam_target": ([SIMSIAM_PREDICTOR], [spectral("power", -0.5)]),
    "rdm_simsiam_both": ([spectral("log1p")], [spectral("power", -0.5)]),
    **{name: ([], []) for name in ("vicreg", "barlow_twins", "lejepa")},
    "w_mse": ([WHITEN], [WHITEN]),
    "directpred": ([spectral("power", 1.0) | {"epsilon": 0.1, "momentum": 0.3}], [STOP]),
    "directcopy": ([spectral("power", 2.0) | {"epsilon": 0.3, "momentum": 0.5}], [STOP]),
    "isoloss": ([spectral("power", 1.0) | {"momentum": 0.998, "gradient": "isotropic"}], [STOP]),
    "fastsiam": ([SIMSIAM_PREDICTOR], [STOP]),
    **{name: ([], [STOP]) for name in ("simdino", "tico")},
    "dino_sinkhorn": ([DINO_PROTOTYPES], [DINO_PROTOTYPES, DINO_SINKHORN]),
    "dino_koleo": ([DINO_PROTOTYPES], [DINO_PROTOTYPES, SHARPEN]),
    "byol_koleo": ([BYOL_PREDICTOR], [STOP]),
}
for base in ("rdm_simsiam", "rdm_byol"):
    BRANCHES |= {
        f"{base}_power1": ([spectral("power", 1.0)], [STOP]),
        f"{base}_power2": ([spectral("power", 2.0)], [STOP]),
        f"{base}_log": ([spectral("log")], [STOP]),
        f"{base}_log1p": ([spectral("log1p")], [STOP]),
        f"{base}_log1p_sq": ([spectral("log1p_sq")], [STOP]),
        f"{base}_target0.3": ([], [spectral("power", -0.3)]),
        f"{base}_target0.5": ([], [spectral("power", -0.5)]),
        f"{base}_target0.7": ([], [spectral("power", -0.7)]),
        f"{base}_target1": ([], [spectral("power", -1.0)]),
    }


def resolved(preset: str) -> Config:
    return run_config.resolve({"preset": preset})


@pytest.mark.parametrize("preset", PRESETS)
def test_branches(preset: str) -> None:
    method = resolved(preset).method
    branches = tuple([dataclasses.asdict(t) for t in side] for side in (method.online, method.target))
    assert branches == BRANCHES[preset]
    assert method.bn_views == "per_view"


@pytest.mark.parametrize("preset", PRESETS)
def test_recipes(preset: str) -> None:
    expected = RECIPES[next((recipe for recipe, presets in LIKE.items() if preset in presets), preset)]
    c = resolved(preset)
    m, o, p = c.method, c.optim, c.method.projector
    lars = (o.eta, o.clip, o.exclude_bias_norm) if o.name == "lars" else ()
    terms = [(r.name, r.weight, r.of, r.views) for r in m.regularize]
    assert (m.alignment.weight, m.alignment.targets, m.target_views, terms) == LOSSES.get(preset, (1.0, "pairs", 2, []))
    scored = (m.alignment.temperature,) if m.alignment.name == "cross_entropy" else ()
    assert {
        "projector": (p.layers, p.hidden, p.out, p.bias, p.activation, p.norm, p.last_norm, p.init),
        "ema": m.ema and (m.ema.momentum, m.ema.final),
        "alignment": (m.alignment.name, m.alignment.directions, *scored),
        "optim": (o.name, o.lr, o.min_lr, o.weight_decay, o.momentum, *lars),
        "views": [(v.brightness, v.contrast, v.saturation, v.hue, v.blur, v.solarize) for v in c.loader.views[:2]],
        "zero_init_residual": c.encoder.zero_init_residual,
    } == expected
    assert (o.warmup, o.warmup_lr, o.clip_grad, o.name == "sgd" and o.exclude_bias_norm) == ("10ep", 3e-5, None, False)
    assert (c.encoder.name, c.loader.batch_size, c.evaluate.probe_lr) == ("resnet18", 256, 0.1)
    for view in c.loader.views:
        scale = (LARGE_CROPS.get(preset, 0.08), 1.0)
        assert (view.size, view.scale, view.jitter, view.grayscale, view.flip) == (32, scale, 0.8, 0.2, 0.5)
        assert (view.interpolation, view.solarize_threshold) == ("bicubic", 128)


@pytest.mark.parametrize("preset", BASE)
def test_groups(preset: str) -> None:
    """One group's keys and number of tensors after the other, on ResNet-18."""
    groups = Trainer(resolved(preset)).stepper.groups
    keys = ("base_lr", "weight_decay", "schedule", "adapt")
    assert [(g["name"], len(g["params"]), *(g[key] for key in keys)) for g in groups] == GROUPS[preset]


def test_rates_scale_with_the_batch() -> None:
    groups = Trainer(run_config.resolve({"preset": "byol", "loader": {"batch_size": 64}})).stepper.groups
    assert [g["base_lr"] for g in groups] == [0.25, 0.25, 0.25, 0.25, 0.025, 0.025]
