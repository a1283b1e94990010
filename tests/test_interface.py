"""The public face: names, what they cost to import, the command line without torch, old names."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import fastrdm
from fastrdm import cli
from fastrdm.commands import export
from fastrdm.commands.pretrained import Preprocess
from fastrdm.config import run_config
from fastrdm.loaders.evaluation import evaluation_batches
from fastrdm.loaders.sources.open import open_source
from fastrdm.methods.spectral_filter import FilterConfig
from fastrdm.renamed import RENAMED

SMALL = [
    "quickstart.yaml",
    "encoder.width=4",
    "loader.batch_size=16",
    "evaluate.every=0st",
    "evaluate.baselines=false",
    "train.length=3st",
]
SPENT = """
import resource, sys
used = resource.getrusage(resource.RUSAGE_SELF)
print(used.ru_utime + used.ru_stime, *(name for name in ("torch", "numpy", "pydantic") if name in sys.modules))
"""


def spent(code: str) -> tuple[float, set[str]]:
    """CPU seconds of a process that runs `code`, and which heavy packages it has imported at the end."""
    done = subprocess.run([sys.executable, "-c", code + SPENT], capture_output=True, text=True, check=True)
    seconds, *names = done.stdout.splitlines()[-1].split()
    return float(seconds), set(names)


def test_import_needs_no_torch() -> None:
    empty, _ = spent("")
    seconds, packages = min(spent("import fastrdm") for _ in range(3))
    assert packages == set()
    assert seconds - empty < 0.1


@pytest.mark.parametrize(
    ("arguments", "start"),
    [
        (["--version"], f"fastrdm {fastrdm.__version__}"),
        (["--help"], "usage: fastrdm COMMAND"),
        (["pack", "--help"], "usage: fastrdm pack"),
        (["doctor", "--help"], "usage: fastrdm doctor"),
        (["train", "--help"], "usage: fastrdm train"),
        (["train", "--help", "optim"], "  optim.name"),
        (["recipes"], "recipe "),
        (["presets"], "preset "),
        (["schema"], "{"),
        (["completion", "bash"], "_fastrdm()"),
    ],
)
def test_what_needs_no_torch_answers_at_once(arguments: list[str], start: str) -> None:
    code = (
        f"import sys\nfrom fastrdm.cli import entry\nsys.argv[1:] = {arguments!r}\n"
        "try:\n    entry()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(start)
    seconds, packages = min((spent(code) for _ in range(3)), key=lambda found: found[0])
    assert "torch" not in packages
    assert seconds < 0.5


@pytest.mark.parametrize("module", ["fastrdm.loaders.spec", "fastrdm.schema", "fastrdm.cli", "fastrdm.commands.doctor"])
def test_these_modules_need_no_torch(module: str) -> None:
    assert "torch" not in spent(f"import {module}")[1]


def test_the_command_line_needs_python_alone() -> None:
    """`fastrdm doctor` must run where torch, NumPy or pydantic is broken."""
    assert spent("import fastrdm.cli, fastrdm.commands.doctor")[1] == set()


def test_every_public_name_is_there() -> None:
    assert set(fastrdm.__all__) <= set(dir(fastrdm))
    for name in fastrdm.__all__:
        assert getattr(fastrdm, name) is not None
    with pytest.raises(AttributeError, match="module 'fastrdm' has no attribute 'trian'"):
        fastrdm.trian  # noqa: B018


def test_help_has_a_sentence_on_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == cli.main([]) == 0
    said = capsys.readouterr().out
    for name, command in cli.COMMANDS.items():
        assert command.sentence[0].isupper() and command.sentence.endswith(".")
        assert f"\n  {name:10}  {command.sentence}\n" in said


def test_python_dash_m(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastrdm", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout == f"fastrdm {fastrdm.__version__}\n"


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m fastrdm train --help | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: ") and done.stderr == ""


OLD = {  # an old name: what the refusal says before it names the new one
    "instruments.every=10ep": "unknown configuration key 'instruments'",
    "loader.views.*.grey=0.1": "unknown configuration key 'loader.views.0.grey'",
    "loader.views.0.solarise=0.1": "unknown configuration key 'loader.views.0.solarise'",
    "loader.views.0.solarise_threshold=9": "unknown configuration key 'loader.views.0.solarise_threshold'",
    "method.target=[centre_sharpen]": "method.target.0 must be a transform, got 'centre_sharpen'",
    **{
        f"method.target=[{{name: filter, power: -1, solver: {old}}}]": "method.target.0.solver must be one of auto, "
        f"eigh, newton_schulz, gram_power, got '{old}'"
        for old in ("ladder", "even", "eigh64")
    },
}
NEW = {
    "instruments": "analysis",
    **{f"loader.views.0.{old}": f"loader.views.0.{RENAMED[old]}" for old in ("grey", "solarise", "solarise_threshold")},
    **{old: RENAMED[old] for old in ("centre_sharpen", "ladder", "even", "eigh64")},
}


@pytest.mark.parametrize("argument", OLD)
def test_an_old_name_is_refused_with_the_new_one(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.train([argument]) == cli.EXIT_REFUSED
    told = capsys.readouterr().err.splitlines()[0]
    old = OLD[argument].split("'")[-2]
    assert told == f"fastrdm: {OLD[argument]}: it is called {NEW[old]!r} now"


def test_an_old_command_is_refused_with_the_new_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["theory", "runs/x"]) == cli.EXIT_REFUSED
    assert capsys.readouterr().err == "fastrdm: unknown command 'theory': it is called 'analyze' now\n"
    assert cli.main(["trian"]) == cli.EXIT_REFUSED
    assert capsys.readouterr().err == "fastrdm: unknown command 'trian': did you mean 'train'?\n"


def test_every_old_name_is_tried() -> None:
    tried = " ".join([*OLD, "theory"])
    assert [old for old in RENAMED if old not in tried] == []
    assert [old for old, new in RENAMED.items() if old in RENAMED.values() or new in RENAMED] == []
    FilterConfig(power=-1.0, solver=RENAMED["ladder"])


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("runs") / "a"
    return fastrdm.train([*SMALL, "preset=byol"], run=str(folder), log={"report": False})


def test_train_in_python_is_the_command(result: Any, tmp_path: Path) -> None:
    assert result.status == 0
    assert (result.folder / "summary.json").is_file() and not (result.folder / "report.html").exists()
    assert result.metrics["loss"] == result.metrics["loss"] and "online/erank_l/unit/moment/batch" in result.metrics
    same = [*SMALL, "preset=byol", f"run={tmp_path / 'b'}", "log.report=false"]
    assert cli.train(same) == 0
    stored = [folder / "checkpoints" for folder in (result.folder, tmp_path / "b")]
    (one, other) = (next(folder.glob("step-*")) / "model.safetensors" for folder in stored)
    assert one.read_bytes() == other.read_bytes()


def test_train_in_python_refuses_as_the_command() -> None:
    with pytest.raises(ValueError, match=r"^unknown configuration key 'optim.lrr': did you mean 'optim.lr'\?$"):
        fastrdm.train(optim={"lrr": 1})
    with pytest.raises(ValueError, match=r"^optim.lr must be at least 0, got -1.0$"):
        fastrdm.train(["optim.lr=1"], optim={"lr": -1})  # keyword arguments lie over the list


@pytest.mark.parametrize("branch", ["online", "target"])
def test_an_encoder_is_loaded_from_a_run_and_from_its_export(result: Any, branch: Any, tmp_path: Path) -> None:
    encoder, preprocess = fastrdm.load_encoder(result.folder, branch)
    assert not encoder.training
    settings = run_config.load([str(result.folder / "config.yaml")])
    source = open_source(settings.loader, "test")
    assert source.images is not None
    views, *_ = next(iter(evaluation_batches(source, settings.loader.views[0], 8)))
    assert torch.equal(torch.stack([preprocess(image) for image in source.images[:8]]), views)
    assert torch.equal(preprocess(Image.fromarray(source.images[0])), views[0])
    file = tmp_path / "encoder.safetensors"
    arguments = [str(result.folder), "--layout", "safetensors", "--branch", branch, "--out", str(file)]
    assert export.main(arguments) == 0
    again, same = fastrdm.load_encoder(file, branch)
    assert same == preprocess == Preprocess(16, 16, "bicubic", preprocess.mean, preprocess.std)
    with torch.no_grad():
        features = encoder(views)
        assert torch.equal(again(views), features)
    assert features.shape == (8, encoder.features)
    other = "online" if branch == "target" else "target"
    with pytest.raises(ValueError, match=f"holds the {branch} branch, not the {other} one$"):
        fastrdm.load_encoder(file, other)


def test_what_load_encoder_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="CHECKPOINT must be a run folder"):
        fastrdm.load_encoder(tmp_path)
    text = tmp_path / "text.safetensors"
    text.write_text("no weights")
    with pytest.raises(ValueError, match=r"text.safetensors is no safetensors file"):
        fastrdm.load_encoder(text)
    bare = tmp_path / "bare.safetensors"
    save_file({"x": torch.zeros(1)}, bare)
    with pytest.raises(ValueError, match="does not say which encoder it holds: write it by `fastrdm export`"):
        fastrdm.load_encoder(bare)
    preprocess = Preprocess(8, 8, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match=r"an image must be \(H, W, 3\) uint8, got \(8, 8\) uint8"):
        preprocess(np.zeros((8, 8), np.uint8))
