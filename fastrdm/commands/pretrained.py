"""A trained encoder with all that is known about it: from a run's checkpoint, or from a file of another project."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastrdm.config import run_config
from fastrdm.evaluation.knn import EvaluateConfig
from fastrdm.files import sha256, whole
from fastrdm.loaders.evaluation import center_view, short_side
from fastrdm.loaders.spec import STATISTICS, LoaderConfig, ViewSpec
from fastrdm.models.encoders import Encoder, EncoderConfig, build_encoder
from fastrdm.models.foreign_weights import load_foreign, read_tree
from fastrdm.models.heads import Head
from fastrdm.models.layouts import Branch
from fastrdm.runtime import checkpoint
from fastrdm.runtime.checkpoint import META, WEIGHTS
from fastrdm.schema import Triple, require

CARD = "config.json"  # beside weights from Hugging Face
DESCRIPTION = "fastrdm"  # key of an exported file's metadata: JSON with the encoder's settings and its preprocessing


class Pretrained(NamedTuple):
    """A trained encoder, its settings and where it came from."""

    encoder: Encoder  # on the CPU, in evaluation mode
    config: EncoderConfig
    view: ViewSpec  # size, interpolation, mean and std of the images that it was trained on
    loader: LoaderConfig | None  # the run's own data; none for a file of another project
    folder: Path  # where results go
    origin: dict[str, Any]  # path, step, SHA-256 of the weights, branch, layout: for the record
    evaluate: EvaluateConfig = EvaluateConfig()  # what the run itself is judged on
    whole: bool = False  # whether the center view is the whole short side of an image, as in sets of 32 px


@dataclass(frozen=True)
class Preprocess:
    """Preprocessing of an image into the encoder's input: resize, center crop, normalization."""

    size: int  # height and width of the input, pixels
    resize: int  # short side of the image before the center square is cut, pixels
    interpolation: str  # bilinear or bicubic, antialiased
    mean: Triple  # of red, green and blue on the scale 0 to 1
    std: Triple

    def __call__(self, image: ArrayLike) -> Tensor:
        """The center view (3, size, size) float32 of one RGB image, given as (H, W, 3) uint8 or as a PIL image.

        Equal to what `fastrdm eval` does on the data set of the run.
        """
        pixels = np.asarray(image)
        if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
            raise ValueError(f"an image must be (H, W, 3) uint8, got {pixels.shape} {pixels.dtype}")
        view = ViewSpec(size=self.size, interpolation=self.interpolation, mean=self.mean, std=self.std)  # type: ignore[arg-type]
        return center_view(torch.as_tensor(pixels.copy()[None]), view, whole=self.resize == self.size)[0]

    def torchvision(self) -> nn.Module:
        """Return the preprocessing as a torchvision v2 transform of PIL images, or of tensors (..., 3, H, W) uint8.

        It gives float32 and differs from this class by rounding only. Raises ImportError without torchvision.
        """
        v2 = import_module("torchvision.transforms.v2")
        resized = v2.Lambda(partial(_resize_short_side, short=self.resize, interpolation=self.interpolation))
        steps = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), resized, v2.CenterCrop(self.size)]
        return v2.Compose([*steps, v2.Normalize(self.mean, self.std), v2.ToPureTensor()])  # type: ignore[no-any-return]


def _resize_short_side(image: Tensor, short: int, interpolation: str) -> Tensor:
    """Resize an image (..., H, W) to `short` pixels on its short side, as `fastrdm.loaders.evaluation.center_view`."""
    functional: Any = import_module("torchvision.transforms.v2.functional")
    how = import_module("torchvision.transforms").InterpolationMode(interpolation)
    return functional.resize(image, [short], interpolation=how, antialias=True).clamp(0, 1)  # type: ignore[no-any-return]


class LoadedEncoder(NamedTuple):
    """An encoder for use elsewhere: `encoder(preprocess(image)[None])` gives the features (1, F) of an image."""

    encoder: Encoder  # images (B, 3, H, W) to features (B, F); on the CPU, in evaluation mode
    preprocess: Preprocess


def load_encoder(path: str | Path, branch: Branch = "online", *, trust: bool = False) -> LoadedEncoder:
    """Load the encoder of a run folder, of one of its checkpoints, or of a file that `fastrdm export` wrote.

    `branch`: the online network, or "target", its moving average; an exported file holds one of them. A file must be a
    safetensors file or a torch file, which describe their encoder and preprocessing. `trust`: load the parts outside
    fastrdm that a run or a file names, which are code. Raises ValueError for anything else, and CheckpointError for a
    checkpoint that is damaged.
    """
    found = from_path(Path(path), branch, trust=trust)
    return LoadedEncoder(found.encoder, preprocess_of(found))


def from_path(
    path: Path, branch: Branch, encoder: str | None = None, source: str | None = None, *, trust: bool = False
) -> Pretrained:
    """The encoder of a run folder or step folder, by `from_run`, or of a file that `fastrdm export` wrote."""
    if path.is_file():
        return from_export(path, branch, trust=trust)
    return from_run(path, branch, encoder, source, trust=trust)


def preprocess_of(pretrained: Pretrained) -> Preprocess:
    """The preprocessing of images for an encoder: the view that `fastrdm eval` makes of the data of its run."""
    view = pretrained.view
    return Preprocess(view.size, short_side(view.size, pretrained.whole), view.interpolation, view.mean, view.std)


def description(pretrained: Pretrained, **more: object) -> dict[str, str]:
    """Metadata of an exported file. `load_encoder` needs the encoder's settings and its preprocessing."""
    encoder = TypeAdapter(EncoderConfig).dump_python(pretrained.config, mode="json")
    preprocess = asdict(preprocess_of(pretrained))
    about = {"encoder": encoder, "preprocess": preprocess, "origin": pretrained.origin, **more}
    return {"branch": str(pretrained.origin["branch"]), DESCRIPTION: json.dumps(about)}


def write_classifier(pretrained: Pretrained, model: nn.Sequential, classes: list[str], file: Path) -> None:
    """Write a fine-tuned encoder and its linear classifier as safetensors under the keys of torchvision or timm.

    `model` is the pair that `fastrdm.evaluation.finetune.finetune` returns. torchvision's or timm's network of that
    name, built with as many classes, loads the file strictly; `load_encoder` gives the encoder alone.
    """
    encoder, head = model
    assert isinstance(encoder, Encoder)
    name = getattr(encoder.backbone, "pretrained_cfg", {}).get("classifier") or "fc"
    weights = {**encoder.backbone.state_dict(), f"{name}.weight": head.weight, f"{name}.bias": head.bias}
    plain = {key: x.detach().cpu().contiguous() for key, x in weights.items()}
    with whole(file, SafetensorError) as partial:
        save_file(plain, partial, description(pretrained, classifier=[name], classes=classes))


def from_export(file: Path, branch: Branch, *, trust: bool = False) -> Pretrained:
    """The encoder in a file that `fastrdm export` wrote for torch or as safetensors; ValueError for another file.

    It is refused as well where its encoder is code from outside fastrdm, without `trust`.
    """
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"{file} is no safetensors file: {error}") from None
        weights = load_file(file)
    else:
        weights = read_tree(file)
        metadata = getattr(weights, "_metadata", {}).get(DESCRIPTION, {})
    if DESCRIPTION not in metadata:
        hint = "write it by `fastrdm export`. A file of other weights takes --weights FILE --layout NAME"
        raise ValueError(f"{file} does not say which encoder it holds: {hint}")
    if metadata["branch"] != branch:
        raise ValueError(f"{file} holds the {metadata['branch']} branch, not the {branch} one")
    stored = json.loads(metadata[DESCRIPTION])
    if not trust:
        run_config.refuse_foreign([{"encoder": stored["encoder"]}], (), file)
    config = TypeAdapter(EncoderConfig).validate_python(stored["encoder"])
    encoder = build_encoder(config)
    heads = tuple(f"{name}." for name in stored.get("classifier", ()))
    encoder.backbone.load_state_dict({key: x for key, x in weights.items() if not key.startswith(heads)})
    resize = stored["preprocess"].pop("resize")
    view = replace(ViewSpec(), **stored["preprocess"])
    origin = {**stored.get("origin", {}), "path": str(file), "sha256": sha256(file), "branch": branch}
    whole = resize == view.size
    return Pretrained(encoder.eval(), config, view, None, file.parent, origin, whole=whole)


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
    data, judged = settings.loader, settings.evaluate
    whole = data.source in STATISTICS  # sets held in memory
    return Pretrained(model.eval(), settings.encoder, data.views[0], data, path, origin, judged, whole)


def from_file(file: Path, layout: str, encoder: EncoderConfig, branch: Branch) -> Pretrained:
    """The encoder in a file of `layout`, with the views that it was trained on as far as they are known.

    They are those of a config.json beside the file, as Hugging Face keeps it, else those that timm gives for a network
    of its own, else 224 px of ImageNet, bilinear; 32 px for a CIFAR stem.
    """
    if not file.is_file():
        raise ValueError(f"--weights must be a file, got {file}")
    model = build_encoder(encoder)
    load_foreign(model, encoder, file, layout, branch)
    check_finite(model, file)
    view = public_view(file, encoder, getattr(model.backbone, "pretrained_cfg", {}))
    origin = {
        "path": str(file),
        "layout": layout,
        "sha256": sha256(file),
        "branch": branch,
        "encoder": encoder.name,
        "stem": encoder.stem,
    }
    whole = encoder.stem == "cifar"
    return Pretrained(model.eval(), encoder, view, None, file.parent, origin, whole=whole)


def public_view(file: Path, encoder: EncoderConfig, card: Mapping[str, Any]) -> ViewSpec:
    """Size, interpolation, mean and std of the images that public weights were trained on.

    `card` is what timm knows of the network; a config.json beside the file goes before it. ValueError for a card whose
    values no view can have.
    """
    beside = file.parent / CARD
    if beside.is_file():
        card = json.loads(beside.read_text()).get("pretrained_cfg", card)
    plain = {"size": 224 if encoder.stem == "imagenet" else 32, "interpolation": "bilinear"}
    told = {key: card[key] for key in ("interpolation", "mean", "std") if card.get(key)}
    if card.get("input_size"):
        told["size"] = card["input_size"][-1]
    try:
        return replace(ViewSpec(), **{**plain, **told})
    except ValidationError as error:
        raise ValueError(f"{beside} describes images that no view can be: {error.errors()[0]['msg']}") from None


def load_projector(pretrained: Pretrained) -> Head:
    """The projector that was trained with this encoder, in evaluation mode; a file of weights holds none."""
    require(pretrained.loader is not None, "--tap", "a module of the encoder for a file of weights", "the projector")
    found = checkpoint.read(Path(pretrained.origin["path"]))
    # `from_run` has refused what this configuration must not name.
    settings = run_config.restore(found.meta["config"], found.path / META, trust=True)
    prefix = f"method.{pretrained.origin['branch']}.projector."
    weights = {key.removeprefix(prefix): x for key, x in found.weights.items() if key.startswith(prefix)}
    projector = Head(settings.method.projector, pretrained.encoder.features)
    checkpoint.load_weights(projector, found._replace(weights=weights))
    return projector.eval()


def check_finite(model: Encoder, path: Path) -> None:
    """ValueError names the weights and statistics that hold NaN or infinity: every feature would be NaN."""
    wrong = [key for key, x in model.state_dict().items() if not x.isfinite().all()]
    if wrong:
        shown = ", ".join(wrong[:3]) + (", ..." if len(wrong) > 3 else "")
        raise ValueError(f"{path} holds weights that are not finite, {len(wrong)} tensors: {shown}")
