"""A run folder from elsewhere brings no code with it: parts outside fastrdm load when they are named, or trusted."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastrdm.commands import analyze, evaluate, export, plan
from fastrdm.config import run_config, tree
from fastrdm.report import page
from fastrdm.runtime import checkpoint
from fastrdm.trainer import Trainer

SMALL = [
    *("encoder.name=resnet_small", "encoder.width=4", "encoder.stem=cifar", "method.projector={hidden: 16, out: 12}"),
    *("loader.batch_size=16", "loader.subset=40", "loader.views.*.size=8", "train.length=1st", "optim.warmup=0st"),
    *("evaluate.baselines=false", "log.report=false"),
]
MARK = "EXECUTED"
STRANGER = f"""
from pathlib import Path
Path("{MARK}").touch()
"""
# where a stored configuration can name a part
PLACES: dict[str, dict[str, Any]] = {
    "preset": {"preset": "stranger:P"},
    "loader.source": {"loader": {"source": "stranger:P"}},
    "encoder.name": {"encoder": {"name": "stranger:P"}},
    "method.online.0.name": {"method": {"online": [{"name": "stranger:P"}]}},
    "method.target.0": {"method": {"target": ["stranger:P"]}},
    "method.target.0.kind": {"method": {"target": [{"name": "filter", "kind": "stranger:P"}]}},
    "method.alignment.name": {"method": {"alignment": {"name": "stranger:P"}}},
}
COMMANDS: dict[str, Callable[[Path], list[str]]] = {
    "eval": lambda run: [str(run), "--method", "knn"],
    "export": lambda run: [str(run), "--layout", "safetensors", "--out", "out.safetensors"],
    "analyze": lambda run: [str(run), "--images", "32", "--replicates", "10"],
    "plan": lambda run: [str(run / "config.yaml")],
}
MAINS = {"eval": evaluate.main, "export": export.main, "analyze": analyze.main, "plan": plan.main}


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    assert Trainer(run_config.load([*SMALL, f"run={run}"])).train()
    return run


@pytest.fixture
def run(honest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of a run, in a working folder that also holds the module `stranger`."""
    shutil.copytree(honest, tmp_path / "run")
    (tmp_path / "stranger.py").write_text(STRANGER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path / "run"
    sys.modules.pop("stranger", None)


def rewrite(run: Path, change: dict[str, Any]) -> None:
    """Lay `change` over the configuration in every file of a run that holds one, hashes made right."""
    (path,) = checkpoint.existing(run)
    meta = json.loads((path / checkpoint.META).read_text())
    meta.pop("sha256")
    meta["config"] = tree.merge(meta["config"], change)
    (path / checkpoint.META).write_text(json.dumps({**meta, "sha256": checkpoint._digest(meta)}))
    (run / "config.yaml").write_text(yaml.safe_dump(meta["config"]))


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("place", PLACES)
def test_a_stored_part_is_not_loaded(run: Path, command: str, place: str) -> None:
    rewrite(run, PLACES[place])
    with pytest.raises(ValueError) as refused:
        MAINS[command](COMMANDS[command](run))
    (path,) = checkpoint.existing(run)
    file = run / "config.yaml" if command == "plan" else path / checkpoint.META
    told = f"{place} 'stranger:P' of {file} is code from outside fastrdm: --trust (in Python, trust=True) loads it"
    assert str(refused.value) == told
    assert not Path(MARK).exists() and "stranger" not in sys.modules


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("place", ["method.online.0.name", "loader.source"])
def test_a_trusted_part_is(run: Path, command: str, place: str) -> None:
    rewrite(run, PLACES[place])
    if (command, place) == ("export", "loader.source"):
        assert export.main([*COMMANDS[command](run), "--trust"]) == 0  # which opens no images
        return
    with pytest.raises(ValueError, match="'stranger:P' cannot be loaded: module 'stranger' has no attribute 'P'"):
        MAINS[command]([*COMMANDS[command](run), "--trust"])
    assert Path(MARK).exists()


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("eval", ["--source", "stranger:P"]),
        ("analyze", ["loader.source=stranger:P"]),
        ("plan", ["loader.source=stranger:P"]),
    ],
)
def test_a_part_that_the_user_names_is_loaded(run: Path, command: str, named: list[str]) -> None:
    rewrite(run, PLACES["loader.source"])
    with pytest.raises(ValueError, match=r"loader\.source 'stranger:P' cannot be loaded"):
        MAINS[command]([*COMMANDS[command](run), *named])
    assert Path(MARK).exists()


def test_a_stored_source_is_not_needed_where_another_is_named(run: Path) -> None:
    rewrite(run, {"loader": {"source": "os:execl"}})
    assert evaluate.main([str(run), "--method", "knn", "--source", "digits"]) == 0
    assert analyze.main([str(run), "--images", "32", "--replicates", "10", "loader.source=digits"]) == 0


@pytest.mark.parametrize("name", ["os:execl", "os:system", "builtins:exec", "subprocess:Popen"])
def test_what_is_no_part_is_refused_before_it_is_called(run: Path, name: str) -> None:
    program = run / "program"
    program.write_text(f"#!/bin/sh\ntouch {MARK}\n")
    program.chmod(0o755)
    rewrite(run, {"loader": {"source": name, "root": str(program)}})
    with pytest.raises(ValueError, match=rf"loader\.source '{name}' must be a subclass of fastrdm\.Source"):
        evaluate.main([str(run), "--method", "knn", "--trust"])
    assert not Path(MARK).exists()


@pytest.mark.parametrize("place", PLACES)
def test_a_report_loads_nothing(run: Path, place: str) -> None:
    rewrite(run, PLACES[place])
    assert page.write([run]).exists()
    assert not Path(MARK).exists() and "stranger" not in sys.modules


def test_texts_that_name_no_part_are_free(run: Path) -> None:
    rewrite(run, {"run": "disk:runs", "loader": {"root": "disk:images"}})
    assert export.main(COMMANDS["export"](run)) == 0
