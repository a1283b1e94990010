"""Compile the augmentation's Triton kernels for sm_90 without a GPU and print what they use, one CSV row a kernel.

    python -m benchmarks.kernels.compile_augment > benchmarks/results/augment_sm90.csv

Registers and stack bytes (spills) a thread, shared memory a block in bytes, and whether Hopper's tensor cores are used
by wgmma or by the older mma.
"""

from collections.abc import Iterator
from typing import Any

from benchmarks import common
from benchmarks.common import Row
from benchmarks.kernels.compile_spectral import compiled, used, versions
from fastrdm.kernels.augment.layout import COLUMNS, NUMBERS, SWITCHES

FIELDS = ["kernel", "registers", "stack_bytes", "shared_bytes", "tensor_cores", "torch", "triton"]


def cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    """Name, kernel, argument types and constants of the variants that training uses."""
    from fastrdm.kernels.augment import augment_triton, parameters_triton

    tile = {"COLUMNS": COLUMNS, "JITTER": True, "BLOCK": augment_triton.BLOCK, "STEP": augment_triton.STEP}
    crop = {"pixel_ptr": "*u8", "place_ptr": "*i64", "width_ptr": "*i32", "drawn_ptr": "*fp32", "plane_ptr": "*fp16"}
    crop |= {"part_ptr": "*fp32", "size": "i32", "tiles_across": "i32"}
    out: list[tuple[str, Any, dict[str, str], dict[str, Any]]] = []
    for mode in ("bilinear", "bicubic"):
        flags = {"CUBIC": mode == "bicubic", **tile}
        out.append((f"crop {mode}", augment_triton._crop_kernel, crop, {"STRIDED": False, **flags}))
        apart = {"pixel_ptr": None, "width_ptr": None, "STRIDED": True}
        out.append((f"crop {mode} planes", augment_triton._crop_kernel, crop, {**apart, **flags}))
    numbers = ("threshold", *(f"{color}_{kind}" for kind in ("mean", "std") for color in ("red", "green", "blue")))
    for kind in ("fp32", "bf16", "fp16"):
        finish = {"plane_ptr": "*fp16", "part_ptr": "*fp32", "drawn_ptr": "*fp32", "out_ptr": f"*{kind}"}
        finish |= {"size": "i32", "tiles_across": "i32"} | dict.fromkeys(numbers, "fp32")
        for reach in (0, 11):
            flags = {"PARTS": 64, "GRAY": True, "REACH": reach, "SOLARIZED": True, **tile}
            out.append((f"finish {kind}{' blur' * (reach > 0)}", augment_triton._finish_kernel, finish, flags))
    draw = {"table_ptr": "*fp64", "epoch_ptr": "*i64", "index_ptr": "*i64", "height_ptr": "*i64", "width_ptr": "*i64"}
    draw |= {"out_ptr": "*fp32", "count": "i32", "seed_low": "i64", "seed_high": "i64"}
    sizes = {"NUMBERS": NUMBERS, "COLUMNS": COLUMNS, "SWITCHES": len(SWITCHES), "BLOCK": parameters_triton.BLOCK}
    out.append(("parameters", parameters_triton._draw_kernel, draw, sizes))
    return out


def rows() -> Iterator[Row]:
    """A row for each variant."""
    for name, kernel, types, constants in cases():
        # The draw is launched so: see parameters_triton.
        options: dict[str, int] | None = {"enable_fp_fusion": False} if name == "parameters" else None
        yield {**used(name, compiled(kernel, types, constants, options)), **versions()}


def main() -> None:
    common.parser(__doc__).parse_args()
    common.require_packages("triton")
    common.print_rows(FIELDS, rows())


if __name__ == "__main__":
    main()
