"""Published settings of evaluation, by the project whose scripts have them; docs/evaluation.md names the sources."""

from typing import Any


def _solo(rate: float) -> dict[str, Any]:
    """Linear probe of solo-learn's scripts (bash_files/linear/imagenet-100) at a base learning rate of `rate`."""
    return {"linear": {"augment": True, "rates": [rate], "epochs": 100, "batch_size": 256, "schedule": "step"}}


_LARS = {"optimizer": "lars", "eta": 0.001}
_SWAV_FEW = {"epochs": 20, "batch_size": 256, "schedule": "step", "gamma": 0.2}

RECIPES: dict[str, dict[str, Any]] = {
    "simsiam": {
        "linear": {"augment": True, "rates": [0.1], "epochs": 90, "batch_size": 4096, "by_epoch": True, **_LARS}
    },
    "swav": {
        "linear": {
            "augment": True,
            "rates": [0.3],
            "epochs": 100,
            "batch_size": 256,
            "by_epoch": True,
            "weight_decay": 1e-6,
        }
    },
    "dino": {"linear": {"augment": True, "rates": [0.001], "epochs": 100, "batch_size": 1024, "by_epoch": True}},
    "solo-simsiam": _solo(30.0),
    "solo-rdm-simsiam": _solo(30.0),
    "solo-byol": _solo(0.3),
    "solo-rdm-byol": _solo(0.3),
    "solo-dino": _solo(0.3),
    "solo-swav": _solo(0.15),
    "swav-1-percent": {"finetune": {"labels": [0.01], "lr": 0.02, "head_lr": 5.0, **_SWAV_FEW}},
    "swav-10-percent": {"finetune": {"labels": [0.1], "lr": 0.01, "head_lr": 0.2, **_SWAV_FEW}},
}
