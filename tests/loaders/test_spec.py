"""What a view and a loader refuse."""

from typing import Any

import pytest
from pydantic import ValidationError

from fastrdm.loaders.spec import LoaderConfig, ViewSpec


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", 0),
        ("scale", (0.0, 1.0)),
        ("scale", (0.5, 0.2)),
        ("ratio", (2.0, 1.0)),
        ("interpolation", "nearest"),
        ("flip", 1.1),
        ("brightness", -0.1),
        ("hue", 0.6),
        ("blur_kernel", 4),
        ("blur_kernel", -3),
        ("blur_sigma", (0.0, 1.0)),
        ("solarize_threshold", 300),
        ("std", (0.2, 0.0, 0.2)),
    ],
)
def test_impossible_views(field: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=field):
        ViewSpec(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch_size", 1),
        ("views", (ViewSpec(),)),
        ("workers", 0),
        ("prefetch", 0),
        ("max_corrupt", 1.5),
        ("subset", 0),
        ("engine", "fast"),
        ("sourc", "digits"),
    ],
)
def test_impossible_loaders(field: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=field):
        LoaderConfig(**{field: value})
