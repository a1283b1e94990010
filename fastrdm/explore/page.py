"""The page of `fastrdm explore`: everything in one HTML file, numbers as base64."""

import base64
import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TEMPLATE = Path(__file__).with_name("page.html")


def packed(values: NDArray[Any]) -> dict[str, Any]:
    """An array for the page: integers as the smallest unsigned type that holds them, other numbers as float32."""
    if np.issubdtype(values.dtype, np.integer):
        kind = "uint8" if values.max(initial=0) < 256 else "uint16" if values.max(initial=0) < 65536 else "uint32"
    else:
        kind = "float32"
    raw = np.ascontiguousarray(values, dtype=np.dtype(kind).newbyteorder("<"))
    return {"type": kind, "shape": list(values.shape), "data": base64.b64encode(raw.tobytes()).decode()}


def page(title: str, content: Mapping[str, Any]) -> str:
    """The page that shows `content`, a tree of plain values and of arrays made by `packed`."""
    # "</script>" in a name must not end the script that holds it.
    data = json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    template = TEMPLATE.read_text(encoding="utf-8")
    return template.replace("{{title}}", html.escape(title)).replace("{{content}}", data)
