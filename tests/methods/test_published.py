"""One step of each published method against a plain version: torch.nn modules, one pass a view, loss and gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrdm.methods.dual_branch import DualBranch

Build = Callable[..., DualBranch]
Draw = Callable[..., list[Tensor]]
TOLERANCE = 1e-12

SCORES = {"name": "prototypes", "count": 4}
RDM = {"online": [{"name": "filter", "kind": "log1p"}], "target": ["stop"]}
RDM_TARGET = {"online": [], "target": [{"name": "filter", "power": -0.5}]}
SIMSIAM_HEAD = {"layers": 3, "hidden": 7, "out": 5, "last_norm": "plain"}
BYOL_HEAD = {"layers": 2, "hidden": 7, "out": 5, "bias": True}
DINO_HEAD = {"layers": 3, "hidden": 7, "out": 5, "bias": True, "activation": "gelu", "norm": False}
BYOL = {"projector": BYOL_HEAD, "ema": {}, "alignment": {"name": "byol", "directions": "sum"}}
CROSS_ENTROPY = {"alignment": {"name": "cross_entropy"}}


class Plain:
    """The layers of one network, built by hand with the weights of ours; every parameter under our name."""

    def __init__(self, method: DualBranch, prefix: str, layers: list[nn.Module]) -> None:
        """`layers`: the projector, in the order of its published code."""
        encoder = [nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        ours: Any = getattr(method, prefix)
        self.encoder, self.projector = nn.Sequential(*encoder).double(), nn.Sequential(*layers).double()
        self.encoder.load_state_dict(ours.encoder.state_dict())
        self.projector.load_state_dict(ours.projector.state_dict())
        self.named = {f"{prefix}.encoder.{n}": p for n, p in self.encoder.named_parameters()}
        self.named |= {f"{prefix}.projector.{n}": p for n, p in self.projector.named_parameters()}
        self.prototypes = torch.zeros(0)
        if ours.prototypes is not None:
            self.prototypes = ours.prototypes.weight.detach().clone().requires_grad_()
            self.named[f"{prefix}.prototypes.weight"] = self.prototypes  # type: ignore[assignment]

    def __call__(self, view: Tensor) -> Tensor:
        return self.projector(self.encoder(view))  # type: ignore[no-any-return]

    def scores(self, z: Tensor) -> Tensor:
        return F.normalize(z) @ (self.prototypes / self.prototypes.norm(dim=1, keepdim=True)).T


def predictor(method: DualBranch, plain: Plain, bias: bool) -> nn.Sequential:
    layers = nn.Sequential(nn.Linear(5, 3, bias=bias), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 5)).double()
    layers.load_state_dict(method.online_transforms[0].head.state_dict())
    plain.named |= {f"online_transforms.0.head.{n}": p for n, p in layers.named_parameters()}
    return layers


def simsiam_head() -> list[nn.Module]:
    first, second = ([nn.Linear(i, 7, bias=False), nn.BatchNorm1d(7), nn.ReLU()] for i in (6, 7))
    return [*first, *second, nn.Linear(7, 5, bias=False), nn.BatchNorm1d(5, affine=False)]


def byol_head() -> list[nn.Module]:
    return [nn.Linear(6, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 5)]


def simsiam(method: DualBranch, a: Tensor, b: Tensor) -> tuple[Tensor, list[Plain]]:
    net = Plain(method, "online", simsiam_head())
    h = predictor(method, net, bias=False)
    z1, z2 = net(a), net(b)
    p1, p2 = h(z1), h(z2)

    def d(p: Tensor, z: Tensor) -> Tensor:
        return -F.cosine_similarity(p, z.detach(), dim=1).mean()

    return d(p1, z2) / 2 + d(p2, z1) / 2, [net]


def byol(method: DualBranch, a: Tensor, b: Tensor) -> tuple[Tensor, list[Plain]]:
    online, target = Plain(method, "online", byol_head()), Plain(method, "target", byol_head())
    h = predictor(method, online, bias=True)
    p1, p2 = h(online(a)), h(online(b))
    with torch.no_grad():
        z1, z2 = target(a), target(b)
    losses = [2 - 2 * (F.normalize(p) * F.normalize(z)).sum(1).mean() for p, z in ((p1, z2), (p2, z1))]
    return losses[0] + losses[1], [online, target]


def swav(method: DualBranch, a: Tensor, b: Tensor) -> tuple[Tensor, list[Plain]]:
    net = Plain(method, "online", byol_head())
    s1, s2 = net.scores(net(a)), net.scores(net(b))

    def codes(s: Tensor) -> Tensor:
        q = torch.exp(s.detach() / 0.05).T
        for _ in range(3):
            q = q / q.sum(1, keepdim=True) / q.shape[0]
            q = q / q.sum(0, keepdim=True) / q.shape[1]
        return (q * q.shape[1]).T

    losses = [-(codes(q) * F.log_softmax(s / 0.1, dim=1)).sum(1).mean() for q, s in ((s1, s2), (s2, s1))]
    return (losses[0] + losses[1]) / 2, [net]


def dino(method: DualBranch, a: Tensor, b: Tensor) -> tuple[Tensor, list[Plain]]:
    layers = ([nn.Linear(6, 7), nn.GELU(), nn.Linear(7, 7), nn.GELU(), nn.Linear(7, 5)] for _ in range(2))
    student, teacher = (Plain(method, side, head) for side, head in zip(("online", "target"), layers, strict=True))
    s1, s2 = student.scores(student(a)), student.scores(student(b))
    center, temperature = torch.tensor([0.1, -0.2, 0.3, 0.0], dtype=torch.float64), 0.04
    with torch.no_grad():
        t1, t2 = (torch.softmax((teacher.scores(teacher(x)) - center) / temperature, 1) for x in (a, b))
    losses = [-(t * F.log_softmax(s / 0.1, dim=1)).sum(1).mean() for t, s in ((t1, s2), (t2, s1))]
    return (losses[0] + losses[1]) / 2, [student, teacher]


def filtered(x: Tensor, g: Callable[[Tensor], Tensor]) -> Tensor:
    """p w, w = V diag(g(S)) V^T without gradient, dropping what is null beside the largest."""
    with torch.no_grad():
        _, s, vh = torch.linalg.svd(x, full_matrices=False)
        s, vh = s[s > 1e-7 * s[0]], vh[s > 1e-7 * s[0]]
        w = vh.T @ torch.diag(g(s)) @ vh
    return x @ w


def rdm_simsiam_online(method: DualBranch, a: Tensor, b: Tensor) -> tuple[Tensor, list[Plain]]:
    net = Plain(method, "online", simsiam_head())
    z1, z2 = net(a), net(b)
    p1, p2 = (filtered(z, torch.log1p) for z in (z1, z2))
    losses = [-F.cosine_similarity(p, z.detach()).mean() for p, z in ((p1, z2), (p2, z1))]
    return (losses[0] + losses[1]) / 2, [net]


def rdm_simsiam_target(method: DualBranch, a: Tensor, b: Tensor) -> tuple[Tensor, list[Plain]]:
    net = Plain(method, "online", simsiam_head())
    z1, z2 = net(a), net(b)
    h1, h2 = (filtered(z, lambda s: s**-0.5).detach() for z in (z1, z2))
    losses = [-F.cosine_similarity(p, h).mean() for p, h in ((z1, h2), (z2, h1))]
    return (losses[0] + losses[1]) / 2, [net]


def rdm_byol_online(method: DualBranch, a: Tensor, b: Tensor) -> tuple[Tensor, list[Plain]]:
    online, target = Plain(method, "online", byol_head()), Plain(method, "target", byol_head())
    p1, p2 = (filtered(online(x), torch.log1p) for x in (a, b))
    with torch.no_grad():
        z1, z2 = target(a), target(b)
    losses = [2 - 2 * F.cosine_similarity(p, z).mean() for p, z in ((p1, z2), (p2, z1))]
    return losses[0] + losses[1], [online, target]


def rdm_imagenet(method: DualBranch, a: Tensor, b: Tensor) -> tuple[Tensor, list[Plain]]:
    """The authors' ImageNet code: the target z of one view in the basis of the other view's online output p."""
    net = Plain(method, "online", byol_head())
    z1, z2 = net(a), net(b)

    def d(p: Tensor, z: Tensor) -> Tensor:
        _, s, vh = torch.linalg.svd(p.detach(), full_matrices=False)
        return -F.cosine_similarity(p, z.detach() @ vh.T @ torch.diag(s**-0.5) @ vh).mean()

    return (d(z1, z2) + d(z2, z1)) / 2, [net]


CASES: dict[str, tuple[dict[str, Any], Callable[[DualBranch, Tensor, Tensor], tuple[Tensor, list[Plain]]]]] = {
    "simsiam": ({"projector": SIMSIAM_HEAD, "online": [{"name": "predictor", "hidden": 3}]}, simsiam),
    "byol": ({**BYOL, "online": [{"name": "predictor", "hidden": 3, "bias": True}]}, byol),
    "swav": ({"projector": BYOL_HEAD, "online": [SCORES], "target": [SCORES, "sinkhorn"], **CROSS_ENTROPY}, swav),
    "dino": (
        {"projector": DINO_HEAD, "ema": {}, "online": [SCORES], "target": [SCORES, "center_sharpen"], **CROSS_ENTROPY},
        dino,
    ),
    "rdm_simsiam_log1p": ({"projector": SIMSIAM_HEAD, **RDM}, rdm_simsiam_online),
    "rdm_simsiam_target0.5": ({"projector": SIMSIAM_HEAD, **RDM_TARGET}, rdm_simsiam_target),
    "rdm_imagenet": (
        {"projector": BYOL_HEAD, "online": [], "target": [{"name": "filter", "power": -0.5, "basis": "other"}]},
        rdm_imagenet,
    ),
    "rdm_byol_log1p": ({**BYOL, **RDM}, rdm_byol_online),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_gradients_and_statistics_equal_the_plain_version(branch: Build, views: Draw, name: str) -> None:
    config, plain = CASES[name]
    method, (a, b) = branch(config), views()
    method.set_step(0)
    for transform in method.target_transforms:
        if hasattr(transform, "center"):
            transform.center.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0]))
    expected, networks = plain(method, a, b)
    loss = method([a, b]).loss
    torch.testing.assert_close(loss, expected, rtol=0, atol=TOLERANCE)
    loss.backward()
    expected.backward()
    theirs = {n: p.grad for net in networks for n, p in net.named.items()}
    assert theirs.keys() == {n for n, _ in method.named_parameters()}
    for n, p in method.named_parameters():
        torch.testing.assert_close(p.grad, theirs[n], rtol=0, atol=TOLERANCE, msg=n)
    for net, prefix in zip(networks, ("online", "target"), strict=False):
        for part in ("encoder", "projector"):
            ours = dict(getattr(getattr(method, prefix), part).named_buffers())
            torch.testing.assert_close(ours, dict(getattr(net, part).named_buffers()), rtol=0, atol=TOLERANCE)
