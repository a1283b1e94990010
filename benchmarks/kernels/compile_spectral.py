"""Compile the spectral Triton kernels for sm_90 without a GPU and print what they use, one CSV row a kernel.

    python -m benchmarks.kernels.compile_spectral > benchmarks/results/spectral_sm90.csv

Registers and spills a thread, shared memory a block in bytes, and whether the tensor cores of Hopper (wgmma) are used.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks import common
from benchmarks.common import Row

FLOAT, HALF, TYPES = "*fp32", "*fp16", ("*fp32", "*bf16", "*fp16")
Case = tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]  # name, kernel, types, constants, options
FIELDS = ["kernel", "registers", "stack_bytes", "shared_bytes", "wgmma", "torch", "triton"]


def products() -> Iterator[Case]:
    """Steps of chains, and products of a square matrix with features, at tiles for small and for large ones."""
    from fastrdm.kernels.linalg import fp16x3_triton

    types = dict.fromkeys(("a_high_ptr", "a_low_ptr", "b_high_ptr", "b_low_ptr"), HALF)
    types |= dict.fromkeys(("a_largest_ptr", "b_largest_ptr", "add_ptr", "out_ptr"), FLOAT)
    types |= dict.fromkeys(("high_ptr", "low_ptr"), HALF) | dict.fromkeys(("m", "n", "depth", "a_row"), "i32")
    types |= dict.fromkeys(("alpha", "beta", "gamma", "scale"), "fp32")
    for symmetric_, size in ((True, 512), (True, 2048), (False, 512), (False, 2048)):
        tile = fp16x3_triton.tile_of(symmetric_, size, max(size, 1024))
        how: dict[str, Any] = {
            "UNITS": False,
            "SYMMETRIC": symmetric_,
            "ADD": symmetric_,
            "KEEP_PARTS": True,
            "ALIGNED": True,
        }
        how |= {"BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "DEPTH": tile.depth, "a_column": 1}
        across, down = ("b_row", "b_column") if symmetric_ else ("b_column", "b_row")
        constants, options = how | {across: 1}, {"num_warps": tile.warps, "num_stages": tile.stages}
        name = f"{'axpby' if symmetric_ else 'product'} {size}"
        yield name, fp16x3_triton._product_kernel, types | {down: "i32"}, constants, options


def cases() -> list[Case]:
    """Every variant that runs."""
    from fastrdm.kernels.linalg import gram_triton

    out, tile = list(products()), {"BLOCK": gram_triton.BLOCK, "DEPTH": gram_triton.DEPTH}
    for kind in TYPES:
        gram = {"x_ptr": kind, "scale_ptr": FLOAT, "mean_ptr": FLOAT, "part_ptr": FLOAT}
        gram |= dict.fromkeys(("height", "width", "share", "splits"), "i32")
        for tall in (False, True):
            for three in (False, True):
                flags = {"TALL": tall, "CENTER": True, "THREE": three, **tile}
                name = f"gram {kind[1:]} {'x^T x' if tall else 'x x^T'} {'fp16x3' if three else 'half'}"
                out.append((name, gram_triton._gram_kernel, gram, flags, {}))
    sums = {"part_ptr": FLOAT, "unit_ptr": FLOAT, "out_ptr": FLOAT, "n": "i32", "splits": "i32"}
    out.append(("gram sum", gram_triton._sum_kernel, sums, {"BLOCK": gram_triton.BLOCK}, {}))
    rows = {"x_ptr": "*bf16", "scale_ptr": FLOAT, "width": "i32"}
    out.append(("gram row scales", gram_triton._row_scales_kernel, rows, {"BLOCK": 1024}, {}))
    means = {"x_ptr": "*bf16", "scale_ptr": FLOAT, "mean_ptr": FLOAT, "height": "i32", "width": "i32"}
    flags = {"ROWS": 16, "BLOCK": gram_triton.BLOCK}
    out.append(("gram column means", gram_triton._column_means_kernel, means, flags, {}))
    return out


def compiled(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    options: dict[str, int] | None = None,
    integers: bool = False,
) -> Any:
    """The kernel as Triton compiles it for sm_90; pointers, and `integers` too, are taken as divisible by 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = types | dict.fromkeys(constants, "constexpr")
    signature = {argument: types[argument] for argument in kernel.arg_names}
    sixteens = [i for i, kind in enumerate(signature.values()) if kind[0] == "*" or (integers and kind == "i32")]
    aligned = {(i,): [["tt.divisibility", 16]] for i in sixteens}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes (spills) of a thread, as cuobjdump reports them."""
    import triton

    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.check_output([tool, "--dump-resource-usage", file.name], text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])


def used(name: str, built: Any) -> dict[str, object]:
    """The columns that both tables of compiled kernels have, but for the tensor cores."""
    registers, stack = resources(built.asm["cubin"])
    return {"kernel": name, "registers": registers, "stack_bytes": stack, "shared_bytes": built.metadata.shared}


def versions() -> dict[str, str]:
    """The columns torch and triton."""
    import triton

    return {"torch": torch.__version__, "triton": triton.__version__}


def rows() -> Iterator[Row]:
    """A row for each variant."""
    for name, kernel, types, constants, options in cases():
        built = compiled(kernel, types, constants, options, integers=True)
        yield {**used(name, built), "wgmma": "wgmma.mma_async" in built.asm["ptx"], **versions()}


def main() -> None:
    common.parser(__doc__).parse_args()
    common.require_packages("triton")
    common.print_rows(FIELDS, rows())


if __name__ == "__main__":
    main()
