"""The fields of configs: every one has its line in --help, with a comment."""

import pytest

from fastrdm import cli
from fastrdm.config import help
from fastrdm.config.run_config import Config
from fastrdm.methods.alignment import CrossEntropyConfig
from fastrdm.methods.dual_branch import TRANSFORMS, transform_settings


def test_help_tells_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.train(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("usage: torchrun")
    settings = [*help.walk(Config)]
    for name in TRANSFORMS:
        settings += [s for s in help.walk(transform_settings(name), f"{name}.") if s.key != f"{name}.name"]
    loss = help.walk(CrossEntropyConfig, "cross_entropy.")
    settings += [s for s in loss if s.key == "cross_entropy.temperature"]
    assert len(settings) > 90
    for setting in settings:
        assert setting.note, f"{setting.key} has no comment beside it"
        (line,) = (line for line in lines if line.startswith(f"  {setting.key} = "))
        assert line.endswith(setting.note)


@pytest.mark.parametrize(
    ("key", "default", "note"),
    [
        ("train.device", "auto", "auto | cpu | cuda"),
        ("evaluate.temperature", 0.07, "a neighbour's vote weighs exp(cosine / temperature)"),
        ("method.ema.momentum", 0.99, "share of the old value, at the start"),
        ("loader.views.*.size", 32, "output height and width, pixels"),
        ("method.target", ["stop"], "and of the branch that it is compared with"),
    ],
)
def test_fields(key: str, default: object, note: str) -> None:
    (found,) = (setting for setting in help.walk(Config) if setting.key == key)
    assert (found.default, found.note) == (default, note)
