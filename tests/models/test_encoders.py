"""ResNets are torchvision's, weight for weight; the small and CIFAR forms, and networks of timm."""

import copy
import sys

import pytest
import torch
from torch import Tensor, nn

from fastrdm.kernels.batchnorm import ViewBatchNorm, set_views
from fastrdm.models.encoders import EncoderConfig, ResNet, TimmEncoder, build_encoder
from fastrdm.models.settings import ENCODERS


def images(count: int = 2, size: int = 32) -> Tensor:
    x = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))
    return x.to(memory_format=torch.channels_last)


def jolted(net: nn.Module) -> nn.Module:
    """Weights and running statistics that no initialization gives, so that a swapped pair shows."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=generator)
            tensor.copy_(tensor + 0.02 * (noise - 0.5) if tensor.ndim > 1 else 0.5 + noise if "var" in name else noise)
    return net


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_weights_move_both_ways_with_torchvision(name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    theirs = models.get_model(name, weights=None)
    theirs.fc = nn.Identity()
    ours = build_encoder(EncoderConfig(name=name))
    assert list(ours.backbone.state_dict()) == list(theirs.state_dict())
    x = images(2, 64)
    ours.load_state_dict(jolted(theirs).state_dict())
    for training in (False, True):
        a, b = ours.train(training)(x).detach(), theirs.train(training)(x).detach()
        assert float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())
    jolted(ours)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)
    assert ours.features == models.get_model(name, weights=None).fc.in_features


def test_initialization_is_torchvisions() -> None:
    models = pytest.importorskip("torchvision.models")
    ours, theirs = build_encoder(EncoderConfig(name="resnet50")).state_dict(), models.resnet50().state_dict()
    for name, tensor in ours.items():
        if tensor.ndim == 4:
            assert float(tensor.std() / theirs[name].std()) == pytest.approx(1, abs=0.05), name
        else:
            assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize(("name", "blocks"), [("resnet18", 8), ("resnet50", 16)])
def test_zero_init_residual_silences_the_last_norm_of_every_block(name: str, blocks: int) -> None:
    state = build_encoder(EncoderConfig(name=name, zero_init_residual=True)).state_dict()
    last = "bn3.weight" if name == "resnet50" else "bn2.weight"
    silent = [key for key, tensor in state.items() if key.endswith("weight") and not tensor.any()]
    assert len(silent) == blocks and all(key.endswith(last) for key in silent)


@pytest.mark.parametrize(
    ("stem", "size", "maps"),
    [("imagenet", 32, 8), ("cifar", 32, 32), ("cifar_padding2", 32, 34), ("imagenet", 224, 56)],
)
def test_stems_give_the_first_stage_maps_of_this_size(stem: str, size: int, maps: int) -> None:
    net = build_encoder(EncoderConfig(name="resnet_small", stem=stem))  # type: ignore[arg-type]
    assert isinstance(net, ResNet)
    seen = []
    net.get_submodule("layer1").register_forward_hook(lambda _, inputs, out: seen.append(inputs[0].shape))
    assert net(images(2, size)).shape == (2, 128)
    assert seen == [(2, 32, maps, maps)]


def test_small_resnet_and_width() -> None:
    assert build_encoder(EncoderConfig(name="resnet_small")).features == 128
    assert build_encoder(EncoderConfig(name="resnet_small", width=16)).features == 64
    assert build_encoder(EncoderConfig(name="resnet50", width=8)).features == 256
    parameters = sum(p.numel() for p in build_encoder(EncoderConfig(name="resnet_small")).parameters())
    assert 200_000 < parameters < 400_000


def test_two_views_in_one_pass_equal_two_passes() -> None:
    together, apart = (build_encoder(EncoderConfig(name="resnet_small", stem="cifar")).double() for _ in range(2))
    apart.load_state_dict(together.state_dict())
    set_views(together, 2)
    x = images(8).double()
    expected = torch.cat([apart(view) for view in x.chunk(2)])
    torch.testing.assert_close(together(x), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(together.state_dict(), apart.state_dict(), rtol=0, atol=1e-12)


def test_maps_stay_channels_last() -> None:
    net = build_encoder(EncoderConfig(name="resnet18", stem="cifar")).to(memory_format=torch.channels_last)
    layouts = []
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(
                lambda _, inputs, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last))
            )
    net(images(2))
    assert len(layouts) == 20 and all(layouts)


def test_compiles_as_one_graph() -> None:
    net = build_encoder(EncoderConfig(name="resnet_small", stem="cifar"))
    set_views(net, 2)
    copy = build_encoder(EncoderConfig(name="resnet_small", stem="cifar"))
    copy.load_state_dict(net.state_dict())
    set_views(copy, 2)
    out = torch.compile(net, fullgraph=True, backend="aot_eager")(images(4))
    torch.testing.assert_close(out, copy(images(4)))


def test_sync_bn_reaches_every_norm() -> None:
    net = build_encoder(EncoderConfig(name="resnet_small", sync_bn=False))
    norms = [module for module in net.modules() if isinstance(module, ViewBatchNorm)]
    assert len(norms) == 9 and not any(norm.sync for norm in norms)


@pytest.mark.parametrize(
    ("name", "features"), [("resnet18", 512), ("mobilenetv3_small_050", 1024), ("vit_tiny_patch16_224", 192)]
)
def test_timm_networks(name: str, features: int) -> None:
    timm = pytest.importorskip("timm")
    ours = build_encoder(EncoderConfig(name=f"timm/{name}")).eval()
    theirs = timm.create_model(name, pretrained=False, num_classes=0).eval()
    assert list(ours.backbone.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(jolted(ours.backbone).state_dict())
    x = images(1, 224)
    out = ours(x)
    assert ours.features == features == out.shape[1]
    torch.testing.assert_close(out, theirs(x), rtol=0, atol=0)
    norms = [m for m in ours.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert all(isinstance(norm, ViewBatchNorm) for norm in norms) and bool(norms) == (not name.startswith("vit"))


def test_misspelt_timm_name_is_refused_with_the_nearest() -> None:
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=r"got 'timm/resnet18e': did you mean 'timm/resnet18'"):
        TimmEncoder("resnet18e", sync_bn=True)


def test_missing_timm_is_told_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"timm/resnet18 needs timm: pip install 'fastrdm\[timm\]'"):
        build_encoder(EncoderConfig(name="timm/resnet18"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "resnet19"}, "encoder.name must be one of .*resnet18, .* did you mean 'resnet18'"),
        ({"width": 0}, "encoder.width must be above 0 channels, got 0"),
        ({"name": "timm/resnet18", "stem": "cifar"}, "encoder.stem must be left at imagenet for timm/resnet18"),
        ({"name": "timm/resnet18", "zero_init_residual": True}, "encoder.zero_init_residual must be left at false"),
        ({"depth": 3}, "depth"),
    ],
)
def test_bad_configs_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EncoderConfig(**values)  # type: ignore[arg-type]


def test_every_listed_encoder_builds() -> None:
    small = {"width": 8, "stem": "cifar"}
    for name, row in ENCODERS.items():
        net = build_encoder(EncoderConfig(name=name, **{key: small[key] for key in small.keys() & row.takes}))  # type: ignore[arg-type]
        assert net(images(2, 16)).shape == (2, net.features)


def test_options_reach_timm() -> None:
    pytest.importorskip("timm")
    net = build_encoder(EncoderConfig(name="timm/test_vit", options={"dynamic_img_size": True, "drop_path_rate": 0.2}))
    assert net(images(2, 96)).shape == net(images(2, 160)).shape == (2, net.features)
    assert max(module.drop_prob for module in net.modules() if hasattr(module, "drop_prob")) == pytest.approx(0.2)


def test_patch_embedding_without_gradient() -> None:
    pytest.importorskip("timm")
    net = build_encoder(EncoderConfig(name="timm/test_vit", freeze_patch_embed=True))
    still = [name for name, p in net.backbone.named_parameters() if not p.requires_grad]
    assert still == ["patch_embed.proj.weight", "patch_embed.proj.bias"]


WRONG_OPTIONS = {
    "options must be left at null for resnet18, which": {
        "name": "resnet18",
        "options": {"drop_path_rate": 0.1},
    },
    r"freeze_patch_embed must be left at false for resnet18": {"name": "resnet18", "freeze_patch_embed": True},
    r"options must be arguments of timm/resnet18, got .*dynamic_img_size": {"options": {"dynamic_img_size": True}},
    r"freeze_patch_embed must be false for timm/resnet18": {"freeze_patch_embed": True},
}


@pytest.mark.parametrize("message", WRONG_OPTIONS)
def test_options_for_another_network_are_refused(message: str) -> None:
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=message):
        build_encoder(EncoderConfig(**{"name": "timm/resnet18", **WRONG_OPTIONS[message]}))  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [16, 33])
def test_narrow_networks_have_the_gradients_of_float64(size: int) -> None:
    """Strided 1x1 convolutions of few channels: their gradient in oneDNN overruns its buffer."""
    net = build_encoder(EncoderConfig(name="resnet_small", stem="cifar", width=4)).to(memory_format=torch.channels_last)
    exact = copy.deepcopy(net).double()
    x = images(8, size)
    net(x).square().sum().backward()
    exact(x.double()).square().sum().backward()
    for (name, p), q in zip(net.named_parameters(), exact.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert float((p.grad - q.grad).abs().max()) <= 1e-3 * float(q.grad.abs().max()), name
