"""Small pictures of many images in a few JPEG sheets of bounded size."""

import base64
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastrdm.loaders.sources.decode import Pixels

COLUMNS = 32
SHEET = COLUMNS * COLUMNS  # pictures on a sheet
SIDES = (64, 56, 48, 40, 32, 24, 16)  # pixels of a picture: the largest whose sheets fit
QUALITY = 75  # of the JPEG files


def sheets(pictures: Pixels, budget: int) -> dict[str, Any]:
    """Pictures (N, S, S, 3) uint8 as JPEG sheets of at most `budget` bytes in all, for a page.

    Returns the pixels of a picture's side, the number of columns of a sheet, and the sheets as data URIs. The pictures
    are made smaller until they fit; at the smallest size nothing more is done.
    """
    largest = pictures.shape[1]
    sides = [side for side in SIDES if side < largest] if largest > SIDES[-1] else []
    if largest <= SIDES[0]:
        sides = [largest, *sides]
    for side in sides:
        files = [_sheet(pictures[start : start + SHEET], side) for start in range(0, len(pictures), SHEET)]
        if sum(map(len, files)) <= budget:
            break
    uris = [f"data:image/jpeg;base64,{base64.b64encode(file).decode()}" for file in files]
    return {"side": side, "columns": COLUMNS, "sheets": uris}


def _sheet(pictures: Pixels, side: int) -> bytes:
    rows = -(-len(pictures) // COLUMNS)
    cells = np.zeros((rows * COLUMNS, side, side, 3), np.uint8)
    cells[: len(pictures)] = resized(pictures, side)
    page = cells.reshape(rows, COLUMNS, side, side, 3).swapaxes(1, 2).reshape(rows * side, COLUMNS * side, 3)
    file = io.BytesIO()
    Image.fromarray(page).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def resized(pictures: Pixels, side: int) -> Pixels:
    """Pictures (N, S, S, 3) at `side` pixels, antialiased."""
    if pictures.shape[1] == side:
        return pictures
    small: list[NDArray[np.uint8]] = [
        np.asarray(Image.fromarray(p).resize((side, side), Image.Resampling.BILINEAR, reducing_gap=2.0))
        for p in pictures
    ]
    return np.stack(small)
