"""Checkpoints: bit for bit, complete or not there at all, refused when damaged, foreign or of another model."""

import errno
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fastrdm.runtime import checkpoint
from fastrdm.runtime.checkpoint import META, STATE, WEIGHTS, CheckpointError

State = dict[str, Any]


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2).double())
    return net.to(memory_format=torch.channels_last)


def some_state(net: nn.Module) -> State:
    optimizer = torch.optim.AdamW([{"params": net.parameters(), "lr": torch.tensor(0.1), "name": "network"}])
    sum(p.double().square().sum() for p in net.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    return {"optimizer": optimizer.state_dict(), "random": [torch.get_rng_state()], "best": {"knn": 0.5, "step": None}}


def save(run: Path, step: int = 7, seed: int = 0) -> Path:
    net = model(seed)
    return checkpoint.save(run, step, net.state_dict(), some_state(net), {"metrics": {"loss": 0.1}, "config": {"a": 1}})


def assert_same(a: object, b: object) -> None:
    assert type(a) is type(b)
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict) and isinstance(b, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list) and isinstance(b, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def readable(run: Path) -> list[int]:
    """Steps of the checkpoints that can be read, the newest first."""
    return [found.meta["step"] for found in checkpoint.newest(run) if not isinstance(found, CheckpointError)]


def test_round_trip_is_bit_for_bit(tmp_path: Path) -> None:
    net = model()
    state = some_state(net)
    path = checkpoint.save(tmp_path, 12, net.state_dict(), state, {"metrics": {"knn": 0.1}, "pair": (1, 2)})
    assert path == tmp_path / "checkpoints" / "step-00000012"
    found = checkpoint.read(path)
    assert_same(found.state, state)
    expected = {"format": "fastrdm-1", "step": 12, "metrics": {"knn": 0.1}, "pair": [1, 2]}
    assert {k: v for k, v in found.meta.items() if k != "files"} == expected

    other = model(seed=1)
    checkpoint.load_weights(other, found)
    assert_same(dict(other.state_dict()), dict(net.state_dict()))
    convolution = other.state_dict()["0.weight"]
    assert convolution.is_contiguous(memory_format=torch.channels_last)
    assert not convolution.is_contiguous()


def test_files_open_without_us(tmp_path: Path) -> None:
    path = save(tmp_path)
    assert sorted(f.name for f in path.iterdir()) == sorted([WEIGHTS, STATE, META])
    assert load_file(path / WEIGHTS).keys() == model().state_dict().keys()
    assert torch.load(path / STATE, weights_only=True)["best"] == {"knn": 0.5, "step": None}
    assert json.loads((path / META).read_text())["step"] == 7


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, seed=1)
    path = save(tmp_path, seed=2)
    assert_same(
        checkpoint.read(path).weights["0.weight"], load_file(save(tmp_path / "b", seed=2) / WEIGHTS)["0.weight"]
    )
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000007"]


@pytest.mark.parametrize("name", [WEIGHTS, STATE, META])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.999])
def test_a_flipped_bit_is_found(tmp_path: Path, name: str, share: float) -> None:
    path = save(tmp_path)
    file = path / name
    content = bytearray(file.read_bytes())
    content[int(share * len(content))] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{path} is .*{name}"):
        checkpoint.read(path)


def test_a_changed_figure_is_found(tmp_path: Path) -> None:
    path = save(tmp_path)
    text = (path / META).read_text()
    assert '"step": 7' in text
    (path / META).write_text(text.replace('"step": 7', '"step": 8'))
    with pytest.raises(CheckpointError, match=r"is damaged: meta.json is not what was written$"):
        checkpoint.read(path)


@pytest.mark.parametrize("name", [WEIGHTS, STATE, META])
def test_a_short_or_missing_file_is_found(tmp_path: Path, name: str) -> None:
    path = save(tmp_path)
    file = path / name
    for length in (file.stat().st_size - 1, 0):
        os.truncate(file, length)
        with pytest.raises(CheckpointError, match=f"{path} is .*{name}"):
            checkpoint.read(path)
    file.unlink()
    with pytest.raises(CheckpointError, match=f"{path} is (damaged|no complete checkpoint): {name}"):
        checkpoint.read(path)


@pytest.mark.parametrize("meta", ['{"format": "other-2"}', "[1, 2]", "3", "null", "{}"])
def test_a_foreign_format_is_refused(tmp_path: Path, meta: str) -> None:
    path = save(tmp_path)
    (path / META).write_text(meta)
    with pytest.raises(CheckpointError, match=f"^{path} is not of format fastrdm-1$"):
        checkpoint.read(path)


@pytest.mark.parametrize("meta", [b"", b"{", b"\xff\xfe\x00"])
def test_meta_that_is_no_json_is_refused(tmp_path: Path, meta: bytes) -> None:
    path = save(tmp_path)
    (path / META).write_bytes(meta)
    with pytest.raises(CheckpointError, match=f"^{path} is no complete checkpoint: meta.json: "):
        checkpoint.read(path)


class _Malicious:
    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.flag),)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    flag = tmp_path / "ran"
    state = {"optimizer": _Malicious(flag)}
    path = checkpoint.save(tmp_path, 1, model().state_dict(), state, {})  # its hashes are right
    with pytest.raises(CheckpointError, match=f"^{path} cannot be loaded: Weights only load failed"):
        checkpoint.read(path)
    assert not flag.exists()
    pickle.loads(pickle.dumps(_Malicious(flag)))
    assert flag.exists()  # and it would have


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3)), "7 unknown (1.bias, 1.num_batches_tracked, 1.running_mean)"),
        (nn.Linear(2, 2), "2 missing (bias, weight); 9 unknown (0.bias, 0.weight, 1.bias)"),
        (nn.Sequential(*[*model()][:3], nn.Linear(5, 2)), "1 of another shape (3.weight)"),
    ],
)
def test_weights_of_another_model_are_refused(tmp_path: Path, other: nn.Module, message: str) -> None:
    found = checkpoint.read(save(tmp_path))
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(CheckpointError) as refused:
        checkpoint.load_weights(other, found)
    assert str(refused.value) == f"{found.path} belongs to another model: {message}"
    assert_same(dict(other.state_dict()), before)


def _full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _refuse(kind: type[Exception]) -> Callable[..., None]:
    def raising(*_: object, **__: object) -> None:
        raise kind("No space left on device")

    return raising


@pytest.mark.parametrize(
    ("target", "failing"),
    [
        ("fastrdm.runtime.checkpoint.save_file", _refuse(SafetensorError)),
        ("fastrdm.runtime.checkpoint.save_file", _full),
        ("torch.save", _refuse(RuntimeError)),
        ("torch.save", _full),
        ("pathlib.Path.write_text", _full),
        ("os.fsync", _full),
        ("pathlib.Path.rename", _full),
    ],
)
def test_a_full_disk_leaves_the_older_checkpoint(
    tmp_path: Path, target: str, failing: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, step=1)
    with monkeypatch.context() as patch:
        patch.setattr(target, failing)
        with pytest.raises(CheckpointError, match=r"step-00000002 could not be written: .*No space left on device"):
            save(tmp_path, step=2)
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000001"]
    assert readable(tmp_path) == [1]
    save(tmp_path, step=2)
    assert readable(tmp_path) == [2, 1]


LIMITED = """
import resource, sys
from pathlib import Path
import torch
from fastrdm.runtime import checkpoint
for name, sizes in {"weights": (50_000, 1, 1), "state": (1, 50_000, 1), "meta": (1, 1, 200_000)}.items():
    run, weights, state = Path(sys.argv[1], name), {"w": torch.ones(sizes[0])}, {"s": torch.ones(sizes[1])}
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    checkpoint.save(run, 1, weights, state, {})
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    try:
        checkpoint.save(run, 2, weights, state, {"note": "x" * sizes[2]})
    except checkpoint.CheckpointError as error:
        print(error)
"""


def test_files_that_the_system_cuts_short(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    runs = [tmp_path / name for name in ("weights", "state", "meta")]
    for run, line in zip(runs, done.stdout.splitlines(), strict=True):
        assert line.startswith(f"{run}/checkpoints/step-00000002 could not be written: ")
        assert os.listdir(run / "checkpoints") == ["step-00000001"]
        assert readable(run) == [1]


class _Killed(BaseException):
    """Ends the process at once: nothing may catch it."""


@pytest.mark.parametrize(
    "target", ["fastrdm.runtime.checkpoint.save_file", "torch.save", "os.fsync", "pathlib.Path.rename"]
)
def test_a_kill_while_saving_leaves_the_older_checkpoint(
    tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*_: object) -> None:
        raise _Killed

    save(tmp_path, step=1)
    with monkeypatch.context() as patch, pytest.raises(_Killed):
        patch.setattr(target, kill)
        save(tmp_path, step=2)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == [".partial-step-00000002", "step-00000001"]
    assert readable(tmp_path) == [1]
    save(tmp_path, step=2)  # over what was left
    assert readable(tmp_path) == [2, 1]


def test_left_overs_are_cleared(tmp_path: Path) -> None:
    checkpoint.clear_partial(tmp_path)  # nothing there yet
    save(tmp_path, step=1)
    shutil.copytree(checkpoint.folder(tmp_path, 1), tmp_path / "checkpoints" / ".partial-step-00000002")
    assert checkpoint.existing(tmp_path) == [checkpoint.folder(tmp_path, 1)]
    checkpoint.clear_partial(tmp_path)
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000001"]


def test_the_newest_come_first_with_reasons_for_the_damaged(tmp_path: Path) -> None:
    assert list(checkpoint.newest(tmp_path)) == []
    for step in (9, 10, 100):
        save(tmp_path, step)
    (checkpoint.folder(tmp_path, 100) / STATE).write_bytes(b"")
    first, *rest = checkpoint.newest(tmp_path)
    assert isinstance(first, CheckpointError)
    assert str(first) == f"{checkpoint.folder(tmp_path, 100)} is damaged: state.pt is not what was written"
    assert [found.meta["step"] for found in rest if not isinstance(found, CheckpointError)] == [10, 9]


@pytest.mark.parametrize(
    ("keep", "best", "left"), [(2, None, [4, 3]), (2, 1, [4, 3, 1]), (1, 4, [4]), (9, 2, [4, 3, 2, 1])]
)
def test_pruning(tmp_path: Path, keep: int, best: int | None, left: list[int]) -> None:
    for step in (1, 2, 3, 4):
        checkpoint.folder(tmp_path, step).mkdir(parents=True)
    checkpoint.prune(tmp_path, keep, checkpoint.folder(tmp_path, best) if best else None)
    assert checkpoint.existing(tmp_path) == [checkpoint.folder(tmp_path, step) for step in left]


FIELDS: dict[str, tuple[str, Any]] = {
    "step that is text": ("step", "12"),
    "step below 0": ("step", -1),
    "step beyond any run": ("step", 10**30),
    "no step": ("step", None),
    "files that are a list": ("files", [1]),
    "files elsewhere": ("files", {"../../secret": {"bytes": 1, "sha256": "0"}}),
    "files without sizes": ("files", {WEIGHTS: {}, STATE: {}}),
    "files that are numbers": ("files", {WEIGHTS: 1, STATE: 2}),
    "config that is text": ("config", "x"),
    "metrics that are a list": ("metrics", []),
    "versions that are text": ("versions", "x"),
}


@pytest.mark.parametrize("what", FIELDS)
def test_a_resealed_meta_with_absurd_fields_is_refused_by_name(what: str, tmp_path: Path) -> None:
    path = save(tmp_path)
    meta = json.loads((path / META).read_text())
    del meta["sha256"]
    key, value = FIELDS[what]
    meta[key] = value
    (path / META).write_text(json.dumps({**meta, "sha256": checkpoint._digest(meta)}))
    with pytest.raises(CheckpointError, match=rf"^{path} is damaged: meta\.json: {key} is ") as told:
        checkpoint.read(path)
    assert len(str(told.value)) < 200 + len(str(path))


def resealed(path: Path, state: bytes) -> None:
    """Another state.pt, with a meta.json that says it is right."""
    (path / STATE).write_bytes(state)
    meta = json.loads((path / META).read_text())
    del meta["sha256"]
    meta["files"][STATE] = {"bytes": len(state), "sha256": checkpoint._sha256(path / STATE)}
    (path / META).write_text(json.dumps({**meta, "sha256": checkpoint._digest(meta)}))


def test_resealed_states_of_any_bytes_are_read_or_refused(tmp_path: Path) -> None:
    """Bits of the pickle inside are flipped: sizes, offsets, names of classes and instructions."""
    path = save(tmp_path)
    with zipfile.ZipFile(path / STATE) as archive:
        parts = {item: archive.read(item) for item in archive.infolist()}
    (pickled,) = (item for item in parts if item.filename.endswith("data.pkl"))
    whole, random, refused = parts[pickled], np.random.default_rng(0), 0
    for _ in range(60):
        data = bytearray(whole)
        for place in random.integers(len(data), size=random.integers(1, 4)):
            data[place] ^= 1 << int(random.integers(8))
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as archive:
            for item, part in (parts | {pickled: bytes(data)}).items():
                archive.writestr(item, part)
        resealed(path, content.getvalue())
        try:
            checkpoint.read(path)
        except CheckpointError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 20
