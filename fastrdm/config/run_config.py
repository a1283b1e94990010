"""One run's configuration: every component's own config composed, read from presets, YAML and `a.b=c`, and checked."""

import dataclasses
import difflib
import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from fastrdm.analysis.spectral_analysis import AnalysisConfig
from fastrdm.config import help
from fastrdm.config import tree as trees
from fastrdm.config.tree import Tree
from fastrdm.evaluation.knn import EvaluateConfig
from fastrdm.loaders.spec import LoaderConfig
from fastrdm.methods.dual_branch import TRANSFORMS, MethodConfig, TransformConfig
from fastrdm.methods.presets import PRESETS
from fastrdm.methods.sinkhorn import SinkhornConfig
from fastrdm.methods.spectral_filter import FilterConfig
from fastrdm.models.encoders import EncoderConfig
from fastrdm.monitoring.monitor import MonitorConfig
from fastrdm.optim.optimizers import OptimConfig
from fastrdm.renamed import RENAMED
from fastrdm.runtime.checkpoint import CheckpointConfig
from fastrdm.runtime.log import LogConfig
from fastrdm.schema import STRICT, Duration, require, steps_of

RECIPES = Path(__file__).parents[1] / "recipes"
QUICK_START = RECIPES / "quickstart.yaml"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainConfig:
    """Length, precision and device of the training."""

    length: Duration = "100ep"
    """Length of the run in epochs or optimizer steps, such as 50ep or 2000st."""

    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the initial weights, of the order of the images and of the views."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the run computes. `auto` takes a CUDA device if there is one."""

    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    """Arithmetic of the encoder and of the projector up to its last BatchNorm. What follows runs in float32, or in
    float64 with fp64.
    """

    accumulate: int = Field(default=1, ge=1)
    """Number of parts into which each process splits its share of a batch; they run one after the other to save memory.
    BatchNorm, spectral filters and Sinkhorn then see one part at a time.
    """

    compile: bool = False
    """Compile the dual branch by torch.compile."""

    capture: bool = False
    """Record the whole training step as a CUDA graph. This needs a single process."""

    channels_last: bool = True
    """Store images and convolution weights with the channels last in memory."""

    hang_timeout: float = Field(default=600, gt=0)
    """Seconds without a step after which a run on several processes gives up."""

    def __post_init__(self) -> None:
        longer = not self.length.endswith("%") and steps_of(self.length, steps_per_epoch=2**32) > 0
        require(longer, "train.length", "above 0, in epochs or steps, such as '50ep'", self.length)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config:
    """One training run."""

    preset: str = "simsiam"
    """Method whose row of the table of presets every other setting starts from; see docs/methods.md."""

    run: str | None = None
    """Folder of the run. `null` takes runs/<preset>-<source>-<digest of the configuration>."""

    train: TrainConfig = TrainConfig()
    method: MethodConfig = MethodConfig()
    encoder: EncoderConfig = EncoderConfig()
    loader: LoaderConfig = LoaderConfig()
    optim: OptimConfig = OptimConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    monitor: MonitorConfig = MonitorConfig()
    analysis: AnalysisConfig = AnalysisConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    def __post_init__(self) -> None:
        parts = self.train.accumulate
        if self.loader.batch_size % parts:
            raise ValueError(f"train.accumulate must divide loader.batch_size={self.loader.batch_size}, got {parts}")
        transforms = (*self.method.online, *self.method.target)
        if parts > 1 and any(isinstance(t, SinkhornConfig) and t.queue for t in transforms):
            raise ValueError(f"train.accumulate must be 1 with sinkhorn.queue, got {parts}: a step fills the ring once")
        if len(self.loader.views) > 2 and any(isinstance(t, FilterConfig) and t.basis == "other" for t in transforms):
            raise ValueError(f"filter.basis=other takes two views, got {len(self.loader.views)} in loader.views")


_ADAPTER = TypeAdapter(Config)


def load(arguments: Sequence[str], over: Tree | None = None) -> Config:
    """The Config of `[FILE.yaml] [a.b=c ...]` and, over them, a nested dict; the quick start without FILE.

    ValueError names what is refused.
    """
    files = [a for a in arguments if "=" not in a]
    if len(files) > 1:
        raise ValueError(f"one configuration file at most, got {', '.join(files)}; settings are written a.b=c")
    layers = trees.read_files(_find(files[0]) if files else QUICK_START)
    return resolve(*layers, *(trees.setting(a) for a in arguments if "=" in a), over or {})


def resolve(*layers: Tree) -> Config:
    """The Config of nested dicts, each laid over the one before it, all of them over their preset."""
    preset = next((layer["preset"] for layer in reversed(layers) if "preset" in layer), Config.preset)
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ValueError(f"preset must be a method's name, got {preset!r}: {_nearest(str(preset), PRESETS)}")
    tree = to_dict(_validate({"preset": preset, **PRESETS[preset]}))
    for layer in layers:
        tree = trees.merge(tree, layer)
    config = _validate(tree)
    _check_values(tree, dataclasses.asdict(config))
    return config


def _find(name: str) -> Path:
    """Path of a configuration file: `name` itself if there is such a file, else the shipped recipe of that name."""
    path = next((path for path in (Path(name), RECIPES / name) if path.is_file()), None)
    if path is None:
        known = sorted(str(p.relative_to(RECIPES)) for p in RECIPES.rglob("*.yaml"))
        raise ValueError(f"no configuration file {name!r}, {_nearest(name, known)}; settings are written a.b=c")
    return path


def _validate(tree: Tree) -> Config:
    try:
        return _ADAPTER.validate_python(tree)
    except ValidationError as error:
        raise ValueError("\n".join(_with_new_name(_explain(e)) for e in error.errors())) from None


def _check_values(given: Any, taken: Any, path: str = "") -> None:
    """Refuse what pydantic lets pass: a number in place of true or false and the reverse, infinity."""
    if isinstance(given, dict | list) and isinstance(taken, dict | list | tuple):
        for key, value in given.items() if isinstance(given, dict) else enumerate(given):
            _check_values(value, taken[key], f"{path}.{key}" if path else str(key))
    elif isinstance(given, bool) != isinstance(taken, bool):
        expected = "true or false" if isinstance(taken, bool) else "a number"
        raise ValueError(f"{path} must be {expected}, got {given!r}")
    elif isinstance(taken, float) and not math.isfinite(taken):
        raise ValueError(f"{path} must be a finite number, got {given!r}")


def _nearest(word: str, known: Iterable[str]) -> str:
    """Suggestion for an unknown word: its new name, else the nearest known one, else all known ones."""
    names = list(known)
    if RENAMED.get(word) in names:
        return f"it is called {RENAMED[word]!r} now"
    near = difflib.get_close_matches(word, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"


def _nearest_key(path: list[str], key: str) -> str:
    """Suggestion for an unknown key: its new name, else the nearest beside it, else a key of that name elsewhere."""
    beside = help.keys_at(Config, path[:-1])
    if RENAMED.get(path[-1]) in beside:
        return f"it is called {key.removesuffix(path[-1]) + RENAMED[path[-1]]!r} now"
    near = difflib.get_close_matches(path[-1], beside, n=1)
    if near:
        return f"did you mean {key.removesuffix(path[-1]) + near[0]!r}?"
    elsewhere = [s.key for s in help.walk(Config) if s.key.split(".")[-1] == path[-1]]
    return f"did you mean {' or '.join(map(repr, elsewhere))}?" if elsewhere else f"known: {', '.join(beside)}"


def _with_new_name(line: str) -> str:
    """The line of a refusal, and the new name where it ends in a value that was renamed."""
    value = re.search(r"got '(\w+)'$", line)
    return f"{line}: it is called {RENAMED[value[1]]!r} now" if value and value[1] in RENAMED else line


_EXPECTED = {  # where pydantic's words are about Python
    "tuple_type": "a list",
    "dataclass_type": "keys and values",
    "string_type": "text",
    "model_attributes_type": "a transform",
    "union_tag_not_found": "a transform with its name",
}


def _explain(error: Any) -> str:
    """One line for one of pydantic's errors: key, what it takes, what it got, the nearest valid key."""
    path = [str(part) for part in error["loc"]]
    # pydantic puts the name of the member of a union after its index in the list
    key = ".".join(part for i, part in enumerate(path) if not (part in TRANSFORMS and i and path[i - 1].isdecimal()))
    if error["type"] == "unexpected_keyword_argument":
        return f"unknown configuration key {key!r}: {_nearest_key(path, key)}"
    if error["type"] == "union_tag_invalid":
        name = error["ctx"]["tag"]
        return f"{key} must be a transform, got {name!r}: {_nearest(name, TRANSFORMS)}"
    if error["type"] == "value_error":
        reason = str(error["ctx"]["error"])
        first, _, rest = reason.partition(" ")
        field = first.split(".")[-1]
        if field in help.keys_at(Config, path):  # a config names its own field: the key says where it stands
            return f"{key}.{field} {rest}" if key else reason
        return reason if "." in first or not key else f"{key}: {reason}"
    if error["type"] in _EXPECTED:
        return f"{key} must be {_EXPECTED[error['type']]}, got {error['input']!r}"
    return f"{key}: {error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}"


def to_dict(config: Config) -> Tree:
    """The resolved configuration as plain data; `resolve` gives the same Config back."""
    tree = _ADAPTER.dump_python(config, mode="json")
    assert isinstance(tree, dict)
    return tree


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, default_flow_style=None)


def run_folder(config: Config) -> Path:
    """Folder of the run. Equal configurations have the same folder."""
    digest = hashlib.sha256(to_yaml(config).encode()).hexdigest()[:8]
    return Path(config.run or f"runs/{config.preset}-{config.loader.source.split(':')[-1]}-{digest}")


def describe() -> Iterator[str]:
    """Lines of `--help`: every setting with its key, default, choices and description."""
    yield from map(help.show, help.walk(Config))
    yield "\nTransforms of method.online and method.target, as in method.target='[{name: filter, power: -0.5}]':"
    for kind in help.options(TransformConfig):
        settings = [s for s in help.walk(kind, f"{kind.name}.") if not s.key.endswith(".name")]
        yield from map(help.show, settings) if settings else [f"  {kind.name}"]
