"""Settings left at `auto`: what is chosen for this machine and this set, and the reason."""

import importlib.util
import shutil
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from fastrdm.config.run_config import Config
from fastrdm.loaders.build import engine_of
from fastrdm.loaders.sources.source import Source
from fastrdm.methods.transform import find_transform
from fastrdm.runtime.distributed import Processes


def choose(
    settings: Config, processes: Processes, source: Source | None = None, stored: Mapping[str, Any] | None = None
) -> tuple[Config, list[str]]:
    """The settings without `auto`, and a line that says what was chosen and why; no line where nothing was open.

    `stored` is the configuration of the run's newest checkpoint: what it chose and what binds a run, its precision and
    its engine, is kept. Without a `source` the loading engine stays open.
    """
    train, loader, told = settings.train, settings.loader, []
    stored_train, stored_loader = ((stored or {}).get(name) or {} for name in ("train", "loader"))
    if train.precision == "auto":
        precision, why = _precision(settings, processes.device, stored_train.get("precision"))
        train = replace(train, precision=precision)
        told.append(f"{precision} ({why})")
    if train.compile == "auto":
        compiled, why = _compile(processes.device)
        train = replace(train, compile=compiled)
        told.append(f"compiled ({why})" if compiled else f"eager ({why})")
    if train.capture == "auto":
        captured, why = _capture(settings, processes)
        train = replace(train, capture=captured)
        if processes.device.type == "cuda":
            told.append(f"{'captured' if captured else 'not captured'} ({why})")
    if train.channels_last == "auto":
        # Faster on a GPU, and by a fifth to a third on a CPU (benchmarks/results/layout_cpu.csv).
        train = replace(train, channels_last=True)
    if train.cudnn_benchmark == "auto":
        still = not any(view.progressive for view in loader.views)
        train = replace(train, cudnn_benchmark=processes.device.type == "cuda" and still)
    if loader.engine == "auto" and source is not None:
        engine = stored_loader.get("engine", "auto")
        engine = engine_of(loader, source) if engine == "auto" else engine
        loader = replace(loader, engine=engine)
        told.append(f"{engine} engine")
    if loader.workers == "auto":
        loader = replace(loader, workers=loader.threads)
        told.append(f"{loader.workers} loading thread{'s' if loader.workers != 1 else ''}")
    line = [f"chosen automatically: {', '.join(dict.fromkeys(told))}"] if told else []
    return replace(settings, train=train, loader=loader), line


def _precision(settings: Config, device: torch.device, stored: Any) -> tuple[Any, str]:
    if stored in ("fp32", "bf16", "fp16", "fp64"):
        return stored, "as this run began"
    if device.type != "cuda":
        if settings.encoder.name == "resnet_small":
            return "fp32", "resnet_small on a CPU, whose results are on record"
        # A step takes 0.5 to 0.7 of the time (benchmarks/results/precision_cpu.csv).
        return ("bf16", "native on this CPU") if cpu_multiplies_bf16() else ("fp32", "this CPU has no AVX512_BF16")
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16", "native on this GPU"
    return "fp16", "this GPU has no bf16"


def cpu_multiplies_bf16() -> bool:
    """Whether this processor is of the kind on which bf16 was measured to pay."""
    return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))


def _compile(device: torch.device) -> tuple[bool, str]:
    if device.type != "cuda":
        return False, "on a CPU compiling costs more than short runs win"
    if importlib.util.find_spec("triton") is None:
        return False, "Triton is not installed"
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        return False, "Triton needs a C compiler, and none is on the PATH"
    return True, "on CUDA"


def _capture(settings: Config, processes: Processes) -> tuple[bool, str]:
    if processes.device.type != "cuda":
        return False, "CUDA graphs need CUDA"
    if processes.world > 1:
        return False, "several processes"
    if any(view.progressive for view in settings.loader.views):
        return False, "the views grow"
    method = settings.method
    for transform in (*method.online, *method.target):
        if find_transform(transform.name).waits(transform):
            return False, f"{transform.name} waits for an eigensolver"
    return True, "one process, views of fixed sizes"
