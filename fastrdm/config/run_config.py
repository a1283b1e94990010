"""One run's configuration: every component's own config composed, read from presets, YAML and `a.b=c`, and checked."""

import dataclasses
import difflib
import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from fastrdm import parts
from fastrdm.analysis.spectral_analysis import AnalysisConfig
from fastrdm.config import help
from fastrdm.config import tree as trees
from fastrdm.config.tree import Tree
from fastrdm.evaluation.knn import EvaluateConfig
from fastrdm.loaders.spec import LoaderConfig
from fastrdm.methods.alignment import ALIGNMENTS, AlignmentConfig, loss_settings
from fastrdm.methods.dual_branch import TRANSFORMS, MethodConfig, transform_settings
from fastrdm.methods.presets import PRESETS
from fastrdm.methods.sinkhorn import SinkhornConfig
from fastrdm.methods.spectral_filter import FilterConfig
from fastrdm.models.encoders import EncoderConfig, encoder_settings
from fastrdm.monitoring.monitor import MonitorConfig
from fastrdm.optim.optimizers import OptimConfig
from fastrdm.renamed import RENAMED
from fastrdm.runtime.checkpoint import CheckpointConfig
from fastrdm.runtime.log import LogConfig
from fastrdm.schema import STRICT, Duration, nearest, require, steps_of

RECIPES = Path(__file__).parents[1] / "recipes"
QUICK_START = RECIPES / "quickstart.yaml"
PATHS = frozenset(("run", "loader.root", "loader.classes"))  # texts that may look like a part and name none


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


def load(arguments: Sequence[str], over: Tree | None = None, *, trust: bool = True) -> Config:
    """The Config of `[FILE.yaml] [a.b=c ...]` and, over them, a nested dict; the quick start without FILE.

    `trust`: whether FILE may name parts outside fastrdm, which are code that is loaded. ValueError names what is
    refused.
    """
    files = [a for a in arguments if "=" not in a]
    if len(files) > 1:
        raise ValueError(f"one configuration file at most, got {', '.join(files)}; settings are written a.b=c")
    file = _find(files[0]) if files else QUICK_START
    layers, changes = trees.read_files(file), [*(trees.setting(a) for a in arguments if "=" in a), over or {}]
    if not trust:
        refuse_foreign(layers, changes, file)
    return resolve(*layers, changes=changes)


def restore(stored: Tree, file: Path, changes: Sequence[Tree] = (), *, trust: bool = False) -> Config:
    """The Config that `file` of a run holds, under `changes`.

    A stored configuration brings no code with it: without `trust`, ValueError where it names a part outside fastrdm
    that `changes` do not name.
    """
    tree = _with_room_for(stored, changes)
    for change in changes:
        tree = trees.merge(tree, change)
    if not trust:
        refuse_foreign([tree], changes, file)
    return resolve(tree)


def resolve(*layers: Tree, changes: Sequence[Tree] = ()) -> Config:
    """The Config of nested dicts, each laid over the one before it, all of them over their preset, then `changes`.

    Where a layer, or `changes` together, name another encoder or loss than the one below, settings from below that the
    new one does not have are left behind.
    """
    preset = next((layer["preset"] for layer in reversed((*layers, *changes)) if "preset" in layer), Config.preset)
    tree = to_dict(_validate({**_preset(preset), "preset": preset}))
    for layer in layers:
        tree = trees.merge(_with_room_for(tree, [layer]), layer)
    tree = _with_room_for(tree, changes)
    for change in changes:
        tree = trees.merge(tree, change)
    config = _validate(tree)
    _check_values(tree, dataclasses.asdict(config))
    return config


def _preset(name: object) -> Tree:
    """The settings of a preset: an entry of the table, a dict of one's own, or what a function of one's own gives."""
    if parts.is_own(name):
        expected = "a dict of settings, or a function annotated as returning one"
        own = parts.load(str(name), "preset", lambda x: isinstance(x, dict) or parts.makes(x, dict), expected)
        tree: Tree = own if isinstance(own, dict) else own()
        require(isinstance(tree, dict), f"preset {name!r}", "a dict of settings", tree)
        return tree
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"preset must be a method's name, got {name!r}: {nearest(str(name), PRESETS)}")
    return PRESETS[name]


def _with_room_for(tree: Tree, layers: Sequence[Tree]) -> Tree:
    """`tree` without the settings of its encoder and loss that those named in `layers` do not have."""
    encoder = _kept(below(tree, "encoder"), [below(layer, "encoder") for layer in layers], encoder_settings)
    losses = [below(layer, "method", "alignment") for layer in layers]
    loss = _kept(below(tree, "method", "alignment"), losses, lambda name: _field_names(loss_settings(name)))
    if encoder is not None:
        tree = {**tree, "encoder": encoder}
    return tree if loss is None else {**tree, "method": {**tree["method"], "alignment": loss}}


def below(tree: Any, *path: str) -> Any:
    """The value at a path of keys, None where there is none."""
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _kept(settings: Any, over: Sequence[Any], known: Callable[[str], Iterable[str]]) -> Tree | None:
    """The settings of a part that the one named last in `over` has as well; None where the part stays the same."""
    names = [value["name"] for value in over if isinstance(value, dict) and "name" in value]
    if not names or not isinstance(settings, dict) or names[-1] == settings.get("name"):
        return None
    try:
        keys = set(known(names[-1]))
    except (TypeError, ValueError):
        return None  # it is refused where everything is checked
    if parts.is_own(names[-1]) or parts.is_own(settings.get("name")):
        keys -= {"options"}  # each own encoder has its own
    return {key: value for key, value in settings.items() if key in keys}


def _field_names(kind: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def refuse_foreign(stored: Sequence[Tree], changes: Sequence[Tree], file: Path) -> None:
    """Raise ValueError where `stored` names a part outside fastrdm that `changes`, typed by the user, do not name."""
    named = {name for change in changes for _, name in _own_parts(change)}
    for key, name in (found for tree in stored for found in _own_parts(tree)):
        if name not in named:
            raise ValueError(
                f"{key} {name!r} of {file} is code from outside fastrdm: --trust (in Python, trust=True) loads it"
            )


def _own_parts(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Key and value of every text in a tree that could name a part of one's own."""
    if isinstance(tree, dict | list):
        for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _own_parts(value, f"{key}.{name}" if key else str(name))
    elif parts.is_own(tree) and key not in PATHS:
        yield key, tree


def _find(name: str) -> Path:
    """Path of a configuration file: `name` itself if there is such a file, else the shipped recipe of that name."""
    path = next((path for path in (Path(name), RECIPES / name) if path.is_file()), None)
    if path is None:
        known = sorted(str(p.relative_to(RECIPES)) for p in RECIPES.rglob("*.yaml"))
        raise ValueError(f"no configuration file {name!r}, {nearest(name, known)}; settings are written a.b=c")
    return path


def _validate(tree: Tree) -> Config:
    try:
        return _ADAPTER.validate_python(tree)
    except ValidationError as error:
        raise ValueError("\n".join(explain(error))) from None


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


def _nearest_key(kind: Any, path: list[str], key: str) -> str:
    """Suggestion for an unknown key at `path` below `kind`: its new name, the nearest beside it, one of its name."""
    beside = help.keys_at(kind, path[:-1])
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
}


def explain(error: ValidationError, kind: Any = Config, at: str = "") -> list[str]:
    """A line for each thing that a settings dataclass `kind`, which stands at the key `at`, does not take."""
    return [_with_new_name(line) for each in error.errors() for line in _explain(each, kind, at)]


def _explain(error: Any, kind: Any, at: str) -> Iterator[str]:
    """One of pydantic's errors: key, what it takes, what it got, the nearest valid key."""
    path = [str(part) for part in error["loc"]]
    key = ".".join([at] * bool(at) + path)
    if error["type"] == "part":  # a part checked its own settings
        for inner in error["ctx"]["errors"]:
            yield from _explain(inner, error["ctx"]["kind"], key)
    elif error["type"] == "choice":
        yield f"{key} {error['msg']}"
    elif error["type"] == "unexpected_keyword_argument":
        yield f"unknown configuration key {key!r}: {_nearest_key(kind, path, key)}"
    elif error["type"] == "value_error":
        reason = str(error["ctx"]["error"])
        first, _, rest = reason.partition(" ")
        field = first.split(".")[-1]
        if field in help.keys_at(kind, path):  # a config names its own field: the key says where it stands
            yield f"{key}.{field} {rest}" if key else reason
        else:
            yield reason if "." in first or not key else f"{key}: {reason}"
    elif error["type"] in _EXPECTED:
        yield f"{key} must be {_EXPECTED[error['type']]}, got {error['input']!r}"
    else:
        yield f"{key}: {error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}"


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
    yield from _describe({name: transform_settings(name) for name in TRANSFORMS})
    yield "\nLosses of method.alignment, as in method.alignment='{name: cross_entropy, temperature: 0.2}':"
    yield from _describe({name: loss_settings(name) for name in ALIGNMENTS})


def _describe(kinds: dict[str, Any]) -> Iterator[str]:
    """Each setting that a part has and not all of its sort; its name where it has none."""
    common = {"name", *_field_names(AlignmentConfig)}
    for name, kind in kinds.items():
        settings = [s for s in help.walk(kind, f"{name}.") if s.key.split(".")[-1] not in common]
        yield from map(help.show, settings) if settings else [f"  {name}"]
