"""Blocks that run again in the backward pass change nothing but the memory, alone and on two processes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastrdm.config import run_config
from fastrdm.efficiency.step_cost import build, small_step
from fastrdm.kernels.batchnorm import set_views
from fastrdm.models.encoders import EncoderConfig, build_encoder
from fastrdm.schema import Horizon

CASES = {
    "basic blocks": {"name": "resnet18", "width": 8, "stem": "cifar"},
    "bottlenecks": {"name": "resnet50", "width": 8, "stem": "cifar"},
    "few blocks": {"name": "resnet_small", "width": 8, "stem": "cifar"},
    "vit": {"name": "timm/test_vit", "options": {"dynamic_img_size": True, "drop_path_rate": 0.2}},
    "vit, patches frozen": {"name": "timm/test_vit", "options": {"dynamic_img_size": True}, "freeze_patch_embed": True},
}


def images(count: int, size: int, seed: int) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def trained(net: nn.Module, call: nn.Module, dtype: torch.dtype, rank: int = 0) -> dict[str, Tensor]:
    """Two steps on views of two sizes, 2 and 3 of them: loss, weights and running statistics."""
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    loss = torch.zeros(())
    for step in range(2):
        out = []
        for views, size in ((2, 32), (3, 16)):
            set_views(net, views)
            out.append(call(images(2 * views, size, 10 * rank + step).to(dtype)))
        loss = torch.cat(out).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {"loss": loss.detach(), **{name: x.detach().clone() for name, x in net.state_dict().items()}}


def networks(case: dict[str, object], dtype: torch.dtype) -> list[nn.Module]:
    """The same twice, the second with checkpointing."""
    torch.manual_seed(0)
    plain, other = (build_encoder(EncoderConfig(**case, checkpointing=c)) for c in (False, True))  # type: ignore[arg-type]
    other.load_state_dict(plain.state_dict())
    return [net.to(dtype) for net in (plain, other)]


def check(found: dict[str, Tensor], expected: dict[str, Tensor], exact: bool = True) -> None:
    for name, x in expected.items():
        bounds = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-9, "atol": 1e-11}
        torch.testing.assert_close(found[name], x, **bounds, msg=lambda m, n=name: f"{n}: {m}")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_nothing_changes_bit_for_bit(case: str, dtype: torch.dtype) -> None:
    if "timm" in str(CASES[case]["name"]):
        pytest.importorskip("timm")
    plain, other = networks(CASES[case], dtype)
    expected = trained(plain, plain, dtype)
    check(trained(other, other, dtype), expected)
    norms = [x for name, x in expected.items() if name.endswith("num_batches_tracked")]
    assert all(count == 2 * 5 for count in norms) and bool(norms) == ("vit" not in case)


def test_nothing_changes_where_compiled() -> None:
    plain, other = networks(CASES["basic blocks"], torch.float64)
    expected = trained(plain, plain, torch.float64)
    torch.compiler.reset()
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager_decomp_partition")
    check(trained(other, compiled, torch.float64), expected, exact=False)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("encoder", "share"),
    [
        (["encoder.name=resnet18", "encoder.stem=cifar"], 0.35),
        (["encoder.name=timm/vit_tiny_patch16_224", "encoder.stem=imagenet", "encoder.zero_init_residual=false"], 0.25),
    ],
)
def test_less_is_kept_for_the_backward_pass(encoder: list[str], share: float) -> None:
    if "timm" in encoder[0]:
        pytest.importorskip("timm")
    kept = {}
    size = 224 if "timm" in encoder[0] else 32
    for switch in (False, True):
        more = [f"encoder.checkpointing={switch}".lower(), f"loader.views.*.size={size}", "method.projector.hidden=64"]
        c = run_config.load(["quickstart.yaml", "encoder.width=null", *encoder, *more])
        kept[switch] = small_step(c, build(c, Horizon(10, 100), 0)[0], 2)[0]
    assert kept[True] < share * kept[False], kept


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050"])
def test_batchnorms_of_timm_are_refused(name: str) -> None:
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=f"encoder.checkpointing must be false for timm/{name}, whose BatchNorm"):
        build_encoder(EncoderConfig(name=f"timm/{name}", checkpointing=True))


def test_networks_that_cannot_are_refused() -> None:
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=r"checkpointing must be false for timm/coat_tiny, for which timm has none"):
        build_encoder(EncoderConfig(name="timm/coat_tiny", checkpointing=True))


def worker(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    plain, other = networks(CASES["few blocks"], torch.float64)
    expected = trained(plain, plain, torch.float64, rank)
    check(trained(other, other, torch.float64, rank), expected)
    mean = expected["bn1.running_mean"]
    dist.all_reduce(mean)
    assert torch.equal(mean / 2, other.bn1.running_mean), "statistics of all processes"  # type: ignore[union-attr]
    third = networks(CASES["few blocks"], torch.float64)[1]
    compiled = torch.compile(third, fullgraph=True, backend="aot_eager_decomp_partition")
    mean.div_(2)
    check(trained(third, compiled, torch.float64, rank), expected, exact=False)  # type: ignore[arg-type]
    dist.destroy_process_group()


def test_two_processes_run_the_same_collectives_again(tmp_path: Path) -> None:
    started = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in range(2)]
    try:
        assert [process.wait(300) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()


if __name__ == "__main__":
    worker(int(sys.argv[1]), Path(sys.argv[2]))
