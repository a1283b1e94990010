"""Parts of one's own, named `package.module:Name`: where they are found, what they must be, their settings."""

import importlib
import inspect
import os
import re
import sys
import traceback
import typing
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import is_pydantic_dataclass
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

T = TypeVar("T")
PAGE = "docs/extending.md"
_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_own(name: object) -> bool:
    """Whether `name` is written `package.module:Name`, which no part of fastrdm is."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def load(name: str, key: str, suits: Callable[[Any], bool], expected: str) -> Any:
    """The object that `name` stands for, looked at but not called.

    The working folder is searched after everything that Python searches, so that no file in it takes the place of an
    installed module. ValueError, beginning with `key`, where there is no such object or `suits` is false of it;
    `expected` says what was looked for.
    """
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.append(folder)
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = "" if isinstance(error, ImportError | AttributeError) else f" ({last.filename}, line {last.lineno})"
        told = str(error) if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{key} {name!r} cannot be loaded: {told}{where}".lstrip()) from error
    if not suits(found):
        raise ValueError(f"{key} {name!r} must be {expected} ({PAGE})".lstrip())
    return found


def of_ours(code: str) -> Any:
    """The object that `package.module:Name` stands for in a table of ours."""
    module, _, attribute = code.partition(":")
    return getattr(importlib.import_module(module), attribute)


def makes(found: object, base: type) -> bool:
    """Whether `found` is a class derived from `base`, or a function annotated as returning `base` or such a class."""
    if inspect.isfunction(found):
        found = _annotation(found, "return")
        found = typing.get_origin(found) or found
    return isinstance(found, type) and issubclass(found, base)


def settings_of(part: Any, base: type[T]) -> type[T]:
    """The settings of a class or function: what annotates its parameter `config`, or `base` without an annotation.

    ValueError unless that is a pydantic dataclass, derived from `base`, that refuses keys it does not have.
    """
    function = inspect.getattr_static(part, "__init__") if isinstance(part, type) else part
    kind = _annotation(function, "config") or base
    known = isinstance(kind, type) and issubclass(kind, base) and is_pydantic_dataclass(kind)
    if not known or vars(kind).get("__pydantic_config__", {}).get("extra") != "forbid":
        raise ValueError(
            f"{part.__module__}:{part.__name__} takes config: {getattr(kind, '__name__', kind)}, which must be a "
            f"pydantic dataclass with config=STRICT, derived from {base.__name__} ({PAGE})"
        )
    settings: type[T] = kind
    return settings


def _annotation(function: Any, name: str) -> Any:
    """What annotates a parameter or the result; None without an annotation, or where it is a type checker's only."""
    annotations = getattr(function, "__annotations__", {})
    alone = SimpleNamespace(__annotations__={name: annotations.get(name)})
    try:
        found = typing.get_type_hints(alone, getattr(inspect.unwrap(function), "__globals__", {}))[name]
    except NameError:
        return None
    return found if name in annotations else None


def validated(kind: type, value: object, at: str = "") -> Any:
    """`value`, which stands at the key `at`, as an instance of the pydantic dataclass `kind`.

    The errors of a refusal are kept in its context, where `run_config.explain` finds them.
    """
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        errors = [{**each, "loc": (*[at] * bool(at), *each["loc"])} for each in error.errors()]
        context = {"kind": kind, "errors": errors}
        raise PydanticCustomError("part", "is refused", context) from None


class Chosen:
    """Annotates a field whose settings are those of the part that its key `name` names; a name alone is short for it.

    `settings` gives the dataclass, derived from `base`, of a part's name, and raises ValueError where there is no such
    part. `what` is the word for such a part in messages, `known` are the names of our own parts.
    """

    def __init__(self, what: str, base: type, settings: Callable[[str], type], known: Iterable[str]) -> None:
        self.what, self.base, self.settings, self.known = what, base, settings, known

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        shown = core_schema.simple_ser_schema("any")
        return core_schema.no_info_plain_validator_function(self._validate, serialization=shown)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: Any) -> dict[str, Any]:
        """A name, the settings of one of our own parts, or those of a part named `package.module:Name`."""
        ours = [handler(TypeAdapter(self.settings(name)).core_schema) for name in self.known]
        own = {"type": "object", "properties": {"name": {"type": "string", "pattern": ":"}}, "required": ["name"]}
        return {"anyOf": [{"type": "string"}, *ours, own]}

    def _validate(self, value: object) -> Any:
        if isinstance(value, self.base):
            return value
        tree = {"name": value} if isinstance(value, str) else value
        if not isinstance(tree, dict):
            raise _choice(f"must be {self.what}, got {value!r}")
        if not isinstance(tree.get("name"), str):
            raise _choice(f"must be {self.what} with its name, got {value!r}")
        try:
            kind = self.settings(tree["name"])
        except ValueError as error:
            raise _choice(str(error)) from error
        return validated(kind, tree)


def _choice(text: str) -> PydanticCustomError:
    return PydanticCustomError("choice", "{text}", {"text": text})
