"""Statistics per view equal separate passes; statistics over processes equal the concatenated batch."""

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastrdm.kernels import batchnorm
from fastrdm.kernels.batchnorm import ViewBatchNorm, convert_batchnorm, set_views

pytestmark = pytest.mark.traced

SHAPES = {"rows": (5,), "images": (5, 4, 3)}  # channels and, for images, height and width
CASES = [(shape, groups, dtype) for shape in SHAPES for groups in (1, 2) for dtype in ("float64", "float32")]
CASES.append(("images", 2, "bfloat16"))


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.to(memory_format=torch.channels_last) if x.ndim == 4 else x


def seeded(norm: Any) -> Any:
    """The same weights for ours and for torch's."""
    if norm.affine:
        norm.weight.data.copy_(random(norm.num_features, seed=1).abs() + 0.5)
        norm.bias.data.copy_(random(norm.num_features, seed=2))
    return norm


def torchs(shape: str, affine: bool = True) -> Any:
    kind = nn.BatchNorm2d if shape == "images" else nn.BatchNorm1d
    return seeded(kind(5, affine=affine)).double()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_groups_equal_separate_passes(shape: str, affine: bool, groups: int) -> None:
    x = random(6 * groups, *SHAPES[shape]).requires_grad_()
    ours, theirs = seeded(ViewBatchNorm(5, affine=affine)).double(), torchs(shape, affine)
    set_views(ours, groups)
    expected = torch.cat([theirs(view) for view in x.chunk(groups)])
    grad = random(*x.shape, seed=3)
    grads = torch.autograd.grad(expected, [x, *theirs.parameters()], grad)
    out = ours(x)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    for mine, other in zip(torch.autograd.grad(out, [x, *ours.parameters()], grad), grads, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=1e-15)
    assert int(ours.num_batches_tracked) == groups
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=0, atol=0)


def test_joint_statistics_differ_from_statistics_per_view() -> None:
    x = torch.cat([random(8, 5), 3 + 2 * random(8, 5, seed=4)])
    norm = ViewBatchNorm(5).double()
    joint = norm(x)
    set_views(norm, 2)
    assert (joint - norm(x)).abs().max() > 0.5
    torch.testing.assert_close(joint.mean(0), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)


def test_layout_and_dtype_are_kept() -> None:
    norm = ViewBatchNorm(5)
    set_views(norm, 2)
    out = norm(random(4, 5, 4, 3, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16 and out.is_contiguous(memory_format=torch.channels_last)
    assert norm.running_mean is not None and norm.running_mean.dtype == torch.float32


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"takes \(N, C\) or \(N, C, H, W\), got \(2, 5, 3\)"):
        ViewBatchNorm(5)(torch.zeros(2, 5, 3))


@pytest.mark.parametrize("groups", [1, 2])
def test_compiles_as_one_graph(groups: int) -> None:
    plain, compiled = seeded(ViewBatchNorm(5)), seeded(ViewBatchNorm(5))
    set_views(plain, groups)
    set_views(compiled, groups)
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    x, y = (random(6, 5, 4, 3, dtype=torch.float32).requires_grad_() for _ in range(2))
    for _ in range(2):
        step(x).square().sum().backward()
        plain(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(compiled.state_dict(), plain.state_dict())


def test_conversion_keeps_tensors_and_keys() -> None:
    net = nn.Sequential(nn.Conv2d(3, 5, 3), seeded(nn.BatchNorm2d(5, eps=1e-3, momentum=0.3)), nn.ReLU())
    net(random(4, 3, 6, 6, dtype=torch.float32))
    before, images = dict(net.state_dict(keep_vars=True)), random(4, 3, 6, 6, seed=5, dtype=torch.float32)
    expected = net(images)
    net[1].load_state_dict({k[2:]: v for k, v in before.items() if k[0] == "1"})
    converted = convert_batchnorm(net)
    norm = converted[1]  # type: ignore[index]
    assert isinstance(norm, ViewBatchNorm) and (norm.eps, norm.momentum) == (1e-3, 0.3)
    after = converted.state_dict(keep_vars=True)
    assert list(after) == list(before) and all(after[key] is before[key] for key in before)
    torch.testing.assert_close(converted(images), expected, rtol=0, atol=0)
    assert convert_batchnorm(norm) is norm


def test_conversion_of_timms_norm_with_activation() -> None:
    layers = pytest.importorskip("timm.layers")
    theirs, x = seeded(layers.BatchNormAct2d(5)), random(4, 5, 4, 3, dtype=torch.float32)
    expected = theirs(x)
    theirs.running_mean.zero_(), theirs.running_var.fill_(1), theirs.num_batches_tracked.zero_()
    keys = list(theirs.state_dict())
    ours = convert_batchnorm(theirs)
    assert isinstance(ours, ViewBatchNorm) and list(ours.state_dict()) == keys
    torch.testing.assert_close(ours(x), expected, rtol=0, atol=0)
    assert bool((ours(x) >= 0).all())


@pytest.mark.parametrize("norm", [nn.BatchNorm3d(5), nn.SyncBatchNorm(5)])
def test_unknown_norms_are_refused_by_name(norm: nn.Module) -> None:
    with pytest.raises(ValueError, match=f"{type(norm).__name__} has no counterpart"):
        convert_batchnorm(nn.Sequential(norm))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(5, momentum=None), nn.BatchNorm2d(5, track_running_stats=False)])
def test_norms_without_a_moving_average_are_refused(norm: nn.Module) -> None:
    with pytest.raises(ValueError, match="BatchNorm2d must have a momentum and running statistics"):
        convert_batchnorm(norm)


def rows_of(rank: int, case: tuple[str, int, str], seed: int) -> Tensor:
    """Rank r holds 3 + r rows of each view; a mean of 100 beside a deviation of 1 shows cancellation."""
    shape, groups, dtype = case
    offset = 0 if dtype == "bfloat16" or seed else 100
    return (offset + random(groups * (3 + rank), *SHAPES[shape], seed=seed + rank)).to(getattr(torch, dtype))


def norm_of(case: tuple[str, int, str]) -> Any:
    norm = seeded(ViewBatchNorm(5)).to(torch.float64 if case[2] == "float64" else torch.float32)
    set_views(norm, case[1])
    return norm


def step(norm: Any, call: Any, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Forward and backward of one process: what comes out and what it leaves behind."""
    x.requires_grad_()
    out = call(x).add_(0)  # what follows a norm may work in place
    out.backward(grad)
    gradients = {"x": x.grad, "weight": norm.weight.grad, "bias": norm.bias.grad}
    return {"out": out.detach(), **gradients, "mean": norm.running_mean, "var": norm.running_var}


def fused_kernels_in_torch() -> torch.library.Library:
    """Torch's kernels of synchronized BatchNorm, which it has for CUDA only, written out for the CPU as documented."""
    made = torch.library.Library("aten", "IMPL")

    def rows(x: Tensor) -> Tensor:
        return x.movedim(1, -1).flatten(0, -2).float()

    def spread(c: Tensor, x: Tensor) -> Tensor:
        return c.view(1, -1, *[1] * (x.ndim - 2))

    def stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        variance, mean = torch.var_mean(rows(x), 0, correction=0)
        return mean, torch.rsqrt(variance + eps)

    def gathered(
        x: Tensor,
        mean: Tensor,
        scale: Tensor,
        moved_mean: Tensor,
        moved_var: Tensor,
        momentum: float,
        eps: float,
        counts: Tensor,
    ) -> tuple[Tensor, Tensor]:
        share, total = (counts / counts.sum())[:, None], counts.sum()
        middle = (share * mean).sum(0)
        variance = (share * (scale**-2 - eps + (mean - middle) ** 2)).sum(0)
        moved_mean.lerp_(middle, momentum)
        moved_var.lerp_(variance * total / (total - 1), momentum)
        return middle, torch.rsqrt(variance + eps)

    def elemt(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, scale: Tensor, eps: float, *, out: Tensor
    ) -> Tensor:
        y = (x.float() - spread(mean, x)) * spread(scale if weight is None else scale * weight, x)
        return out.copy_(y if bias is None else y + spread(bias, x))

    def reduced(
        g: Tensor, x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor | None, *needed: bool
    ) -> tuple[Tensor, ...]:
        gradient, centered = rows(g), rows(x) - mean
        along = (gradient * centered).sum(0)
        return gradient.sum(0), along, along * scale, gradient.sum(0)

    def back(
        g: Tensor,
        x: Tensor,
        mean: Tensor,
        scale: Tensor,
        weight: Tensor | None,
        total: Tensor,
        along: Tensor,
        counts: Tensor,
        *,
        out: Tensor,
    ) -> Tensor:
        assert counts.dtype == torch.int32
        number, centered = counts.sum(), x.float() - spread(mean, x)
        inner = g.float() - spread(total / number, x) - centered * spread(scale**2 * along / number, x)
        return out.copy_(inner * spread(scale if weight is None else scale * weight, x))

    found = {"stats": stats, "gather_stats_with_counts": gathered, "elemt.out": elemt}
    for name, kernel in {**found, "backward_reduce": reduced, "backward_elemt.out": back}.items():
        made.impl(f"batch_norm_{name}", kernel, "CPU")
    return made


class Launches(TorchDispatchMode):
    """Counts operators that are kernels of BatchNorm or read a number on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name().removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def test_fused_norm_reads_each_row_twice_forward_and_twice_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = fused_kernels_in_torch()
    monkeypatch.setattr(batchnorm, "process_count", lambda: 2)
    monkeypatch.setattr(batchnorm, "_has_fused_kernels", lambda x: True)
    collectives: list[str] = []
    monkeypatch.setattr(batchnorm, "gather_over_processes", lambda x: (collectives.append("gather"), x[None])[1])
    monkeypatch.setattr(batchnorm, "reduce_over_processes", lambda x, _: (collectives.append("sum"), x)[1])
    norm = ViewBatchNorm(5)
    set_views(norm, 2)
    x = random(6, 5, 4, 3, dtype=torch.float32).requires_grad_()
    with Launches() as seen:
        norm(x).sum().backward()
    whole = {name: count for name, count in seen.counts.items() if name.startswith("batch_norm")}
    names = ("stats", "gather_stats_with_counts", "elemt.out", "backward_reduce", "backward_elemt.out")
    assert whole == {f"batch_norm_{name}": 2 for name in names}
    assert collectives == ["gather", "sum"] and "_local_scalar_dense" not in seen.counts
    del kept


def test_views_are_normalized_in_place_of_being_joined() -> None:
    norm = ViewBatchNorm(5)
    set_views(norm, 2)
    x = random(6, 5, 4, 3, dtype=torch.float32).requires_grad_()
    with Launches() as seen:
        y = norm(x)
    assert seen.counts["native_batch_norm.out"] == 2 and not seen.counts["cat"]
    views = [torch.nn.functional.batch_norm(view, None, None, norm.weight, norm.bias, True) for view in x.chunk(2)]
    expected = torch.cat(views)
    assert torch.equal(y, expected)
    grad = random(*x.shape, seed=1, dtype=torch.float32)
    ours, theirs = (torch.autograd.grad(out, [x, *norm.parameters()], grad) for out in (y, expected))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def worker(rank: int, world: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    results = []
    for case in CASES:
        norm = norm_of(case)
        results.append(step(norm, norm, rows_of(rank, case, 0), rows_of(rank, case, 50)))
        compact = results[-1]["out"].ndim == 2 or results[-1]["out"].is_contiguous(memory_format=torch.channels_last)
        assert compact and int(norm.num_batches_tracked) == case[1]
    case = ("images", 2, "float32")
    norm = norm_of(case)
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    got = step(norm, compiled, rows_of(rank, case, 0), rows_of(rank, case, 50))
    for key, value in results[CASES.index(case)].items():
        torch.testing.assert_close(got[key], value, msg=lambda m, key=key: f"compiled {key}: {m}")
    kept = fused_kernels_in_torch()
    batchnorm._has_fused_kernels = lambda x: True
    for case in (case for case in CASES if case[2] == "float32"):
        norm = norm_of(case)
        got = step(norm, norm, rows_of(rank, case, 0), rows_of(rank, case, 50))
        for key, value in results[CASES.index(case)].items():
            told = f"fused {case} {key}"
            torch.testing.assert_close(got[key], value, rtol=2e-4, atol=2e-4, msg=lambda m, told=told: f"{told}: {m}")
    del kept
    alone = ViewBatchNorm(5, sync=False)
    x = rows_of(rank, ("rows", 1, "float32"), 0)
    torch.testing.assert_close(alone(x), nn.BatchNorm1d(5)(x), rtol=0, atol=0)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_processes_equal_the_concatenated_batch(world: int, tmp_path: Path) -> None:
    command = [sys.executable, __file__]
    started = [subprocess.Popen([*command, str(rank), str(world), str(tmp_path)]) for rank in range(world)]
    try:
        assert [process.wait(120) for process in started] == [0] * world
    finally:
        for process in started:
            process.kill()
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    for i, case in enumerate(CASES):
        compare([result[i] for result in results], case)


def compare(found: list[dict[str, Tensor]], case: tuple[str, int, str]) -> None:
    shape, groups, dtype = case
    world, theirs = len(found), torchs(shape)
    inputs = [rows_of(rank, case, 0).double().requires_grad_() for rank in range(world)]
    grads = [rows_of(rank, case, 50).double() for rank in range(world)]
    sizes = [3 + rank for rank in range(world)]
    views = [theirs(torch.cat([x.chunk(groups)[g] for x in inputs])).split(sizes) for g in range(groups)]
    outputs = [torch.cat([view[rank] for view in views]) for rank in range(world)]
    torch.autograd.backward(outputs, grads)
    bound = {"float64": 1e-11, "float32": 2e-4, "bfloat16": 2e-2}[dtype]  # float32 rows near 100 are 8e-6 apart
    for rank, result in enumerate(found):
        torch.testing.assert_close(result["out"].double(), outputs[rank].detach(), rtol=bound, atol=bound)
        torch.testing.assert_close(result["x"].double(), inputs[rank].grad, rtol=bound, atol=bound)
        torch.testing.assert_close(result["mean"].double(), theirs.running_mean, rtol=1e-6, atol=bound / 100)
        torch.testing.assert_close(result["var"].double(), theirs.running_var, rtol=1e-5, atol=bound / 100)
        assert torch.equal(result["mean"], found[0]["mean"])
    for key in ("weight", "bias"):
        total = sum(result[key].double() for result in found)
        torch.testing.assert_close(total, getattr(theirs, key).grad, rtol=10 * bound, atol=10 * bound)


if __name__ == "__main__":
    worker(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
