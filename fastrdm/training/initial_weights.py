"""`train.init`: a run that starts from weights instead of from its seed alone."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastrdm.files import sha256
from fastrdm.methods.dual_branch import Network
from fastrdm.models.encoders import Encoder, EncoderConfig
from fastrdm.models.foreign_weights import encoder_weights, timm_weights
from fastrdm.models.layouts import Branch
from fastrdm.runtime import checkpoint
from fastrdm.runtime.checkpoint import META, WEIGHTS
from fastrdm.training.learner import Learner

# what is taken over whole or not at all: an encoder, a head, the prototypes, one transform, the probe
_PART = re.compile(r"method\.(?:online|target)\.\w+|method\.\w+_transforms\.\d+|\w+")
_STEP = re.compile(r"(.+):(\d+)")


def initialize(learner: Learner, init: str, encoder: EncoderConfig) -> tuple[list[str], dict[str, Any]]:
    """Put the weights that `init` names into `learner`; lines on what was taken, and a record of where it came from.

    `init` is a run's folder, `FOLDER:STEP`, a checkpoint, a file of weights in any layout that `fastrdm eval` reads, or
    `timm:NAME` with timm's own weights, `timm:NAME:FILE` with a file of them. The encoder must fit; a head, the
    prototypes or a transform that does not keeps the values of the seed and is named. An EMA target takes the weights
    of the file's target, and of its online network where there is none. Raises ValueError and CheckpointError.
    """
    if init.startswith("timm:"):
        name, _, file = init.removeprefix("timm:").partition(":")
        weights = timm_weights(name, file or None, encoder)
        return _start(learner, _as_learner(learner, {"online": weights}), init, {"path": init})
    path, step = _place(Path(init))
    if path.is_file():
        layout, found = encoder_weights(learner.method.online.encoder, encoder, path)
        record: dict[str, Any] = {"path": str(path), "layout": layout, "sha256": sha256(path)}
        return _start(learner, _as_learner(learner, found), f"{path} (layout {layout})", record)
    read = checkpoint.read(path)
    record = {"path": str(path), "step": step or read.meta["step"], "sha256": read.meta["files"][WEIGHTS]["sha256"]}
    return _start(learner, read.weights, str(path), record)


def check(init: str) -> None:
    """Raise ValueError where the weights that `init` names are not there."""
    if not init.startswith("timm:"):
        _place(Path(init))


def _place(path: Path) -> tuple[Path, int | None]:
    """The file or the checkpoint that `train.init` names, and the step where one was asked for."""
    step = None
    if not path.exists() and (match := _STEP.fullmatch(str(path))):
        path, step = Path(match[1]), int(match[2])
        if not checkpoint.folder(path, step).is_dir():
            there = ", ".join(str(int(p.name.removeprefix("step-"))) for p in checkpoint.existing(path)) or "none"
            raise ValueError(f"train.init must name a checkpoint that is there, got step {step} of {path}: {there}")
        return checkpoint.folder(path, step), step
    if path.is_file() and path.name == WEIGHTS and (path.parent / META).is_file():
        path = path.parent
    if path.is_file() or (path / META).is_file():
        return path, step
    steps = checkpoint.existing(path)
    if not steps:
        what = "which holds no checkpoint" if path.is_dir() else "which is not there"
        raise ValueError(f"train.init must be a run's folder, FOLDER:STEP, a file or timm:NAME, got {path}, {what}")
    return steps[0], step


def _as_learner(learner: Learner, found: Mapping[Branch, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Weights of the encoder's backbone, by branch, under the learner's keys."""
    named: dict[str, Tensor] = {}
    networks: dict[Branch, Network | None] = {"online": learner.method.online, "target": learner.method.target}
    for branch, network in networks.items():
        if network is not None:
            own = f"method.{branch}.encoder.{_prefix_of_backbone(network.encoder)}"
            named |= {f"{own}{key}": x for key, x in found.get(branch, found["online"]).items()}
    return named


def _prefix_of_backbone(encoder: Encoder) -> str:
    names = (name for name, module in encoder.named_modules() if module is encoder.backbone)
    return "".join(f"{name}." for name in names if name)


def _start(
    learner: Learner, weights: Mapping[str, Tensor], origin: str, record: dict[str, Any]
) -> tuple[list[str], dict[str, Any]]:
    own = learner.state_dict()
    parts: dict[str, list[str]] = {}
    for key in own:
        match = _PART.match(key)
        parts.setdefault(match[0] if match else key, []).append(key)
    taken: dict[str, Tensor] = {}
    left = []
    for part, keys in parts.items():
        given = {key: _source(key, weights) for key in keys}
        wrong = [key for key, x in given.items() if x is None or x.shape != own[key].shape]
        wrong = [key for key in wrong if not key.endswith("num_batches_tracked")]
        if wrong:
            left.append(part)
            if part == "method.online.encoder":
                raise ValueError(
                    f"train.init={origin} holds another encoder: {len(wrong)} tensors are missing or of another "
                    f"shape, such as {wrong[0].removeprefix(f'{part}.')}"
                )
        else:
            taken |= {key: x for key, x in given.items() if x is not None}
    learner.load_state_dict({**own, **taken})
    lines = [f"starting from the weights of {origin}: step count, schedules and optimizer begin anew"]
    if left:
        lines.append(f"  left as the seed made them: {', '.join(part.removeprefix('method.') for part in left)}")
    return lines, {**record, "left": left}


def _source(key: str, weights: Mapping[str, Tensor]) -> Tensor | None:
    """The tensor for `key`; an EMA target without one of its own takes the online network's."""
    return weights.get(key, weights.get(key.replace("method.target.", "method.online.", 1)))
