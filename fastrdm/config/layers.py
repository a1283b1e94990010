"""The layers of a configuration, each over the one before it, and which of them a value comes from."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fastrdm.config.tree import Tree


class Layer(NamedTuple):
    """Settings of one origin."""

    origin: str
    """The name that `--print-config` gives it, such as `preset byol` or `command line`."""

    tree: Tree

    chosen: bool = False
    """Whether the user set them: on the command line or in a file that does not come with fastrdm."""


def last_to_set(layers: Sequence[Layer], key: str) -> Layer | None:
    """The layer that decides the value of `key`; None where it is the default of its field."""
    path = key.split(".")
    for layer in reversed(layers):
        found = _sets(layer.tree, path)
        if found:
            return layer
        if found is None:  # an item of a list that this layer wrote anew: what lies under it is gone
            return None
    return None


def user_sets(layers: Sequence[Layer]) -> Callable[[str], bool]:
    """Whether the value of a key was chosen by the user."""

    def given(key: str) -> bool:
        layer = last_to_set(layers, key)
        return layer is not None and layer.chosen

    return given


def _sets(tree: Any, path: Sequence[str]) -> bool | None:
    """Whether this part of a layer has the value at `path`; None where it lacks it and replaces what would hold it."""
    if not path:
        return True
    if isinstance(tree, dict):
        inside = [_sets(tree[key], path[1:]) for key in (path[0], "*") if key in tree]
        return True if True in inside else None if None in inside else False
    if isinstance(tree, list):
        inside = [_sets(tree[int(path[0])], path[1:])] if path[0].isdecimal() and int(path[0]) < len(tree) else []
        return True if True in inside else None
    return True  # a name that stands for a transform, or null for a section
