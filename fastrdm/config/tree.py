"""Settings as plain nested data: read from YAML, laid over each other, compared."""

from pathlib import Path
from typing import Any, NamedTuple

import yaml

Tree = dict[str, Any]


MAX_VALUES = 100_000  # values of one text, those counted again that an alias repeats
MAX_DEPTH = 100


class _Loader(yaml.SafeLoader):
    """YAML's plain types; a key that stands twice is refused, where PyYAML keeps the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Tree:  # type: ignore[override]
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = str(self.construct_object(key_node, deep=True))
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} stands twice", problem_mark=node.start_mark)
            seen.add(key)
        return {str(key): value for key, value in super().construct_mapping(node, deep).items()}


class Source(NamedTuple):
    """Contents of a configuration file: settings, and keys that are about the file itself."""

    path: Path
    tree: Tree

    presets: tuple[str, ...] = ()
    """`presets:`, patterns of the names of methods that the file is made for; () for any."""

    published: Tree = {}  # noqa: RUF012
    """`published:`, settings of the published run that do not change its result but its speed."""


def parse(text: str, what: str) -> Any:
    """The value of a YAML text; ValueError names `what` and the line."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(node, what)
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        found = "".join(text.splitlines()[line - 1 : line])[:200]
        raise ValueError(f"{what} takes YAML, got {found!r} in line {line}: {error.problem}") from None
    except yaml.YAMLError as error:  # a control character, a broken encoding
        raise ValueError(f"{what} takes YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise ValueError(f"{what} takes YAML that is nested at most {MAX_DEPTH} deep") from None
    except ValueError as error:  # what looks like a date or a number and is none, such as 2020-13-45
        raise error if str(error).startswith(what) else ValueError(f"{what} takes YAML: {error}") from None


def _check_size(root: yaml.Node, what: str) -> None:
    """Refuse what aliases blow up, or lead back to itself, before it is built."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node, depth: int) -> int:
        if depth > MAX_DEPTH:
            raise ValueError(f"{what} takes YAML that is nested at most {MAX_DEPTH} deep and does not hold itself")
        if id(node) not in sizes:
            inside = node.value if isinstance(node, yaml.CollectionNode) else []
            children = [child for item in inside for child in (item if isinstance(item, tuple) else (item,))]
            sizes[id(node)] = 1 + sum(size(child, depth + 1) for child in children)
        return sizes[id(node)]

    if size(root, 0) > MAX_VALUES:
        raise ValueError(f"{what} takes YAML of at most {MAX_VALUES:,} values, got more once its aliases are followed")


def read_files(path: Path) -> list[Source]:
    """A YAML file and those that `base:` leads to (relative to each), the lowest first."""
    found: list[Source] = []
    seen = []
    while True:
        seen.append(path.resolve())
        try:
            tree = parse(path.read_text(encoding="utf-8"), str(path)) or {}
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"configuration file {path} cannot be read: {error}") from None
        if not isinstance(tree, dict):
            raise ValueError(f"{path} must hold keys and values, got {type(tree).__name__}")
        base, presets, published = tree.pop("base", None), tree.pop("presets", []), tree.pop("published", {})
        if not isinstance(presets, list) or not all(isinstance(name, str) for name in presets):
            raise ValueError(f"presets must be a list of names of methods, got {presets!r} in {path}")
        if not isinstance(published, dict):
            raise ValueError(f"published must hold keys and values, got {published!r} in {path}")
        found.insert(0, Source(path, tree, tuple(presets), published))
        if base is None:
            return found
        if not isinstance(base, str):
            raise ValueError(f"base must be a file's name, got {base!r} in {path}")
        path = path.parent / base
        if path.resolve() in seen:
            raise ValueError(f"base must not lead back to a file that it came from, got {base} in {seen[-1].name}")


def setting(argument: str) -> Tree:
    """The tree of one `a.b=c`, c as YAML."""
    path, _, text = argument.partition("=")
    value: Any = parse(text, path)
    for key in reversed(path.split(".")):
        value = {key: value}
    assert isinstance(value, dict)
    return value


def merge(under: Any, over: Any, path: str = "") -> Any:
    """`over` laid on `under`: mappings key by key; a mapping on a list by index, or `*` for each; else it replaces."""
    if isinstance(under, list) and isinstance(over, dict):
        return _merge_list(under, over, path)
    if not isinstance(under, dict) or not isinstance(over, dict):
        return over
    dot = f"{path}." if path else ""
    return {**under, **{k: merge(under[k], v, f"{dot}{k}") if k in under else v for k, v in over.items()}}


def _merge_list(under: list[Any], over: Tree, path: str) -> list[Any]:
    for key in over:
        if key != "*" and not (key.isdecimal() and int(key) < len(under)):
            raise ValueError(f"{path} has {len(under)} items, numbered from 0 or * for each, got item {key!r}")
    out = [_merge_item(item, over["*"], f"{path}.*") if "*" in over else item for item in under]
    for key, value in over.items():
        if key != "*":
            out[int(key)] = _merge_item(out[int(key)], value, f"{path}.{key}")
    return out


def _merge_item(under: Any, over: Any, path: str) -> Any:
    """An item of another name, such as a filter in place of a predictor, keeps nothing of the one before."""
    if isinstance(under, str) and isinstance(over, dict):
        under = {"name": under}  # a transform written short
    named = isinstance(under, dict) and isinstance(over, dict) and "name" in over
    return over if named and under.get("name") != over["name"] else merge(under, over, path)


def differences(old: Tree, new: Tree, path: str = "") -> list[str]:
    """Lines `a.b: old -> new` for every setting in which two resolved configurations differ."""
    lines = []
    for key in {**old, **new}:
        was, now = old.get(key), new.get(key)
        if isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
            was, now = (dict(enumerate(items)) for items in (was, now))
        if isinstance(was, dict) and isinstance(now, dict):
            lines += differences(was, now, f"{path}{key}.")
        elif was != now:
            lines.append(f"{path}{key}: {was} -> {now}")
    return lines
