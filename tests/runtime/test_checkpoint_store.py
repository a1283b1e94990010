"""Checkpoints on a store: complete or not there at all, the run goes on elsewhere bit for bit, failures are told."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fsspec", reason="needs fsspec")

import fsspec

from fastrdm.config import run_config
from fastrdm.loaders.sources import store
from fastrdm.loaders.sources.store import Store
from fastrdm.runtime import checkpoint
from fastrdm.runtime.checkpoint import META, STATE, WEIGHTS, CheckpointError
from fastrdm.runtime.checkpoint_store import CheckpointStore
from fastrdm.trainer import Trainer

URL = "memory://bucket/run"
SMALL = ["encoder.width=4", "method.projector.hidden=16", "method.projector.out=16", "loader.batch_size=16"]
SMALL += ["loader.subset=64", "monitor.every=0st", "log.report=false", "evaluate.every=0st", "evaluate.baselines=false"]
SMALL += ["optim.warmup=1st", f"checkpoint.store={URL}", "checkpoint.every=2st", "train.length=6st"]


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The store that lies in memory, with nothing in it; failing calls are tried again at once."""
    monkeypatch.setattr(store, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(store, "LONGEST_WAIT", 0.001)
    fs = fsspec.filesystem("memory")
    if fs.exists("/bucket"):
        fs.rm("/bucket", recursive=True)
    yield fs


def trainer(folder: Path, *more: str) -> Trainer:
    return Trainer(run_config.load([*SMALL, f"run={folder}", *more]))


def steps(fs: Any) -> list[str]:
    """Steps in the store that are complete, and of each other thing its path."""
    found = fs.find("/bucket/run")
    names = {Path(path).parent.name for path in found}
    whole = {n for n in names if {Path(p).name for p in found if f"/{n}/" in p} == {META, STATE, WEIGHTS}}
    return sorted(whole) + sorted(path for path in found if Path(path).parent.name not in whole)


def weights(folder: Path, step: int = 6) -> dict[str, torch.Tensor]:
    return checkpoint.read(checkpoint.folder(folder, step)).weights


def test_a_run_goes_on_elsewhere_bit_for_bit(
    tmp_path: Path, empty: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = trainer(tmp_path / "whole", "checkpoint.store=null")
    assert whole.train()
    first = trainer(tmp_path / "first")
    take = first.train_step

    def until_the_third(batch: Any) -> Any:
        if first.step == 3:
            first.stop.ask()
        return take(batch)

    monkeypatch.setattr(first, "train_step", until_the_third)
    assert not first.train()
    assert steps(empty) == ["step-00000002", "step-00000004"]
    shutil.rmtree(tmp_path / "first")  # with its machine
    second = trainer(tmp_path / "second")
    capsys.readouterr()
    assert second.train()
    assert f"fetched from {URL}/step-00000004" in capsys.readouterr().out
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "second")
    assert all(torch.equal(expected[name], found[name]) for name in expected) and expected.keys() == found.keys()
    assert steps(empty) == ["step-00000004", "step-00000006"]  # as checkpoint.keep says
    again = trainer(tmp_path / "second")
    assert again.train() and again.step == 6
    assert "fetched" not in capsys.readouterr().out  # its own checkpoint is as new


def save(run: Path, step: int) -> Path:
    net = torch.nn.Linear(2, 2)
    meta = {"metrics": {}, "config": {"a": step}, "versions": {}}
    return checkpoint.save(run, step, net.state_dict(), {"step": step}, meta)


def test_a_copy_that_is_cut_short_is_no_checkpoint(tmp_path: Path, empty: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = CheckpointStore(URL)
    copies.start(save(tmp_path / "run", 1), 2, None)
    assert copies.finish() is None
    put = empty.put_file

    def broken(local: str, remote: str, **how: Any) -> None:
        if remote.endswith(META):
            raise OSError("the line is dead")
        put(local, remote, **how)

    monkeypatch.setattr(type(empty), "put_file", lambda _, local, remote, **how: broken(local, remote, **how))
    copies.start(save(tmp_path / "run", 2), 2, None)
    failed = copies.finish()
    assert isinstance(failed, CheckpointError)
    assert "step-00000002/meta.json cannot be reached after 8 attempts: the line is dead" in str(failed)
    assert copies.fetch(tmp_path / "other", lambda meta: None) == [f"fetched from {URL}/step-00000001"]
    assert [path.name for path in checkpoint.existing(tmp_path / "other")] == ["step-00000001"]
    assert copies.newest_settings() == {"a": 1}


def test_a_step_that_is_written_anew_is_never_a_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of one size, as two runs of one model have them: a broken second copy leaves no checkpoint of both."""
    copies = CheckpointStore(URL)
    copies.start(save(tmp_path / "one", 3), 2, None)
    assert copies.finish() is None
    upload = Store.upload

    def weights_alone(self: Store, file: Path, name: str, replace: bool = False) -> None:
        upload(self, file, name, replace)
        if file.name == WEIGHTS:
            raise OSError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "upload", weights_alone)
        copies.start(save(tmp_path / "two", 3), 2, None)
        assert copies.finish() is not None
    assert copies.fetch(tmp_path / "fetched", lambda meta: None) == []
    copies.start(save(tmp_path / "three", 3), 2, None)
    assert copies.finish() is None
    copies.fetch(tmp_path / "fetched", lambda meta: None)
    expected, found = (checkpoint.read(checkpoint.folder(tmp_path / n, 3)).weights for n in ("three", "fetched"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_damaged_checkpoint_is_told_and_the_one_before_it_used(tmp_path: Path, empty: Any) -> None:
    copies = CheckpointStore(URL)
    for step in (1, 2):
        copies.start(save(tmp_path / "run", step), 2, None)
        assert copies.finish() is None
    path = f"/bucket/run/step-00000002/{WEIGHTS}"
    data = empty.cat_file(path)
    empty.pipe_file(path, data[:-1] + bytes([data[-1] ^ 1]))
    damaged, used = copies.fetch(tmp_path / "other", lambda meta: None)
    assert damaged.startswith(f"checkpoint not used: {URL}/step-00000002: ")
    assert f"{WEIGHTS} is not what was written" in damaged
    assert used == f"fetched from {URL}/step-00000001"
    assert not list((tmp_path / "other" / "checkpoints").glob(".partial-*"))


def test_names_in_a_description_stay_in_the_folder(tmp_path: Path, empty: Any) -> None:
    told = {"step": 9, "files": {"../../outside": {"bytes": 1, "sha256": ""}}}
    empty.pipe_file(f"/bucket/run/step-00000009/{META}", json.dumps(told).encode())
    (line,) = CheckpointStore(URL).fetch(tmp_path / "run", lambda meta: None)
    assert "names the file '../../outside'" in line
    assert not (tmp_path / "outside").exists()


def test_the_best_one_is_kept(tmp_path: Path, empty: Any) -> None:
    copies = CheckpointStore(URL)
    best = checkpoint.folder(tmp_path / "run", 1)
    for step in (1, 2, 3, 4):
        copies.start(save(tmp_path / "run", step), 2, best)
        assert copies.finish() is None
    assert steps(empty) == ["step-00000001", "step-00000003", "step-00000004"]


def test_another_run_in_the_store_is_refused(tmp_path: Path) -> None:
    assert trainer(tmp_path / "one").train()
    other = trainer(tmp_path / "two", "optim.lr=0.3")
    with pytest.raises(ValueError, match=rf"{URL} holds a run of another configuration .*choose another checkpoint.st"):
        other.train()
    assert not checkpoint.existing(tmp_path / "two")


def test_a_store_that_fails_costs_copies_and_no_checkpoint(
    tmp_path: Path, empty: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trainer(tmp_path / "run")

    def dead(*_: Any, **__: Any) -> None:
        raise OSError("no space in the bucket")

    monkeypatch.setattr(type(empty), "put_file", dead)
    with pytest.raises(CheckpointError, match=r"was not copied to checkpoint\.store: .* no space in the bucket"):
        run.train()  # the last copy must succeed
    assert "training goes on, but a checkpoint was not copied" in capsys.readouterr().out
    assert [path.name for path in checkpoint.existing(tmp_path / "run")] == ["step-00000006", "step-00000004"]


def test_a_run_is_no_url() -> None:
    with pytest.raises(
        ValueError, match=r"run must be a folder of this machine; checkpoint\.store=URL copies its checkpoints"
    ):
        run_config.load([*SMALL, "run=s3://bucket/run"])


def test_an_unknown_protocol_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint\.store=nowhere://x "):
        trainer(tmp_path / "run", "checkpoint.store=nowhere://x")
