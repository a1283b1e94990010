"""Each method's head has the paper's layers, splits at its last BatchNorm and keeps plain keys."""

import pytest
import torch
from torch import nn

from fastrdm.models import heads
from fastrdm.models.heads import Head, HeadConfig

LAYERS = {
    "SIMSIAM_PROJECTOR": ["512>2048", "BN", "ReLU", "2048>2048", "BN", "ReLU", "2048>2048", "BN plain"],
    "SIMSIAM_PREDICTOR": ["512>512", "BN", "ReLU", "512>2048+b"],
    "BYOL_PROJECTOR": ["512>4096+b", "BN", "ReLU", "4096>256+b"],
    "BYOL_PREDICTOR": ["512>4096+b", "BN", "ReLU", "4096>256+b"],
    "SWAV_PROJECTOR": ["512>2048+b", "BN", "ReLU", "2048>128+b"],
    "DINO_PROJECTOR": ["512>2048+b", "GELU", "2048>2048+b", "GELU", "2048>256+b"],
}
TAILS = {"SIMSIAM_PROJECTOR": 1, "DINO_PROJECTOR": 1}  # the others: BatchNorm, activation, Linear


def told(module: nn.Module) -> str:
    if isinstance(module, nn.Linear):
        return f"{module.in_features}>{module.out_features}{'' if module.bias is None else '+b'}"
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return "BN" if module.affine else "BN plain"
    return type(module).__name__


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_the_papers(name: str) -> None:
    head = Head(getattr(heads, name), 512)
    assert [told(module) for module in head] == LAYERS[name]
    assert len(head) - head.split == TAILS.get(name, 3)
    assert head.out == int(LAYERS[name][-2 if "BN" in LAYERS[name][-1] else -1].split(">")[1].removesuffix("+b"))


@pytest.mark.parametrize("last_norm", ["none", "affine", "plain"])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_tail_of_body_is_the_plain_sequence(last_norm: str, norm: bool, layers: int) -> None:
    config = HeadConfig(layers=layers, hidden=7, out=5, norm=norm, last_norm=last_norm)  # type: ignore[arg-type]
    head = Head(config, 6)
    plain = nn.Sequential(*head)
    assert list(head.state_dict()) == list(plain.state_dict())
    x = torch.randn(8, 6)
    expected = plain(x)
    torch.testing.assert_close(head(x), expected, rtol=0, atol=0)
    torch.testing.assert_close(head.tail(head.body(x)), expected, rtol=0, atol=0)
    norms = [index for index, module in enumerate(head) if "BN" in told(module)]
    assert head.split == (norms[-1] if norms else len(head) - 1)


def test_output_in_float32_when_only_the_body_is_in_16_bits() -> None:
    head = Head(HeadConfig(layers=2, hidden=16, out=8), 6)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = head.body(torch.randn(4, 6))
    assert hidden.dtype == torch.bfloat16
    out = head.tail(hidden.float())
    assert out.dtype == torch.float32 and not torch.equal(out, out.bfloat16().float())


def test_trunc_normal_start() -> None:
    state = Head(heads.DINO_PROJECTOR, 512).state_dict()
    for name, tensor in state.items():
        if name.endswith("bias"):
            assert not tensor.any()
        else:
            assert float(tensor.std()) == pytest.approx(0.02, rel=0.02) and float(tensor.mean()) < 1e-4


def test_plain_last_norm_gives_centered_unit_columns() -> None:
    out = Head(HeadConfig(hidden=32, out=16, last_norm="plain"), 8)(torch.randn(64, 8))
    torch.testing.assert_close(out.mean(0), torch.zeros(16), rtol=0, atol=1e-5)
    torch.testing.assert_close(out.var(0, correction=0), torch.ones(16), rtol=0, atol=1e-2)


def test_compiles_as_one_graph() -> None:
    head = Head(HeadConfig(hidden=8, out=4, last_norm="plain"), 6)
    x = torch.randn(8, 6)
    torch.testing.assert_close(torch.compile(head, fullgraph=True, backend="aot_eager")(x), head(x))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"hidden": 0}, "hidden must be at least 1 feature, got 0"),
        ({"activation": "tanh"}, "'relu' or 'gelu'"),
        ({"width": 3}, "width"),
    ],
)
def test_bad_configs_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeadConfig(**values)  # type: ignore[arg-type]
