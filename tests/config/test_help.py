"""The settings of configs: each has its place in `--help`, with a sentence of its own."""

import dataclasses
import re
import sys
from typing import Any

import pytest

from fastrdm import cli
from fastrdm.config import help
from fastrdm.config.run_config import Config
from fastrdm.evaluation.settings import EvalConfig
from fastrdm.methods.losses import ALIGNMENTS, loss_settings
from fastrdm.methods.regularizer_settings import REGULARIZERS, regularizer_settings
from fastrdm.methods.transform_settings import TRANSFORMS, transform_settings

CONSTANTS = {  # tables and two-word names, such as ENCODERS and HEADLINE_CONVENTION
    name
    for key, module in sys.modules.items()
    if key.startswith("fastrdm.")
    for name in vars(module)
    if name.isupper() and ("_" in name or name.endswith("S"))
}


def settings() -> list[help.Setting]:
    """All settings of `train`, of its transforms, losses and regularizers, and of `eval`."""
    parts: dict[str, Any] = {name: transform_settings(name) for name in TRANSFORMS}
    parts |= {name: loss_settings(name) for name in ALIGNMENTS}
    parts |= {name: regularizer_settings(name) for name in REGULARIZERS}
    common = ("name", "directions", "weight", "targets", "of", "views")  # of every part of its sort
    transforms = [
        setting
        for name, kind in parts.items()
        for setting in help.walk(kind, f"{name}.")
        if setting.key.split(".")[-1] not in common
    ]
    return [*help.walk(Config), *transforms, *help.walk(EvalConfig)]


@pytest.mark.parametrize("setting", settings(), ids=lambda setting: setting.key)
def test_a_description_is_a_sentence(setting: help.Setting) -> None:
    text = setting.description
    assert len(text.split()) >= 3, f"{setting.key} has no docstring below it"
    assert text[0].isupper()
    assert text.endswith(".")
    assert "ENCODERS" in CONSTANTS
    assert not CONSTANTS & set(re.findall(r"\w+", text))
    assert len(text) < 300


def declared(kind: Any) -> dict[tuple[str, str], str]:
    """The descriptions below a config, by the class that declares the field."""
    found = {}
    for option in help.options(kind):
        for setting in help.walk(option):
            *path, name = setting.key.split(".")
            if not path:
                (owner, *_) = [base for base in option.__mro__ if name in vars(base).get("__annotations__", {})]
                found[owner.__name__, name] = setting.description
        for field in dataclasses.fields(option):
            found |= declared(field.type)
    return {key: text for key, text in found.items() if text}


def test_no_description_is_used_twice() -> None:
    texts = {**declared(Config), **declared(EvalConfig)}
    assert len(texts) > 120
    seen: dict[str, tuple[str, str]] = {}
    for key, text in texts.items():
        assert text not in seen, f"{key} and {seen[text]} say the same"
        seen[text] = key


def test_help_shows_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.train(["--help", "all"]) == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 120
    for setting in settings()[: -len([*help.walk(EvalConfig)])]:
        (line,) = (i for i, line in enumerate(lines) if line.startswith(f"  {setting.key} = "))
        below = " ".join(lines[line + 1 : line + 6]).split()
        assert below[: len(setting.description.split())] == setting.description.split()


@pytest.mark.parametrize(
    ("key", "default", "choices", "description"),
    [
        ("train.device", "auto", ("auto", "cpu", "cuda"), "Where the run computes. `auto` takes a CUDA device if ther"),
        ("evaluate.temperature", 0.07, (), "Temperature of the vote: a neighbor weighs exp(cosine / temperature)."),
        ("method.ema.momentum", 0.99, (), "Share of the old weights kept in each update at the start of the run. "),
        ("loader.views.*.size", 32, (), "Height and width of the view, in pixels."),
        ("method.target", ["stop"], (), "Transforms of the target branch, with which the online branch is compare"),
    ],
)
def test_fields(key: str, default: object, choices: tuple[str, ...], description: str) -> None:
    (found,) = (setting for setting in help.walk(Config) if setting.key == key)
    assert (found.default, found.choices) == (default, choices)
    assert found.description.startswith(description)


def test_an_inherited_field_keeps_its_description() -> None:
    texts = {setting.key: setting.description for setting in help.walk(EvalConfig)}
    assert texts["linear.epochs"] == "Epochs for which the classifier is trained."
    assert texts["finetune.epochs"] == "Epochs of fine-tuning."  # declared anew
    assert texts["finetune.gamma"] == texts["linear.gamma"] == "Factor of the step schedule."


def test_help_begins_with_examples_and_sections(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.train(["--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: fastrdm train ")
    assert len(shown.splitlines()) < 60 and max(map(len, shown.splitlines())) <= 120
    for name in ("train", "method", "encoder", "loader", "optim", "evaluate", "monitor", "checkpoint", "log"):
        assert re.search(rf"^  {name} +[A-Zk].*\.$", shown, re.MULTILINE), f"section {name} has no sentence"


@pytest.mark.parametrize(
    ("section", "first", "last"),
    [
        ("optim", "optim.name", "optim.betas"),
        ("loader.views", "loader.views", "loader.views.*.std"),
        ("optim.lr", "optim.lr", "optim.lr"),
        ("sinkhorn", "sinkhorn.epsilon", "sinkhorn.queue_start"),
    ],
)
def test_help_of_a_section(section: str, first: str, last: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.train(["--help", section]) == 0
    keys = re.findall(r"^  (\S+) = ", capsys.readouterr().out, re.MULTILINE)
    assert keys[0] == first and last in keys
    assert all(key.startswith(section) for key in keys)


def test_help_of_what_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.train(["--help", "optimm"]) == cli.EXIT_REFUSED
    told = capsys.readouterr().err
    assert told == "fastrdm: --help takes a section, a key or a part, got 'optimm': did you mean 'optim'?\n"
