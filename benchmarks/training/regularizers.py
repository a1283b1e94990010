"""Regularizers and losses of the other families beside their plain formulas, forward and backward; CSV to stdout.

    python -m benchmarks.training.regularizers [--rows 512] [--width 2048] > benchmarks/results/regularizers_cpu.csv

The plain formula is the one that published code has: covariances as D x D matrices, a coding rate or a nuclear norm by
`eigvalsh` or `svdvals`, characteristic functions with a sine and a cosine for each frequency, and Barlow Twins in both
directions of a pair. Rounds take turns; the medians are of processor time, since other work shares the machine.
"""

import csv
import statistics
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import common
from fastrdm.methods.alignment import align
from fastrdm.methods.losses import AlignmentConfig, CrossCorrelationConfig, cross_correlation
from fastrdm.methods.regularizer import RegularizerContext, find_regularizer
from fastrdm.methods.regularizer_settings import regularizer_settings
from fastrdm.methods.regularizers import Sliced

Loss = Callable[[Tensor], Tensor]
FIELDS = ["loss", "rows", "width", "views", "plain_ms", "ours_ms", "times", "difference", *common.ENVIRONMENT]
VIEWS = 2


def covariance(x: Tensor) -> Tensor:
    x = x - x.mean(0)
    c = x.mT @ x / (len(x) - 1)
    return (c.square().sum() - c.diagonal().square().sum()) / x.shape[1]


def coding_rate(x: Tensor) -> Tensor:
    x, (n, width) = F.normalize(x, dim=-1), x.shape
    values: Tensor = torch.linalg.eigvalsh(x.mT @ x).clamp_min(0)
    return -torch.log1p(values * (width / (n * 0.5))).sum() / 2 * (n + width) / (n * width)


def frobenius(x: Tensor) -> Tensor:
    x = F.normalize(x, dim=0)
    values: Tensor = torch.linalg.svdvals(x).square()
    return (values / values.sum()).square().sum().log()


def koleo(x: Tensor) -> Tensor:
    x = F.normalize(x, dim=-1)
    near = (x @ x.mT).detach().fill_diagonal_(-2).argmax(1)
    return -(F.pairwise_distance(x, x[near], eps=1e-8) + 1e-8).log().mean()


def variance(x: Tensor) -> Tensor:
    return F.relu(1 - (x.var(0) + 1e-4).sqrt()).mean()


def sigreg(x: Tensor, slices: Tensor) -> Tensor:
    t = torch.linspace(0, 3, 17, dtype=x.dtype)
    angles = (x @ slices).unsqueeze(-1) * t
    normal = torch.exp(-t.square() / 2)
    error = (angles.cos().mean(0) - normal).square() + angles.sin().mean(0).square()
    integral: Tensor = torch.trapezoid(error * normal, t)
    return 2 * len(x) * integral.mean()


def nuclear(x: Tensor) -> Tensor:
    """Of both views (V, B, D)."""
    values: Tensor = torch.linalg.svdvals(F.normalize(x, dim=-1).mean(0))
    return -values.sum()


def barlow_twins(x: Tensor) -> Tensor:
    """Of both views (V, B, D), each direction by itself."""
    config = CrossCorrelationConfig()
    return align(x, x, cross_correlation, config)


def pairs(rows: int, width: int) -> dict[str, tuple[Loss, Loss]]:
    """The plain loss and ours, of views (V, rows, width)."""
    ours = {}
    for name in ("variance", "covariance", "coding_rate", "frobenius", "koleo", "sigreg", "nuclear"):
        ours[name] = find_regularizer(name)(regularizer_settings(name)(name=name), RegularizerContext(width, rows))
    slices = ours["sigreg"]
    assert isinstance(slices, Sliced)
    plain: dict[str, Loss] = {
        f.__name__: lambda x, f=f: torch.stack([f(view) for view in x]).mean()  # type: ignore[misc]
        for f in (variance, covariance, coding_rate, frobenius, koleo)
    }
    plain["sigreg"] = lambda x: torch.stack([sigreg(view, slices.slices) for view in x]).mean()
    found: dict[str, tuple[Loss, Loss]] = {name: (plain[name], ours[name]) for name in plain}
    found["nuclear"] = nuclear, ours["nuclear"]
    config: AlignmentConfig = CrossCorrelationConfig()
    found["cross_correlation"] = barlow_twins, lambda x: align(x, x, cross_correlation, config, once=True)
    return found


def once(loss: Loss, x: Tensor) -> tuple[float, float]:
    """Milliseconds of processor time of a forward and backward pass, and the value."""
    x.grad = None
    begin = common.CLOCKS["cpu"]()
    value = loss(x)
    value.backward()
    return 1e3 * (common.CLOCKS["cpu"]() - begin), value.item()


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(VIEWS, arguments.rows, arguments.width, generator=generator)
    mixed = x * torch.logspace(0, -1.5, arguments.width) + 0.1
    leaf = mixed.requires_grad_()
    writer = csv.DictWriter(sys.stdout, FIELDS, lineterminator="\n")
    writer.writeheader()
    for name, both in pairs(arguments.rows, arguments.width).items():
        laps: tuple[list[float], list[float]] = ([], [])
        values = [0.0, 0.0]
        for _ in range(arguments.rounds + 1):
            for side, loss in enumerate(both):
                lap, values[side] = once(loss, leaf)
                laps[side].append(lap)
        plain, ours = (statistics.median(some[1:]) for some in laps)
        sizes = {"loss": name, "rows": arguments.rows, "width": arguments.width, "views": VIEWS}
        times = {"plain_ms": round(plain, 1), "ours_ms": round(ours, 1), "times": round(plain / ours, 2)}
        apart = {"difference": f"{abs(values[0] - values[1]) / max(abs(values[0]), 1e-9):.1e}"}
        writer.writerow({**sizes, **times, **apart, **common.environment(torch.device("cpu"))})
        sys.stdout.flush()


if __name__ == "__main__":
    main()
