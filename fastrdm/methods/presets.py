"""The table of methods: each preset is data that lies under the user's file and command line.

Shapes and rates follow the published CIFAR scripts (ResNet-18, batch 256); recipes/ overrides them.
"""

from typing import Any

Preset = dict[str, Any]

_SIMSIAM_HEAD: Preset = {"layers": 3, "hidden": 2048, "out": 2048, "bias": False, "last_norm": "plain"}
_BYOL_HEAD: Preset = {"layers": 2, "hidden": 4096, "out": 256, "bias": True, "last_norm": "none"}
_SGD: Preset = {"name": "sgd", "lr": 0.5, "weight_decay": 1e-5}
_LARS: Preset = {"name": "lars", "lr": 1.0, "weight_decay": 1e-5, "eta": 0.02, "clip": True, "exclude_bias_norm": True}
_BYOL_LOSS: Preset = {"name": "byol", "directions": "sum"}
_EMA: Preset = {"momentum": 0.99, "final": 1.0}
_BYOL_JITTER: Preset = {"saturation": 0.2, "scale": [0.08, 1.0]}
_SOLARIZE: Preset = {**_BYOL_JITTER, "solarize": 0.2}


def _simsiam(online: list[Any], target: list[Any]) -> Preset:
    method = {"projector": _SIMSIAM_HEAD, "online": online, "target": target}
    return {
        "method": method,
        "encoder": {"zero_init_residual": True},
        "optim": _SGD,
        "loader": {"views": [{"scale": [0.08, 1.0]}] * 2},
    }


def _byol(online: list[Any], target: list[Any]) -> Preset:
    method = {"projector": _BYOL_HEAD, "online": online, "target": target, "ema": _EMA, "alignment": _BYOL_LOSS}
    return {"method": method, "optim": _LARS, "loader": {"views": [_BYOL_JITTER, _SOLARIZE]}}


def _swav(online: list[Any], target: list[Any]) -> Preset:
    head = {"layers": 2, "hidden": 2048, "out": 128, "bias": True, "last_norm": "none"}
    color = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2, "scale": [0.08, 1.0]}
    return {
        "method": {"projector": head, "online": online, "target": target, "alignment": {"name": "cross_entropy"}},
        "optim": {**_LARS, "lr": 0.6, "min_lr": 6e-4, "weight_decay": 1e-6, "exclude_bias_norm": False},
        "loader": {"views": [color, color]},
    }


def _dino(online: list[Any], target: list[Any]) -> Preset:
    head = {"layers": 3, "hidden": 2048, "out": 256, "bias": True, "last_norm": "none"}
    head |= {"activation": "gelu", "norm": False, "init": "trunc_normal"}
    method = {"projector": head, "online": online, "target": target, "alignment": {"name": "cross_entropy"}}
    return {
        "method": {**method, "ema": {"momentum": 0.9995, "final": 1.0}},
        "optim": {**_LARS, "lr": 0.3, "weight_decay": 1e-6},
        "loader": {"views": [_BYOL_JITTER, _SOLARIZE]},
    }


def _alike(head: Preset, optim: Preset, views: list[Preset], **method: Any) -> Preset:
    """A method whose two branches are one network: what keeps its rank is the loss."""
    method = {"projector": head, "online": [], "target": [], **method}
    return {"method": method, "optim": optim, "loader": {"views": views}}


def _direct(power: float, epsilon: float, momentum: float) -> Preset:
    head = {"layers": 2, "hidden": 512, "out": 128, "bias": True, "last_norm": "none"}
    predictor = {"name": "filter", "power": power, "epsilon": epsilon, "momentum": momentum}
    method = {"projector": head, "online": [predictor], "target": ["stop"], "alignment": _BYOL_LOSS}
    return {
        "method": {**method, "ema": {"momentum": 0.996, "final": 0.996}},
        "optim": {"name": "sgd", "lr": 0.06, "weight_decay": 4e-4},
        "loader": {"views": [_BYOL_JITTER, _BYOL_JITTER]},
    }


def _with(preset: Preset, **method: Any) -> Preset:
    """A preset with some settings of its method replaced."""
    return {**preset, "method": {**preset["method"], **method}}


def _power(exponent: float) -> Preset:
    return {"name": "filter", "kind": "power", "power": exponent}


def _log(kind: str) -> Preset:
    return {"name": "filter", "kind": kind}


_ONLINE: dict[str, Preset] = {
    "power1": _power(1.0),
    "power2": _power(2.0),
    "log": _log("log"),
    "log1p": _log("log1p"),
    "log1p_sq": _log("log1p_sq"),
}
_TARGET: dict[str, Preset] = {f"target{p}": _power(-p) for p in (0.3, 0.5, 0.7, 1)}
_SWAV_PROTOTYPES: Preset = {"name": "prototypes", "count": 3000, "freeze": "2ep"}
_DINO_PROTOTYPES: Preset = {"name": "prototypes", "count": 4096, "freeze": "1ep"}
_SINKHORN: Preset = {"name": "sinkhorn", "queue": 3840, "queue_start": "50ep"}

_DINO_SINKHORN: Preset = {"name": "sinkhorn", "epsilon": 0.07, "warmup_epsilon": 0.04, "warmup": "30ep"}
_BYOL_PREDICTOR: Preset = {"name": "predictor", "hidden": 4096, "bias": True, "constant_lr": False}
_WIDE_HEAD: Preset = {"layers": 3, "hidden": 2048, "out": 2048, "bias": True, "last_norm": "none"}
_DECORRELATION: Preset = {**_LARS, "lr": 0.3, "weight_decay": 1e-4}
_VICREG: list[Preset] = [{"name": "variance", "weight": 25.0}, {"name": "covariance", "weight": 2.0}]
_COSINE_LOSS: Preset = {"name": "negative_cosine"}
_VICREG_VIEW: Preset = {"saturation": 0.2, "scale": [0.2, 1.0], "solarize": 0.1}
_STRONG_VIEW: Preset = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2, "scale": [0.2, 1.0]}
_W_MSE: Preset = {"name": "whiten", "root": "cholesky", "size": 128}
_KOLEO: Preset = {"name": "koleo", "weight": 0.1, "of": "features", "views": "global"}

PRESETS: dict[str, Preset] = {
    "symsimsiam": _simsiam([], []),
    "simsiam": _simsiam(["predictor"], ["stop"]),
    "byol": _byol([_BYOL_PREDICTOR], ["stop"]),
    "swav": _swav([_SWAV_PROTOTYPES], [_SWAV_PROTOTYPES, _SINKHORN]),
    "dino": _dino([_DINO_PROTOTYPES], [_DINO_PROTOTYPES, "center_sharpen"]),
    "rdm_simsiam": _simsiam([], [_power(-0.5)]),
    "rdm_byol": _byol([], [_power(-0.5)]),
    **{f"rdm_simsiam_{name}": _simsiam([f], ["stop"]) for name, f in _ONLINE.items()},
    **{f"rdm_byol_{name}": _byol([f], ["stop"]) for name, f in _ONLINE.items()},
    **{f"rdm_simsiam_{name}": _simsiam([], [f]) for name, f in _TARGET.items()},
    **{f"rdm_byol_{name}": _byol([], [f]) for name, f in _TARGET.items()},
    # compositions that no paper has
    "swav_target": _swav([_SWAV_PROTOTYPES], [_power(-0.5), _SWAV_PROTOTYPES, _SINKHORN]),
    "dino_online": _dino([_log("log1p"), _DINO_PROTOTYPES], [_DINO_PROTOTYPES, "center_sharpen"]),
    "simsiam_target": _simsiam(["predictor"], [_power(-0.5)]),
    "rdm_simsiam_both": _simsiam([_log("log1p")], [_power(-0.5)]),
    # branches that are alike, and a loss that keeps the rank
    "vicreg": _alike(
        _WIDE_HEAD,
        _DECORRELATION,
        [_VICREG_VIEW, _VICREG_VIEW],
        alignment={"name": "mse", "weight": 25.0},
        regularize=_VICREG,
    ),
    "barlow_twins": _alike(
        _WIDE_HEAD,
        _DECORRELATION,
        [_BYOL_JITTER, _SOLARIZE],
        alignment={"name": "cross_correlation", "weight": 0.1},
    ),
    "lejepa": _alike(
        {**_WIDE_HEAD, "out": 128},
        {"name": "adamw", "lr": 5e-4, "weight_decay": 5e-2},
        [_BYOL_JITTER, _SOLARIZE],
        alignment={"name": "mse", "weight": 0.95, "targets": "center"},
        regularize=[{"name": "sigreg", "weight": 0.05}],
    ),
    "w_mse": _with(
        _alike(
            {**_WIDE_HEAD, "layers": 2, "hidden": 1024, "out": 64},
            {"name": "adamw", "lr": 2e-3, "weight_decay": 1e-6},
            [_STRONG_VIEW, _STRONG_VIEW],
            alignment={"name": "byol"},
        ),
        online=[_W_MSE],
        target=[_W_MSE],
    ),
    # predictors that are computed from the features
    "directpred": _direct(1.0, 0.1, 0.3),
    "directcopy": _direct(2.0, 0.3, 0.5),
    "isoloss": _byol([{**_power(1.0), "momentum": 0.998, "gradient": "isotropic"}], ["stop"]),
    # many views, and published methods with a term or a target of others
    "fastsiam": {
        **_with(_simsiam(["predictor"], ["stop"]), target_views=4, alignment={**_COSINE_LOSS, "targets": "mean"}),
        "loader": {"views": [{"scale": [0.08, 1.0]}] * 4},
    },
    "simdino": _with(_dino([], ["stop"]), alignment=_COSINE_LOSS, regularize=[{"name": "coding_rate"}]),
    "tico": _with(_byol([], ["stop"]), alignment=_COSINE_LOSS, regularize=[{"name": "tico", "weight": 8.0}]),
    "dino_sinkhorn": _dino([_DINO_PROTOTYPES], [_DINO_PROTOTYPES, _DINO_SINKHORN]),
    "dino_koleo": _with(_dino([_DINO_PROTOTYPES], [_DINO_PROTOTYPES, "center_sharpen"]), regularize=[_KOLEO]),
    "byol_koleo": _with(_byol([_BYOL_PREDICTOR], ["stop"]), regularize=[_KOLEO]),
}
