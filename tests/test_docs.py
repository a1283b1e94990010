"""What the documentation shows runs: commands, Python, YAML, names and links."""

import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from fastrdm import cli
from fastrdm.config import run_config, tree
from fastrdm.loaders.sources.packed import PackedSource
from fastrdm.methods.presets import PRESETS

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
MADE = {"settings.md", "records.md"}  # docs/site_hooks.py makes them; tests/test_site.py follows the links
RECIPES = sorted(run_config.RECIPES.rglob("*.yaml"))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def all_blocks(language: str) -> list[object]:
    return [
        pytest.param(block, id=f"{page.stem}-{i}") for page in PAGES for i, block in enumerate(blocks(page, language))
    ]


def training_commands() -> list[str]:
    """Commands shown on pages and at the head of shipped configs; [what stands in brackets] is optional.

    Those of docs/extending.md are run below, with the modules that they name.
    """
    pages = [page for page in PAGES if page.name != "extending.md"]
    shell = [block.replace("\\\n", " ") for page in pages for block in blocks(page, "sh")]
    lines = [line for block in shell for line in block.splitlines()]
    lines += [line.removeprefix("# ") for file in RECIPES for line in file.read_text().splitlines() if line[:2] == "# "]
    shown = [line for line in lines if re.match(r"torchrun .*fastrdm/train\.py|fastrdm train", line)]
    return [re.sub(r"\[.*?\.\.\.\]", "", line) for line in shown]


def test_the_first_two_commands_are_those_that_ci_runs() -> None:
    first, second, *_ = (line for block in blocks(ROOT / "README.md", "sh") for line in block.splitlines())
    assert first.startswith("python3 -m venv .venv && ")
    assert first.endswith(" && torchrun fastrdm/train.py")
    assert second.startswith("python3 -m venv .venv && ")
    assert second.endswith(" && pytest")
    script = (ROOT / ".ci" / "run").read_text()
    (extraction,) = re.findall(r"^mapfile -t commands < <\((.*)\)", script, re.MULTILINE)
    done = subprocess.run(["bash", "-c", extraction], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [first, second]
    assert re.findall(r'bash -euc "\$\{commands\[(\d)\]\}"$', script, re.MULTILINE) == ["0", "1"]


@pytest.mark.parametrize("command", training_commands())
def test_shown_commands_are_accepted(command: str) -> None:
    words = shlex.split(re.sub(r" --(processes|nodes|rdzv-endpoint|max-restarts) \S+", "", command), comments=True)
    arguments = words[words.index("fastrdm/train.py" if words[0] == "torchrun" else "train") + 1 :]
    run_config.load([word for word in arguments if not word.startswith("--")])
    assert {word for word in arguments if word.startswith("--")} <= {"--print-config", "--help", "--published"}


@pytest.mark.parametrize("block", all_blocks("yaml"))
def test_shown_yaml_loads(block: str) -> None:
    run_config.resolve(tree.parse(block, "the block"))


@pytest.mark.parametrize("block", all_blocks("python"))
def test_shown_python_runs(block: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", block],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^ *print\(", block, re.MULTILINE)) <= len(done.stdout.splitlines())


def test_parts_of_ones_own_work_as_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each example of docs/extending.md in a file of the name in its first line, and its commands, in that folder."""
    page = ROOT / "docs" / "extending.md"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for block in blocks(page, "python"):
        (tmp_path / block.splitlines()[0].removeprefix("# ")).write_text(block)
    small = ["method.projector={hidden: 16, out: 12}", "loader.views.*.size=8", "evaluate.baselines=false"]
    commands = [shlex.split(line) for block in blocks(page, "sh") for line in block.splitlines()]
    assert {command[1] for command in commands} == {"train", "plan", "eval", "analyze"}
    assert len([command for command in commands if command[1] == "train"]) == len(blocks(page, "python")) == 7
    for _, name, *arguments in commands:
        assert cli.main([name, *arguments, *(small if name == "train" else [])]) == 0, arguments
        if name == "train":  # what a run writes down reads back
            run = next(word for word in arguments if word.startswith("run=")).removeprefix("run=")
            read, given = run_config.load([f"{run}/config.yaml"]), run_config.load([*arguments, *small])
            assert (read.method, read.encoder, read.loader.source) == (given.method, given.encoder, given.loader.source)


def test_an_hdf5_file_is_read_as_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source of docs/data.md trains and is packed, on real JPEG files."""
    h5py = pytest.importorskip("h5py", reason="needs h5py")
    (block,) = [b for b in blocks(ROOT / "docs" / "data.md", "python") if b.startswith("# shelf.py")]
    (tmp_path / "shelf.py").write_text(block)
    files = []
    for k, photo in enumerate(load_sample_images().images * 4):
        file = io.BytesIO()
        Image.fromarray(photo[k * 9 : k * 9 + 48, k : k + 40]).save(file, "JPEG")
        files.append(np.frombuffer(file.getvalue(), np.uint8))
    with h5py.File(tmp_path / "set.h5", "w") as file:
        file["classes"] = [b"temple", b"flower"]
        images = file.create_dataset("train/image", len(files), h5py.vlen_dtype(np.uint8))
        for k, data in enumerate(files):
            images[k] = data
        file["train/label"] = np.arange(len(files)) % 2
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    small = ["method.projector={hidden: 16, out: 12}", "loader.views.*.size=16", "encoder.width=4", "log.report=false"]
    words = ["loader.source=shelf:Shelf", "loader.root=set.h5", "train.length=2st", "optim.warmup=0st"]
    assert cli.main(["train", *words, *small, "loader.batch_size=4", "run=run"]) == 0
    assert cli.main(["pack", "set.h5", "packed", "--source", "shelf:Shelf", "--workers", "1"]) == 0
    packed = PackedSource(tmp_path / "packed")
    assert packed.classes == ["temple", "flower"] and packed.labels.tolist() == [0, 1] * 4
    assert [packed.fetch(k)[0] for k in range(8)] == [data.tobytes() for data in files]


def test_readme_names_every_preset() -> None:
    table = re.findall(r"^\| (`.*?) \|(.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    shown: set[str] = set()
    for names, row in table:
        for name in re.findall(r"`(\w+)`", names):
            stem = re.fullmatch(r"(.*?)[XP]", name)
            shown |= {stem[1] + choice for choice in re.findall(r"`([\w.]+)`", row)} if stem else {name}
    assert shown == PRESETS.keys()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(((?!https?://)[^)#]+)", page.read_text())
    assert [link for link in links if link not in MADE and not (page.parent / link).exists()] == []
