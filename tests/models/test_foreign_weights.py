"""Files in the layouts of other projects, made here, are read key by key; what does not fit is named."""

import argparse
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fastrdm.models.encoders import Encoder, EncoderConfig, build_encoder
from fastrdm.models.foreign_weights import check_export, load_foreign, read_tree
from fastrdm.models.layouts import LAYOUTS

CONFIG = EncoderConfig(name="resnet18", width=4)


def weights(seed: int, config: EncoderConfig = CONFIG) -> dict[str, Tensor]:
    """Random weights under torchvision's keys."""
    generator = torch.Generator().manual_seed(seed)
    state = build_encoder(config).state_dict()
    return {
        key: torch.randn(x.shape, generator=generator) if x.is_floating_point() else torch.tensor(seed)
        for key, x in state.items()
    }


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: x for key, x in tensors.items()}


ONE, TWO = weights(1), weights(2)
SOME = torch.ones(3)
SOLO = {**under("projector.", {"0.weight": SOME}), "classifier.weight": SOME, "predictor.0.weight": SOME}
FILES: list[tuple[str, Any, Any]] = [
    ("torchvision", "online", {**ONE, "fc.weight": SOME, "fc.bias": SOME}),
    ("torchvision", "online", {key: x for key, x in ONE.items() if "num_batches" not in key}),
    ("timm", "online", {"epoch": 3, "state_dict": {**ONE, "fc.weight": SOME}}),
    ("solo-learn", "online", {"state_dict": {**under("momentum_backbone.", TWO), **under("backbone.", ONE), **SOLO}}),
    ("solo-learn", "target", {"state_dict": {**under("backbone.", TWO), **under("momentum_backbone.", ONE), **SOLO}}),
    ("solo-learn", "online", {"state_dict": {**under("encoder.", ONE), **under("momentum_encoder.", TWO), **SOLO}}),
    ("solo-learn", "target", {"state_dict": {**under("encoder.", TWO), **under("momentum_encoder.", ONE), **SOLO}}),
    (
        "simsiam",
        "online",
        {
            "epoch": 100,
            "arch": "resnet18",
            "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
            "state_dict": {
                **under("module.encoder.", ONE),
                "module.encoder.fc.0.weight": SOME,
                "module.encoder.fc.1.running_mean": SOME,
                "module.predictor.0.weight": SOME,
            },
        },
    ),
    (
        "dino",
        "online",
        {
            "student": {**under("module.backbone.", ONE), "module.head.mlp.0.weight": SOME},
            "teacher": under("backbone.", TWO),
            "args": argparse.Namespace(arch="resnet18", lr=0.3),
        },
    ),
    (
        "dino",
        "target",
        {
            "student": under("module.backbone.", TWO),
            "teacher": {**under("backbone.", ONE), "head.last_layer.weight_g": SOME},
        },
    ),
    ("dino", "target", ONE),
    (
        "swav",
        "online",
        {**under("module.", ONE), "module.projection_head.0.weight": SOME, "module.prototypes.weight": SOME},
    ),
    ("swav", "online", {"epoch": 9, "state_dict": under("module.", ONE), "amp": {"loss_scaler0": {"loss_scale": 4.0}}}),
]


def encoder(config: EncoderConfig = CONFIG) -> Encoder:
    return build_encoder(config)


def written(tmp_path: Path, tree: Any) -> Path:
    file = tmp_path / "weights.pth.tar"
    torch.save(tree, file)
    return file


@pytest.mark.parametrize(("layout", "branch", "tree"), FILES, ids=[f"{f[0]}-{f[1]}-{i}" for i, f in enumerate(FILES)])
def test_each_layout_gives_the_encoder(tmp_path: Path, layout: str, branch: Any, tree: Any) -> None:
    model = encoder()
    load_foreign(model, CONFIG, written(tmp_path, tree), layout, branch)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, ONE[key]) or ("num_batches" in key and key not in tree), key


def test_safetensors_are_read(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file(ONE, file)
    model = encoder()
    load_foreign(model, CONFIG, file, "torchvision", "online")
    assert torch.equal(model.state_dict()["conv1.weight"], ONE["conv1.weight"])


def test_every_layout_has_a_file_above() -> None:
    assert {f[0] for f in FILES} == LAYOUTS.keys()


def refusal(tmp_path: Path, tree: Any, layout: str, branch: Any = "online", config: EncoderConfig = CONFIG) -> str:
    model = encoder(config)
    before = {key: x.clone() for key, x in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"weights\.pth\.tar") as refused:
        load_foreign(model, config, written(tmp_path, tree), layout, branch)
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items()), "nothing is half-loaded"
    return str(refused.value)


def test_the_first_keys_that_differ_are_named(tmp_path: Path) -> None:
    tree = {key: x for key, x in ONE.items() if not key.startswith("layer4.1")}
    tree |= {"bn1.weight": torch.ones(7), "extra.weight": SOME}
    told = refusal(tmp_path, tree, "torchvision")
    assert "10 missing (layer4.1.conv1.weight, layer4.1.bn1.weight, layer4.1.bn1.bias)" in told
    assert "1 unexpected (extra.weight)" in told
    assert "1 of another shape (bn1.weight (7,) for (4,))" in told


@pytest.mark.parametrize(
    ("tree", "asked", "advised"),
    [
        (ONE, "solo-learn", "torchvision --branch online"),
        (ONE, "dino", "torchvision --branch online"),
        ({"state_dict": under("momentum_encoder.", ONE)}, "simsiam", "solo-learn --branch target"),
        ({"state_dict": under("backbone.", ONE)}, "torchvision", "solo-learn --branch online"),
        ({"state_dict": under("module.encoder.", ONE)}, "swav", "simsiam --branch online"),
        ({"teacher": under("module.backbone.", ONE)}, "timm", "dino --branch target"),
        (under("module.", ONE), "dino", "swav --branch online"),
    ],
)
def test_a_wrong_layout_is_told_a_right_one(tmp_path: Path, tree: Any, asked: str, advised: str) -> None:
    told = refusal(tmp_path, tree, asked)
    assert f"in layout {asked} does not fit resnet18: " in told
    assert told.endswith(f". It fits with --layout {advised}")


@pytest.mark.parametrize(
    ("held", "asked", "told"),
    [
        (EncoderConfig(name="resnet18"), EncoderConfig(name="resnet34"), "--encoder resnet18 --layout swav"),
        (EncoderConfig(name="resnet18"), EncoderConfig(name="resnet50"), "--encoder resnet18 --layout swav"),
        (
            EncoderConfig(name="resnet18", stem="cifar"),
            EncoderConfig(name="resnet18"),
            "--encoder resnet18 --stem cifar --layout swav",
        ),
    ],
)
def test_a_file_of_another_encoder_is_named(
    tmp_path: Path, held: EncoderConfig, asked: EncoderConfig, told: str
) -> None:
    with torch.device("meta"):
        shapes = build_encoder(held).state_dict()
    tree = under("module.", {key: torch.zeros((), dtype=x.dtype).expand(x.shape) for key, x in shapes.items()})
    assert f"It holds resnet18: {told}" in refusal(tmp_path, tree, "swav", config=asked)


def test_a_missing_branch_is_named(tmp_path: Path) -> None:
    assert "it has no target branch" in refusal(tmp_path, ONE, "torchvision", "target")
    told = refusal(tmp_path, {"state_dict": under("backbone.", ONE)}, "solo-learn", "target")
    assert "no key begins with momentum_backbone. or momentum_encoder. (there is backbone.conv1.weight" in told
    assert "no 'student' among its keys (epoch)" in refusal(tmp_path, {"epoch": 1}, "dino")


def test_files_that_need_code_are_refused(tmp_path: Path) -> None:
    file = written(tmp_path, {"state_dict": under("backbone.", ONE), "hyper_parameters": Fraction(1, 3)})
    with pytest.raises(ValueError, match=r"not safe to load: it holds fractions\.Fraction.*write its weights alone"):
        read_tree(file)


def test_files_that_hold_no_weights_are_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"hello")
    with pytest.raises(ValueError, match="cannot be read"):
        read_tree(broken)
    with pytest.raises(ValueError, match="weights by name, got a list"):
        read_tree(written(tmp_path, [1, 2]))
    whole = written(tmp_path, ONE)
    whole.write_bytes(whole.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read"):
        read_tree(whole)
    broken.rename(tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match="cannot be read"):
        read_tree(tmp_path / "broken.safetensors")


def test_timm_leaves_its_own_classifier_out(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("mobilenetv3_small_050", num_classes=10)
    config = EncoderConfig(name="timm/mobilenetv3_small_050")
    model = build_encoder(config).eval()
    load_foreign(model, config, written(tmp_path, theirs.state_dict()), "timm", "online")
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    theirs.reset_classifier(0)
    torch.testing.assert_close(model(images), theirs.eval()(images), rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", ["torchvision", "timm"])
@pytest.mark.parametrize(
    ("config", "told"),
    [
        (EncoderConfig(name="resnet_small"), "cannot hold resnet_small"),
        (EncoderConfig(name="resnet18", stem="cifar"), "cannot hold encoder.stem=cifar: its resnet18 begins"),
        (EncoderConfig(name="resnet50", stem="cifar_padding2"), "cannot hold encoder.stem=cifar_padding2"),
        (EncoderConfig(name="resnet18", width=32), "cannot hold encoder.width=32, only 64"),
    ],
)
def test_what_a_layout_cannot_hold_is_refused(layout: str, config: EncoderConfig, told: str) -> None:
    with pytest.raises(ValueError, match=f"--layout {layout} {told}.*--layout safetensors holds it"):
        check_export(config, layout)
    check_export(config, "safetensors")


def test_networks_of_timm_go_to_timm() -> None:
    config = EncoderConfig(name="timm/resnet18")
    check_export(config, "timm")
    with pytest.raises(ValueError, match=r"--layout torchvision cannot hold timm/resnet18: --layout timm does"):
        check_export(config, "torchvision")
