"""`fastrdm analyze`: from a finished run to its metrics."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastrdm.analysis.spectral_analysis import collect
from fastrdm.commands import analyze
from fastrdm.config import run_config
from fastrdm.runtime import checkpoint
from fastrdm.trainer import Trainer
from fastrdm.training import periodic_analysis

SETTINGS: dict[str, Any] = {
    "preset": "dino",
    "train": {"length": "6st"},
    "method": {
        "projector": {"hidden": 16, "out": 8},
        "online": [{"name": "prototypes", "count": 12, "freeze": "1st"}],
        "target": [{"name": "prototypes", "count": 12, "freeze": "1st"}, {"name": "center_sharpen", "warmup": "100%"}],
    },
    "encoder": {"name": "resnet_small", "stem": "cifar", "width": 4},
    "loader": {"source": "digits", "batch_size": 64, "views": {"*": {"size": 8}}},
    "optim": {"warmup": "0st"},
    "evaluate": {"baselines": False},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    run = tmp_path_factory.mktemp("theory") / "run"
    trainer = Trainer(run_config.resolve(SETTINGS, {"run": str(run)}))
    trainer.train()
    return trainer


def test_the_model_is_that_of_the_last_step(trained: Trainer) -> None:
    """Weights, queue and center from the checkpoint; temperature and the like from the step."""
    found = checkpoint.read(checkpoint.existing(trained.state.folder)[0])
    method, epoch = analyze.trained(found, trained.settings)
    assert epoch == 5 // 28
    expected = dict(trained.method.named_buffers()) | dict(trained.method.named_parameters())
    for key, x in (dict(method.named_buffers()) | dict(method.named_parameters())).items():
        assert torch.equal(x, expected[key]), key
    views = [next(iter(trained.loader)).views]
    one, other = (collect(m, views, batch_size=64)["outputs"] for m in (method, trained.method))
    assert torch.equal(one.online, other.online) and torch.equal(one.target, other.target)


def test_figures_are_written_printed_and_the_same_again(trained: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained.state.folder
    assert analyze.main([str(run), "--images", "640", "--replicates", "10"]) == 0
    first = json.loads((run / "analysis.json").read_text())
    assert first["metrics"]["images"] == 640
    assert first["metrics"]["dimension"] == 12
    assert first["metrics"]["scores/dimension"] == 8
    said = capsys.readouterr().out
    assert f"{run}\n  640 images in 12 dimensions\n" in said
    assert "scores before softmax:" in said
    assert analyze.main(["--replicates", "10", str(run), "--images", "640", "loader.workers=1"]) == 0
    assert json.loads((run / "analysis.json").read_text()) == first


def test_a_run_can_be_measured_while_it_trains(trained: Trainer) -> None:
    """The same metrics as from its checkpoint."""
    t = trained
    live = periodic_analysis.analyze_method(t.method, t.settings, t.source, 0, t.processes, images=128, replicates=10)
    assert live == analyze.analyze_run(trained.state.folder, images=128, replicates=10)


def test_views_are_none_of_training(trained: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def keep(*_: Any, seed: int, **named: Any) -> Any:
        seen.append(seed)
        raise ValueError("enough")

    monkeypatch.setattr(periodic_analysis, "build_loader", keep)
    with pytest.raises(ValueError, match="enough"):
        analyze.analyze_run(trained.state.folder)
    assert seen == [trained.settings.train.seed + 2**32]


def test_bad_input_is_refused(trained: Trainer, tmp_path: Path) -> None:
    run = str(trained.state.folder)
    refused = {
        "RUN must be a run folder with checkpoints": [str(tmp_path)],
        "--replicates must be at least 10, got 3": [run, "--replicates", "3"],
        "--images must be above 0, got 0": [run, "--images", "0"],
        "--images must be at least the 12 dimensions, and 10 times that .*, got 5": [run, "--images", "5"],
        "--images must be at most the 1408 of digits in batches of 64, got 1409": [run, "--images", "1409"],
        "unknown configuration key 'loader.rot'": [run, "loader.rot=x"],
    }
    for message, arguments in refused.items():
        with pytest.raises(ValueError, match=message):
            analyze.main(arguments)
    copy = shutil.copytree(run, tmp_path / "copy")
    with pytest.raises(checkpoint.CheckpointError, match="another model"):
        analyze.main([str(copy), "method.projector.out=9"])
