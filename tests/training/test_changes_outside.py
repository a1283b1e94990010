"""What lies outside a run's folder changes between a kill and the restart: noticed and named, or of no consequence."""

import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastrdm import cli
from fastrdm.loaders.packing.pack import main as pack
from fastrdm.loaders.sources.source import Source
from fastrdm.runtime import checkpoint
from fastrdm.training import run_state
from fastrdm.training.fingerprint import differences, fingerprint

SMALL = [
    *("encoder.name=resnet_small", "encoder.width=4", "method.projector={hidden: 16, out: 12}"),
    *("loader.batch_size=8", "loader.views.*.size=8", "train.length=4st", "optim.warmup=1st", "evaluate.every=0st"),
    *("evaluate.baselines=false", "checkpoint.every=2st", "log.report=false", "run=run"),
]
Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str]:
        status = cli.train([*SMALL, *arguments])
        told = capsys.readouterr()
        return status, told.out + told.err

    return run


def pictures(root: str, seed: int = 0, splits: tuple[str, ...] = ("train", "val")) -> None:
    random = np.random.default_rng(seed)
    for split in splits:
        for label in "ab":
            folder = Path(root, split, label)
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(8 if split == "train" else 3):
                Image.fromarray(random.integers(0, 256, (12, 14, 3), np.uint8)).save(folder / f"{number}.png")


def killed_at_step_2() -> None:
    """Leave of the run what a kill after step 2 leaves."""
    shutil.rmtree("run/checkpoints/step-00000004")
    Path("run/summary.json").unlink()


def tar(path: str, seed: int) -> None:
    pictures("loose", seed, ("train",))
    with tarfile.open(path, "w") as file:
        for picture in sorted(Path("loose/train").rglob("*.png")):
            file.add(picture, picture.name if picture.parent.name == "a" else f"1{picture.name}")


# The data set in each form, how it changes, and what is told.
FORMS = {
    "folder": (["loader.source=folder", "loader.root=data"], "other content"),
    "pack": (["loader.source=packed", "loader.root=packed"], "other content"),
    "tar": (["loader.source=webdataset", "loader.root=train.tar"], "other content"),
    "labels file": (["loader.source=folder", "loader.root=data", "loader.labels=labels.csv"], "other labels"),
    "class list": (["loader.source=folder", "loader.root=data", "loader.classes=classes.txt"], "other classes"),
}


def make(form: str, seed: int) -> None:
    pictures("data", seed if form in ("folder", "pack") else 0)
    if form == "pack":
        shutil.rmtree("packed", ignore_errors=True)
        pack(["data", "packed", "--workers", "1"])
    elif form == "tar":
        tar("train.tar", seed)
    elif form == "labels file":
        names = sorted(str(path.relative_to("data")) for path in Path("data").rglob("*.png"))
        names = [name.partition("/")[2] for name in names]
        rows = [f"{name},{'ab'[(index + seed * (index < 3)) % 2]}" for index, name in enumerate(dict.fromkeys(names))]
        Path("labels.csv").write_text("\n".join(["file,label", *rows]))
    elif form == "class list":
        Path("classes.txt").write_text("b\na\n" if seed else "a\nb\n")
        if seed:
            Path("classes.txt").write_text("a\n")


@pytest.mark.parametrize("form", FORMS)
def test_other_images_or_labels_to_train_on_are_another_run(form: str, run: Run) -> None:
    settings, named = FORMS[form]
    make(form, 0)
    status, told = run(*settings)
    assert status == 0, told
    killed_at_step_2()
    make(form, 1)
    status, told = run(*settings)
    assert status == cli.EXIT_REFUSED and named in told and "restore the data, or choose another run=" in told
    assert told.splitlines()[-1].startswith("fastrdm: run holds a run on other data than ")


def test_a_repaired_image_is_the_same_run(run: Run) -> None:
    settings = ["loader.source=folder", "loader.root=data", "loader.max_corrupt=0.2"]
    pictures("data")
    whole = Path("data/train/a/3.png").read_bytes()
    Path("data/train/a/3.png").write_bytes(b"no image")
    assert run(*settings)[0] == 0
    killed_at_step_2()
    Path("data/train/a/3.png").write_bytes(whole)
    status, told = run(*settings)
    assert status == 0 and "continuing from run/checkpoints/step-00000002" in told


@pytest.mark.parametrize("where", ["its own", "the run's"])
def test_other_images_to_evaluate_on_are_told_and_the_run_goes_on(where: str, run: Run) -> None:
    settings = ["loader.source=folder", "loader.root=data"]
    settings += ["evaluate.source=folder", "evaluate.root=judged"] if where == "its own" else []
    pictures("data")
    pictures("judged")
    assert run(*settings)[0] == 0
    weights = Path("run/checkpoints/step-00000004", checkpoint.WEIGHTS).read_bytes()
    killed_at_step_2()
    pictures("judged" if where == "its own" else "data", 1, ("val",))
    status, told = run(*settings)
    assert status == 0, told
    assert "note: the test images of evaluations are not those of step 2 (other content)" in told
    assert Path("run/checkpoints/step-00000004", checkpoint.WEIGHTS).read_bytes() == weights
    assert "are not those of" not in run(*settings)[1]


def test_the_evaluation_set_may_move(run: Run) -> None:
    pictures("data")
    pictures("judged")
    settings = ["loader.source=folder", "loader.root=data", "evaluate.source=folder"]
    assert run(*settings, "evaluate.root=judged")[0] == 0
    killed_at_step_2()
    Path("judged").rename("elsewhere")
    status, told = run(*settings, "evaluate.root=elsewhere")
    assert status == 0 and "continuing from" in told and "are not those of" not in told


def test_weights_that_a_run_began_from_are_read_once(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    pictures("data")
    settings = ["loader.source=folder", "loader.root=data", "train.init=first.safetensors"]
    assert run("loader.source=folder", "loader.root=data", "run=other", "train.seed=1")[0] == 0
    first = ["other", "--layout", "safetensors", "--out", "first.safetensors"]
    assert cli.run("export", first) == 0
    assert run(*settings)[0] == 0
    weights = Path("run/checkpoints/step-00000004", checkpoint.WEIGHTS).read_bytes()
    killed_at_step_2()
    Path("first.safetensors").unlink()
    status, told = run(*settings)
    assert status == 0 and "continuing from run/checkpoints/step-00000002" in told, told
    assert Path("run/checkpoints/step-00000004", checkpoint.WEIGHTS).read_bytes() == weights


def test_another_torch_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures("data")
    settings = ["loader.source=folder", "loader.root=data"]
    before = {**run_state.versions(), "torch": "1.0"}
    with monkeypatch.context() as patch:
        patch.setattr(run_state, "versions", lambda: before)
        assert run(*settings)[0] == 0
    killed_at_step_2()
    status, told = run(*settings)
    assert status == 0 and "note: step 2 was computed with torch 1.0, the rest is with " in told


def test_contents_are_compared_where_both_could_be_read() -> None:
    old = {"images": 3, "content": ["a", None, "c"]}
    assert differences(old, {"images": 3, "content": ["a", "b", None]}) == []
    assert differences(old, {"images": 3, "content": ["x", "b", "c"]}) == ["other content"]
    assert differences({"content": "digest of earlier versions"}, {"content": ["a"]}) == []
    assert differences(old, {"images": 4, "content": ["a", "b", "c", "d"]}) == ["images: 3 -> 4"]


def test_a_split_without_images_is_asked_for_none() -> None:
    class Nothing(Source):
        name, classes, labels = "nothing", ["a"], np.zeros(0, np.int64)

        def fetch(self, index: int) -> tuple[bytes, str]:
            raise IndexError(index)

    assert fingerprint(Nothing())["images"] == 0 and "content" not in fingerprint(Nothing())
