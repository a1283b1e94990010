"""Lists of what there is: recipes, methods, and words for a shell. None but the last needs torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from fastrdm import cli
from fastrdm.config import run_config
from fastrdm.methods.presets import PRESETS


def told(name: str, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert cli.run(name, arguments) == 0
    return capsys.readouterr().out.splitlines()


def test_every_recipe_has_a_line_with_its_methods_and_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    _, *lines = told("recipes", capsys)
    files = {str(file.relative_to(run_config.RECIPES)) for file in run_config.RECIPES.rglob("*.yaml")}
    assert {line.split()[0] for line in lines} == files
    (dino,) = (line for line in lines if line.startswith("cifar10/cpu_dino.yaml"))
    assert dino.split()[1:3] == ["dino,", "dino_koleo"] and "DINO on cpu.yaml's terms" in dino


def test_every_preset_has_a_line_with_its_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    _, *lines = told("presets", capsys)
    assert [line.split()[0] for line in lines] == list(PRESETS)
    (dino,) = (line for line in lines if line.startswith("dino "))
    assert dino.split()[1:5] == ["prototypes", "prototypes,", "center_sharpen", "yes"]
    for line in lines:
        for recipe in (word for word in line.split() if word.endswith(".yaml")):
            run_config.load([recipe, f"preset={line.split()[0]}"])


@pytest.mark.parametrize("name", ["recipes", "presets"])
def test_lists_need_no_torch(name: str) -> None:
    code = (
        f"import resource, sys; from fastrdm import cli; cli.run('{name}', []); assert 'torch' not in sys.modules\n"
        "used = resource.getrusage(resource.RUSAGE_SELF); print(used.ru_utime + used.ru_stime, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stderr) < 0.5, "CPU seconds"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_are_read_by_their_shell(
    shell: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lines = told("completion", capsys, shell)
    script = "\n".join(lines)
    for word in ("pack", "cifar10/cpu.yaml", "preset=byol", "optim.lr=", "train.precision=bf16"):
        assert word in script
    if shell == "bash":
        (tmp_path / "script").write_text(script)
        ask = (
            f". {tmp_path}/script;"
            "COMP_LINE='fastrdm train optim.l' COMP_POINT=21 COMP_CWORD=2; _fastrdm; echo ${COMPREPLY[*]};"
            "COMP_LINE='fastrdm pac' COMP_POINT=11 COMP_CWORD=1; _fastrdm; echo ${COMPREPLY[*]};"
            "COMP_LINE='fastrdm train preset=by' COMP_POINT=23 COMP_CWORD=4; _fastrdm; echo ${COMPREPLY[*]}"
        )
        done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, cwd=tmp_path)
        assert done.stdout.splitlines() == ["optim.lr=", "pack", "byol byol_koleo"]
