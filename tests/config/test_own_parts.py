"""Parts of one's own: found in the working folder, checked before they are called, their settings checked as ours."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastrdm import cli, parts
from fastrdm.config import run_config

ROOT = Path(__file__).parents[2]
PAIRS = {"weight": 1.0, "targets": "pairs", "directions": "mean"}
MODULE = """
import dataclasses
import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from fastrdm.methods.losses import AlignmentConfig, Loss
from fastrdm.methods.transform import Transform, TransformConfig
from fastrdm.models.encoders import Encoder, EncoderOptions
from fastrdm.schema import STRICT, Duration, require


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ScaleConfig(TransformConfig):
    factor: float = 2.0
    until: Duration = "10ep"

    def __post_init__(self):
        require(self.factor > 0, "factor", "above 0", self.factor)

class Scale(Transform):
    def __init__(self, config: ScaleConfig, context):
        super().__init__(config, context)

    def forward(self, x, branch):
        return x

class Bare(Transform):
    def forward(self, x, branch):
        return x

class Loose(Transform):
    def __init__(self, config: "LooseConfig", context): ...

@dataclasses.dataclass
class LooseConfig:
    factor: float = 1.0

@dataclass(frozen=True, kw_only=True, config=STRICT)
class NetOptions(EncoderOptions):
    depth: int = 2

class Net(Encoder):
    def __init__(self, config: NetOptions):
        super().__init__()
        self.features, self.body = 8, nn.Conv2d(3, 8, config.depth)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        return self.norm(self.body(x)).mean((2, 3))

def net(config: NetOptions) -> Encoder:
    return Net(config)

def lie(config: NetOptions) -> Encoder:
    return nn.Identity()

@dataclass(frozen=True, kw_only=True, config=STRICT)
class SquareConfig(AlignmentConfig):
    slope: float = 1.0

def _square(online: Tensor, target: Tensor, config: SquareConfig) -> Tensor:
    return config.slope * (online - target).square().mean()

square = Loss(_square)

def root(s: Tensor) -> Tensor:
    return s ** 0.5

def untold(s):
    return s

PRESET = {"method": {"online": ["own:Scale"]}}

def preset() -> dict[str, object]:
    return PRESET
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "own.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("x = 1\ny = x / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("own", None)


REFUSED = {
    "method.online=[{name: own:Scale, facto: 1}]": "unknown configuration key 'method.online.0.facto': did you mean "
    "'method.online.0.factor'?",
    "method.online=[{name: own:Scale, factor: -1}]": "method.online.0.factor must be above 0, got -1.0",
    "method.online=[{name: own:Scale, factor: x}]": "method.online.0.factor: input should be a valid number",
    "method.online=[{name: own:Scale, until: 3}]": "method.online.0.until: a duration is written '50ep'",
    "method.online=[{name: own:Bare, factor: 1}]": "unknown configuration key 'method.online.0.factor': known: name",
    "method.online=[own:Loose]": "method.online.0 own:Loose takes config: LooseConfig, which must be a pydantic",
    "method.online=[own:net]": "method.online.0 'own:net' must be a class derived from fastrdm's Transform",
    "method.online=[own:Missing]": "method.online.0 'own:Missing' cannot be loaded: module 'own' has no",
    "method.online=[broken:X]": "method.online.0 'broken:X' cannot be loaded: ZeroDivisionError: division by zero (",
    "method.online=[no_module:X]": "method.online.0 'no_module:X' cannot be loaded: No module named 'no_module'",
    "encoder={name: own:Net, options: {depht: 1}}": "unknown configuration key 'encoder.options.depht': did you mean ",
    "encoder={name: own:Net, options: {depth: x}}": "encoder.options.depth: input should be a valid integer",
    "encoder={name: own:Net, stem: cifar}": "encoder.stem must be left at imagenet for own:Net, which does not",
    "encoder={name: own:Net, width: 3}": "encoder.width must be left at null for own:Net, which does not have",
    "encoder.name=os:execl": "encoder.name 'os:execl' must be a class derived from fastrdm's Encoder",
    "method.alignment={name: own:square, wight: 1}": "unknown configuration key 'method.alignment.wight': did you mean",
    "method.alignment=own:_square": "method.alignment 'own:_square' must be an object of fastrdm's class Loss",
    "method.target=[{name: filter, kind: own:untold}]": "method.target.0.kind 'own:untold' must be a function",
    "method.target=[{name: filter, kind: torch:Tensor}]": "method.target.0.kind 'torch:Tensor' must be a function",
    "method.target=[{name: filter, kind: own:root, power: 1}]": "method.target.0.power must be left out for kind=own",
    "preset=os:execl": "preset 'os:execl' must be a dict of settings, or a function annotated as returning one",
    "loader.source=os:execl": "loader.source 'os:execl' must be a subclass of fastrdm.Source",
}


@pytest.mark.parametrize("argument", REFUSED)
def test_refusal_is_one_clear_line(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.train([argument]) == cli.EXIT_REFUSED
    told = capsys.readouterr().err
    assert told.startswith(f"fastrdm: {REFUSED[argument]}") and told.count("\n") == 1


# argument: the key below which the part's settings are printed, and what is printed there
ACCEPTED: dict[str, tuple[str, Any]] = {
    "method.online=[{name: own:Scale, factor: 3}]": (
        "method.online",
        [{"name": "own:Scale", "factor": 3.0, "until": "10ep"}],
    ),
    "method.online=[own:Bare]": ("method.online", [{"name": "own:Bare"}]),
    "encoder.name=own:Net": ("encoder.options", {"depth": 2}),
    "encoder={name: own:net, options: {depth: 3}}": ("encoder.options", {"depth": 3}),
    "method.alignment={name: own:square, slope: 2}": (
        "method.alignment",
        {"name": "own:square", **PAIRS, "slope": 2.0},
    ),
    "method.alignment=own:square": (
        "method.alignment",
        {"name": "own:square", **PAIRS, "slope": 1.0},
    ),
    "method.target=[{name: filter, kind: own:root}]": ("method.target.0.kind", "own:root"),
    "preset=own:PRESET": ("method.online", [{"name": "own:Scale", "factor": 2.0, "until": "10ep"}]),
    "preset=own:preset": ("method.online", [{"name": "own:Scale", "factor": 2.0, "until": "10ep"}]),
}


def at(printed: str, path: str) -> Any:
    """What a printed configuration holds at a key."""
    value = yaml.safe_load(printed)
    for key in path.split("."):
        value = value[int(key)] if isinstance(value, list) else value[key]
    return value


@pytest.mark.parametrize("argument", ACCEPTED)
def test_settings_are_printed_and_read_back(argument: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.train([argument, "--print-config"]) == 0
    printed = capsys.readouterr().out
    path, expected = ACCEPTED[argument]
    assert at(printed, path) == expected
    (folder / "printed.yaml").write_text(printed)
    assert run_config.load(["printed.yaml"]) == run_config.load([argument])


def test_an_encoder_that_is_none_is_refused() -> None:
    from fastrdm.models.encoders import build_encoder

    config = run_config.load(["encoder.name=own:lie"]).encoder
    with pytest.raises(ValueError, match="'own:lie' must be an Encoder that sets `features`, got 'Identity'"):
        build_encoder(config)


def test_an_own_encoder_splits_its_statistics_and_refuses_what_it_cannot() -> None:
    from fastrdm.kernels.batchnorm import ViewBatchNorm
    from fastrdm.models.encoders import build_encoder

    encoder = build_encoder(run_config.load(["encoder.name=own:Net", "encoder.sync_bn=false"]).encoder)
    assert isinstance(encoder.norm, ViewBatchNorm) and not encoder.norm.sync
    config = run_config.load(["encoder.name=own:Net", "encoder.checkpointing=true"]).encoder
    with pytest.raises(ValueError, match=r"encoder\.checkpointing must be false for Net, which has no way to do it"):
        build_encoder(config)


def test_another_name_leaves_the_settings_behind_that_it_does_not_have() -> None:
    def encoder(*arguments: str) -> tuple[object, ...]:
        c = run_config.load(arguments).encoder
        return c.name, c.stem, c.width, c.zero_init_residual

    assert encoder("encoder.name=own:Net") == ("own:Net", "imagenet", None, False)
    below = encoder("quickstart.yaml", "encoder.name=resnet50")
    assert below == ("resnet50", "cifar", 16, True)  # it has what lies below
    for given in (["encoder.stem=cifar", "encoder.name=own:Net"], ["encoder={name: own:Net, stem: cifar}"]):
        with pytest.raises(ValueError, match=r"encoder\.stem must be left at imagenet"):
            run_config.load(given)  # what the user gives is never left behind
    loss = run_config.load(["preset=byol", "method.alignment.name=negative_cosine"]).method.alignment
    assert loss.directions == "sum"  # every loss has it
    dino = ["preset=dino", "method.online=[]", "method.target=[stop]", "method.alignment.name=byol"]
    assert run_config.load(dino).method.alignment.name == "byol"  # without a temperature


def test_the_working_folder_takes_the_place_of_nothing(folder: Path) -> None:
    """The script of torchrun, beside files named as modules of Python and as packages that are installed."""
    for name in ("random", "queue", "signal", "inspect", "dataclasses", "timm", "pydantic"):
        (folder / f"{name}.py").write_text("raise SystemExit('found in place of another')\n")
    argument = "method.online=[{name: own:Scale, factor: 3}]"
    command = [sys.executable, str(ROOT / "fastrdm" / "train.py"), "--print-config", argument]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path, expected = ACCEPTED[argument]
    assert at(done.stdout, path) == expected


def test_nothing_of_ones_own_leaves_the_path_alone(folder: Path) -> None:
    run_config.load([])
    assert str(folder) not in sys.path
    parts.load("own:root", "key", callable, "a function")
    assert sys.path[-1] == str(folder)
