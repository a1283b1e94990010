"""The dual branch: what enters the loss, where gradient stops, how the target follows, BatchNorm by view."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastrdm.kernels.batchnorm import ViewBatchNorm
from fastrdm.methods.dual_branch import DualBranch
from fastrdm.optim.optimizers import OptimConfig, build_optimizer, parameter_groups
from fastrdm.schema import Horizon

Build = Callable[..., DualBranch]
Draw = Callable[..., list[Tensor]]

SCORES = {"name": "prototypes", "count": 4, "freeze": "2st"}
FILTER = {"name": "filter", "power": -0.5}
SHARPEN = {"name": "center_sharpen", "momentum": 1.0}  # the center stays
BYOL: dict[str, Any] = {"alignment": {"name": "byol", "directions": "sum"}, "ema": {"momentum": 0.9, "final": 1.0}}
METHODS: dict[str, dict[str, Any]] = {
    "symsimsiam": {"online": [], "target": []},
    "simsiam": {},
    "byol": BYOL,
    "swav": {"online": [SCORES], "target": [SCORES, "sinkhorn"], "alignment": {"name": "cross_entropy"}},
    "dino": {
        "online": [SCORES],
        "target": [SCORES, "center_sharpen"],
        "ema": {},
        "alignment": {"name": "cross_entropy"},
    },
    "rdm_simsiam": {"online": [], "target": [FILTER]},
    "rdm_byol": {"online": [{"name": "filter", "kind": "log1p"}], "target": ["stop"], **BYOL},
}


def parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def gradients(method: DualBranch, views: list[Tensor]) -> dict[str, Tensor]:
    named = {name: p for name, p in method.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(method(views).loss, list(named.values())), strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_output(branch: Build, views: Draw, name: str) -> None:
    method = branch(METHODS[name])
    out = method(views(8, 8, 4))
    assert out.loss.ndim == 0 and out.loss.requires_grad
    scored = name in ("swav", "dino")
    width = 4 if scored else 5
    shapes = {"online": (3, 8, width), "target": (2, 8, width), "features": (3, 8, 6), "hidden": (3, 8, 7)}
    for key, shape in shapes.items():
        assert getattr(out, key).shape == shape and not getattr(out, key).requires_grad, key
    if not scored:
        assert out.scores is None
        return
    assert out.scores is not None
    online, target = out.scores
    assert online.shape == (3, 8, 4) and target.shape == (2, 8, 4)
    assert online.abs().max() <= 1 and target.abs().max() <= 1  # cosines
    torch.testing.assert_close(out.online, torch.softmax(online / 0.1, -1))  # probabilities enter the loss
    torch.testing.assert_close(out.target.sum(-1), torch.ones(2, 8, dtype=torch.float64))


def test_what_leaves_the_network(branch: Build, views: Draw) -> None:
    method, images = branch({"online": [], "target": ["stop"]}), views()
    out = method(images)
    last = method.online.projector[-1]
    torch.testing.assert_close(
        out.online, last(torch.relu(method.online.projector[1](out.hidden.flatten(0, 1)))).view(2, 8, 5)
    )
    torch.testing.assert_close(out.target, out.online)
    torch.testing.assert_close(method.online.encoder(torch.cat(images)).view(2, 8, 6), out.features)


@pytest.mark.parametrize("target", [["stop"], [FILTER], [SCORES, "sinkhorn"], [SCORES, SHARPEN]])
@pytest.mark.parametrize("ema", [None, {}])
def test_no_gradient_flows_through_the_target(
    branch: Build, views: Draw, target: list[Any], ema: dict[str, Any] | None
) -> None:
    scored = SCORES in target
    method = branch(
        {
            "online": [SCORES] if scored else ["predictor"],
            "target": target,
            "ema": ema,
            "alignment": {"name": "cross_entropy" if scored else "negative_cosine"},
        }
    )
    ours = gradients(method, views())
    constant = method(views()).target
    method.target_transforms = nn.ModuleList([_Constant(constant)])  # the same numbers, from nowhere
    theirs = gradients(method, views())
    assert ours.keys() == theirs.keys() and any(g.abs().max() > 1e-3 for g in ours.values())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)
    assert all(p.grad is None and not p.requires_grad for p in (method.target or nn.Identity()).parameters())


class _Constant(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def set_step(self, step: int) -> None:
        pass

    def forward(self, x: Tensor, branch: object) -> Tensor:
        return self.value


def test_the_symmetric_baseline_lets_gradient_into_both_branches(branch: Build, views: Draw) -> None:
    both = gradients(branch(METHODS["symsimsiam"]), views())
    one = gradients(branch({"online": [], "target": ["stop"]}), views())
    for name, g in both.items():  # -cos is symmetric: the second path doubles the gradient
        torch.testing.assert_close(g, 2 * one[name], rtol=0, atol=1e-14)


@pytest.mark.parametrize(("step", "expected"), [(0, 0.9), (10, 0.95), (19, 0.9993844170297569), (20, 1.0)])
def test_the_target_follows_the_parameters_after_the_step(
    branch: Build, views: Draw, step: int, expected: float
) -> None:
    method = branch(BYOL)
    assert method.target is not None
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.5)
    old = parameters(method.target)
    method.set_step(step)
    method(views()).loss.backward()
    buffers = {name: x.clone() for name, x in method.target.named_buffers()}
    optimizer.step()
    assert all(torch.equal(p, old[name]) for name, p in method.target.named_parameters())
    method.after_step()
    assert method.momentum.item() == pytest.approx(expected, abs=1e-15)
    new = parameters(method.online)
    for name, p in method.target.named_parameters():
        torch.testing.assert_close(p, expected * old[name] + (1 - expected) * new[name], rtol=0, atol=1e-14)
    for name, x in method.target.named_buffers():
        assert torch.equal(x, buffers[name]), "buffers come from the target's own passes"
    assert set(old) == set(new)


def test_the_targets_running_statistics_are_its_own(branch: Build, views: Draw) -> None:
    method = branch(BYOL)
    assert method.target is not None
    plain = nn.BatchNorm2d(6).double()
    for images in (views(seed=1), views(seed=2)):
        method(images)
        for view in images:
            plain(method.target.encoder[0](view))
        method.after_step()
    norm = method.target.encoder[1]
    torch.testing.assert_close(norm.running_mean, plain.running_mean, rtol=0, atol=1e-14)
    torch.testing.assert_close(norm.running_var, plain.running_var, rtol=0, atol=1e-14)
    assert norm.num_batches_tracked == 4
    assert (norm.running_mean - method.online.encoder[1].running_mean).abs().max() > 1e-3


def norms(module: nn.Module) -> list[ViewBatchNorm]:
    return [m for m in module.modules() if isinstance(m, ViewBatchNorm)]


@pytest.mark.parametrize("sizes", [(8, 8), (8, 8, 4, 4, 4)])
def test_per_view_equals_separate_passes_everywhere(branch: Build, views: Draw, sizes: tuple[int, ...]) -> None:
    method, images = branch({}), views(*sizes)
    alone = copy.deepcopy(method)
    out = method(images)
    predictor = alone.online_transforms[0].head
    for norm in norms(alone):
        norm.groups = 1
    z = [alone.online.projector(alone.online.encoder(view)) for view in images]
    torch.testing.assert_close(out.online, torch.stack([predictor(one) for one in z]), rtol=0, atol=1e-14)
    torch.testing.assert_close(out.target, torch.stack(z[:2]), rtol=0, atol=1e-14)
    for ours, theirs in zip(norms(method), norms(alone), strict=True):
        torch.testing.assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()), rtol=0, atol=1e-14)


def test_joint_takes_statistics_over_the_views_of_a_resolution(branch: Build, views: Draw) -> None:
    method, images = branch({**METHODS["swav"], "bn_views": "joint"}), views(8, 8, 4, 4)
    alone = copy.deepcopy(method.online)
    out = method(images)
    for norm in norms(alone):
        norm.groups = 1
    features = [alone.encoder(torch.cat(images[:2])), alone.encoder(torch.cat(images[2:]))]
    torch.testing.assert_close(out.features, torch.cat([f.view(2, 8, 6) for f in features]), rtol=0, atol=1e-14)
    apart = branch(METHODS["swav"])(images).features
    assert (out.features - apart).abs().max() > 1e-3


def test_joint_reaches_the_predictor(branch: Build, views: Draw) -> None:
    method = branch({"bn_views": "joint"})
    alone = copy.deepcopy(method)
    out = method(views())
    z = alone.online.projector(alone.online.encoder(torch.cat(views())))
    torch.testing.assert_close(out.online.flatten(0, 1), alone.online_transforms[0].head(z), rtol=0, atol=1e-14)


def test_global_views_come_first_and_crops_are_students_only(branch: Build, views: Draw) -> None:
    method, images = branch(METHODS["dino"]), views(8, 8, 4, 4)
    method.set_step(0)
    seen = []
    assert method.target is not None
    method.target.register_forward_pre_hook(lambda _, args: seen.append([tuple(v.shape) for v in args[0]]))
    few = method(images[:2])
    many = copy.deepcopy(method)
    many.target_transforms[1].center.zero_()
    out = many(images)
    assert seen[0] == [(8, 3, 8, 8)] * 2 and len(seen) == 2 and seen[1] == seen[0]
    torch.testing.assert_close(out.target, few.target)
    log_p = torch.log_softmax(out.scores[0] / 0.1, -1)  # type: ignore[index]
    pairs = [-(out.target[t] * log_p[v]).sum(-1).mean() for v in range(4) for t in range(2) if v != t]
    assert len(pairs) == 6
    torch.testing.assert_close(out.loss, sum(pairs) / 6)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", METHODS)
def test_under_autocast_everything_from_the_last_norm_on_is_float32(
    branch: Build, views: Draw, name: str, precision: torch.dtype
) -> None:
    method = branch(METHODS[name], dtype=torch.float32, precision=precision)
    seen: dict[str, set[torch.dtype]] = {"body": set(), "tail": set()}
    for index, module in enumerate(method.online.projector):
        part = "body" if index < method.online.projector.split else "tail"
        module.register_forward_hook(lambda _, args, out, part=part: seen[part].add(out.dtype))
    out = method(views(dtype=torch.float32))
    assert seen == {"body": {precision}, "tail": {torch.float32}}
    for x in (out.loss, out.online, out.target, *(out.scores or ())):
        assert x.dtype == torch.float32
    out.loss.backward()
    exact = branch(METHODS[name], dtype=torch.float32)(views(dtype=torch.float32))
    torch.testing.assert_close(out.loss, exact.loss, rtol=0, atol=0.2)
    assert all(p.grad.dtype == torch.float32 for p in method.parameters() if p.grad is not None)


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_frozen_prototypes_do_not_move_by_a_bit(branch: Build, views: Draw, optimizer: str) -> None:
    method = branch(METHODS["swav"])
    config = OptimConfig(name=optimizer, weight_decay=0.1, exclude_bias_norm=False)  # type: ignore[arg-type]
    optimizer = build_optimizer(parameter_groups(method.roles(), config), config, torch.device("cpu"))
    layer = method.online.prototypes
    assert layer is not None
    start = layer.weight.detach().clone()
    for step in range(4):
        before = parameters(method.online)
        method.set_step(step)
        method(views(seed=step)).loss.backward()
        method.after_backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(layer.weight, start) == (step < 2), f"freeze is 2 steps, this is step {step}"
        assert not torch.equal(method.online.encoder[0].weight, before["encoder.0.weight"])


@pytest.mark.parametrize("name", METHODS)
def test_every_trainable_parameter_has_one_role(branch: Build, views: Draw, name: str) -> None:
    method = branch(METHODS[name], horizon=Horizon(5, 20))
    roles = [p for role in method.roles() for _, p in role.parameters]
    assert {id(p) for p in roles} == {id(p) for p in method.parameters() if p.requires_grad}
    assert len(roles) == len({id(p) for p in roles})
    method(views()).loss.backward()
    assert all(p.grad is not None for p in roles)


@pytest.mark.parametrize("name", ["negative_cosine", "byol"])
def test_behind_an_online_filter_the_loss_keeps_the_gradient_of_small_directions(branch: Build, name: str) -> None:
    """One direction holds 0.9999 of the variance; power 2 multiplies what rounding leaves along it."""
    method = branch({"online": [{"name": "filter", "power": 2.0}], "target": ["stop"], "alignment": {"name": name}})
    draw = torch.Generator().manual_seed(0)
    small = torch.randn(2, 96, 5, generator=draw, dtype=torch.float64)
    small[..., 0] = 0
    common = (small.square().sum() * 9999 / 192).sqrt() * torch.eye(5, dtype=torch.float64)[0]
    x = small + common
    target = x.flip(0) + 0.3 * small.roll(1, 1)

    def gradient(dtype: torch.dtype, keep: bool) -> Tensor:
        method.wide_loss = keep
        leaf = x.to(dtype).requires_grad_()
        loss = method._loss(method._run(method.online_transforms, leaf, None), target.to(dtype))  # type: ignore[arg-type]
        assert loss.dtype == dtype
        return torch.autograd.grad(loss, leaf)[0].double()

    exact = gradient(torch.float64, True)
    kept, lost = ((gradient(torch.float32, keep) - exact).norm() / exact.norm() for keep in (True, False))
    assert kept < 0.02, kept
    assert lost > 10 * kept, "nothing to keep"


def test_without_an_online_filter_the_loss_stays_in_its_dtype(branch: Build) -> None:
    assert not branch(METHODS["byol"]).wide_loss and branch(METHODS["rdm_byol"]).wide_loss
    assert not branch(METHODS["rdm_simsiam"]).wide_loss, "a target's filter passes no gradient"
