"""Settings as plain nested data: read from YAML, laid over each other, compared."""

from pathlib import Path
from typing import Any

import yaml

Tree = dict[str, Any]


class _Loader(yaml.SafeLoader):
    """YAML's plain types; a key that stands twice is refused, where PyYAML keeps the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Tree:  # type: ignore[override]
        seen: set[str] = set()
        for key in (str(self.construct_object(key, deep=True)) for key, _ in node.value):
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} stands twice", problem_mark=node.start_mark)
            seen.add(key)
        return {str(key): value for key, value in super().construct_mapping(node, deep).items()}


def parse(text: str, what: str) -> Any:
    """The value of a YAML text; ValueError names `what` and the line."""
    try:
        return yaml.load(text, _Loader)  # _Loader is a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        found = "".join(text.splitlines()[line - 1 : line])
        raise ValueError(f"{what} takes YAML, got {found!r} in line {line}: {error.problem}") from None
    except yaml.YAMLError as error:  # a control character, a broken encoding
        raise ValueError(f"{what} takes YAML: {str(error).splitlines()[0]}") from None


def read_files(path: Path) -> list[Tree]:
    """The trees of a YAML file and of those that `base:` leads to (relative to each), the lowest first."""
    trees: list[Tree] = []
    seen = []
    while True:
        seen.append(path.resolve())
        try:
            tree = parse(path.read_text(encoding="utf-8"), str(path)) or {}
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"configuration file {path} cannot be read: {error}") from None
        if not isinstance(tree, dict):
            raise ValueError(f"{path} must hold keys and values, got {type(tree).__name__}")
        base = tree.pop("base", None)
        trees.insert(0, tree)
        if base is None:
            return trees
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


def flat(tree: Any, path: str = "") -> Tree:
    """The tree as `a.b.0.c: value`, a key for each leaf; an empty mapping or list is a leaf."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    found = {
        key: leaf for name, value in items for key, leaf in flat(value, f"{path}.{name}" if path else str(name)).items()
    }
    return found or {path: tree}
