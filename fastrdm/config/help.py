"""The fields of nested config dataclasses: their keys, defaults and the comments beside them in the source."""

import ast
import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml


class Setting(NamedTuple):
    """One field that a user can set."""

    key: str  # such as loader.views.*.size
    default: Any
    note: str  # what it takes, and its comment


def options(kind: Any) -> list[Any]:
    """The dataclasses that an annotation such as `X`, `X | None` or `tuple[X | Y, ...]` holds."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return [kind]
    return [found for argument in typing.get_args(kind) for found in options(argument)]


def walk(kind: Any, prefix: str = "") -> Iterator[Setting]:
    """Every setting below a dataclass; a field that takes one of several dataclasses is not entered."""
    notes = _comments(kind)
    for field in dataclasses.fields(kind):
        inner = options(field.type)
        if not dataclasses.is_dataclass(field.type):
            yield Setting(prefix + field.name, _default(field), _note(field.type, notes.get(field.name, "")))
        if len(inner) == 1:
            many = typing.get_origin(field.type) is tuple
            yield from walk(inner[0], f"{prefix}{field.name}.{'*.' if many else ''}")


def keys_at(kind: Any, path: list[str]) -> list[str]:
    """Names of the fields at `path`, with indices and names of items in it, below a dataclass; [] if there are none."""
    for part in path:
        inner = options(kind)
        named = [option for option in inner if getattr(option, "name", None) == part]
        types = {field.name: field.type for option in inner for field in dataclasses.fields(option)}
        kind = named[0] if named else types.get(part, kind)  # else an index into a list
    return [field.name for option in options(kind)[:1] for field in dataclasses.fields(option)]


def line(setting: Setting) -> str:
    """The setting as --help shows it."""
    value = yaml.safe_dump(setting.default, default_flow_style=True, width=10_000).partition("\n")[0]
    return f"  {textwrap.shorten(f'{setting.key} = {value}', 58, placeholder=' ...'):58}  {setting.note}".rstrip()


def _default(field: Any) -> Any:
    """The default as plain data; a list of configs by the names of its items, or by their number."""
    value = field.default.default if hasattr(field.default, "annotation") else field.default
    if not isinstance(value, tuple):
        return value
    if any(dataclasses.is_dataclass(item) and not hasattr(item, "name") for item in value):
        return f"{len(value)} items"
    return [getattr(item, "name", item) for item in value]


def _note(kind: Any, comment: str) -> str:
    choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
    listed = " | ".join(str(choice).lower() if isinstance(choice, bool) else choice for choice in choices)
    return f"{listed}; {comment}" if listed and comment else listed or comment


def _comments(kind: Any) -> dict[str, str]:
    """The comment beside each field, the inherited ones too."""
    notes: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if "__dataclass_fields__" not in vars(base):
            continue
        source = textwrap.dedent(inspect.getsource(base))
        lines = source.splitlines()
        body = typing.cast(ast.ClassDef, ast.parse(source).body[0]).body
        own = [node for node in body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
        notes |= {ast.unparse(node.target): lines[(node.end_lineno or 1) - 1].partition("  # ")[2] for node in own}
    return notes
