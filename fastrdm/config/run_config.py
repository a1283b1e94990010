"""One run's configuration: every component's own config composed, read from presets, YAML and `a.b=c`, and checked."""

import dataclasses
import difflib
import hashlib
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from fastrdm import parts
from fastrdm.analysis.settings import AnalysisConfig
from fastrdm.config import help
from fastrdm.config import tree as trees
from fastrdm.config.layers import Layer, last_to_set
from fastrdm.config.source_defaults import assume
from fastrdm.config.tree import Tree
from fastrdm.evaluation.settings import EvaluateConfig
from fastrdm.loaders.sources.store import is_remote
from fastrdm.loaders.spec import LoaderConfig
from fastrdm.methods.losses import ALIGNMENTS, AlignmentConfig, loss_settings
from fastrdm.methods.presets import PRESETS
from fastrdm.methods.regularizer_settings import REGULARIZERS, RegularizerConfig, regularizer_settings
from fastrdm.methods.settings import MethodConfig
from fastrdm.methods.transform_settings import TRANSFORMS, FilterConfig, SinkhornConfig, transform_settings
from fastrdm.models.settings import EncoderConfig, encoder_settings
from fastrdm.monitoring.settings import MonitorConfig
from fastrdm.optim.settings import OptimConfig
from fastrdm.renamed import RENAMED
from fastrdm.runtime.settings import CheckpointConfig, LogConfig
from fastrdm.schema import STRICT, Duration, nearest, require, steps_of

RECIPES = Path(__file__).parents[1] / "recipes"
QUICK_START = RECIPES / "quickstart.yaml"
PATHS = (
    *("run", "train.init", "loader.root", "loader.labels", "loader.cache", "loader.classes"),
    *("evaluate.root", "evaluate.labels", "checkpoint.store"),
)
"""Keys of paths: `~` and `$VARIABLE` are replaced in them, and what looks like a part of one's own names none."""


Switch = Literal["auto", True, False]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainConfig:
    """Length, precision and device of the training."""

    length: Duration = "100ep"
    """Length of the run in epochs or optimizer steps, such as 50ep or 2000st."""

    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the initial weights, of the order of the images and of the views."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the run computes. `auto` takes a CUDA device if there is one."""

    init: str | None = None
    """Weights to start from: RUN, the folder of a run, RUN:STEP, a file in any layout that `fastrdm eval` reads,
    timm:NAME, or timm:NAME:FILE with a file that timm reads. `null` starts from the seed.
    """

    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = "auto"
    """Arithmetic of the encoder and of the projector up to its last BatchNorm. What follows runs in float32, or in
    float64 with fp64. `auto` takes bf16 on CUDA, and fp16 on a GPU without bf16. On a CPU it takes bf16 where the
    processor has AVX512_BF16, else fp32, and always fp32 for resnet_small.
    """

    accumulate: int = Field(default=1, ge=1)
    """Number of parts into which each process splits its share of a batch; they run one after the other to save memory.
    BatchNorm, spectral filters and Sinkhorn then see one part at a time.
    """

    compile: Switch = "auto"
    """Compile the dual branch by torch.compile. `auto` compiles on CUDA where Triton works."""

    capture: Switch = "auto"
    """Record the whole training step as a CUDA graph. This needs a single process. `auto` records on CUDA where the
    views do not grow.
    """

    channels_last: Switch = "auto"
    """Store images and convolution weights with the channels last in memory. `auto` does so."""

    cudnn_benchmark: Switch = "auto"
    """Let cuDNN time its algorithms for each convolution and take the fastest. Results then differ in rounding from one
    start to the next. `auto` does so on a GPU where the views do not grow.
    """

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
        local = self.run is None or not is_remote(self.run)
        require(
            local, "run", "a folder of this machine; checkpoint.store=URL copies its checkpoints to a store", self.run
        )
        parts = self.train.accumulate
        if self.loader.batch_size % parts:
            raise ValueError(f"train.accumulate must divide loader.batch_size={self.loader.batch_size}, got {parts}")
        transforms = (*self.method.online, *self.method.target)
        if parts > 1 and any(isinstance(t, SinkhornConfig) and t.queue for t in transforms):
            raise ValueError(f"train.accumulate must be 1 with sinkhorn.queue, got {parts}: a step fills the ring once")
        views, targets = len(self.loader.views), self.method.target_views
        for t in transforms:
            if views > 2 and isinstance(t, FilterConfig) and t.basis != "self":
                raise ValueError(f"filter.basis={t.basis} takes two views, got {views} in loader.views")
        require(targets <= views, "method.target_views", f"at most the {views} views of loader.views", targets)
        if views == 2 and self.method.alignment.targets == "mean":
            raise ValueError(
                "method.alignment.targets must be pairs with two views, got 'mean': each view has one other target, so "
                "that both are the same"
            )
        images = self.loader.batch_size // parts
        if images < 2 and self.method.regularize:
            raise ValueError(f"method.regularize needs at least 2 images in a part of a batch, got {images}")


_ADAPTER = TypeAdapter(Config)


class Loaded(NamedTuple):
    """A configuration, and where its values come from."""

    config: Config
    layers: list[Layer]

    assumed: list[str]
    """Lines on what nobody set, for the start of a run; none for a file that sets it all."""


def load(arguments: Sequence[str], over: Tree | None = None, published: bool = False, *, trust: bool = True) -> Config:
    """The Config of `[FILE.yaml] [a.b=c ...]` and, over them, a nested dict; the quick start where there is neither.

    `trust`: whether FILE may name parts outside fastrdm, which are code that is loaded. ValueError names what is
    refused.
    """
    return compose(arguments, over, published, trust=trust).config


def compose(
    arguments: Sequence[str], over: Tree | None = None, published: bool = False, *, trust: bool = True
) -> Loaded:
    """As `load`, with the layers: preset, what suits the data set, files, command line, the nested dict.

    `published` adds what the files say of the published run's speed, its precision above all.
    """
    names = [a for a in arguments if "=" not in a]
    if len(names) > 1:
        raise ValueError(f"one configuration file at most, got {', '.join(names)}; settings are written a.b=c")
    name = names[0] if names else None if arguments or over else QUICK_START.name
    files = trees.read_files(_find(name)) if name else []
    layers = [Layer(_name_of(file.path), file.tree, chosen=not _is_shipped(file.path)) for file in files]
    if published:
        layers += [Layer(f"{_name_of(file.path)}, published", file.published) for file in files]
    changes = [Layer("command line", trees.setting(a), chosen=True) for a in arguments if "=" in a]
    changes += [Layer("keyword argument", over, chosen=True)] if over else []
    if files and not trust:
        refuse_foreign([layer.tree for layer in layers], [change.tree for change in changes], files[-1].path)
    every = [*layers, *changes]
    preset = _last([layer.tree for layer in every], "preset") or Config.preset
    if files:
        _check_recipe(files[-1], str(preset))
    source, encoder = (
        _last([layer.tree.get(section) for layer in every], key) or default
        for section, key, default in (
            ("loader", "source", LoaderConfig.source),
            ("encoder", "name", EncoderConfig.name),
        )
    )
    suits = assume(str(source), str(preset), str(encoder))
    below_files = [Layer(f"preset {preset}", _preset(preset)), Layer("suits the data", suits.tree)]
    trees_below = [suits.tree, *(layer.tree for layer in layers)]
    config = resolve({"preset": preset}, *trees_below, changes=[change.tree for change in changes], expand=True)
    every = [*below_files, *every]
    return Loaded(config, every, _assumed(every, config, suits.told))


def _last(sections: Sequence[Any], key: str) -> Any:
    """The last value of `key` in these mappings; None where none has it."""
    return next((tree[key] for tree in reversed(sections) if isinstance(tree, dict) and key in tree), None)


def _assumed(layers: Sequence[Layer], config: Config, told: str) -> list[str]:
    """Return the lines that tell the user which values were assumed."""
    open_keys = ("preset", "encoder.name", "train.length", "loader.batch_size")
    values = {key: value for key, value in flat(to_dict(config)) if key in open_keys}
    chosen = [layer.origin for layer in layers if layer.chosen or layer.origin.endswith(".yaml")]
    free = [key for key in open_keys if (layer := last_to_set(layers, key)) is None or layer.origin not in chosen]
    lines = [f"assumed, as nobody set it: {', '.join(f'{key}={values[key]}' for key in free)}"] if free else []
    sized = last_to_set(layers, "loader.views.0.size")
    if sized is not None and sized.origin == "suits the data":
        lines.append(f"assumed, as {told}")
    return lines


def flat(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested data under its key; an empty list or mapping counts as a value."""
    items = list(tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else [])
    if not items:
        yield path, tree
    for key, value in items:
        yield from flat(value, f"{path}.{key}" if path else str(key))


def _name_of(file: Path) -> str:
    return str(file.relative_to(RECIPES)) if _is_shipped(file) else str(file)


def _is_shipped(file: Path) -> bool:
    return file.resolve().is_relative_to(RECIPES.resolve())


def _check_recipe(file: trees.Source, preset: str) -> None:
    """Refuse a method that the file is not made for, and name the one that is."""
    if file.presets and not any(fnmatchcase(preset, pattern) for pattern in file.presets):
        beside = (recipe for recipe in sorted(file.path.parent.glob("*.yaml")) if recipe != file.path)
        fitting = [other for other in beside if _made_for(other, preset)]
        instead = f"{_name_of(fitting[0])} is" if fitting else "preset= without a file takes the method's own values"
        made = f"one that {_name_of(file.path)} is made for ({', '.join(file.presets)})"
        raise ValueError(f"preset must be {made}, got {preset!r}: {instead}")


def _made_for(file: Path, preset: str) -> bool:
    return any(fnmatchcase(preset, pattern) for pattern in trees.read_files(file)[-1].presets)


def _expanded(tree: Tree) -> Tree:
    """The tree with `~` and `$VARIABLE` in its paths replaced; ValueError names what cannot be."""
    for key in PATHS:
        *sections, name = key.split(".")
        place: Any = tree
        for section in sections:
            place = place.get(section) if isinstance(place, dict) else None
        if isinstance(place, dict) and isinstance(text := place.get(name), str):
            # a path may stand behind a colon, as in timm:NAME:FILE
            place[name] = path = ":".join(map(os.path.expanduser, os.path.expandvars(text).split(":")))
            missing = re.search(r"\$\{?\w+\}?", path) or re.search("(?:^|(?<=:))~[^/:]*", path)
            if missing:
                what = "which is no variable of the environment" if "$" in missing[0] else "which is nobody's home"
                raise ValueError(f"{key} must be a path, got {text!r} with {missing[0]}, {what}")
    return tree


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


def resolve(*layers: Tree, changes: Sequence[Tree] = (), expand: bool = False) -> Config:
    """The Config of nested dicts, each laid over the one before it, all of them over their preset, then `changes`.

    Where a layer, or `changes` together, name another encoder or loss than the one below, settings from below that the
    new one does not have are left behind. `expand`: replace `~` and `$VARIABLE` in paths.
    """
    preset = next((layer["preset"] for layer in reversed((*layers, *changes)) if "preset" in layer), Config.preset)
    tree = to_dict(_validate({**_preset(preset), "preset": preset}))
    for layer in layers:
        tree = trees.merge(_with_room_for(tree, [layer]), layer)
    tree = _with_room_for(tree, changes)
    for change in changes:
        tree = trees.merge(tree, change)
    if expand:
        tree = _expanded(tree)
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
        shipped = [str(p.relative_to(RECIPES)) for p in RECIPES.rglob("*.yaml")]
        near = difflib.get_close_matches(name, shipped, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "`fastrdm recipes` lists the shipped ones"
        raise ValueError(f"no configuration file {name!r}, {hint}; settings are written a.b=c")
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
    if elsewhere:
        return f"did you mean {' or '.join(map(repr, elsewhere))}?"
    known = MEANT.get(path[-1].replace("_", "-"), "-")
    return f"known: {', '.join(beside)}" if known.startswith("-") else f"did you mean {known}?"


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
        yield f"{key} must be {_EXPECTED[error['type']]}, got {_short(error['input'])}"
    else:
        yield f"{key}: {error['msg'][0].lower()}{error['msg'][1:]}, got {_short(error['input'])}"


def _short(value: object) -> str:
    """The value as Python writes it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."


def to_dict(config: Config) -> Tree:
    """The resolved configuration as plain data; `resolve` gives the same Config back."""
    tree = _ADAPTER.dump_python(config, mode="json")
    assert isinstance(tree, dict)
    return tree


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, default_flow_style=None)


def annotated(loaded: Loaded) -> str:
    """The resolved configuration as YAML, one value a line, each with the place that it comes from as a comment."""
    return "\n".join(_annotated(to_dict(loaded.config), loaded.layers, "", 0)) + "\n"


def _annotated(tree: Any, layers: Sequence[Layer], path: str, depth: int) -> Iterator[str]:
    nested = isinstance(tree, dict) or any(isinstance(item, dict) for item in tree)
    assert nested
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        inner = f"{path}.{key}" if path else str(key)
        start = f"{'  ' * depth}{key}:" if isinstance(tree, dict) else f"{'  ' * depth}-"
        if value and (isinstance(value, dict) or (isinstance(value, list) and isinstance(value[0], dict))):
            yield start
            yield from _annotated(value, layers, inner, depth + 1)
        else:
            layer = last_to_set(layers, inner)
            text = yaml.safe_dump(value, default_flow_style=True, width=10_000).partition("\n")[0]
            yield f"{f'{start} {text}':50}  # {layer.origin if layer else 'default'}"


# Settings that change neither the weights nor the order and the views of the images. They are not part of a run's name,
# and a run may go on with other ones. `train.precision` and the like are, because they change what is computed.
FREE = (
    "run",
    "log.",
    "checkpoint.",
    "monitor.",
    "analysis.",
    "evaluate.every",
    "evaluate.k",
    "evaluate.bank",
    "evaluate.temperature",
    "evaluate.baselines",
    "evaluate.batch_size",
    "evaluate.root",
    "train.device",
    "train.compile",
    "train.capture",
    "train.hang_timeout",
    "loader.root",
    "loader.download",
    "loader.workers",
    "loader.prefetch",
    "loader.cache",
    "loader.augment",
    "loader.max_corrupt",
)


def other_run(old: Tree, new: Tree) -> list[str]:
    """Lines `a.b: old -> new` for the settings that make two configurations two runs."""
    return [line for line in trees.differences(old, new) if not line.startswith(FREE)]


def run_folder(config: Config) -> Path:
    """Where the run lives: the same command finds the same folder, whatever its free settings are.

    The data set counts by its absolute path, so that another spelling of `loader.root` is the same run.
    """
    if config.run:
        return Path(config.run)
    binding = _without_free(to_dict(config))
    root = config.loader.root and str(Path(config.loader.root).resolve())
    digest = hashlib.sha256(yaml.safe_dump({**binding, "root": root}).encode()).hexdigest()[:8]
    return Path(f"runs/{config.preset}-{config.loader.source.split(':')[-1]}-{digest}")


def _without_free(tree: Tree, path: str = "") -> Tree:
    kept = {key: value for key, value in tree.items() if not f"{path}{key}".startswith(FREE)}
    sections = {key: _without_free(value, f"{path}{key}.") for key, value in kept.items() if isinstance(value, dict)}
    return {key: value for key, value in {**kept, **sections}.items() if value != {}}


def json_schema() -> Tree:
    """The JSON schema of a configuration file: every setting, and the keys that are about the file itself."""
    schema: Tree = _ADAPTER.json_schema()
    text = {"type": "string"}
    schema["properties"] |= {
        "base": {**text, "description": "File that this one builds on, relative to it."},
        "presets": {"type": "array", "items": text, "description": "Methods that the file is made for, as patterns."},
        "published": {"type": "object", "description": "Settings that `--published` adds."},
    }
    schema["properties"]["preset"]["enum"] = list(PRESETS)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "fastrdm", **_with_items(schema)}


def _with_items(schema: Any) -> Any:
    """The schema in which a list may also be written as a mapping of numbers, or `*`, to changes of its items."""
    if isinstance(schema, list):
        return [_with_items(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: _with_items(value) for key, value in schema.items()}
    if inner.get("type") == "array" and any(word in str(inner.get("items")) for word in ("$ref", "properties")):
        kept = {key: inner.pop(key) for key in ("title", "description", "default") if key in inner}
        return {**kept, "anyOf": [inner, {"type": "object"}]}
    return inner


def sections() -> dict[str, str]:
    """The sections of the configuration, and the sentence that says what each is about."""
    found = {field.name: help.options(field.type) for field in dataclasses.fields(Config)}
    return {name: (inner[0].__doc__ or "").partition("\n")[0] for name, inner in found.items() if inner}


def describe(section: str = "") -> Iterator[str]:
    """The settings whose keys begin with `section`, each with default, choices and description; all for "".

    ValueError names what there is when there are none.
    """
    part = [s for s in help.walk(Config) if not section or f"{s.key}.".startswith(f"{section}.")]
    yield from map(help.show, part)
    transforms = {name: transform_settings(name) for name in TRANSFORMS if section in ("", "method", name)}
    losses = {name: loss_settings(name) for name in ALIGNMENTS if section in ("", "method", "method.alignment", name)}
    penalties = {
        name: regularizer_settings(name)
        for name in REGULARIZERS
        if section in ("", "method", "method.regularize", name)
    }
    if not part and not transforms and not losses and not penalties:
        names = ["preset", "run", *sections(), *TRANSFORMS, *ALIGNMENTS, *REGULARIZERS]
        raise ValueError(f"--help takes a section, a key or a part, got {section!r}: {nearest(section, names)}")
    if transforms:
        yield "\nTransforms of method.online and method.target, as in method.target='[{name: filter, power: -0.5}]':"
        yield from _describe(transforms)
    if losses:
        yield "\nLosses of method.alignment, as in method.alignment='{name: cross_entropy, temperature: 0.2}':"
        yield from _describe(losses)
    if penalties:
        yield "\nRegularizers of method.regularize, as in method.regularize='[{name: variance, weight: 25}]':"
        yield from map(help.show, (s for s in help.walk(RegularizerConfig) if s.key != "name"))
        yield from _describe(penalties)


def _describe(kinds: dict[str, Any]) -> Iterator[str]:
    """Each setting that a part has and not all of its sort; its name where it has none."""
    common = {"name", *_field_names(AlignmentConfig), *_field_names(RegularizerConfig)}
    for name, kind in kinds.items():
        settings = [s for s in help.walk(kind, f"{name}.") if s.key.split(".")[-1] not in common]
        yield from map(help.show, settings) if settings else [f"  {name}"]


MEANT = {
    "epochs": "train.length=100ep",
    "steps": "train.length=5000st",
    "max-epochs": "train.length=100ep",
    "lr": "optim.lr=0.1",
    "learning-rate": "optim.lr=0.1",
    "weight-decay": "optim.weight_decay=1e-4",
    "wd": "optim.weight_decay=1e-4",
    "optimizer": "optim.name=sgd",
    "batch-size": "loader.batch_size=256",
    "batch": "loader.batch_size=256",
    "bs": "loader.batch_size=256",
    "workers": "loader.workers=8",
    "num-workers": "loader.workers=8",
    "data": "loader.root=FOLDER",
    "data-dir": "loader.root=FOLDER",
    "dataset": "loader.source=folder",
    "model": "encoder.name=resnet18",
    "arch": "encoder.name=resnet18",
    "backbone": "encoder.name=resnet18",
    "method": "preset=simsiam",
    "out": "run=FOLDER",
    "output": "run=FOLDER",
    "output-dir": "run=FOLDER",
    "save-dir": "run=FOLDER",
    "name": "run=FOLDER",
    "seed": "train.seed=0",
    "device": "train.device=cpu",
    "precision": "train.precision=bf16",
    "amp": "train.precision=bf16",
    "fp16": "train.precision=fp16",
    "bf16": "train.precision=bf16",
    "image-size": "loader.views.*.size=224",
    "img-size": "loader.views.*.size=224",
    "crop-size": "loader.views.*.size=224",
    "pretrained": "train.init=FILE",
    "init": "train.init=RUN",
    "wandb": "log.wandb=PROJECT",
    "gpus": "--processes N",
    "nproc-per-node": "--processes N",
    "nnodes": "--nodes N",
    "resume": "run=FOLDER; the same command goes on",
    "help-all": "--help all",
}
"""Options of other trainers, and the setting that is meant."""


def meant(option: str) -> str:
    """Return what to write in place of an option that does not exist, "" where nothing is known."""
    name = option.lstrip("-").partition("=")[0].replace("_", "-")
    if name in MEANT:
        return MEANT[name]
    near = difflib.get_close_matches(name, MEANT, n=1, cutoff=0.8)
    keys = [s.key for s in help.walk(Config) if s.key.split(".")[-1].replace("_", "-") == name]
    return " or ".join(f"{key}=..." for key in keys) or (MEANT[near[0]] if near else "")
