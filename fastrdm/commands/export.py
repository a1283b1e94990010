"""`fastrdm export`: an encoder's weights for torchvision, timm or safetensors, checked by loading them there."""

import argparse
import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastrdm.commands.pretrained import DESCRIPTION, Pretrained, add_trust, description, from_run
from fastrdm.models.encoders import EncoderConfig, build_encoder
from fastrdm.models.foreign_weights import EXPORTS, check_export
from fastrdm.schema import require

TOLERANCE = 1e-6  # of the largest output: other kernels may sum in another order


def parser() -> argparse.ArgumentParser:
    """The command line of `fastrdm export`."""
    p = argparse.ArgumentParser(
        "fastrdm export",
        description="Write the encoder of a run, without its projector, in the layout of another library, and compare "
        "both on random images. FILE.safetensors is a safetensors file, any other name a torch file.",
    )
    p.add_argument("checkpoint", metavar="CHECKPOINT", help="run folder (its newest checkpoint) or a step folder")
    p.add_argument("--layout", choices=EXPORTS, required=True, help="safetensors: the encoder's own keys")
    p.add_argument("--out", type=Path, metavar="FILE", required=True)
    p.add_argument("--branch", choices=("online", "target"), default="online", help="target: the EMA network, teacher")
    add_trust(p)
    return p


def main(arguments: Sequence[str]) -> int:
    """Export as `arguments` say; the exit status."""
    options = parser().parse_args(arguments)
    named = options.layout != "safetensors" or options.out.suffix == ".safetensors"
    require(named, "--out", "a name that ends in .safetensors for --layout safetensors", str(options.out))
    pretrained = from_run(Path(options.checkpoint), options.branch, trust=options.trust)
    check_export(pretrained.config, options.layout)
    write(pretrained, options.out)
    print(f"{options.out}: {pretrained.config.name}, {checked(pretrained, options.layout, options.out)}")
    return 0


def write(pretrained: Pretrained, file: Path) -> None:
    """Write the encoder's weights under their public keys. The file appears when it is complete."""
    weights = {key: x.contiguous() for key, x in pretrained.encoder.backbone.state_dict().items()}
    partial = file.with_name(f".partial-{file.name}")
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".safetensors":
        about = {key: str(pretrained.origin[key]) for key in ("encoder", "preset", "step", "branch", "sha256")}
        save_file(weights, partial, {**about, "stem": pretrained.config.stem, DESCRIPTION: description(pretrained)})
    else:
        torch.save(weights, partial)
    os.replace(partial, file)


def checked(pretrained: Pretrained, layout: str, file: Path) -> str:
    """Load the file in the other library and compare outputs; returns what was compared, or why nothing was.

    ValueError if they differ, and then the file is removed.
    """
    weights = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    try:
        loaded, run, library = counterpart(pretrained.config, layout)
    except ImportError:
        return f"not checked: {layout} is not installed"
    loaded.load_state_dict(weights)
    shape = getattr(loaded, "pretrained_cfg", {}).get("input_size", (3, 64, 64))
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = pretrained.encoder(images), run.eval()(images)
    difference = float((ours - theirs).abs().max() / ours.abs().max())
    if not difference <= TOLERANCE:
        file.unlink()
        raise ValueError(f"--layout {layout} gives other outputs, off by {difference:.1e}: {file} is removed")
    return f"checked in {library}: outputs differ by {difference:.0e} of the largest"


def counterpart(config: EncoderConfig, layout: str) -> tuple[nn.Module, nn.Module, str]:
    """The network that `layout` has for this encoder, built by that library.

    Returns the module that takes the weights, the module that gives features, and the library's name and version.
    """
    if layout == "safetensors":
        encoder = build_encoder(config)
        return encoder.backbone, encoder, "fastrdm"
    library: Any = import_module(layout)
    name = config.name.removeprefix("timm/")
    if layout == "timm":
        model: nn.Module = library.create_model(name, pretrained=False, num_classes=0)
    else:
        model = import_module("torchvision.models").get_model(name, weights=None)
        model.fc = nn.Identity()
    return model, model, f"{layout} {library.__version__}"
