"""The augmentation compiled for this machine's CPU: csrc/augment_cpu.cpp, built by its C++ compiler on first use."""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fastrdm.kernels.augment.compiled import compiled
from fastrdm.kernels.augment.layout import COLUMNS, OPERATIONS, ViewRecipe
from fastrdm.kernels.augment.ragged import Ragged

SOURCE = Path(__file__).with_name("csrc") / "augment_cpu.cpp"
FAST = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math")
FLAGS = ("-std=c++17", *FAST, "-Wno-psabi", "-shared", "-fPIC", "-pthread")


class Spec(ctypes.Structure):
    """The source's struct Spec: a view's description. Color levels are on the scale 0 to 255."""

    _fields_ = (
        ("size", ctypes.c_int32),
        ("cubic", ctypes.c_int32),
        ("blur_kernel", ctypes.c_int32),
        *((operation, ctypes.c_int32) for operation in OPERATIONS),
        ("threshold", ctypes.c_float),
        ("mean", ctypes.c_float * 3),
        ("std", ctypes.c_float * 3),
    )


@cache
def library() -> ctypes.CDLL:
    """The compiled source; 2 s the first time, else NoCompiler."""
    loaded = compiled(SOURCE, FLAGS)
    for function in (loaded.augment_views, loaded.crop_views):
        function.restype = ctypes.c_int64
        function.argtypes = (*(ctypes.c_void_p,) * 4, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32)
    return loaded


def augment_cpu(
    images: Ragged | Sequence[Tensor], parameters: Tensor, recipe: ViewRecipe, out: Tensor | None = None
) -> Tensor:
    """Views (B, 3, S, S) float32, channels-last, normalized; written into `out` of that kind where given.

    Reference: fastrdm.loaders.augment, from which it differs by rounding only (below 1e-4 of 1 before normalization).
    Images and parameters (B, COLUMNS) float32 lie on the CPU. One image a thread, on torch's number of threads; the
    interpreter is free meanwhile. ValueError for a crop box that leaves its image.
    """
    size = recipe.size
    if out is None:
        out = torch.empty(len(parameters), size, size, 3).permute(0, 3, 1, 2)
    assert out.dtype == torch.float32 and out.is_contiguous(memory_format=torch.channels_last)
    _run("augment_views", images, parameters, recipe, out)
    return out


def crop_cpu(
    images: Ragged | Sequence[Tensor], parameters: Tensor, recipe: ViewRecipe, out: Tensor | None = None
) -> Tensor:
    """Crops alone, flipped where drawn and rounded, (B, 3, S, S) uint8, contiguous; arguments as for augment_cpu."""
    if out is None:
        out = torch.empty(len(parameters), 3, recipe.size, recipe.size, dtype=torch.uint8)
    assert out.dtype == torch.uint8 and out.is_contiguous()
    _run("crop_views", images, parameters, recipe, out)
    return out


def _run(
    function: str,
    images: Ragged | Sequence[Tensor],
    parameters: Tensor,
    recipe: ViewRecipe,
    out: Tensor,
) -> None:
    assert parameters.shape == (len(out), COLUMNS) and out.shape[1:] == (3, recipe.size, recipe.size)
    parameters = parameters.float().contiguous()
    if isinstance(images, Ragged):
        height, width = images.height.int().contiguous(), images.width.int().contiguous()
        address = images.pixels.data_ptr() + images.offset
    else:
        # Held until the call returns.
        images = [image.contiguous() for image in images]
        height, width = torch.tensor([image.shape[:2] for image in images], dtype=torch.int32).T.contiguous().unbind(0)
        address = torch.tensor([image.data_ptr() for image in images])
    assert len(address) == len(height) == len(width) == len(out)
    levels = [[255 * value for value in triple] for triple in (recipe.mean, recipe.std)]
    spec = Spec(
        recipe.size,
        recipe.interpolation == "bicubic",
        recipe.blur_kernel,
        *(getattr(recipe, operation) > 0 for operation in OPERATIONS),
        recipe.solarize_threshold,
        *((ctypes.c_float * 3)(*triple) for triple in levels),
    )
    pointers = [tensor.data_ptr() for tensor in (address, height, width, parameters)]
    make, threads = getattr(library(), function), torch.get_num_threads()
    wrong = make(*pointers, len(out), ctypes.byref(spec), out.data_ptr(), threads)
    if wrong >= 0:
        sides, row = (int(height[wrong]), int(width[wrong])), parameters[wrong].tolist()
        raise ValueError(f"image {wrong} of (height, width) {sides} has no such crop or order of jitter: {row}")
