"""`fastrdm eval` on a small run of its own: what it prints, what it writes, what it refuses."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastrdm
from fastrdm import cli
from fastrdm.commands import evaluate as offline
from fastrdm.commands import parsers
from fastrdm.commands.pretrained import from_file
from fastrdm.config import run_config
from fastrdm.evaluation.knn import wilson_interval
from fastrdm.evaluation.published_settings import RECIPES
from fastrdm.evaluation.settings import EvalConfig
from fastrdm.loaders.sources.open import open_source
from fastrdm.loaders.spec import LoaderConfig
from fastrdm.models.encoders import EncoderConfig, build_encoder
from fastrdm.runtime import checkpoint
from fastrdm.runtime.checkpoint import WEIGHTS
from fastrdm.trainer import Trainer

SMALL = [
    "preset=byol",
    "train.length=6st",
    "optim.warmup=1st",
    "encoder.width=4",
    "train.precision=fp32",  # as eval's own
    "method.projector.hidden=16",
    "method.projector.out=12",
    "loader.batch_size=64",
    "loader.views.*.size=8",
    "evaluate.baselines=false",
    "checkpoint.every=3st",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with the checkpoints of steps 3 and 6."""
    folder = tmp_path_factory.mktemp("runs") / "byol"
    trainer = Trainer(run_config.load([*SMALL, f"run={folder}"]))
    assert trainer.train()
    metrics = {"knn": trainer.metrics["knn"], "knn_target": trainer.metrics["knn_target"]}
    (folder / "told.json").write_text(json.dumps(metrics))
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without EMA."""
    folder = tmp_path_factory.mktemp("runs") / "simsiam"
    assert Trainer(run_config.load([*SMALL, "preset=simsiam", "train.length=1st", f"run={folder}"])).train()
    return folder


def evaluate(*arguments: object) -> None:
    assert offline.main([str(a) for a in arguments]) == 0


def record(file: Path) -> Any:
    return json.loads(file.read_text())


def refusal(*arguments: object) -> str:
    with pytest.raises(ValueError) as refused:
        offline.main([str(a) for a in arguments])
    return str(refused.value)


def test_knn_is_what_training_measured(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = record(run / "told.json")
    evaluate(run, "--method", "knn", "--out", tmp_path)
    evaluate(run, "--method", "knn", "--branch", "target", "--out", tmp_path)
    online, target = (record(tmp_path / f"eval-knn-digits{end}.json") for end in ("", "-target"))
    assert online["top1"]["share"] == told["knn"]
    assert target["top1"]["share"] == told["knn_target"]
    assert online["top5"]["share"] > online["top1"]["share"]
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith(f"knn on digits, 360 images: top-1 {100 * told['knn']:.1f} % (")


def test_a_record_says_how_its_number_was_made(run: Path) -> None:
    evaluate(run, "linear.epochs=2", "linear.rates=[0.1, 1]", "knn.k=7")
    knn, linear = (record(run / f"eval-{name}-digits.json") for name in ("knn", "linear"))
    for found in (knn, linear):
        top1 = found["top1"]
        assert top1["of"] == 360
        assert top1["share"] == top1["right"] / 360
        assert (top1["low"], top1["high"]) == wilson_interval(top1["right"], 360)
        weights = run / "checkpoints" / "step-00000006" / WEIGHTS
        assert found["checkpoint"]["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
        assert found["checkpoint"]["step"] == 6
        assert found["source"] | {"view": None} == {
            "name": "digits", "subset": None, "train_images": 1437, "test_images": 360, "classes": 10,
            "unreadable": 0, "view": None,
        }  # fmt: skip
        assert found["source"]["view"]["size"] == 8
        assert found["versions"]["torch"] == torch.__version__
        assert found["seconds"] > 0
    assert knn["settings"] == {"k": 7, "temperature": 0.07}
    assert linear["settings"]["epochs"] == 2
    assert [row["rate"] for row in linear["rates"]] == [0.1, 1.0]
    assert linear["rate"] in (0.1, 1.0)


def test_a_step_folder_is_measured_as_that_step(run: Path) -> None:
    step = run / "checkpoints" / "step-00000003"
    evaluate(step, "--method", "knn")
    assert record(step / "eval-knn-digits.json")["checkpoint"]["step"] == 3


def test_augmented_probe_and_fine_tuning_have_files_of_their_own(run: Path, tmp_path: Path) -> None:
    evaluate(run, "--method", "linear,finetune", "linear.augment=true", "linear.epochs=1", "--labels", "0.01,0.1",
             "finetune.epochs=1", "--out", tmp_path)  # fmt: skip
    names = {file.name for file in tmp_path.iterdir()}
    records = {f"eval-{name}-digits.json" for name in ("linear-augmented", "finetune-0.01", "finetune-0.1")}
    assert names == records | {f"eval-finetune-{share}-digits.safetensors" for share in ("0.01", "0.1")}
    assert [record(tmp_path / f"eval-finetune-{s}-digits.json")["train_images"] for s in ("0.01", "0.1")] == [10, 140]


def test_transfer_to_another_source(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "transfer_source.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    evaluate(run, "--source", "transfer_source:Bright", "--method", "knn", "--size", "12")
    found = record(run / "eval-knn-transfer_source-Bright.json")
    assert found["top1"] == {"share": 1.0, "low": wilson_interval(20, 20)[0], "high": 1.0, "right": 20, "of": 20}
    assert "top5" not in found
    assert found["source"]["train_images"] == 55, "five have no label"
    assert found["source"]["view"]["size"] == 12
    told = refusal(run, "--source", "transfer_source:Other", "--method", "knn")
    assert "the two splits of bright do not have the same classes: 1 only in test (" in told
    told = refusal(run, "--source", "transfer_source:Unlabeled", "--method", "knn")
    assert "the training images of bright have no labels: an accuracy would mean nothing" in told


def test_weights_and_features_that_are_not_finite_are_refused(run: Path, tmp_path: Path) -> None:
    found = checkpoint.read(checkpoint.folder(run, 6))
    key = "method.online.encoder.conv1.weight"
    meta = {name: found.meta[name] for name in ("metrics", "config", "versions")}
    for value, reason in ((float("nan"), "weights that are not finite, 1 tensors: conv1.weight"), (3e38, "not finite")):
        weights = {**found.weights, key: torch.full_like(found.weights[key], value)}
        checkpoint.save(tmp_path, 6, weights, found.state, meta)
        assert reason in refusal(tmp_path, "--method", "knn")
    assert not list(tmp_path.glob("eval*"))


SOURCE = """
import numpy as np
from fastrdm.loaders.sources.source import Source

class Bright(Source):
    name = "bright"
    def __init__(self, root, split):
        self.classes = ["dark", "bright"]
        self.labels = np.arange(60 if split == "train" else 20) % 2
        shade = np.where(self.labels, 200, 20)[:, None, None, None]
        self.images = (shade + np.random.default_rng(0).integers(0, 40, (len(shade), 9, 9, 3))).astype(np.uint8)
        if split == "train":
            self.labels[:5] = -1
    def __len__(self):
        return len(self.labels)
    def read(self, index):
        return self.images[index]

class Other(Bright):
    def __init__(self, root, split):
        super().__init__(root, split)
        if split == "test":
            self.classes = ["dark", "grayscale", "bright"]

class Unlabeled(Bright):
    def __init__(self, root, split):
        super().__init__(root, split)
        self.labels[:] = -1
"""


def test_weights_of_another_project(tmp_path: Path) -> None:
    file = tmp_path / "solo.ckpt"
    given = ("--weights", file, "--layout", "solo-learn", "--encoder", "resnet18")
    assert "--weights must be a file" in refusal(*given)
    encoder = build_encoder(EncoderConfig(name="resnet18", stem="cifar"))
    torch.save({"state_dict": {f"backbone.{key}": x for key, x in encoder.state_dict().items()}}, file)
    assert "solo.ckpt in layout solo-learn does not fit resnet18: 1 of another shape (conv1.weight" in refusal(*given)
    assert "--source must name the images" in refusal(*given, "--stem", "cifar")
    evaluate(*given, "--stem", "cifar", "--source", "digits", "--size", "8", "--method", "knn")
    found = record(tmp_path / "eval-knn-digits-solo.json")
    assert (found["checkpoint"]["layout"], found["checkpoint"]["stem"]) == ("solo-learn", "cifar")
    assert found["top1"]["share"] > 0.2


def test_recipes_are_settings_and_name_their_method() -> None:
    for name, tree in RECIPES.items():
        options = parsers.evaluate().parse_args(["--recipe", name])
        found = offline.settings(options, [])
        (method,) = tree
        assert getattr(found, method) != getattr(EvalConfig(), method)
    simsiam = offline.settings(parsers.evaluate().parse_args(["--recipe", "simsiam"]), ["linear.epochs=3"]).linear
    assert simsiam.rates[0] * simsiam.batch_size / 256 == pytest.approx(1.6)
    assert (simsiam.optimizer, simsiam.epochs, simsiam.augment) == ("lars", 3, True)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("linear.epoch=3",), "unknown setting linear.epoch: did you mean linear.epochs?"),
        (("linear.epochs=x",), "linear.epochs: input should be a valid integer"),
        (("linear.rates=[]",), "linear.rates must be rates above 0"),
        (("linear.held_out=1",), "linear.held_out: input should be less than 1"),
        (("finetune.scale=[2,1]",), "finetune.scale must be 0 < low <= high <= 1"),
        (("--labels", "0,1"), "finetune.labels must be shares in (0, 1]"),
        (("--method", "knn,probe"), "--method must be of knn, linear, finetune, got 'probe'"),
        (("--encoder", "resnet50"), "--encoder must be resnet18, which "),
        (("--layout", "dino"), "--layout must be left out for a checkpoint of fastrdm"),
        (("--size", "0"), "--size must be above 0, got 0"),
        (("other",), "CHECKPOINT must be one folder"),
        (("--source", "digit"), "did you mean 'digits'?"),
        (("--weights", "x.pth"), "the encoder must be a CHECKPOINT or --weights FILE, one of the two"),
    ],
)
def test_what_is_refused(run: Path, arguments: tuple[str, ...], told: str) -> None:
    assert told in refusal(run, *arguments)


def test_what_is_refused_without_a_run(tmp_path: Path, plain: Path) -> None:
    assert "CHECKPOINT must be a run folder with checkpoints" in refusal(tmp_path)
    file = tmp_path / "weights.pth"
    torch.save({}, file)
    assert "takes --weights FILE --layout NAME" in refusal(file)
    assert "--layout must be given with --weights" in refusal("--weights", file)
    assert "--branch must be online: simsiam" in refusal(plain, "--branch", "target")
    assert "did you mean 'resnet18'?" in refusal("--weights", file, "--layout", "dino", "--encoder", "resnet81")


def test_several_processes_are_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "must be run on one process, without torchrun, got '2 processes'" in refusal(run)


def test_a_damaged_checkpoint_ends_in_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "meta.json").write_text("{}")
    assert cli.guarded(offline.main, [str(tmp_path)]) == cli.EXIT_FAILED
    assert "is not of format fastrdm-1" in capsys.readouterr().err


def test_help_lists_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        offline.main(["--help"])
    shown = capsys.readouterr().out
    assert "linear.epochs = 100" in shown
    assert "A set with fewer images makes one batch." in shown, "descriptions of inherited fields are found"


def test_the_fine_tuned_model_is_saved(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--method", "finetune", "--labels", "1", "finetune.epochs=1", "--out", tmp_path]
    evaluate(run, *given)
    file = tmp_path / "eval-finetune-1-digits.safetensors"
    assert f"fine-tuned model: {file}" in capsys.readouterr().out
    weights = load_file(file)
    encoder, preprocess = fastrdm.load_encoder(file)
    before, _ = fastrdm.load_encoder(run)
    test = open_source(LoaderConfig(), "test")
    assert test.images is not None
    with torch.no_grad():
        features = encoder(torch.stack([preprocess(image) for image in test.images]))
        assert not torch.equal(before.conv1.weight, encoder.conv1.weight)  # type: ignore[attr-defined]
    scores = features @ weights["fc.weight"].T + weights["fc.bias"]
    right = int((scores.argmax(1).numpy() == test.labels).sum())
    assert right == record(tmp_path / "eval-finetune-1-digits.json")["top1"]["right"]


def test_public_weights_are_seen_as_they_were_trained(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    config = EncoderConfig(name="timm/vit_tiny_patch16_224")
    file = tmp_path / "model.safetensors"
    save_file(build_encoder(config).backbone.state_dict(), file)
    view = from_file(file, "timm", config, "online").view
    assert (view.size, view.mean, view.interpolation) == (224, (0.5, 0.5, 0.5), "bicubic")
    card = {"input_size": [3, 224, 224], "mean": [0.1, 0.2, 0.3], "std": [0.2, 0.2, 0.2], "interpolation": "bilinear"}
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": card}))
    view = from_file(file, "timm", config, "online").view
    assert (view.mean, view.std, view.interpolation) == ((0.1, 0.2, 0.3), (0.2, 0.2, 0.2), "bilinear")
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": {**card, "std": [0, 0, 0]}}))
    with pytest.raises(ValueError, match=r"config\.json describes images that no view can be"):
        from_file(file, "timm", config, "online")
