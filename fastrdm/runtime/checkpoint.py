"""Checkpoints: a folder for a step, complete or not there at all, safe to load, checked before use."""

import contextlib
import hashlib
import json
import pickle
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastrdm.errors import RunError
from fastrdm.files import flush
from fastrdm.runtime.settings import CheckpointConfig as CheckpointConfig

FORMAT = "fastrdm-1"
WEIGHTS, STATE, META = "model.safetensors", "state.pt", "meta.json"


class CheckpointError(RunError):
    """A checkpoint that cannot be used or written; the message is its path and the reason."""


class Checkpoint(NamedTuple):
    """Content of one checkpoint folder."""

    path: Path
    weights: dict[str, Tensor]  # the model's state dict, standard keys
    state: dict[str, Any]  # optimizer, scaler, random states, loader position, ...
    meta: dict[str, Any]  # step, configuration, versions


def folder(run: Path, step: int) -> Path:
    """Folder of the checkpoint of `step`."""
    return run / "checkpoints" / f"step-{step:08d}"


def save(run: Path, step: int, weights: Mapping[str, Tensor], state: dict[str, Any], meta: dict[str, Any]) -> Path:
    """Save a checkpoint of `step` and return its folder.

    It is written under a temporary name, flushed and renamed. CheckpointError (a full disk) leaves older ones whole.
    """
    final = folder(run, step)
    partial = final.with_name(f".partial-{final.name}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file({k: v.detach().cpu().contiguous() for k, v in weights.items()}, partial / WEIGHTS)
        torch.save(state, partial / STATE)
        files = {f.name: {"bytes": f.stat().st_size, "sha256": _sha256(f)} for f in sorted(partial.iterdir())}
        described = json.loads(json.dumps({"format": FORMAT, "step": step, "files": files, **meta}))
        (partial / META).write_text(json.dumps({**described, "sha256": _digest(described)}, indent=1))
        for path in (*partial.iterdir(), partial):
            flush(path)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        flush(final.parent)
    except (OSError, RuntimeError, SafetensorError) as error:  # the last two: torch and safetensors on a full disk
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"{final} could not be written: {error}") from error
    return final


def read(path: Path) -> Checkpoint:
    """Read the checkpoint in `path` and compare its files with their hashes. CheckpointError says what is wrong."""
    try:
        meta = json.loads((path / META).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no complete checkpoint: {META}: {error}") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not of format {FORMAT}")
    if meta.pop("sha256", None) != _digest(meta):
        raise CheckpointError(f"{path} is damaged: {META} is not what was written")
    _check_meta(path, meta)
    for name, expected in meta["files"].items():
        file = path / name
        if not file.exists():
            raise CheckpointError(f"{path} is damaged: {name} is missing")
        if file.stat().st_size != expected["bytes"] or _sha256(file) != expected["sha256"]:
            raise CheckpointError(f"{path} is damaged: {name} is not what was written")
    try:
        weights, state = load_file(path / WEIGHTS), torch.load(path / STATE, map_location="cpu", weights_only=True)
    except Exception as error:  # a state made by hand can make torch's reader raise anything
        raise CheckpointError(f"{path} cannot be loaded: {reason(error)}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} cannot be loaded: {STATE} holds a {type(state).__name__}, not a dict")
    return Checkpoint(path, weights, state, meta)


def reason(error: Exception) -> str:
    """The first line of what went wrong, with its kind where that is no sentence."""
    first = next(iter(str(error).splitlines()), "")
    told = isinstance(error, OSError | RuntimeError | ValueError | pickle.UnpicklingError) and first
    return first if told else f"{type(error).__name__} {first}"


def _check_meta(path: Path, meta: dict[str, Any]) -> None:
    """Refuse a meta.json whose fields are not what `save` writes, whatever checksum it carries."""
    kinds = {"step": int, "files": dict, "metrics": dict, "config": dict, "versions": dict}
    wrong = [key for key, kind in kinds.items() if not isinstance(meta.get(key, kind()), kind)]
    files = meta.get("files", {})
    if not wrong and set(files) != {WEIGHTS, STATE}:
        wrong = ["files"]
    if not wrong and not all(isinstance(f, dict) and {"bytes", "sha256"} <= f.keys() for f in files.values()):
        wrong = ["files"]
    if not wrong and not 0 <= meta.get("step", -1) < 1 << 53:
        wrong = ["step"]
    if wrong:
        raise CheckpointError(f"{path} is damaged: {META}: {wrong[0]} is {str(meta.get(wrong[0]))[:80]}")


def existing(run: Path) -> list[Path]:
    """Finished checkpoints of a run, the newest first."""
    return sorted((run / "checkpoints").glob("step-*"), reverse=True)


def newest(run: Path) -> Iterator[Checkpoint | CheckpointError]:
    """Iterate over a run's checkpoints, newest first. A CheckpointError stands in for one that cannot be read."""
    for path in existing(run):
        try:
            yield read(path)
        except CheckpointError as error:
            yield error


def load_weights(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Put the checkpoint's weights into `model`; CheckpointError names the first keys or shapes that do not fit."""
    own = model.state_dict()
    missing, extra = own.keys() - checkpoint.weights.keys(), checkpoint.weights.keys() - own.keys()
    shapes = [k for k in own.keys() & checkpoint.weights.keys() if own[k].shape != checkpoint.weights[k].shape]
    wrong = {"missing": sorted(missing), "unknown": sorted(extra), "of another shape": sorted(shapes)}
    if any(wrong.values()):
        reasons = "; ".join(f"{len(keys)} {what} ({', '.join(keys[:3])})" for what, keys in wrong.items() if keys)
        raise CheckpointError(f"{checkpoint.path} belongs to another model: {reasons}")
    model.load_state_dict(checkpoint.weights)


def newest_settings(run: Path) -> dict[str, Any]:
    """The configuration in the newest checkpoint whose description can be read; {} without one."""
    for path in existing(run):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return dict(json.loads((path / META).read_text())["config"])
    return {}


def prune(run: Path, keep: int, best: Path | None) -> None:
    """Remove all but the newest `keep` checkpoints and `best`. CheckpointError names one that cannot be removed."""
    for path in existing(run)[keep:]:
        if path != best:
            try:
                shutil.rmtree(path)
            except OSError as error:
                raise CheckpointError(f"{path} could not be removed: {error.strerror or error}") from error


def clear_partial(run: Path) -> None:
    """Remove what a killed process left half-written, as far as that can be removed: it is in nobody's way."""
    for path in (run / "checkpoints").glob(".partial-*"):
        with contextlib.suppress(OSError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _digest(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
