"""Features of every image of a source on disk, in parts: by several processes, and resumable after a stop."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastrdm.evaluation.evaluator import Machine
from fastrdm.files import whole, write_whole
from fastrdm.loaders.evaluation import evaluation_batches
from fastrdm.loaders.sources.source import Source, Subset
from fastrdm.loaders.spec import ViewSpec
from fastrdm.runtime.distributed import Processes, agree

PART = 2048  # images that a stopped command computes again, at most, on each process
PARTS, PLAN = ".parts", "plan.json"
FEATURES = "features.npy"
BLOCK = 4096  # rows of the finished file in memory at a time
SMALLEST = 1e-6  # of the largest variance: directions below it carry no more than rounding


class Embedded(NamedTuple):
    """Rows of all parts, until `complete` makes them the features file."""

    features: NDArray[np.float32]  # (N, D), mapped from a file, and writable
    numbers: NDArray[np.int64]  # (N,) number of each row's image in the source, rising
    faults: dict[int, str]  # images that could not be read and have no row: number in the source -> name and reason


@torch.no_grad()
def tap_features(encoder: nn.Module, name: str, images: Tensor) -> Tensor:
    """Output (B, D) of the encoder's module `name`, averaged over positions, for images (B, 3, H, W).

    Maps (B, D, H, W) are averaged over pixels, tokens (B, T, D) over tokens. ValueError for another shape.
    """
    found: list[Tensor] = []
    handle = dict(encoder.named_modules())[name].register_forward_hook(lambda _, __, output: found.append(output))
    try:
        encoder(images)
    finally:
        handle.remove()
    shape = tuple(found[0].shape) if found and isinstance(found[0], Tensor) else None
    if shape is None or len(shape) not in (2, 3, 4):
        raise ValueError(f"--tap must be a module that gives (B, D), (B, T, D) or (B, D, H, W), got {name}: {shape}")
    x = found[0]
    return x.mean((2, 3)) if x.ndim == 4 else x.mean(1) if x.ndim == 3 else x


def embed(
    encode: Callable[[Tensor], Tensor],
    source: Source,
    view: ViewSpec,
    out: Path,
    plan: dict[str, Any],
    machine: Machine,
    processes: Processes,
    tell: Callable[[str], None],
) -> Embedded | None:
    """Compute the features of every readable image of `source` in folder `out`, in the order of the source.

    `encode` turns center views (B, 3, S, S) into rows (B, D). `plan` describes the work: what an earlier call with the
    same plan left in `out` is used, and ValueError is raised if `out` holds another's. Each process makes some of the
    parts; the main one joins them and returns the result, which `complete` makes final; the others return None.
    """
    folder = out / PARTS
    if processes.main:
        _check_plan(folder, plan)
    agree(plan)
    numbers = range(-(-len(source) // PART))
    todo = [n for n in numbers if n % processes.world == processes.rank and not _part(folder, n).exists()]
    _make_parts(encode, source, view, folder, todo, machine, tell)
    agree("parts")
    if not processes.main:
        return None
    return _join([_part(folder, n) for n in numbers], folder / FEATURES)


def complete(out: Path) -> None:
    """Put the features file in its place, as the last act: until then, the same command begins from the parts."""
    os.replace(out / PARTS / FEATURES, out / FEATURES)
    shutil.rmtree(out / PARTS)


def _check_plan(folder: Path, plan: dict[str, Any]) -> None:
    """Begin the folder of parts, or go on with it."""
    text = json.dumps(plan, indent=1, sort_keys=True, default=str)
    file = folder / PLAN
    if file.exists() and file.read_text() != text:
        before, now = json.loads(file.read_text()), json.loads(text)
        changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        raise ValueError(
            f"-o must be a new folder, got {folder.parent}, which holds parts of other features ({', '.join(changed)})"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(file, text)


def _part(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.npz"


def _make_parts(
    encode: Callable[[Tensor], Tensor],
    source: Source,
    view: ViewSpec,
    folder: Path,
    todo: list[int],
    machine: Machine,
    tell: Callable[[str], None],
) -> None:
    """Compute the parts `todo` in one pass over their images, so that reading ahead never stops between parts."""
    whole = np.arange(len(source))
    mine = np.concatenate([whole[:0], *(whole[n * PART : (n + 1) * PART] for n in todo)])
    faults: dict[int, str] = {}
    batches = evaluation_batches(
        Subset(source, mine), view, machine.batch_size, device=machine.device, workers=machine.workers, faults=faults
    )
    rows: list[tuple[Tensor, Tensor]] = []
    waiting = iter(todo)
    current = next(waiting, None)
    for views, index, _ in batches:
        rows.append((encode(views), torch.from_numpy(mine)[index]))
        # The first row beyond a part shows that it is complete. Features stay on the device until then.
        while current is not None and int(rows[-1][1][-1]) >= (current + 1) * PART:
            rows = _write_part(folder, current, rows, faults, mine)
            tell(f"{int(rows[0][1][0]):,} of {len(source):,} images")
            current = next(waiting, None)
    while current is not None:
        rows = _write_part(folder, current, rows, faults, mine)
        current = next(waiting, None)


def _write_part(
    folder: Path, number: int, rows: list[tuple[Tensor, Tensor]], faults: dict[int, str], mine: NDArray[np.int64]
) -> list[tuple[Tensor, Tensor]]:
    """Write the rows of part `number`, and return the others. The file appears when it is complete."""
    features, index = torch.empty(0, 0), torch.empty(0, dtype=torch.int64)
    if rows:
        features, index = (torch.cat(column) for column in zip(*rows, strict=True))
    inside = index // PART == number
    unread = {int(mine[i]): text for i, text in list(faults.items()) if int(mine[i]) // PART == number}
    with whole(_part(folder, number)) as partial, partial.open("wb") as file:
        np.savez(
            file,
            features=features[inside.to(features.device)].float().cpu().numpy(),
            index=index[inside].numpy(),
            unread=np.array(list(unread), np.int64),
            reasons=np.array(list(unread.values()), np.str_),
        )
    rest = index // PART > number
    return [(features[rest.to(features.device)], index[rest])] if bool(rest.any()) else []


def _join(parts: list[Path], file: Path) -> Embedded:
    """One features file of all parts, in order."""
    index, faults, width = [np.zeros(0, np.int64)], dict[int, str](), 0
    for part in parts:
        with np.load(part) as held:
            index.append(held["index"])
            faults.update(zip(held["unread"].tolist(), held["reasons"].tolist(), strict=True))
            width = max(width, held["features"].shape[1])
    count = sum(map(len, index))
    if not count:
        reason = f"such as {next(iter(faults.values()))}" if faults else "it is empty"
        raise ValueError(f"SOURCE must hold an image that can be read: {reason}")
    joined = np.lib.format.open_memmap(file, "w+", np.float32, (count, width))
    _reserve(file)
    start = 0
    for part in parts:
        with np.load(part) as held:
            rows = held["features"]
            joined[start : start + len(rows)] = rows
            start += len(rows)
    return Embedded(joined, np.concatenate(index), faults)


def _reserve(file: Path) -> None:
    """Take the disk space of a file that is mapped: writing to it where there is none would kill the process."""
    with file.open("r+b") as opened:
        try:
            os.posix_fallocate(opened.fileno(), 0, os.fstat(opened.fileno()).st_size)
        except OSError as error:
            file.unlink()
            raise OSError(error.errno, error.strerror, str(file)) from error


def blocks(rows: int) -> Iterator[slice]:
    """Slices of at most BLOCK rows."""
    return (slice(start, min(start + BLOCK, rows)) for start in range(0, rows, BLOCK))


def whiten(features: NDArray[np.float32]) -> None:
    """Whiten rows (N, D) in place by ZCA: zero mean, identity covariance, in the original directions.

    Directions with less than SMALLEST of the largest variance are set to zero. Computed in float64.
    """
    count, width = features.shape
    mean, moment = np.zeros(width), np.zeros((width, width))
    for part in blocks(count):
        mean += features[part].sum(0, dtype=np.float64) / count
    for part in blocks(count):
        centered = features[part] - mean
        moment += centered.T @ centered / count
    values, vectors = np.linalg.eigh(moment)
    kept = values > SMALLEST * values[-1]
    scale = np.zeros_like(values)
    scale[kept] = values[kept] ** -0.5
    matrix = (vectors * scale) @ vectors.T
    for part in blocks(count):
        features[part] = (features[part] - mean) @ matrix


def unit_length(features: NDArray[np.float32]) -> None:
    """Scale rows (N, D) to length 1 in place; a row of zeros stays."""
    for part in blocks(len(features)):
        length = np.linalg.norm(features[part], axis=1, keepdims=True)
        features[part] /= np.where(length > 0, length, 1)
