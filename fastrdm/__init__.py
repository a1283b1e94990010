"""fastrdm: non-contrastive self-supervised learning, fast, with the rank of both branches in sight.

The names below are the public interface. They are imported when they are first used: `import fastrdm` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastrdm.commands.pretrained import load_encoder
    from fastrdm.commands.train import train
    from fastrdm.kernels.linalg.effective_rank import effective_rank
    from fastrdm.kernels.linalg.gram import gram
    from fastrdm.kernels.spectral.spectral_filter import spectral_filter
    from fastrdm.loaders.build import build_loader
    from fastrdm.loaders.sources.source import Source
    from fastrdm.methods.dual_branch import DualBranch

__version__ = "0.1.0"

__all__ = [
    "DualBranch",
    "Source",
    "__version__",
    "build_loader",
    "effective_rank",
    "gram",
    "load_encoder",
    "spectral_filter",
    "train",
]

_MODULES = {
    "DualBranch": "methods.dual_branch",
    "Source": "loaders.sources.source",
    "build_loader": "loaders.build",
    "effective_rank": "kernels.linalg.effective_rank",
    "gram": "kernels.linalg.gram",
    "load_encoder": "commands.pretrained",
    "spectral_filter": "kernels.spectral.spectral_filter",
    "train": "commands.train",
}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module 'fastrdm' has no attribute {name!r}")
    value = getattr(import_module(f"fastrdm.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
