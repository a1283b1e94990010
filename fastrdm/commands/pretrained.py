"""A trained encoder with all that is known about it: from a run's checkpoint, or from a file of another project."""

import argparse
import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from fastrdm.config import run_config
from fastrdm.loaders.evaluation import center_view
from fastrdm.loaders.spec import LoaderConfig, ViewSpec
from fastrdm.models.encoders import Encoder, EncoderConfig, build_encoder
from fastrdm.models.foreign_weights import Branch, load_foreign
from fastrdm.runtime import checkpoint
from fastrdm.runtime.checkpoint import META, WEIGHTS
from fastrdm.schema import Triple

DESCRIPTION = "fastrdm"  # key of an exported file's metadata: JSON with the encoder's settings and its preprocessing


def add_trust(p: argparse.ArgumentParser) -> None:
    """The option without which a stored configuration brings no code with it."""
    told = "load the parts outside fastrdm (package.module:Name) that a stored configuration names: they are code"
    p.add_argument("--trust", action="store_true", help=told)


class Pretrained(NamedTuple):
    """A trained encoder, its settings and where it came from."""

    encoder: Encoder  # on the CPU, in evaluation mode
    config: EncoderConfig
    view: ViewSpec  # size, interpolation, mean and std of the images that it was trained on
    loader: LoaderConfig | None  # the run's own data; none for a file of another project
    folder: Path  # where results go
    origin: dict[str, Any]  # path, step, SHA-256 of the weights, branch, layout: for the record


@dataclass(frozen=True)
class Preprocess:
    """Preprocessing of an image into the encoder's input: resize, center crop, normalization."""

    size: int  # height and width of the input, pixels
    interpolation: str  # bilinear or bicubic, antialiased
    mean: Triple  # of red, green and blue on the scale 0 to 1
    std: Triple

    def __call__(self, image: ArrayLike) -> Tensor:
        """The center view (3, size, size) float32 of one RGB image, given as (H, W, 3) uint8 or as a PIL image.

        Images larger than `size` are first resized so that their short side is 256 / 224 of it. Equal to what
        `fastrdm eval` does.
        """
        pixels = np.asarray(image)
        if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
            raise ValueError(f"an image must be (H, W, 3) uint8, got {pixels.shape} {pixels.dtype}")
        view = ViewSpec(size=self.size, interpolation=self.interpolation, mean=self.mean, std=self.std)  # type: ignore[arg-type]
        return center_view(torch.as_tensor(pixels.copy()[None]), view)[0]


class LoadedEncoder(NamedTuple):
    """An encoder for use elsewhere: `encoder(preprocess(image)[None])` gives the features (1, F) of an image."""

    encoder: Encoder  # images (B, 3, H, W) to features (B, F); on the CPU, in evaluation mode
    preprocess: Preprocess


def load_encoder(path: str | Path, branch: Branch = "online", *, trust: bool = False) -> LoadedEncoder:
    """Load the encoder of a run folder, of one of its checkpoints, or of a file that `fastrdm export` wrote.

    `branch`: the online network, or "target", its moving average; an exported file holds one of them. A file must be a
    safetensors file, which describes its encoder and preprocessing. `trust`: load the parts outside fastrdm that a run
    or a file names, which are code. Raises ValueError for anything else, and CheckpointError for a checkpoint that is
    damaged.
    """
    path = Path(path)
    if path.is_file():
        return _exported(path, branch, trust)
    found = from_run(path, branch, trust=trust)
    return LoadedEncoder(found.encoder, preprocess_of(found.view))


def preprocess_of(view: ViewSpec) -> Preprocess:
    """The preprocessing of images for an encoder that was trained on such views."""
    return Preprocess(view.size, view.interpolation, view.mean, view.std)


def description(pretrained: Pretrained) -> str:
    """JSON of what `load_encoder` needs besides the weights; stored in the metadata of an exported file."""
    encoder = TypeAdapter(EncoderConfig).dump_python(pretrained.config, mode="json")
    return json.dumps({"encoder": encoder, "preprocess": asdict(preprocess_of(pretrained.view))})


def _exported(file: Path, branch: Branch, trust: bool) -> LoadedEncoder:
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file, which load_encoder takes: {error}") from None
    if DESCRIPTION not in metadata:
        raise ValueError(f"{file} does not say which encoder it holds: write it by `fastrdm export`")
    if metadata["branch"] != branch:
        raise ValueError(f"{file} holds the {metadata['branch']} branch, not the {branch} one")
    stored = json.loads(metadata[DESCRIPTION])
    if not trust:
        run_config.refuse_foreign([{"encoder": stored["encoder"]}], (), file)
    encoder = build_encoder(TypeAdapter(EncoderConfig).validate_python(stored["encoder"]))
    encoder.backbone.load_state_dict(load_file(file))
    return LoadedEncoder(encoder.eval(), TypeAdapter(Preprocess).validate_python(stored["preprocess"]))


def from_run(
    path: Path, branch: Branch, encoder: str | None = None, source: str | None = None, *, trust: bool = False
) -> Pretrained:
    """The encoder of a run folder's newest checkpoint, or of a step folder.

    `encoder` names the one that the user expects, and is refused if it is another's; `source` takes the place of the
    run's own. ValueError where the checkpoint names parts outside fastrdm that neither of them names, without `trust`.
    """
    steps = checkpoint.existing(path)
    if not steps and not (path / META).exists():
        hint = ": a file of weights takes --weights FILE --layout NAME" if path.is_file() else ""
        raise ValueError(f"CHECKPOINT must be a run folder with checkpoints, or one of them, got {path}{hint}")
    found = checkpoint.read(steps[0] if steps else path)
    given = {"encoder": {"name": encoder}, "loader": {"source": source}}
    stored = found.meta["config"]
    if encoder not in (None, run_config.below(stored, "encoder", "name")):
        stands = run_config.below(stored, "encoder", "name")
        raise ValueError(f"--encoder must be {stands}, which {found.path} holds, got {encoder}")
    changes = [{key: value} for key, value in given.items() if None not in value.values()]
    settings = run_config.restore(stored, found.path / META, changes, trust=trust)
    if branch == "target" and settings.method.ema is None:
        raise ValueError(f"--branch must be online: {settings.preset} of {found.path} keeps no moving average")
    prefix = f"method.{branch}.encoder."
    weights = {key.removeprefix(prefix): x for key, x in found.weights.items() if key.startswith(prefix)}
    model = build_encoder(settings.encoder)
    checkpoint.load_weights(model, found._replace(weights=weights))
    check_finite(model, found.path)
    origin = {
        "path": str(found.path),
        "step": found.meta["step"],
        "sha256": found.meta["files"][WEIGHTS]["sha256"],
        "branch": branch,
        "preset": settings.preset,
        "encoder": settings.encoder.name,
        "versions": found.meta["versions"],
    }
    return Pretrained(model.eval(), settings.encoder, settings.loader.views[0], settings.loader, path, origin)


def from_file(file: Path, layout: str, encoder: EncoderConfig, branch: Branch) -> Pretrained:
    """The encoder in a file of `layout`; its views are 224 px of ImageNet, 32 px for a CIFAR stem, bilinear."""
    if not file.is_file():
        raise ValueError(f"--weights must be a file, got {file}")
    model = build_encoder(encoder)
    load_foreign(model, encoder, file, layout, branch)
    check_finite(model, file)
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


def check_finite(model: Encoder, path: Path) -> None:
    """ValueError names the weights and statistics that hold NaN or infinity: every feature would be NaN."""
    wrong = [key for key, x in model.state_dict().items() if not x.isfinite().all()]
    if wrong:
        shown = ", ".join(wrong[:3]) + (", ..." if len(wrong) > 3 else "")
        raise ValueError(f"{path} holds weights that are not finite, {len(wrong)} tensors: {shown}")
