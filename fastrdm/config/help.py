"""The settings of nested config dataclasses, as `--help` shows them: key, default, choices and description."""

import dataclasses
import textwrap
import typing
from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml

WIDTH = 100  # columns of a description


class Setting(NamedTuple):
    """One field that a user can set."""

    key: str  # such as loader.views.*.size
    default: Any
    choices: tuple[str, ...]  # the values it can have, () where they are not a closed list
    description: str  # the docstring under the field, on one line


def options(kind: Any) -> list[Any]:
    """The dataclasses that an annotation such as `X`, `X | None` or `tuple[X | Y, ...]` holds."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return [kind]
    return [found for argument in typing.get_args(kind) for found in options(argument)]


def walk(kind: Any, prefix: str = "") -> Iterator[Setting]:
    """Every setting below a dataclass; a field that takes one of several dataclasses, or several, is not entered."""
    for field in dataclasses.fields(kind):
        bare = _bare(field.type)
        inner = options(bare)
        if not dataclasses.is_dataclass(bare):
            yield Setting(
                prefix + field.name, _default(field), _choices(field.type), _description(kind, field.name) or ""
            )
        if len(inner) == 1 and not any(_bare(item) is not item for item in typing.get_args(bare)):
            many = typing.get_origin(bare) is tuple
            yield from walk(inner[0], f"{prefix}{field.name}.{'*.' if many else ''}")


def _bare(kind: Any) -> Any:
    """An annotation without what Annotated adds to it."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) is typing.Annotated else kind


def keys_at(kind: Any, path: list[str]) -> list[str]:
    """Names of the fields at `path`, with indices and names of items in it, below a dataclass; [] if there are none."""
    for part in path:
        inner = options(kind)
        named = [option for option in inner if getattr(option, "name", None) == part]
        types = {field.name: field.type for option in inner for field in dataclasses.fields(option)}
        kind = named[0] if named else types.get(part, kind)  # else an index into a list
    return [field.name for option in options(kind)[:1] for field in dataclasses.fields(option)]


def show(setting: Setting) -> str:
    """The setting as `--help` shows it: key, default and choices, and the description below them."""
    value = yaml.safe_dump(setting.default, default_flow_style=True, width=10_000).partition("\n")[0]
    choices = f"  ({' | '.join(setting.choices)})" if setting.choices else ""
    return "\n".join([f"  {setting.key} = {value}{choices}", *_wrapped(setting.description)])


def _wrapped(text: str) -> list[str]:
    indent = " " * 6
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _default(field: Any) -> Any:
    """The default as plain data; a list of configs by the names of its items, or by their number."""
    value = field.default.default if hasattr(field.default, "annotation") else field.default
    if not isinstance(value, tuple):
        return value
    if any(dataclasses.is_dataclass(item) and not hasattr(item, "name") for item in value):
        return f"{len(value)} items"
    return [getattr(item, "name", item) for item in value]


def _choices(kind: Any) -> tuple[str, ...]:
    choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
    return tuple(str(choice).lower() if isinstance(choice, bool) else str(choice) for choice in choices)


def _description(kind: Any, name: str) -> str | None:
    """The docstring under a field, which pydantic keeps with the class that declares the field."""
    for base in kind.__mro__:
        if name in vars(base).get("__annotations__", {}):
            text = base.__pydantic_fields__[name].description
            return " ".join(text.split()) if text else None
    return None
