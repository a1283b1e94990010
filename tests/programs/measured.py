"""`python measured.py OUT`: the analysis of one method, on 1 and on 2 processes with half of each batch.

Writes OUT/<world>-<rank>.json: every process's metrics.
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch
from forked import launch
from torch import nn

from fastrdm.analysis.spectral_analysis import measure
from fastrdm.kernels.batchnorm import ViewBatchNorm
from fastrdm.methods.dual_branch import DualBranch, MethodConfig
from fastrdm.methods.spectral_filter import FilterConfig
from fastrdm.models.heads import HeadConfig
from fastrdm.runtime import distributed
from fastrdm.schema import Horizon

BATCH = 16


class Encoder(nn.Sequential):
    """(N, 3, 4, 4) to (N, 8)."""

    features = 8

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(48, 8), ViewBatchNorm(8))


def work(rank: int, world: int, out: Path) -> None:
    """Measure on this process's share."""
    distributed.start("cpu")
    torch.manual_seed(0)
    config = MethodConfig(projector=HeadConfig(layers=1, out=6, last_norm="plain"), target=(FilterConfig(power=-0.5),))
    method = DualBranch(config, Encoder(), Horizon(4, 20), batch_size=BATCH).double()
    images = torch.randn(8, 2, BATCH, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    share = BATCH // world
    batches = (tuple(views[:, rank * share : (rank + 1) * share]) for views in images)
    metrics = measure(method, batches, batch_size=BATCH, replicates=10).metrics
    (out / f"{world}-{rank}.json").write_text(json.dumps(metrics))
    distributed.stop()


def main() -> None:
    out = Path(sys.argv[1])
    for world in (1, 2):
        if any(launch(world, partial(work, world=world, out=out))):
            sys.exit(1)


if __name__ == "__main__":
    main()
