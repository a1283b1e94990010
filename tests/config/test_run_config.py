"""Configuration: what is refused and how it is told; layers and lists; what is printed loads again."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastrdm import cli
from fastrdm.config import run_config
from fastrdm.config.run_config import RECIPES
from fastrdm.config.source_defaults import assume
from fastrdm.methods.predictor import PredictorConfig
from fastrdm.methods.presets import PRESETS
from fastrdm.methods.spectral_filter import FilterConfig
from fastrdm.methods.stop import StopConfig

REFUSED = {
    # a misspelt key: the nearest beside it, else the key of that name elsewhere
    "optim.lrr=1": "unknown configuration key 'optim.lrr': did you mean 'optim.lr'?",
    "lodaer.source=x": "unknown configuration key 'lodaer': did you mean 'loader'?",
    "lr=1": "unknown configuration key 'lr': did you mean 'optim.lr'?",
    "train.batch_size=8": "unknown configuration key 'train.batch_size': did you mean 'loader.batch_size' or",
    "zzz=1": "unknown configuration key 'zzz': known: preset, run, train,",
    "method.filter=3": "unknown configuration key 'method.filter': known: projector, online,",
    "loader.views.1.sizee=3": "unknown configuration key 'loader.views.1.sizee': did you mean 'loader.views.1.size'?",
    "method.online.0.hiden=4": "unknown configuration key 'method.online.0.hiden': did you mean 'method.online.0.hid",
    "method.online=[{name: predictor, hidde: 3}]": "unknown configuration key 'method.online.0.hidde': did you",
    "optim.=3": "unknown configuration key 'optim.': known: name, backend, lr,",
    "=3": "unknown configuration key '': known: preset,",
    "base=quickstart.yaml": "unknown configuration key 'base'",
    # a value of the wrong type
    "optim.lr=fast": "optim.lr: input should be a valid number, unable to parse string as a number, got 'fast'",
    "optim.lr=": "optim.lr: input should be a valid number, got None",
    "optim.lr.x=3": "optim.lr: input should be a valid number, got {'x': 3}",
    "optim.lr=true": "optim.lr must be a number, got True",
    "optim.lr=.inf": "optim.lr must be a finite number, got inf",
    "optim.lr=.nan": "optim.lr must be at least 0, got nan",
    "train.seed=true": "train.seed must be a number, got True",
    "train.seed=1.5": "train.seed: input should be a valid integer, got a number with a fractional part, got 1.5",
    "train.compile=1": "train.compile must be true or false, got 1",
    "loader.views.1.size=true": "loader.views.1.size must be a number, got True",
    "loader.views=3": "loader.views must be a list, got 3",
    "loader.views.0=3": "loader.views.0 must be keys and values, got 3",
    "method.online=predictor": "method.online must be a list, got 'predictor'",
    "method.online=[3]": "method.online.0 must be a transform, got 3",
    "method.online=[{hidden: 3}]": "method.online.0 must be a transform with its name, got {'hidden': 3}",
    "optim=3": "optim must be keys and values, got 3",
    "run=3": "run must be text, got 3",
    "optim.betas=[0.9]": "optim.betas.1: field required, got [0.9]",
    "optim.lr=[1": "optim.lr takes YAML, got '[1' in line 1: expected ',' or ']'",
    "run=!!python/object:os.system": "run takes YAML, got '!!python/object:os.system' in line 1: could not determine",
    "train={seed: 1, seed: 2}": "train takes YAML, got '{seed: 1, seed: 2}' in line 1: key 'seed' stands twice",
    "run=\x07": "run takes YAML: unacceptable character #x0007",
    # a value out of range
    "train.seed=4294967296": "train.seed: input should be less than 4294967296, got 4294967296",
    "optim.lr=-1": "optim.lr must be at least 0, got -1.0",
    "evaluate.k=0": "evaluate.k: input should be greater than or equal to 1, got 0",
    "loader.views.0.flip=2": "loader.views.0.flip must be a probability in [0, 1], got 2.0",
    "loader.views=[]": "loader.views must be at least two views, got 0",
    "method.alignment.name=cosine": "method.alignment must be a loss, got 'cosine': known: negative_cosine, byol, ",
    "method.alignment=3": "method.alignment must be a loss, got 3",
    "method.alignment.temperature=1": "unknown configuration key 'method.alignment.temperature': ",
    "method.target=[{name: filter, power: fast}]": "method.target.0.power: input should be a valid number",
    # durations
    "train.length=50": "train.length: a duration is written '50ep' (epochs), '2000st' (steps) or '5%' (of the",
    "train.length=50eps": "train.length: a duration is written",
    "train.length=-5ep": "train.length: a duration is written",
    "train.length=": "train.length: a duration is written",
    "train.length=5%": "train.length must be above 0, in epochs or steps, such as '50ep', got '5%'",
    "train.length=0st": "train.length must be above 0, in epochs or steps, such as '50ep', got '0st'",
    "checkpoint.every=200%": "checkpoint.every: a share of the run must be at most 100%, got '200%'",
    # unknown names and items
    "preset=simsaim": "preset must be a method's name, got 'simsaim': did you mean 'simsiam'?",
    "preset=[byol]": "preset must be a method's name, got ['byol']: did you mean 'byol'?",
    "preset=": "preset must be a method's name, got None: known:",
    "method.online=[predicter]": "method.online.0 must be a transform, got 'predicter': did you mean 'predictor'?",
    "loader.views.5.size=3": "loader.views has 2 items, numbered from 0 or * for each, got item '5'",
    "loader.views.-1.size=3": "loader.views has 2 items, numbered from 0 or * for each, got item '-1'",
    "method.online.x.hidden=4": "method.online has 1 items, numbered from 0 or * for each, got item 'x'",
    "quickstrt.yaml": "no configuration file 'quickstrt.yaml', did you mean 'quickstart.yaml'?; settings are written",
    "optim.lr": "no configuration file 'optim.lr', `fastrdm recipes` lists the shipped ones; settings are",
    "--seed=3": "unknown option --seed=3: write train.seed=0",
    # impossible pairs, and kinds that do not meet
    "train.accumulate=3": "train.accumulate must divide loader.batch_size=256, got 3",
    "method.target=[filter]": "method.target.0.power must be a number for kind=power, got None",
    "method.target=[{name: filter, kind: log, power: 1}]": "method.target.0.power must be left out for kind=log, got 1",
    "method.online=[prototypes]": "method.online: alignment negative_cosine takes features here, but prototypes",
    "method.target=[sinkhorn]": "method.target.0: sinkhorn takes scores, but the projector gives features",
    "method.online=[stop, sinkhorn]": "method.online.1: sinkhorn takes scores, but stop gives features",
}


@pytest.mark.parametrize("argument", REFUSED)
def test_refusal_is_one_clear_line(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.train([argument]) == 2
    said, told = capsys.readouterr()
    assert said == ""
    assert told.startswith(f"fastrdm: {REFUSED[argument]}")
    assert told.endswith("\n")
    assert told.count("\n") == 1


REFUSED_TOGETHER = [
    (["preset=swav", "loader.batch_size=64", "train.accumulate=2"], "train.accumulate must be 1 with sinkhorn.queue"),
    (["preset=swav", "method.target.0.count=10"], "prototypes.count must be "),
    (["quickstart.yaml", "other.yaml"], "one configuration file at most, got quickstart.yaml, other.yaml; settings"),
    (["quickstart.yaml", "lr", "1"], "one configuration file at most, got quickstart.yaml, lr, 1; settings are"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED_TOGETHER)
def test_refused_together(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError) as refused:
        run_config.load(arguments)
    assert str(refused.value).startswith(message)


def test_filter_on_the_other_branch_takes_two_views() -> None:
    view, basis = {"size": 16}, {"name": "filter", "power": -0.5, "basis": "other"}
    assert run_config.resolve({"method": {"target": [basis]}}).method.target[0] == FilterConfig(
        power=-0.5, basis="other"
    )
    with pytest.raises(ValueError, match=r"^filter.basis=other takes two views, got 3 in loader.views$"):
        run_config.resolve({"loader": {"views": [view] * 3}, "method": {"target": [basis]}})


def test_every_wrong_setting_is_told_at_once() -> None:
    with pytest.raises(ValueError) as refused:
        run_config.load(["optim.lrr=1", "train.compile=maybe", "loader.views.*.flip=2"])
    assert [line.split(" ")[0] for line in str(refused.value).splitlines()] == [
        "train.compile:",
        "loader.views.0.flip",
        "loader.views.1.flip",
        "unknown",
    ]


def test_later_layers_win(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("preset: byol\noptim: {lr: 0.1, momentum: 0.5}\ntrain: {length: 7ep}\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "own.yaml").write_text("base: ../base.yaml\noptim: {lr: 0.2}\n")
    found = run_config.load([str(tmp_path / "sub" / "own.yaml"), "optim.weight_decay=1e-3", "optim.weight_decay=1e-4"])
    byol = run_config.resolve({"preset": "byol"})
    assert (found.preset, found.optim.eta, found.method) == ("byol", byol.optim.eta, byol.method)  # the preset's
    assert (found.optim.momentum, found.train.length) == (0.5, "7ep")  # the base's
    assert found.optim.lr == 0.2  # the file's
    assert found.optim.weight_decay == 1e-4  # the command line's last
    other = run_config.load([str(tmp_path / "sub" / "own.yaml"), "preset=simsiam"])
    assert (other.method, other.optim.lr) == (run_config.resolve({"preset": "simsiam"}).method, 0.2)


def test_an_empty_file_is_the_default_preset_on_digits(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("# nothing\n")
    found = run_config.load([str(tmp_path / "own.yaml")])
    assert found == run_config.resolve(assume("digits", "simsiam", "resnet18").tree)
    assert (found.preset, found.encoder.name, found.method) == ("simsiam", "resnet18", run_config.resolve({}).method)


def test_own_file_comes_before_a_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_config.load(["quickstart.yaml"]) == run_config.load([])
    Path("quickstart.yaml").write_text("optim: {lr: 7}")
    assert run_config.load(["quickstart.yaml"]).optim.lr == 7


def test_lists_by_item_and_whole(tmp_path: Path) -> None:
    def sizes(*arguments: str) -> list[int]:
        words = arguments if arguments[0].endswith(".yaml") else ("quickstart.yaml", *arguments)
        return [view.size for view in run_config.load(words).loader.views]

    assert sizes("loader.views.*.size=24") == [24, 24]
    assert sizes("loader.views.1.size=24") == [16, 24]
    assert sizes("loader.views.*.size=24", "loader.views.1.size=8") == [24, 8]
    assert sizes("loader.views.1.size=8", "loader.views.*.size=24") == [24, 24]  # the last one wins
    assert sizes("loader.views=[{size: 32}, {}, {size: 8}]") == [32, 32, 8]
    assert sizes("loader.views=[{size: 8}, {}]", "loader.views.1.size=9") == [8, 9]
    assert run_config.load(["loader.views.0.scale.0=0.3"]).loader.views[0].scale == (0.3, 1.0)
    (tmp_path / "own.yaml").write_text('loader: {views: {1: {size: 8}, "*": {size: 24}}}')
    assert sizes(str(tmp_path / "own.yaml")) == [24, 8]  # in one file an item's own setting wins wherever it stands


def test_transforms_by_item_and_whole() -> None:
    def online(*arguments: str) -> tuple[Any, ...]:
        return run_config.load(["preset=byol", *arguments]).method.online

    byol = PredictorConfig(hidden=4096, bias=True, constant_lr=False)
    assert online() == (byol,)
    assert online("method.online.0.hidden=8") == (PredictorConfig(hidden=8, bias=True, constant_lr=False),)
    assert online("method.online=[predictor]") == (PredictorConfig(),)
    assert online("method.online=[predictor]", "method.online.0.hidden=8") == (PredictorConfig(hidden=8),)
    assert online("method.online.0={name: filter, power: 1}") == (FilterConfig(power=1.0),)
    assert online("method.online=[]") == ()
    assert run_config.load(["preset=rdm_simsiam", "method.target.0.power=-1"]).method.target == (
        FilterConfig(power=-1.0),
    )
    assert run_config.load(["preset=rdm_simsiam", "method.target=[stop]"]).method.target == (StopConfig(),)


def test_null_takes_away_and_keys_bring_back() -> None:
    assert run_config.load(["preset=byol", "method.ema=null"]).method.ema is None
    assert run_config.load(["preset=byol", "method.ema="]).method.ema is None
    ema = run_config.load(["preset=simsiam", "method.ema.momentum=0.9"]).method.ema
    assert ema is not None
    assert (ema.momentum, ema.final) == (0.9, 1.0)


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("'1e-4'", 1e-4), ("1", 1.0), ("0.5", 0.5)])
def test_numbers(text: str, value: float) -> None:
    found = run_config.load([f"optim.lr={text}"]).optim.lr
    assert (found, type(found)) == (value, float)


def test_a_value_may_hold_the_sign() -> None:
    assert run_config.load(["run=a=b"]).run == "a=b"


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_printed_loads_again(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = run_config.resolve({"preset": name})
    assert run_config.resolve(run_config.to_dict(made)) == made
    assert cli.train([f"preset={name}", "optim.lr=1e-5", "--print-config"]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert run_config.load([str(tmp_path / "printed.yaml")]) == run_config.load([f"preset={name}", "optim.lr=1e-5"])


@pytest.mark.parametrize("file", sorted(RECIPES.rglob("*.yaml")), ids=lambda f: str(f.relative_to(RECIPES)))
def test_shipped_files_load(file: Path) -> None:
    found = run_config.load([str(file)])
    assert found == run_config.load([str(file.relative_to(RECIPES))])


def test_configs_are_frozen() -> None:
    with pytest.raises(AttributeError):
        run_config.load([]).optim.lr = 3.0  # type: ignore[misc]


def test_run_folder_is_the_same_for_the_same_settings() -> None:
    def folder(*arguments: str) -> str:
        return str(run_config.run_folder(run_config.load(arguments)))

    assert folder().startswith("runs/simsiam-digits-")
    assert folder() == folder("quickstart.yaml", "optim.lr=0.2")  # as the file has it
    assert folder() != folder("quickstart.yaml", "optim.lr=0.3")
    assert folder("run=here") == "here"
    assert folder("loader.source=my.module:Birds").startswith("runs/simsiam-Birds-")


def test_a_resolved_config_is_plain_yaml() -> None:
    text = run_config.to_yaml(run_config.load(["preset=dino"]))
    assert yaml.safe_load(text) == run_config.to_dict(run_config.load(["preset=dino"]))
    assert "!!" not in text


def test_nothing_is_written_before_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.train(["optim.lr=fast"]) == 2
    assert os.listdir(tmp_path) == []
