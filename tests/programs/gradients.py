"""`python gradients.py OUT 1,2,4 HOW,... LOSS,...`: losses that look at rows of all processes, on that many processes.

Writes OUT/<loss>-<how>-<world>.pt: the loss, averaged over processes, and the weights' gradient, averaged likewise.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from forked import launch
from torch import Tensor

from fastrdm.kernels.collectives import process_count, process_rank
from fastrdm.methods.losses import CrossCorrelationConfig, cross_correlation
from fastrdm.methods.regularizer import RegularizerContext, find_regularizer
from fastrdm.methods.regularizer_settings import REGULARIZERS, regularizer_settings
from fastrdm.methods.transform import BranchContext, TransformContext
from fastrdm.methods.whiten import Whiten, WhitenConfig
from fastrdm.runtime import distributed
from fastrdm.runtime.distributed import gather_rows_with_gradient, sum_with_gradient
from fastrdm.schema import Horizon

ROWS, WIDTH = 16, 5
CORRELATION = CrossCorrelationConfig()


def covariance(x: Tensor) -> Tensor:
    """Variance and covariance of all rows, from sums over processes."""
    mean = sum_with_gradient(x.sum(0)) / ROWS
    c = x - mean
    covariance = sum_with_gradient(c.mT @ c) / (ROWS - 1)
    off = covariance - torch.diag(torch.diagonal(covariance))
    return F.relu(1 - (torch.diagonal(covariance) + 1e-4).sqrt()).mean() + off.square().sum() / x.shape[1]


def gathered(x: Tensor) -> Tensor:
    """A loss of all rows, the same number on every process."""
    everyone = gather_rows_with_gradient(x)
    return (everyone @ everyone.mT).exp().mean().log()


def contrastive(x: Tensor) -> Tensor:
    """A loss of a process's own rows against those of all: another number on every process."""
    everyone = gather_rows_with_gradient(x.unsqueeze(0), dim=1)[0]
    logits = F.normalize(x, dim=1) @ F.normalize(everyone, dim=1).mT / 0.2
    partner = (torch.arange(len(x)) + process_rank() * len(x) + 1) % ROWS
    return F.cross_entropy(logits, partner)


def two_views(x: Tensor) -> Tensor:
    """(2, B, WIDTH) of rows (B, WIDTH)."""
    return torch.stack((x, (2 * x + 0.3 * x.flip(-1)).tanh()))


def regularized(name: str) -> Callable[[Tensor], Tensor]:
    """A regularizer of the table, on two views; with a step behind it where it has state."""
    module = find_regularizer(name)(regularizer_settings(name)(name=name), RegularizerContext(WIDTH, ROWS)).double()
    return lambda x: module(two_views(x))


def wide(name: str) -> Callable[[Tensor], Tensor]:
    """A regularizer that takes another way with fewer rows than dimensions."""
    module = find_regularizer(name)(regularizer_settings(name)(name=name), RegularizerContext(4 * WIDTH, ROWS)).double()
    return lambda x: module(two_views(torch.cat((x, x.square(), x.sin(), x.exp()), -1)))


def correlated(x: Tensor) -> Tensor:
    """The loss of Barlow Twins between two views."""
    a, b = two_views(x)
    return cross_correlation(a, b, CORRELATION)


def whitened(**settings: Any) -> Callable[[Tensor], Tensor]:
    """A loss of whitened views, in parts that hold rows of several processes or as a whole."""
    context = TransformContext("online", WIDTH, None, ROWS, True, Horizon(1, 1))
    module = Whiten(WhitenConfig(**settings), context).double()
    module.set_step(5)
    partner = torch.linspace(-1, 1, WIDTH, dtype=torch.float64)
    return lambda x: (module(two_views(x), BranchContext(None, None)).tanh() * partner).square().mean()


LOSSES: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {  # makers, so that none begins with another's state
    "covariance": lambda: covariance,
    "gathered": lambda: gathered,
    "contrastive": lambda: contrastive,
    "cross_correlation": lambda: correlated,
    **{f"regularizer_{name}": partial(regularized, name) for name in REGULARIZERS},
    **{f"wide_{name}": partial(wide, name) for name in ("covariance", "coding_rate", "frobenius", "nuclear")},
    "whiten_zca": whitened,
    "whiten_newton": partial(whitened, root="newton"),
    "whiten_cholesky": partial(whitened, root="cholesky", size=8),
}


def work(out: Path, rank: int, names: list[str], hows: list[str]) -> None:
    distributed.start("cpu")
    world = process_count()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(ROWS, 7, generator=generator, dtype=torch.float64)
    start = 0.4 * torch.randn(7, WIDTH, generator=generator, dtype=torch.float64)
    mine = images.chunk(world)[rank]
    for name in names:
        for how in hows:
            loss = LOSSES[name]()
            torch._dynamo.reset()  # type: ignore[no-untyped-call]
            weights = start.clone().requires_grad_()
            chosen = torch.compile(loss, fullgraph=True, backend="aot_eager") if how == "compiled" else loss
            value = chosen((mine @ weights).tanh())
            value.backward()
            assert weights.grad is not None
            seen = {"loss": value.detach().clone(), "gradient": weights.grad}
            for tensor in seen.values():
                if world > 1:
                    dist.all_reduce(tensor)
                    tensor /= world
            if rank == 0:
                torch.save(seen, out / f"{name}-{how}-{world}.pt")
    distributed.stop()


if __name__ == "__main__":
    folder, hows, names = Path(sys.argv[1]), sys.argv[3].split(","), sys.argv[4].split(",")
    for count in map(int, sys.argv[2].split(",")):
        assert launch(count, lambda rank: work(folder, rank, names, hows)) == [0] * count
