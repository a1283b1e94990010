"""`python gradients.py OUT 1,2,4`: losses that look at rows of all processes, on that many processes.

Writes OUT/<loss>-<how>-<world>.pt: the loss, averaged over processes, and the weights' gradient, averaged likewise.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from forked import launch
from torch import Tensor

from fastrdm.kernels.collectives import process_count, process_rank
from fastrdm.runtime import distributed
from fastrdm.runtime.distributed import gather_rows_with_gradient, sum_with_gradient

ROWS, WIDTH = 16, 5


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


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "covariance": covariance,
    "gathered": gathered,
    "contrastive": contrastive,
}


def work(out: Path, rank: int) -> None:
    distributed.start("cpu")
    world = process_count()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(ROWS, 7, generator=generator, dtype=torch.float64)
    start = 0.4 * torch.randn(7, WIDTH, generator=generator, dtype=torch.float64)
    mine = images.chunk(world)[rank]
    for name, loss in LOSSES.items():
        for how in ("eager", "compiled"):
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
    folder = Path(sys.argv[1])
    for count in map(int, sys.argv[2].split(",")):
        assert launch(count, lambda rank: work(folder, rank)) == [0] * count
