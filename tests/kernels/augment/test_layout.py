"""One layout of drawn parameters: the C++ source repeats it, and no operation of a view is left out of it."""

import ctypes
import re
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from fastrdm.kernels.augment.augment_cpu import SOURCE, Spec
from fastrdm.kernels.augment.layout import COLUMNS, OPERATIONS, SWITCHES, Adjustment, Column
from fastrdm.loaders.augment.parameters import sample_parameters
from fastrdm.loaders.spec import ViewSpec

CPP = re.sub(r"//.*", "", SOURCE.read_text())
CTYPES = {"int32_t": ctypes.c_int32, "float": ctypes.c_float}
STRENGTHS = {"brightness", "contrast", "saturation", "hue"}  # how strong the jitter is, not whether


def enum(name: str) -> dict[str, int]:
    """The members of a C++ enum and their values."""
    found = re.search(rf"enum {name} {{([^}}]*)}}", CPP)
    assert found
    values: dict[str, int] = {}
    for member in found[1].split(","):
        label, _, value = (part.strip() for part in member.partition("="))
        values[label] = int(value) if value else max(values.values(), default=-1) + 1
    return values


def test_columns_of_the_cpp_source() -> None:
    assert enum("Column") == {**{column.name: column.value for column in Column}, "COLUMNS": COLUMNS}
    assert enum("Adjustment") == {f"OP_{kind.name}": kind.value for kind in Adjustment}


def test_struct_of_the_cpp_source() -> None:
    found = re.search(r"struct Spec {([^}]*)}", CPP)
    assert found
    members: list[tuple[str, Any]] = []
    for kind, names in re.findall(r"(\w+) ([^;]+);", found[1]):
        for name in names.split(","):
            label, _, length = name.strip().rstrip("]").partition("[")
            members.append((label, CTYPES[kind] * int(length) if length else CTYPES[kind]))
    assert members == list(Spec._fields_)


def test_columns_do_not_overlap() -> None:
    widths = {column: 4 if column == Column.ORDER else 1 for column in Column}
    taken = [column + k for column, width in widths.items() for k in range(width)]
    assert taken == list(range(COLUMNS))


def test_every_number_of_a_view_is_an_operation_or_known_to_be_none() -> None:
    """A new operation's probability has to be listed, or it would be neither checked nor switched off."""
    numbers = {field.name for field in fields(ViewSpec) if field.type is float}
    assert numbers == {"flip", *OPERATIONS, *STRENGTHS}
    assert set(SWITCHES) < set(OPERATIONS)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_probabilities_are_checked(operation: str) -> None:
    with pytest.raises(ValueError, match=f"{operation} must be a probability"):
        ViewSpec(**{operation: 1.5})  # type: ignore[arg-type]


def test_a_plain_view_draws_crop_and_flip_alone() -> None:
    always: dict[str, Any] = dict.fromkeys(OPERATIONS, 1.0)
    busy = ViewSpec(size=8, scale=(0.3, 0.6), **always)
    index, sides = torch.arange(50), torch.full((50,), 20)
    drawn, plain = (sample_parameters(spec, 0, 0, index, 0, sides, sides) for spec in (busy, busy.plain()))
    assert torch.equal(drawn[:, : Column.FLIP + 1], plain[:, : Column.FLIP + 1])
    neutral = torch.zeros(COLUMNS)
    neutral[Column.BRIGHTNESS : Column.HUE] = 1
    order = range(Column.ORDER, Column.ORDER + len(Adjustment))
    rest = [column for column in range(Column.FLIP + 1, COLUMNS) if column not in order]
    assert (plain[:, rest] == neutral[rest]).all()
    assert all((drawn[:, column] != neutral[column]).any() for column in rest)
    assert replace(busy.plain(), **always) == busy, "nothing else changes"
