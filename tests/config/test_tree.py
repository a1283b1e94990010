"""Nested settings: files that are refused, and what differs between two configurations."""

from pathlib import Path

import pytest

from fastrdm import cli
from fastrdm.config import run_config, tree


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "{file} must hold keys and values, got list"),
        ("a: [1\nb: 2\n", "{file} takes YAML, got 'b: 2' in line 2: "),
        (
            "optim: {lr: 1}\noptim: {lr: 2}\n",
            "{file} takes YAML, got 'optim: {lr: 1}' in line 1: key 'optim' stands twice",
        ),
        ("on: 1\n", "unknown configuration key 'True'"),
        ("3: 1\n", "unknown configuration key '3'"),
        ("? [a, b]\n: 1\n", "{file} takes YAML, got '? [a, b]' in line 1: found unhashable key"),
        ("loader: {views: {2: {size: 8}}}\n", "loader.views has 2 items, numbered from 0 or * for each, got item '2'"),
        ("base: 3\n", "base must be a file's name, got 3 in {file}"),
        ("base: other.yaml\n", "configuration file {folder}/other.yaml cannot be read: [Errno 2]"),
        ("base: own.yaml\n", "base must not lead back to a file that it came from, got own.yaml in own.yaml"),
    ],
)
def test_refused_files(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(text)
    assert cli.train([str(file)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("fastrdm: " + message.replace("{file}", str(file)).replace("{folder}", str(tmp_path)))
    assert told.count("\n") == 1


def test_what_is_no_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "weights.yaml").write_bytes(b"\xff\xfe\x00\x80")
    assert cli.train([str(tmp_path / "weights.yaml")]) == 2
    assert "weights.yaml cannot be read: 'utf-8' codec can't decode" in capsys.readouterr().err
    assert cli.train([str(tmp_path)]) == 2
    assert f"no configuration file '{tmp_path}'" in capsys.readouterr().err


def test_differences() -> None:
    old = run_config.to_dict(run_config.load([]))
    new = run_config.to_dict(
        run_config.load(["quickstart.yaml", "optim.lr=0.3", "loader.views.1.size=8", "method.online=[]", "run=x"])
    )
    assert tree.differences(old, old) == []
    assert tree.differences(old, new) == [
        "run: None -> x",
        f"method.online: {old['method']['online']} -> []",
        "loader.views.1.size: 16 -> 8",
        "optim.lr: 0.2 -> 0.3",
    ]
    assert tree.differences({"a": 1}, {"b": {"c": 2}}) == ["a: 1 -> None", "b: None -> {'c': 2}"]
