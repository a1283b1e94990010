"""The table of engines."""

import torch

from fastrdm.loaders.native import NativeLoader
from fastrdm.loaders.resident import ResidentLoader
from fastrdm.loaders.sources import Source
from fastrdm.loaders.spec import Loader, LoaderConfig

CPU = torch.device("cpu")
ENGINES: dict[str, type[ResidentLoader] | type[NativeLoader]] = {"resident": ResidentLoader, "native": NativeLoader}


def build_loader(
    config: LoaderConfig,
    source: Source,
    *,
    seed: int,
    rank: int = 0,
    world: int = 1,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
) -> Loader:
    """The loader of process `rank` of `world`, with views of `dtype` on `device`."""
    engine = config.engine
    if engine == "auto":
        engine = "native" if source.images is None else "resident"
    return ENGINES[engine](config, source, seed=seed, rank=rank, world=world, device=device, dtype=dtype)
