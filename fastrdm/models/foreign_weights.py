"""Weights in other projects' files: where each keeps the encoder, how they are read, which encoders they can hold."""

import argparse
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor

from fastrdm.models.encoders import Encoder, EncoderConfig, build_encoder
from fastrdm.models.layouts import LAYOUTS, Branch
from fastrdm.models.settings import ENCODERS, find_encoder

Weights = Mapping[str, Tensor]


COUNTER = "num_batches_tracked"  # files older than torch 0.4.1 lack it, and nothing here reads it


def load_foreign(encoder: Encoder, config: EncoderConfig, file: Path, layout: str, branch: Branch) -> None:
    """Put the weights of `file` into `encoder`; ValueError names the first keys that do not fit, and what would."""
    tree = read_tree(file)
    own = encoder.backbone.state_dict()
    try:
        found = _select(tree, layout, branch)
        wrong = _mismatch(own, found, _heads(encoder, layout))
    except LookupError as reason:
        found, wrong = {}, str(reason.args[0])
    if wrong:
        raise ValueError(f"{file} in layout {layout} does not fit {config.name}: {wrong}{_advice(tree, own, encoder)}")
    kept = {key: found.get(key, tensor) for key, tensor in own.items()}
    encoder.backbone.load_state_dict(kept)


def encoder_weights(encoder: Encoder, config: EncoderConfig, file: Path) -> tuple[str, dict[Branch, dict[str, Tensor]]]:
    """The layout of `file` and, by branch, its weights under the keys of `encoder.backbone`; a classifier is left out.

    The layout is found by trying all of them. ValueError says what is missing where none fits the encoder.
    """
    tree = read_tree(file)
    own = encoder.backbone.state_dict()
    wrong = []
    for layout, branch, found in _readings(tree):
        differs = _mismatch(own, found, _heads(encoder, layout))
        if differs:
            wrong.append(differs)
            continue
        fitting: dict[Branch, dict[str, Tensor]] = {}
        for other, also, weights in _readings(tree):
            if other == layout and not _mismatch(own, weights, _heads(encoder, layout)):
                fitting[also] = {key: weights[key] for key in own if key in weights}
        fitting.setdefault("online", fitting[branch])
        return layout, fitting
    nearest = min(wrong, key=len, default="it holds no weights under keys that are known")
    raise ValueError(f"{file} does not fit {config.name}: {nearest}{_advice(tree, own, encoder)}")


def timm_weights(name: str, file: str | None, config: EncoderConfig) -> dict[str, Tensor]:
    """The weights of timm's network `name` without its classifier, from `file` or from timm's own source.

    timm converts what it knows how to convert, such as the position embeddings of another image size.
    """
    try:
        import timm
    except ImportError:
        raise ValueError("train.init=timm:NAME needs timm: pip install 'fastrdm[timm]'") from None
    if file is not None and not Path(file).is_file():
        raise ValueError(f"train.init=timm:{name}:FILE must name a file, got {file}")
    same = config.name == f"timm/{name}" and isinstance(config.options, dict)
    options: dict[str, Any] = dict(cast(dict[str, Any], config.options)) if same else {}
    overlay = {"file": file} if file else None
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay, **options)
    except Exception as error:  # whatever timm, the hub or the file raise
        hint = "" if file else "; a file that you have goes behind a colon, as in train.init=timm:NAME:FILE"
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise ValueError(f"train.init=timm:{name} has no weights to give ({reason}){hint}") from None
    return dict(model.state_dict())


def read_tree(file: Path) -> dict[str, Any]:
    """Load the contents of a .safetensors or torch file on the CPU; ValueError if reading it needs foreign code."""
    try:
        if file.suffix == ".safetensors":
            return dict(load_file(file))
        with torch.serialization.safe_globals([argparse.Namespace]):  # DINO keeps its arguments beside the weights
            tree = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        if name is None:
            raise ValueError(f"{file} cannot be read: it is no file of weights") from None
        raise ValueError(
            f"{file} is not safe to load: it holds {name[1]}, more than tensors, and could run any code. "
            "If you trust it, write its weights alone: "
            "torch.save({'state_dict': torch.load(FILE, weights_only=False)['state_dict']}, NEW)"
        ) from None
    except Exception as error:  # what is no file of weights can make its reader raise anything
        raise ValueError(f"{file} cannot be read: {type(error).__name__}: {str(error).partition(chr(10))[0]}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{file} must hold weights by name, got a {type(tree).__name__}")
    return tree


def _select(tree: Mapping[str, Any], layout: str, branch: Branch) -> dict[str, Tensor]:
    """The encoder's tensors by their own keys; LookupError says what the layout looks for in vain."""
    place = LAYOUTS[layout].branches.get(branch)
    if place is None:
        raise LookupError(f"it has no {branch} branch")
    holder = next((h for h in place.holders if not h or isinstance(tree.get(h), Mapping)), None)
    if holder is None:
        raise LookupError(f"no {' or '.join(map(repr, place.holders))} among its keys ({_first(tree)})")
    inner = tree[holder] if holder else tree
    tensors = {key: value for key, value in inner.items() if isinstance(value, Tensor)}
    prefix = next((p for p in place.prefixes if any(key.startswith(p) for key in tensors)), None)
    if prefix is None:
        raise LookupError(
            f"no key begins with {' or '.join(filter(None, place.prefixes))} (there is {_first(tensors)})"
        )
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _heads(encoder: Encoder, layout: str) -> tuple[str, ...]:
    """Beginnings of the keys that stand beside an encoder's; a network of timm names its classifier itself."""
    named = getattr(encoder.backbone, "pretrained_cfg", {}).get("classifier") or ()
    return LAYOUTS[layout].heads + tuple(f"{n}." for n in ([named] if isinstance(named, str) else named))


def _mismatch(own: Weights, found: Weights, heads: tuple[str, ...]) -> str:
    """The first keys that are missing, unexpected or of another shape; "" if all fit."""
    missing = [key for key in own if key not in found and not key.endswith(COUNTER)]
    extra = [key for key in found if key not in own and not key.startswith(heads)]
    shapes = [
        f"{key} {tuple(found[key].shape)} for {tuple(own[key].shape)}"
        for key in own
        if key in found and found[key].shape != own[key].shape
    ]
    wrong = {"missing": missing, "unexpected": extra, "of another shape": shapes}
    return "; ".join(f"{len(keys)} {what} ({', '.join(keys[:3])})" for what, keys in wrong.items() if keys)


def _advice(tree: Mapping[str, Any], own: Weights, encoder: Encoder) -> str:
    """Which layout and branch would fit the encoder, else which of our encoders the file holds."""
    for layout, branch, found in _readings(tree):
        if not _mismatch(own, found, _heads(encoder, layout)):
            return f". It fits with --layout {layout} --branch {branch}"
    for config in _own_networks():
        with torch.device("meta"):
            other = build_encoder(config)
        for layout, branch, found in _readings(tree):
            if not _mismatch(other.state_dict(), found, LAYOUTS[layout].heads):
                stem = "" if config.stem == "imagenet" else f" --stem {config.stem}"
                return f". It holds {config.name}: --encoder {config.name}{stem} --layout {layout} --branch {branch}"
    return ""


def _readings(tree: Mapping[str, Any]) -> Iterator[tuple[str, Branch, dict[str, Tensor]]]:
    for name, layout in LAYOUTS.items():
        for branch in layout.branches:
            try:
                yield name, branch, _select(tree, name, branch)
            except LookupError:
                continue


def _own_networks() -> Iterator[EncoderConfig]:
    for name, row in ENCODERS.items():
        plain = EncoderConfig(name=name)
        yield plain
        if "stem" in row.takes:
            yield replace(plain, stem="cifar")


def _first(keys: Mapping[str, Any]) -> str:
    names = [str(key) for key in keys]
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def check_export(config: EncoderConfig, layout: str) -> None:
    """ValueError if `layout` has no network for this encoder; its weights are then `encoder.backbone.state_dict()`."""
    row = find_encoder(config.name)
    if layout in ("safetensors", "onnx"):
        return
    instead = "--layout safetensors holds it under the encoder's own keys"
    # A folder for Hugging Face is one that timm opens.
    library = "timm" if layout == "huggingface" else layout
    if library not in row.exports:
        fitting = f"--layout {row.exports[0]} does" if row.exports else instead
        raise ValueError(f"--layout {layout} cannot hold {config.name}: {fitting}")
    if config.stem != "imagenet":
        raise ValueError(
            f"--layout {layout} cannot hold encoder.stem={config.stem}: its {config.name} begins with a 7x7 "
            f"convolution of stride 2 and max pooling, this one with a 3x3 convolution of stride 1; {instead}"
        )
    if config.width not in (None, row.width):
        raise ValueError(f"--layout {layout} cannot hold encoder.width={config.width}, only {row.width}: {instead}")
