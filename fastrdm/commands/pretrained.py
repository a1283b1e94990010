"""A trained encoder with all that is known about it: from a run's checkpoint, or from a file of another project."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from fastrdm.config import run_config
from fastrdm.evaluation.knn import EvaluateConfig
from fastrdm.loaders.spec import LoaderConfig, ViewSpec
from fastrdm.models.encoders import Encoder, EncoderConfig, build_encoder
from fastrdm.models.foreign_weights import Branch, load_foreign
from fastrdm.runtime import checkpoint
from fastrdm.runtime.checkpoint import META, WEIGHTS


class Pretrained(NamedTuple):
    """What evaluation and export work on."""

    encoder: Encoder  # on the CPU, in evaluation mode
    config: EncoderConfig
    view: ViewSpec  # size, interpolation, mean and std of the images that it was trained on
    loader: LoaderConfig | None  # the run's own data; none for a file of another project
    folder: Path  # where results go
    origin: dict[str, Any]  # path, step, SHA-256 of the weights, branch, layout: for the record
    evaluate: EvaluateConfig = EvaluateConfig()  # what the run itself is judged on


def from_run(path: Path, branch: Branch, encoder: str | None = None) -> Pretrained:
    """The encoder of a run folder's newest checkpoint, or of a step folder; `encoder` is refused if it is another's."""
    steps = checkpoint.existing(path)
    if not steps and not (path / META).exists():
        hint = ": a file of weights takes --weights FILE --layout NAME" if path.is_file() else ""
        raise ValueError(f"CHECKPOINT must be a run folder with checkpoints, or one of them, got {path}{hint}")
    found = checkpoint.read(steps[0] if steps else path)
    settings = run_config.resolve(found.meta["config"])
    if encoder not in (None, settings.encoder.name):
        raise ValueError(f"--encoder must be {settings.encoder.name}, which {found.path} holds, got {encoder}")
    if branch == "target" and settings.method.ema is None:
        raise ValueError(f"--branch must be online: {settings.preset} of {found.path} keeps no moving average")
    prefix = f"method.{branch}.encoder."
    weights = {key.removeprefix(prefix): x for key, x in found.weights.items() if key.startswith(prefix)}
    model = build_encoder(settings.encoder)
    checkpoint.load_weights(model, found._replace(weights=weights))
    origin = {
        "path": str(found.path),
        "step": found.meta["step"],
        "sha256": found.meta["files"][WEIGHTS]["sha256"],
        "branch": branch,
        "preset": settings.preset,
        "encoder": settings.encoder.name,
        "versions": found.meta["versions"],
    }
    data, judged = settings.loader, settings.evaluate
    return Pretrained(model.eval(), settings.encoder, data.views[0], data, path, origin, judged)


def from_file(file: Path, layout: str, encoder: EncoderConfig, branch: Branch) -> Pretrained:
    """The encoder in a file of `layout`; its views are 224 px of ImageNet, 32 px for a CIFAR stem, bilinear."""
    if not file.is_file():
        raise ValueError(f"--weights must be a file, got {file}")
    model = build_encoder(encoder)
    load_foreign(model, encoder, file, layout, branch)
    view = replace(ViewSpec(), size=224 if encoder.stem == "imagenet" else 32, interpolation="bilinear")
    origin = {
        "path": str(file),
        "layout": layout,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "branch": branch,
        "encoder": encoder.name,
        "stem": encoder.stem,
    }
    return Pretrained(model.eval(), encoder, view, None, file.parent, origin)
