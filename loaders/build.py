"""The table of loading engines, and `build_loader`, which chooses one."""

from collections.abc import Callable

import torch

from fastrdm.loaders.engines.dali import DaliLoader
from fastrdm.loaders.engines.ffcv import FfcvLoader
from fastrdm.loaders.engines.native import NativeLoader
from fastrdm.loaders.engines.resident import ResidentLoader
from fastrdm.loaders.engines.synthetic import SyntheticLoader
from fastrdm.loaders.engines.torchcodec import TorchcodecLoader
from fastrdm.loaders.order import Process
from fastrdm.loaders.sources.source import Source
from fastrdm.loaders.spec import Engine, Loader, LoaderConfig
from fastrdm.schema import require

CPU = torch.device("cpu")
ENGINES: dict[str, Callable[..., Loader]] = {
    "resident": ResidentLoader,
    "native": NativeLoader,
    "dali": DaliLoader,
    "ffcv": FfcvLoader,
    "torchcodec": TorchcodecLoader,
    "synthetic": SyntheticLoader,
}


def engine_of(config: LoaderConfig, source: Source) -> Engine:
    """The engine of `config`; what `auto` means for this source."""
    if config.engine != "auto":
        return config.engine
    return "native" if source.images is None else "resident"


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
    if source.images is not None and config.engine != "synthetic":
        limit = config.max_enlarge * min(source.images.shape[1:3])
        largest = max(view.size for view in config.views)
        images = "x".join(map(str, source.images.shape[1:3]))
        most = f"at most loader.max_enlarge={config.max_enlarge:g} times the images of {images} px"
        require(largest <= limit, "loader.views.*.size", most, largest)
    if config.augment == "dali" and config.engine != "dali":
        raise ValueError(f"loader.augment=dali takes loader.engine=dali, got loader.engine={config.engine}")
    ordered = config.order == "full" or source.shards is not None
    shards = "full unless the set is packed in shards (fastrdm pack; a .beton file has none)"
    require(ordered, "loader.order", shards, config.order)
    return ENGINES[engine_of(config, source)](config, source, Process(seed, rank, world, device, dtype))
