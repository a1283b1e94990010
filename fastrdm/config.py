"""One run's configuration: every component's own config composed, read from presets, YAML and `a.b=c`, and checked."""

import ast
import dataclasses
import difflib
import hashlib
import inspect
import textwrap
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from fastrdm.checkpoint import CheckpointConfig
from fastrdm.encoders import EncoderConfig
from fastrdm.evaluate import EvaluateConfig
from fastrdm.loaders.spec import STRICT, LoaderConfig
from fastrdm.log import LogConfig
from fastrdm.methods.branch import TRANSFORMS, MethodConfig
from fastrdm.methods.online import FilterConfig
from fastrdm.methods.presets import PRESETS
from fastrdm.methods.target import SinkhornConfig
from fastrdm.optim import OptimConfig
from fastrdm.schedules import Duration

CONFIGS = Path(__file__).parent / "configs"
QUICK_START = CONFIGS / "quickstart.yaml"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainConfig:
    """How long, how precisely and on what to train."""

    length: Duration = "100ep"
    seed: int = Field(default=0, ge=0)  # of the initial weights, the order and the views
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"  # of encoder and projector; the rest: fp32 or wider
    accumulate: int = Field(default=1, ge=1)  # parts of a batch that run one after the other to save memory
    compile: bool = False  # torch.compile the dual branch
    channels_last: bool = True


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config:
    """One training run."""

    preset: str = "simsiam"  # the row of the table of methods that everything below starts from
    run: str | None = None  # folder of the run; null: runs/<preset>-<source>-<digest of the configuration>
    train: TrainConfig = TrainConfig()
    method: MethodConfig = MethodConfig()
    encoder: EncoderConfig = EncoderConfig()
    loader: LoaderConfig = LoaderConfig()
    optim: OptimConfig = OptimConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
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


def load(arguments: Sequence[str]) -> Config:
    """The Config of `[FILE.yaml] [a.b=c ...]`; the quick start without FILE. ValueError names what is refused."""
    files = [a for a in arguments if "=" not in a]
    if len(files) > 1:
        raise ValueError(f"one configuration file at most, got {', '.join(files)}; settings are written a.b=c")
    tree = read_file(Path(files[0]) if files else QUICK_START)
    for argument in arguments:
        if "=" in argument:
            tree = _with_override(tree, argument)
    return resolve(tree)


def resolve(tree: dict[str, Any]) -> Config:
    """The Config of a nested dict laid over its preset."""
    preset = tree.get("preset", Config.preset)
    if preset not in PRESETS:
        raise ValueError(f"preset must be a method's name, got {preset!r}: {_nearest(str(preset), PRESETS)}")
    try:
        return TypeAdapter(Config).validate_python(merge(PRESETS[preset], tree))
    except ValidationError as error:
        raise ValueError("\n".join(_explain(e) for e in error.errors())) from None


def read_file(path: Path) -> dict[str, Any]:
    """A YAML file's tree, laid over the file that its `base:` names (relative to it)."""
    if not path.exists():
        known = sorted(str(p.relative_to(CONFIGS)) for p in CONFIGS.rglob("*.yaml"))
        if str(path) in known:
            return read_file(CONFIGS / path)
        raise ValueError(f"configuration file {path} does not exist; {_nearest(str(path), known)}")
    tree = yaml.safe_load(path.read_text()) or {}
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold keys and values, got {type(tree).__name__}")
    base = tree.pop("base", None)
    return merge(read_file(path.parent / base), tree) if base else tree


def merge(under: Any, over: Any) -> Any:
    """`over` laid on `under`: mappings key by key; a mapping on a list by index, or `*` for each; else it replaces."""
    if isinstance(under, list) and isinstance(over, dict) and all(str(k) == "*" or str(k).isdigit() for k in over):
        return _merge_list(under, over)
    if isinstance(under, str) and isinstance(over, dict) and "name" not in over:
        under = {"name": under}  # a transform written short
    if not isinstance(under, dict) or not isinstance(over, dict):
        return over
    return {**under, **{k: merge(under[k], v) if k in under else v for k, v in over.items()}}


def _merge_list(under: list[Any], over: dict[Any, Any]) -> list[Any]:
    for key in over:
        if str(key) != "*" and int(key) >= len(under):
            raise ValueError(f"there is no item {key} in a list of {len(under)}")
    out = [merge(item, over["*"]) if "*" in over else item for item in under]
    for key, value in over.items():
        if str(key) != "*":
            out[int(key)] = merge(out[int(key)], value)
    return out


def _with_override(tree: dict[str, Any], argument: str) -> dict[str, Any]:
    path, _, text = argument.partition("=")
    try:
        value: Any = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"{path} takes a YAML value, got {text!r}") from None
    for key in reversed(path.split(".")):
        value = {key: value}
    try:
        merged = merge(tree, value)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    assert isinstance(merged, dict)
    return merged


def _nearest(word: str, known: typing.Iterable[str], prefix: str = "") -> str:
    """What is offered for a word that is not among the known ones: the nearest, or all."""
    names = list(known)
    near = difflib.get_close_matches(word, names, n=1)
    return f"did you mean {prefix + near[0]!r}?" if near else f"known: {', '.join(names)}"


def _explain(error: Any) -> str:
    """One line for one of pydantic's errors: key, what it takes, what it got, the nearest valid key."""
    location = [str(part) for part in error["loc"]]
    key = ".".join(part for part in location if part not in _TAGS)
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        prefix = key[: -len(location[-1])]
        return f"unknown configuration key {key!r}: {_nearest(location[-1], _keys_at(Config, location[:-1]), prefix)}"
    if error["type"] == "union_tag_invalid":
        name = error["ctx"]["tag"]
        return f"{key} takes a transform, got {name!r}: {_nearest(name, TRANSFORMS)}"
    if error["type"] == "value_error":
        reason = str(error["ctx"]["error"])
        first = reason.split()[0]
        if "." in first or not key:
            return reason
        return f"{key}.{reason}" if first in _keys_at(Config, location) else f"{key}: {reason}"
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{key}: {message}, got {error['input']!r}"


_TAGS = set(TRANSFORMS)  # pydantic puts the name of the member of a union into the path


def _keys_at(kind: Any, path: list[str]) -> list[str]:
    """Names of the fields of the dataclass that `path` leads to from `kind`."""
    for part in path:
        kind = _step(kind, part)
    found = next(_dataclasses_in(kind), None)
    return [f.name for f in dataclasses.fields(found)] if found else []


def _step(kind: Any, part: str) -> Any:
    options = list(_dataclasses_in(kind))
    tagged = [o for o in options if getattr(o, "name", None) == part]
    if tagged:
        return tagged[0]
    for option in options:
        types = {f.name: f.type for f in dataclasses.fields(option)}
        if part in types:
            return types[part]
    return kind  # an index into a list


def _dataclasses_in(kind: Any) -> Iterator[Any]:
    if dataclasses.is_dataclass(kind):
        yield kind
    for argument in typing.get_args(kind):
        yield from _dataclasses_in(argument)


def to_dict(config: Config) -> dict[str, Any]:
    """The resolved configuration as plain data; `resolve` gives the same Config back."""
    tree = TypeAdapter(Config).dump_python(config, mode="json")
    assert isinstance(tree, dict)
    return tree


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, default_flow_style=None)


def run_folder(config: Config) -> Path:
    """Where the run lives: the same command finds the same folder."""
    digest = hashlib.sha256(to_yaml(config).encode()).hexdigest()[:8]
    return Path(config.run or f"runs/{config.preset}-{config.loader.source.split(':')[-1]}-{digest}")


def differences(old: dict[str, Any], new: dict[str, Any], path: str = "") -> list[str]:
    """Lines `a.b: old -> new` for every setting in which two resolved configurations differ."""
    lines = []
    for key in {**old, **new}:
        was, now = old.get(key), new.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            lines += differences(was, now, f"{path}{key}.")
        elif was != now:
            lines.append(f"{path}{key}: {was} -> {now}")
    return lines


def describe(kind: Any = Config, path: str = "") -> Iterator[str]:
    """One line for each setting: its key, default and the comment beside it in the source."""
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            yield from describe(field.type, f"{path}{field.name}.")
            continue
        note = _comments(kind).get(field.name, "")
        setting = textwrap.shorten(f"{path}{field.name} = {_default(field)}", 58, placeholder=" ...")
        yield f"  {setting:58}  {note}"


def _default(field: Any) -> Any:
    value = field.default.default if hasattr(field.default, "annotation") else field.default
    parts = value if isinstance(value, tuple) else (value,)
    return "..." if any(dataclasses.is_dataclass(part) for part in parts) else value


def _comments(kind: Any) -> dict[str, str]:
    source = textwrap.dedent(inspect.getsource(kind))
    lines = source.splitlines()
    body = typing.cast(ast.ClassDef, ast.parse(source).body[0]).body
    fields = (node for node in body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name))
    return {node.target.id: lines[(node.end_lineno or 1) - 1].partition("  # ")[2] for node in fields}  # type: ignore[union-attr]
