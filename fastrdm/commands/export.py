"""`fastrdm export`: an encoder for torchvision, timm, Hugging Face or ONNX, checked by loading it there."""

import copy
import json
import logging
import shutil
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastrdm.commands import parsers
from fastrdm.commands.pretrained import DESCRIPTION, Pretrained, description, from_path, preprocess_of
from fastrdm.files import whole, write_whole
from fastrdm.models.encoders import EncoderConfig, build_encoder
from fastrdm.models.foreign_weights import check_export
from fastrdm.schema import require

TOLERANCE = 1e-6  # of the largest output: other kernels may sum in another order
ONNX_TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2}  # of the largest output: another runtime's convolutions
WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"  # what timm and transformers look for in a folder

OPERATORS_LOGGER = logging.getLogger("torch.onnx._internal.exporter._registration")


def main(arguments: Sequence[str]) -> int:
    """Export as `arguments` say; the exit status."""
    options = parsers.export().parse_args(arguments)
    layout, out = options.layout, options.out
    ending = {"safetensors": ".safetensors", "onnx": ".onnx"}.get(layout, out.suffix)
    require(out.suffix == ending, "--out", f"a name that ends in {ending} for --layout {layout}", str(out))
    require(layout == "onnx" or options.precision == "fp32", "--precision", "fp32 but for --layout onnx", "fp16")
    pretrained = from_path(Path(options.checkpoint), options.branch, trust=options.trust)
    check_export(pretrained.config, layout)
    if layout == "onnx":
        _require_package("onnx", "onnxscript", "onnxruntime")
        write_onnx(pretrained, out, options.precision)
        result = checked_onnx(pretrained, out, options.precision)
    elif layout == "huggingface":
        require(not out.exists(), "--out", "a new folder for --layout huggingface", str(out))
        write_folder(pretrained, out)
        result = checked(pretrained, layout, out)
    else:
        write(pretrained, out)
        result = checked(pretrained, layout, out)
    print(f"{out}: {pretrained.config.name}, {result}")
    return 0


def _require_package(*names: str) -> None:
    missing = [name for name in names if find_spec(name) is None]
    require(
        not missing, "--layout onnx", "used with onnx, onnxscript, onnxruntime: pip install 'fastrdm[onnx]'", missing
    )


def write(pretrained: Pretrained, file: Path) -> None:
    """Write the encoder's weights under their public keys. The file appears when it is complete."""
    weights = pretrained.encoder.backbone.state_dict()
    for key, x in weights.items():
        weights[key] = x.contiguous()
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole(file, SafetensorError, RuntimeError) as partial:
        if file.suffix == ".safetensors":
            about = {key: str(pretrained.origin[key]) for key in ("encoder", "preset", "step", "branch", "sha256")}
            save_file(weights, partial, {**about, "stem": pretrained.config.stem, **description(pretrained)})
        else:
            # Torch keeps versions of modules in this attribute of a state dict. Loading ignores names of no module.
            weights._metadata[DESCRIPTION] = description(pretrained)  # type: ignore[attr-defined]
            torch.save(weights, partial)


def write_folder(pretrained: Pretrained, folder: Path) -> None:
    """Write a folder that `timm.create_model("local-dir:FOLDER")` and transformers' `from_pretrained` open.

    The folder appears when it is complete.
    """
    view, size = pretrained.view, pretrained.view.size
    card = {
        "input_size": [3, size, size],
        "interpolation": view.interpolation,
        "crop_pct": size / preprocess_of(pretrained).resize,
        "crop_mode": "center",
        "mean": view.mean,
        "std": view.std,
        "num_classes": 0,
    }
    names = {
        "architecture": pretrained.config.name.removeprefix("timm/"),
        "model_args": pretrained.config.options or {},
    }
    config = {**names, "num_classes": 0, "num_features": pretrained.encoder.features, "pretrained_cfg": card}
    weights = {key: x.contiguous() for key, x in pretrained.encoder.backbone.state_dict().items()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with whole(folder, SafetensorError) as partial:
        partial.mkdir()
        save_file(weights, partial / WEIGHTS_FILE, {"format": "pt", **description(pretrained)})
        (partial / CONFIG_FILE).write_text(json.dumps({**config, **description(pretrained)}, indent=1))


class _Half(nn.Module):
    """An encoder with fp16 weights, its input and output in fp32."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder(images.half()).float()  # type: ignore[no-any-return]


def _no_torchvision(record: logging.LogRecord) -> bool:
    """Drop the warnings that torchvision's operators cannot be exported: no encoder has one."""
    return not record.getMessage().startswith("torchvision is not installed")


def write_onnx(pretrained: Pretrained, file: Path, precision: str) -> None:
    """Write the encoder as an ONNX graph from `images` (B, 3, S, S) float32, normalized, to `features` (B, F) float32.

    Any number of images fits; S is that of the run's views. Mean, std and all else stand in the graph's metadata.
    """
    size = pretrained.view.size
    network = copy.deepcopy(pretrained.encoder)
    model = _Half(network.half()) if precision == "fp16" else network
    images = torch.zeros(2, 3, size, size)
    OPERATORS_LOGGER.addFilter(_no_torchvision)
    try:
        program = torch.onnx.export(
            model.eval(),
            (images,),
            dynamo=True,
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    finally:
        OPERATORS_LOGGER.removeFilter(_no_torchvision)
    assert program is not None
    graph = program.model_proto
    for key, text in description(pretrained).items():
        graph.metadata_props.add(key=key, value=text)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, graph.SerializeToString())


def checked_onnx(pretrained: Pretrained, file: Path, precision: str) -> str:
    """Run the file in onnxruntime on 1 and 3 images, and compare with the encoder; ValueError if outputs differ."""
    runtime: Any = import_module("onnxruntime")
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    size, worst = pretrained.view.size, 0.0
    for count in (1, 3):
        images = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))
        with torch.no_grad():
            ours = pretrained.encoder(images).numpy()
        (theirs,) = session.run(["features"], {"images": images.numpy()})
        worst = max(worst, float(np.abs(ours - theirs).max() / np.abs(ours).max()))
    return _verdict(worst, ONNX_TOLERANCE[precision], "onnx", f"onnxruntime {runtime.__version__}", file)


def _verdict(difference: float, tolerance: float, layout: str, library: str, file: Path) -> str:
    """Say what was compared; ValueError, and the file is removed, if outputs differ by more than `tolerance`."""
    if not difference <= tolerance:
        shutil.rmtree(file) if file.is_dir() else file.unlink()
        raise ValueError(f"--layout {layout} gives other outputs, off by {difference:.1e}: {file} is removed")
    return f"checked in {library}: outputs differ by {difference:.0e} of the largest"


def checked(pretrained: Pretrained, layout: str, file: Path) -> str:
    """Load the file in the other library and compare outputs; returns what was compared, or why nothing was.

    ValueError if they differ, and then the file is removed.
    """
    try:
        loaded, run, library = counterpart(pretrained.config, layout, file)
    except ImportError:
        return f"not checked: {'timm' if layout == 'huggingface' else layout} is not installed"
    if layout != "huggingface":
        weights = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
        loaded.load_state_dict(weights)
    shape = getattr(loaded, "pretrained_cfg", {}).get("input_size", (3, 64, 64))
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = pretrained.encoder(images), run.eval()(images)
    difference = float((ours - theirs).abs().max() / ours.abs().max())
    return _verdict(difference, TOLERANCE, layout, library, file)


def counterpart(config: EncoderConfig, layout: str, file: Path) -> tuple[nn.Module, nn.Module, str]:
    """The network that `layout` has for this encoder, built by that library; from `file` itself where it is a folder.

    Returns the module that takes the weights, the module that gives features, and the library's name and version.
    """
    if layout == "safetensors":
        encoder = build_encoder(config)
        return encoder.backbone, encoder, "fastrdm"
    name, library = config.name.removeprefix("timm/"), "timm" if layout == "huggingface" else layout
    package: Any = import_module(library)
    if layout == "huggingface":
        model: nn.Module = package.create_model(f"local-dir:{file}", pretrained=True, num_classes=0)
    elif layout == "timm":
        model = package.create_model(name, pretrained=False, num_classes=0)
    else:
        model = import_module("torchvision.models").get_model(name, weights=None)
        model.fc = nn.Identity()
    return model, model, f"{library} {package.__version__}"
