"""The texts that are kept for commands without torch say what the settings say."""

import json

import pytest

from fastrdm import cli
from fastrdm.commands import described


def test_what_is_kept_is_what_the_settings_say() -> None:
    """After a setting has changed: python -m fastrdm.commands.described."""
    kept = json.loads(described.FILE.read_text(encoding="utf-8"))
    assert kept == json.loads(json.dumps(described.collect())), "run python -m fastrdm.commands.described"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--help", "loader.views"], "loader.views.*.size"),  # composed, since only whole sections are kept
        (["quickstart.yaml", "-h"], "usage: fastrdm train"),
        (["--help=optim"], "optim.name"),
        (["--help", "sinkhorn"], "sinkhorn.epsilon"),
    ],
)
def test_every_form_of_help_of_train(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run("train", words) == 0
    assert said in capsys.readouterr().out


def test_help_on_what_there_is_not_names_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run("train", ["--help", "optimizer"]) == cli.EXIT_REFUSED
    assert "did you mean 'optim'?" in capsys.readouterr().err
