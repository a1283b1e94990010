"""`train.init`: what is taken over, what is left and named, and what is refused."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fastrdm import cli
from fastrdm.config import run_config
from fastrdm.runtime import checkpoint
from fastrdm.schema import Horizon
from fastrdm.training.initial_weights import initialize
from fastrdm.training.learner import Learner, build_learner, build_method

SMALL = [
    "quickstart.yaml",
    "encoder.width=4",
    "method.projector={hidden: 16, out: 12}",
    "loader.subset=80",
    "loader.batch_size=16",
    "loader.views.*.size=8",
    "evaluate.every=0st",
    "train.length=4st",
    "log.report=false",
]


def learner(*settings: str, seed: int = 0) -> tuple[Learner, Any]:
    c = run_config.load([*SMALL, *settings])
    torch.manual_seed(seed)
    return build_learner(build_method(c, Horizon(5, 20)), c, 10), c.encoder


@pytest.fixture(scope="module")
def byol(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("init") / "byol"
    assert cli.train([*SMALL, "preset=byol", "method.online.0.hidden=16", f"run={run}", "checkpoint.every=2st"]) == 0
    return run


def test_all_of_a_run_is_taken_where_it_fits(byol: Path) -> None:
    mine, encoder = learner("preset=byol", "method.online.0.hidden=16")
    lines, record = initialize(mine, str(byol), encoder)
    stored = checkpoint.read(checkpoint.folder(byol, 4)).weights
    assert all(torch.equal(x, stored[key]) for key, x in mine.state_dict().items())
    assert len(lines) == 1 and "step count, schedules and optimizer begin anew" in lines[0]
    assert (record["step"], record["left"]) == (4, []) and len(record["sha256"]) == 64


@pytest.mark.parametrize(
    "init", ["{run}:2", "{run}/checkpoints/step-00000002", "{run}/checkpoints/step-00000002/model.safetensors"]
)
def test_a_step_of_a_run(byol: Path, init: str) -> None:
    mine, encoder = learner("preset=byol", "method.online.0.hidden=16")
    _, record = initialize(mine, init.format(run=byol), encoder)
    stored = checkpoint.read(checkpoint.folder(byol, 2)).weights
    assert torch.equal(mine.method.online.encoder.conv1.weight, stored["method.online.encoder.conv1.weight"])
    assert record["step"] == 2


def test_what_does_not_fit_is_left_and_named(byol: Path) -> None:
    mine, encoder = learner("preset=dino", "method.online.0.count=20", "method.target.0.count=20", seed=3)
    before = {key: x.clone() for key, x in mine.state_dict().items()}
    lines, record = initialize(mine, str(byol), encoder)
    assert record["left"] == [
        "method.online.projector",
        "method.online.prototypes",
        "method.target.projector",
        "method.target.prototypes",
        "method.target_transforms.1",
    ]
    assert "left as the seed made them: online.projector, online.prototypes, target.projector" in lines[1]
    after = mine.state_dict()
    for key, x in before.items():
        assert torch.equal(x, after[key]) == (
            key.startswith(tuple(record["left"])) or ("running_" in key and torch.equal(x, after[key]))
        )


def test_a_target_without_one_of_its_own_takes_the_online_weights(tmp_path: Path, byol: Path) -> None:
    run = tmp_path / "simsiam"
    assert cli.train([*SMALL, f"run={run}"]) == 0
    mine, encoder = learner("preset=byol", "method.online.0.hidden=16", seed=4)
    initialize(mine, str(run), encoder)
    assert mine.method.target is not None
    online, target = (network.encoder.state_dict() for network in (mine.method.online, mine.method.target))
    assert all(torch.equal(x, target[key]) for key, x in online.items())


def test_another_encoder_is_refused(byol: Path) -> None:
    mine, encoder = learner("encoder.width=8")
    with pytest.raises(
        ValueError, match=r"^train.init=.*byol/checkpoints/step-00000004 holds another encoder: \d+ tensors"
    ):
        initialize(mine, str(byol), encoder)


@pytest.mark.parametrize(
    ("init", "told"),
    [
        ("{run}:3", "train.init must name a checkpoint that is there, got step 3 of .*byol: 4, 2$"),
        (
            "{empty}",
            "train.init must be a run's folder, FOLDER:STEP, a file or timm:NAME, got .*, which holds no checkpoint$",
        ),
        ("{empty}/none", "train.init must be .*, which is not there$"),
        ("{empty}/text.pth", "text.pth cannot be read: "),
        ("timm:resnet18:{empty}/none.pth", "must name a file, got .*none.pth$"),
    ],
)
def test_what_cannot_be_taken_is_refused_in_one_line(tmp_path: Path, byol: Path, init: str, told: str) -> None:
    (tmp_path / "text.pth").write_text("no weights")
    mine, encoder = learner()
    with pytest.raises(ValueError, match=told) as refused:
        initialize(mine, init.format(run=byol, empty=tmp_path), encoder)
    assert "\n" not in str(refused.value)


def test_weights_that_are_not_there_are_told_before_anything_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.train([f"train.init={tmp_path}", f"run={tmp_path / 'run'}"]) == cli.EXIT_REFUSED
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("fastrdm: train.init must be") and told.err.count("\n") == 1


RESNET18 = ["encoder.name=resnet18", "encoder.stem=imagenet", "encoder.width=null"]


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_checkpoint_of_a_library_with_and_without_its_classifier(tmp_path: Path, library: str, head: bool) -> None:
    torchvision, timm = pytest.importorskip("torchvision"), pytest.importorskip("timm")
    model = torchvision.models.resnet18() if library == "torchvision" else timm.create_model("resnet18")
    weights = model.state_dict()
    if not head:
        weights = {key: x for key, x in weights.items() if not key.startswith("fc.")}
    torch.save(weights, tmp_path / "w.pth")
    mine, encoder = learner("preset=byol", *RESNET18)
    lines, record = initialize(mine, str(tmp_path / "w.pth"), encoder)
    assert mine.method.target is not None
    for network in (mine.method.online, mine.method.target):
        assert all(torch.equal(x, weights[key]) for key, x in network.encoder.state_dict().items())
    assert "online.projector" in lines[1] and record["layout"] == "torchvision"


def test_dinos_file_fills_both_branches(tmp_path: Path) -> None:
    mine, encoder = learner("preset=byol", *RESNET18)
    student, teacher = (
        {k: torch.randn_like(x, dtype=torch.float) for k, x in mine.method.online.encoder.state_dict().items()}
        for _ in range(2)
    )
    named = {"student": {f"module.backbone.{k}": x for k, x in student.items()}}
    named["teacher"] = {f"backbone.{k}": x for k, x in teacher.items()}
    torch.save(named, tmp_path / "dino.pth")
    initialize(mine, str(tmp_path / "dino.pth"), encoder)
    assert mine.method.target is not None
    assert torch.equal(mine.method.online.encoder.conv1.weight, student["conv1.weight"])
    assert torch.equal(mine.method.target.encoder.conv1.weight, teacher["conv1.weight"])


def test_a_file_for_another_network_says_which(tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "w.pth")
    mine, encoder = learner(*RESNET18)
    with pytest.raises(ValueError, match=r"w.pth does not fit resnet18: .*It holds resnet34"):
        initialize(mine, str(tmp_path / "w.pth"), encoder)


def test_timms_network_by_name_with_a_file(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    weights = timm.create_model("resnet18", num_classes=5).state_dict()
    torch.save(weights, tmp_path / "w.pth")
    mine, encoder = learner(*RESNET18)
    initialize(mine, f"timm:resnet18:{tmp_path / 'w.pth'}", encoder)
    assert torch.equal(mine.method.online.encoder.conv1.weight, weights["conv1.weight"])


def test_a_vision_transformer_of_timm(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    weights = timm.create_model("test_vit").state_dict()
    torch.save(weights, tmp_path / "w.pth")
    mine, encoder = learner("encoder={name: timm/test_vit, stem: imagenet, width: null, zero_init_residual: false}")
    initialize(mine, str(tmp_path / "w.pth"), encoder)
    assert torch.equal(mine.method.online.encoder.backbone.state_dict()["pos_embed"], weights["pos_embed"])


def test_a_finished_run_is_lengthened_as_its_refusal_says(
    byol: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    same = [*SMALL, "preset=byol", "method.online.0.hidden=16", "checkpoint.every=2st"]
    assert cli.train([*same, f"run={byol}", "train.length=8st"]) == cli.EXIT_REFUSED
    told = capfd.readouterr().err
    init = re.search(r"train.init=\S+ with another run= starts the longer run from its weights", told)
    assert init and "train.length: 4st -> 8st" in told
    longer = [*same, f"run={tmp_path / 'longer'}", "train.length=8st", init[0].split()[0]]
    assert cli.train(longer) == 0
    said = capfd.readouterr().out
    assert f"starting from the weights of {byol}/checkpoints/step-00000004: step count, schedules" in said
    assert "initial encoder" in said and "random encoder" in said
    last = checkpoint.read(checkpoint.folder(tmp_path / "longer", 8))
    assert last.meta["init"]["step"] == 4
    assert cli.train(longer) == 0, "the same command tells the summary again, and needs the weights no more"
