"""Train RDM-SimSiam with SVD filters, eigh and newton_schulz; do the loss curves differ more than by chance?

    python -m benchmarks.training.solver_vs_svd --root data/cifar10 > benchmarks/results/solver_vs_svd.csv

--root holds train.images.npy, uint8 (N, 32, 32, 3). Five SVD runs start from weights that differ by 1e-6, relative;
their smallest and largest loss at each step are the envelope. One more run for each of our solvers starts from the
weights of the first. Prints each step's losses, and to stderr the distances from the mean of the SVD runs.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from benchmarks import common
from benchmarks.common import Row
from benchmarks.kernels.spectral import svd_weights
from fastrdm.kernels.spectral.spectral_filter import spectral_filter

Filter = Callable[[Tensor], Tensor]
SETTINGS: dict[str, tuple[str, float | None, str]] = {
    "online log1p": ("log1p", None, "online"),
    "target -0.5": ("power", -0.5, "target"),
}
SVD_RUNS, BATCH, WIDTH = 5, 128, 256
SOLVERS = ("eigh", "newton_schulz")
FIELDS = ["setting", "step", *(f"svd{i}" for i in range(SVD_RUNS)), *SOLVERS]


def network() -> nn.Sequential:
    """A small convolutional encoder and SimSiam's projector, (B, 3, 32, 32) -> (B, WIDTH), columns standardized."""

    def block(inside: int, outside: int) -> list[nn.Module]:
        return [nn.Conv2d(inside, outside, 3, 2, 1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()]

    return nn.Sequential(
        *block(3, 32),
        *block(32, 64),
        *block(64, 128),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, WIDTH, bias=False),
        nn.BatchNorm1d(WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, WIDTH),
        nn.BatchNorm1d(WIDTH, affine=False),
    )


def svd_filter(kind: str, power: float | None, side: str) -> Filter:
    """The authors' filter: W from a float32 SVD, as a constant."""

    def apply(x: Tensor) -> Tensor:
        with torch.no_grad():
            w = svd_weights(x, kind, power)
        out: Tensor = (x if side == "online" else x.detach()) @ w
        return out

    return apply


def own_filter(kind: str, power: float | None, side: str, solver: str) -> Filter:
    """This package's filter with one of its solvers."""
    return lambda x: spectral_filter(x, kind, power, side=side, solver=solver)  # type: ignore[arg-type]


def two_views(images: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Random flips, shifts by up to 4 pixels and changes of contrast, of uint8 (B, 3, 32, 32)."""
    views = []
    for _ in range(2):
        x = images.float() / 127.5 - 1
        flip = torch.rand(len(x), generator=generator) < 0.5
        x = torch.where(flip[:, None, None, None], x.flip(-1), x)
        dy, dx = torch.randint(-4, 5, (2,), generator=generator).tolist()
        x = x.roll((dy, dx), (-2, -1))
        views.append(x * (0.6 + 0.8 * torch.rand(len(x), 1, 1, 1, generator=generator)))
    return views


def train(images: Tensor, steps: int, nudge: int, transform: Filter, side: str) -> list[float]:
    """Losses of one run; `nudge` > 0 changes the initial weights by 1e-6, relative, in its own direction."""
    torch.manual_seed(0)
    net = network()
    noise = torch.Generator().manual_seed(1000 + nudge)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1 + 1e-6 * (nudge > 0) * torch.randn(p.shape, generator=noise))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.03, momentum=0.9, weight_decay=5e-4)
    draw = torch.Generator().manual_seed(7)
    losses = []
    for _ in range(steps):
        batch = images[torch.randint(len(images), (BATCH,), generator=draw)]
        first, second = (net(view) for view in two_views(batch, draw))
        loss = torch.zeros(())
        for a, b in ((first, second), (second, first)):
            online, target = (transform(a), b.detach()) if side == "online" else (a, transform(b))
            loss = loss - 0.5 * cosine_similarity(online, target, dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def verdict(setting: str, svd: Tensor, ours: dict[str, list[float]]) -> None:
    """Print to stderr how far ours stray from the mean of the SVD runs, and how far an SVD run does from the others."""
    others = svd.sum(0)
    theirs = max((run - (others - run) / (len(svd) - 1)).abs().max().item() for run in svd)
    for name, losses in ours.items():
        run = torch.tensor(losses, dtype=torch.float64)
        inside = ((run >= svd.min(0).values - 1e-5) & (run <= svd.max(0).values + 1e-5)).double().mean().item()
        distance = (run - svd.mean(0)).abs().max().item()
        chance = (len(svd) - 1) / (len(svd) + 1)
        print(f"{setting}: {name} strays by {distance:.2e} at most, an SVD run by {theirs:.2e};", file=sys.stderr)
        print(f"  {inside:.0%} of its steps lie in the envelope, by chance {chance:.0%}", file=sys.stderr)


def rows(images: Tensor, steps: int) -> Iterator[Row]:
    """The losses of every step; the verdict on each setting goes to stderr."""
    for setting, (kind, power, side) in SETTINGS.items():
        svd = [train(images, steps, i, svd_filter(kind, power, side), side) for i in range(SVD_RUNS)]
        ours = {solver: train(images, steps, 0, own_filter(kind, power, side, solver), side) for solver in SOLVERS}
        for step, losses in enumerate(zip(*svd, *ours.values(), strict=True)):
            yield dict(zip(FIELDS, (setting, step, *(f"{loss:.7f}" for loss in losses)), strict=True))
        verdict(setting, torch.tensor(svd, dtype=torch.float64), ours)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    images = torch.from_numpy(np.load(args.root / "train.images.npy")).permute(0, 3, 1, 2)
    common.print_rows(FIELDS, rows(images, args.steps))


if __name__ == "__main__":
    main()
