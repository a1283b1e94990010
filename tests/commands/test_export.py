"""Exported files load where they are meant to be loaded, strictly, and give the encoder's own outputs there."""

import importlib.util
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import fastrdm
from fastrdm.commands import export
from fastrdm.commands.pretrained import Pretrained, from_file, from_path, from_run
from fastrdm.config import run_config
from fastrdm.loaders.spec import ViewSpec
from fastrdm.models.encoders import EncoderConfig, build_encoder
from fastrdm.trainer import Trainer

SMALL = [
    "quickstart.yaml",
    "preset=byol",
    "train.length=2st",
    "optim.warmup=1st",
    "method.projector.hidden=16",
    "method.projector.out=12",
    "loader.batch_size=16",
    "loader.subset=40",
    "loader.views.*.size=8",
    "evaluate.baselines=false",
    "evaluate.probe=false",
]


def pretrained(name: str) -> Pretrained:
    """An encoder with running statistics that no initialization gives."""
    torch.manual_seed(0)
    settings = EncoderConfig(name=name)
    encoder = build_encoder(settings)
    with torch.no_grad():
        for _ in range(3):
            encoder(torch.randn(4, 3, 64, 64))
    origin = {"encoder": name, "preset": "simsiam", "step": 1, "branch": "online", "sha256": "0"}
    return Pretrained(encoder.eval(), settings, ViewSpec(), None, Path(), origin)


def images(size: int = 64) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("resnet18", "torchvision"),
        ("resnet50", "torchvision"),
        ("resnet18", "timm"),
        ("timm/resnet18", "timm"),
        ("timm/mobilenetv3_small_050", "timm"),
    ],
)
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
@torch.no_grad()
def test_files_load_strictly_and_agree(tmp_path: Path, name: str, layout: str, ending: str) -> None:
    pytest.importorskip(layout)
    ours, file = pretrained(name), tmp_path / f"weights{ending}"
    export.write(ours, file)
    theirs: Any
    if layout == "timm":
        import timm

        theirs = timm.create_model(name.removeprefix("timm/"), num_classes=1000)
        classifier = theirs.pretrained_cfg["classifier"]
    else:
        from torchvision.models import get_model

        theirs, classifier = get_model(name, weights=None), "fc"
    weights = load_file(file) if ending == ".safetensors" else torch.load(file, weights_only=True)
    told = theirs.load_state_dict(weights, strict=False)
    assert told.unexpected_keys == []
    assert told.missing_keys == [f"{classifier}.weight", f"{classifier}.bias"]
    setattr(theirs, classifier, nn.Identity())
    expected = ours.encoder(images())
    torch.testing.assert_close(theirs.eval()(images()), expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
    assert "outputs differ by" in export.checked(ours, layout, file)


def test_a_file_that_gives_other_outputs_is_removed(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    ours, file = pretrained("resnet18"), tmp_path / "weights.pth"
    export.write(ours, file)
    changed = torch.load(file, weights_only=True)
    changed["layer3.0.bn1.weight"] *= 1.01
    torch.save(changed, file)
    with pytest.raises(ValueError, match="--layout torchvision gives other outputs, off by"):
        export.checked(ours, "torchvision", file)
    assert not file.exists()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "byol"
    assert Trainer(run_config.load([*SMALL, f"run={folder}", "encoder.width=4"])).train()
    return folder


def test_safetensors_hold_any_encoder_and_its_description(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for branch in ("online", "target"):
        file = tmp_path / f"{branch}.safetensors"
        arguments = [str(run), "--layout", "safetensors", "--out", str(file), "--branch", branch]
        assert export.main(arguments) == 0
        trained = from_run(run, branch)  # type: ignore[arg-type]
        found = load_file(file)
        assert found.keys() == trained.encoder.state_dict().keys()
        assert all(torch.equal(x, found[key]) for key, x in trained.encoder.state_dict().items())
        with safe_open(file, framework="pt") as opened:
            about = opened.metadata()
        assert (about["encoder"], about["stem"], about["branch"]) == ("resnet_small", "cifar", branch)
    online, target = (load_file(tmp_path / f"{branch}.safetensors") for branch in ("online", "target"))
    assert not torch.equal(online["conv1.weight"], target["conv1.weight"])
    assert "checked in fastrdm: outputs differ by 0e+00" in capsys.readouterr().out


def test_what_is_exported_is_read_again(tmp_path: Path) -> None:
    ours, file = pretrained("resnet18"), tmp_path / "weights.safetensors"
    export.write(ours, file)
    again = from_file(file, "torchvision", ours.config, "online")
    assert torch.equal(again.encoder(images()), ours.encoder(images()))


def test_what_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--layout torchvision cannot hold resnet_small: --layout safetensors"):
        export.main([str(run), "--layout", "torchvision", "--out", str(tmp_path / "x.pth")])
    with pytest.raises(ValueError, match=r"--out must be a name that ends in \.safetensors"):
        export.main([str(run), "--layout", "safetensors", "--out", str(tmp_path / "x.pth")])
    assert list(tmp_path.iterdir()) == []


def exported(monkeypatch: pytest.MonkeyPatch, ours: Pretrained, *arguments: object) -> None:
    """Run the command on an encoder of no run."""
    monkeypatch.setattr(export, "from_path", lambda *_, **__: ours)
    assert export.main(["run", *map(str, arguments)]) == 0


@pytest.mark.parametrize("name", ["resnet_small", "timm/vit_tiny_patch16_224"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_onnx_agrees_with_torch(
    tmp_path: Path,
    name: str,
    precision: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import onnx
    import onnxruntime

    settings = EncoderConfig(name=name, stem="cifar" if name == "resnet_small" else "imagenet")
    torch.manual_seed(0)
    encoder = build_encoder(settings)
    size = 32 if name == "resnet_small" else 224
    with torch.no_grad():
        encoder(torch.randn(4, 3, size, size))
    view = ViewSpec(size=size, interpolation="bilinear", mean=(0.1, 0.2, 0.3))
    origin = {"encoder": name, "preset": "simsiam", "step": 1, "branch": "online", "sha256": "0"}
    ours = Pretrained(encoder.eval(), settings, view, None, Path(), origin)
    file = tmp_path / "encoder.onnx"
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "torchvision" else found(name, *a)
    )
    exported(monkeypatch, ours, "--layout", "onnx", "--out", file, "--precision", precision)
    assert "torchvision" not in caplog.text, "it is of no use here, and its absence no news"
    assert "checked in onnxruntime" in capsys.readouterr().out
    batch = torch.randn(5, 3, size, size, generator=torch.Generator().manual_seed(7))
    (features,) = onnxruntime.InferenceSession(file).run(None, {"images": batch.numpy()})
    with torch.no_grad():
        expected = ours.encoder(batch).numpy()
    tolerance = export.ONNX_TOLERANCE[precision] * abs(expected).max()
    assert features.dtype == expected.dtype and abs(features - expected).max() < tolerance
    about = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
    stored = json.loads(about["fastrdm"])
    assert stored["preprocess"] == {
        "size": size,
        "resize": 224 * 256 // 224 if size == 224 else 37,
        "interpolation": "bilinear",
        "mean": [0.1, 0.2, 0.3],
        "std": list(view.std),
    }
    assert stored["origin"]["step"] == 1 and about["branch"] == "online"
    half = {w.data_type for w in onnx.load(file).graph.initializer if len(w.dims) > 1}
    assert half == {onnx.TensorProto.FLOAT16 if precision == "fp16" else onnx.TensorProto.FLOAT}


@pytest.mark.parametrize("name", ["resnet18", "timm/vit_tiny_patch16_224"])
def test_a_folder_opens_in_timm_and_transformers(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)
    settings = EncoderConfig(name=name)
    origin = {"encoder": name, "preset": "simsiam", "step": 1, "branch": "online", "sha256": "0"}
    view = ViewSpec(size=224, interpolation="bilinear", mean=(0.1, 0.2, 0.3))
    ours = Pretrained(build_encoder(settings).eval(), settings, view, None, Path(), origin)
    folder = tmp_path / "folder"
    exported(monkeypatch, ours, "--layout", "huggingface", "--out", folder)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        expected = ours.encoder(images(224))
        torch.testing.assert_close(model(images(224)), expected, rtol=1e-5, atol=1e-5)
    data = timm.data.resolve_model_data_config(model)
    assert (tuple(data["mean"]), data["interpolation"], data["crop_pct"]) == ((0.1, 0.2, 0.3), "bilinear", 0.875)
    with pytest.raises(ValueError, match="--out must be a new folder for --layout huggingface"):
        export.main(["run", "--layout", "huggingface", "--out", str(folder)])
    transformers = pytest.importorskip("transformers")
    hub = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(hub(images(224)).pooler_output, expected, rtol=1e-5, atol=1e-5)


def test_every_file_tells_its_preprocessing_and_origin(run: Path, tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    for ending in ("pth", "safetensors"):
        file = tmp_path / f"x.{ending}"
        export.write(from_run(run, "online"), file)
        encoder, preprocess = fastrdm.load_encoder(file)
        assert preprocess.size == 8 and preprocess.interpolation == "bicubic"
        assert from_path(file, "online").origin["step"] == 2
    transform = preprocess.torchvision()
    for height, width in ((20, 30), (6, 7), (8, 8), (200, 100)):
        pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8)
        assert torch.allclose(transform(pixels.permute(2, 0, 1)), preprocess(pixels.numpy()), atol=2e-5)
        pil = torchvision.transforms.v2.functional.to_pil_image(pixels.permute(2, 0, 1))
        assert torch.allclose(transform(pil), preprocess(pil), atol=2e-5)
    assert pickle.loads(pickle.dumps(transform))(pil).shape == (3, 8, 8)
    assert encoder(transform(pil)[None]).shape == (1, encoder.features)
