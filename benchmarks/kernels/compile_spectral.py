"""Compile the spectral Triton kernels without a GPU and print what they use, one CSV row a kernel and architecture.

    python -m benchmarks.kernels.compile_spectral > benchmarks/results/spectral_sm90.csv
    python -m benchmarks.kernels.compile_spectral --arch 80 > benchmarks/results/spectral_sm80.csv

Registers and stack bytes (spills) a thread, shared memory a block in bytes, the instruction that the tensor cores run
(wgmma on Hopper, tcgen05 on Blackwell, mma elsewhere), and the one that copies operands to shared memory while they
work: cp.async, or cp.async.bulk.tensor by tensor descriptors.
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
Case = tuple[str, Any, dict[str, Any], dict[str, Any], dict[str, int]]  # name, kernel, types, constants, options
FIELDS = ["kernel", "arch", "registers", "stack_bytes", "shared_bytes", "tensor_cores", "copies", "torch", "triton"]


def products(arch: int) -> Iterator[Case]:
    """Steps of chains, and products of a square matrix with features, at tiles for small and for large ones."""
    from fastrdm.kernels.linalg import fp16x3_triton

    types = dict.fromkeys(("a_high_ptr", "a_low_ptr", "b_high_ptr", "b_low_ptr"), HALF)
    types |= dict.fromkeys(("a_largest_ptr", "b_largest_ptr", "add_ptr", "out_ptr"), FLOAT)
    types |= dict.fromkeys(("high_ptr", "low_ptr"), HALF) | dict.fromkeys(("m", "n", "depth", "a_row"), "i32")
    types |= dict.fromkeys(("alpha", "beta", "gamma", "scale"), "fp32")
    types |= dict.fromkeys(("weight_ptr", "t1_ptr", "t2_ptr", "t3_ptr"), FLOAT)
    types |= {"weight_stride": "i32", "square_ptr": "*fp64", "share_ptr": FLOAT}
    shapes = ((True, 512), (True, 2048), (False, 512), (False, 2048))
    variants = [*((*shape, "") for shape in shapes), (True, 512, "combined"), (True, 512, "squares")]
    for symmetric_, size, extra in variants:
        tile = fp16x3_triton.tile_of(symmetric_, size, max(size, 1024), arch >= 90)
        how: dict[str, Any] = {
            "UNITS": False,
            "SYMMETRIC": symmetric_,
            "ADD": symmetric_ and extra != "squares",
            "COMBINED": extra == "combined",
            "SQUARES": extra == "squares",
            "KEEP_PARTS": extra != "squares",
            "ALIGNED": True,
            "SHARES": 1,
            "DESCRIPTORS": False,
            "TURNED": False,
        }
        how |= {"BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "DEPTH": tile.depth, "a_column": 1}
        across, down = ("b_row", "b_column") if symmetric_ else ("b_column", "b_row")
        constants, options = how | {across: 1}, {"num_warps": tile.warps, "num_stages": tile.stages}
        name = f"{'axpby' if symmetric_ else 'product'} {size} {extra}".strip()
        yield name, fp16x3_triton._product_kernel, types | {down: "i32"}, constants, options


def product_variants(arch: int) -> Iterator[Case]:
    """Ways to make a product that no run takes yet: a sum shared by two programs, operands by tensor descriptors."""
    from fastrdm.kernels.linalg import fp16x3_triton

    found = {name: parts for name, *parts in products(arch)}
    kernel, types, constants, options = found["axpby 512"]
    yield "axpby 512 of two shares", kernel, types, constants | {"SHARES": 2}, options
    kernel, constants = fp16x3_triton._share_kernel, constants | {"SHARES": 2}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    yield "axpby 512 share", kernel, types | {"share": "i32"}, constants, options
    if arch < 90:
        return
    kernel, types, constants, options = found["product 2048"]
    rows, columns, depth = (constants[name] for name in ("BLOCK_M", "BLOCK_N", "DEPTH"))
    types |= dict.fromkeys(("a_high_ptr", "a_low_ptr"), f"tensordesc<fp16[1, {rows}, {depth}]>")
    for turned, block in ((False, f"{depth}, {columns}"), (True, f"{columns}, {depth}")):
        types |= dict.fromkeys(("b_high_ptr", "b_low_ptr"), f"tensordesc<fp16[1, {block}]>")
        flags = constants | {"DESCRIPTORS": True, "TURNED": turned}
        yield f"product 2048 by descriptors{' turned' * turned}", kernel, types, flags, options


def around() -> Iterator[Case]:
    """What surrounds the products of a filter, for two views of 512 rows."""
    from fastrdm.kernels.linalg import fp16x3_triton
    from fastrdm.kernels.spectral import around_triton as kernels
    from fastrdm.kernels.spectral.dominant import ALONE

    double, sizes = "*fp64", {"height": "i32", "width": "i32"}
    combine = dict.fromkeys(("weight_ptr", "t1_ptr", "t2_ptr", "t3_ptr", "out_ptr"), FLOAT)
    combine |= {"high_ptr": HALF, "low_ptr": HALF, "weight_stride": "i32", "n": "i32"}
    chunk = {"CHUNK": fp16x3_triton.CHUNK}
    yield "combine", fp16x3_triton._combine_kernel, combine, chunk, {}
    squares = {"x_ptr": FLOAT, "square_ptr": double, "width": "i32"}
    yield "row squares", kernels._squares_kernel, squares, {"BLOCK": kernels.WIDE}, {}
    tile = {"ROWS": kernels.ROWS, "BLOCK": kernels.BLOCK}
    turn = {"x_ptr": FLOAT} | dict.fromkeys(("square_ptr", "before_ptr", "left_ptr", "part_ptr"), double) | sizes
    for first in (True, False):
        flags = {"FIRST": first, "COUNT": 512, **tile}
        yield f"dominant {'first ' * first}round", kernels._round_kernel, turn, flags, {}
    names = ("square_ptr", "part_ptr", "left_ptr", "rest_square_ptr", "out_left_ptr", "size_ptr", "right_ptr")
    rest = {"x_ptr": FLOAT, "rest_ptr": FLOAT} | dict.fromkeys(names, double) | sizes
    yield "dominant rest", kernels._rest_kernel, rest, {"ALONE": ALONE, **tile}, {}
    norm = {"x_ptr": FLOAT, "square_ptr": double, "norm_ptr": double, "high_ptr": HALF, "low_ptr": HALF}
    norm |= {"elements": "i32", "squares": "i32", "scale": "fp32"}
    yield "over norm", kernels._over_norm_kernel, norm, {"BLOCK": kernels.BLOCK, **chunk}, {}
    bound = dict.fromkeys(("x_ptr", "gram_ptr", "x_out_ptr", "gram_out_ptr"), FLOAT)
    bound |= dict.fromkeys(("x_high_ptr", "x_low_ptr", "gram_high_ptr", "gram_low_ptr"), HALF)
    bound |= dict.fromkeys(("square_ptr", "gram_square_ptr", "size_ptr", "bound_ptr"), double)
    bound |= dict.fromkeys(("elements", "gram_elements", "chunks", "squares", "gram_squares"), "i32")
    bound |= {"share": "fp32", "scale": "fp32"}
    yield "over bound", kernels._over_bound_kernel, bound, {"BLOCK": kernels.BLOCK, **chunk}, {}
    row = {"x_ptr": FLOAT, "high_ptr": HALF, "low_ptr": HALF, "scale": "fp32"} | sizes
    row |= dict.fromkeys(("right_ptr", "along_ptr", "unit_ptr"), double)
    yield "rows in", kernels._rows_in_kernel, row, {"BLOCK": kernels.WIDE}, {}
    out = dict.fromkeys(("unit_ptr", "gain_ptr", "along_ptr", "weight_ptr", "right_ptr"), double)
    out |= dict.fromkeys(("along_batch", "width", "c_batch", "c_row", "c_column"), "i32")
    out |= {"c_ptr": FLOAT, "out_ptr": FLOAT, "exponent": "fp32", "factor": "fp32"}
    for power in (False, True):
        flags = {"POWER": power, "DOMINANT": True, "BLOCK": kernels.WIDE}
        yield f"rows out{' of a power' * power}", kernels._rows_out_kernel, out, flags, {}


def grams() -> Iterator[Case]:
    """Gram matrices in three float16 products, of rows in each dtype."""
    from fastrdm.kernels.linalg import gram_triton

    tile = {"BLOCK": gram_triton.BLOCK, "DEPTH": gram_triton.DEPTH}
    for kind in TYPES:
        gram = {"x_ptr": kind, "scale_ptr": FLOAT, "mean_ptr": FLOAT, "part_ptr": FLOAT}
        gram |= dict.fromkeys(("height", "width", "share", "splits"), "i32")
        for tall in (False, True):
            flags = {"TALL": tall, "CENTER": True, **tile}
            yield f"gram {kind[1:]} {'x^T x' if tall else 'x x^T'} fp16x3", gram_triton._gram_kernel, gram, flags, {}
    sums = {"part_ptr": FLOAT, "unit_ptr": FLOAT, "out_ptr": FLOAT, "n": "i32", "splits": "i32"}
    yield "gram sum", gram_triton._sum_kernel, sums, {"BLOCK": gram_triton.BLOCK}, {}
    rows = {"x_ptr": "*bf16", "scale_ptr": FLOAT, "width": "i32"}
    yield "gram row scales", gram_triton._row_scales_kernel, rows, {"BLOCK": 1024}, {}
    means = {"x_ptr": "*bf16", "scale_ptr": FLOAT, "mean_ptr": FLOAT, "height": "i32", "width": "i32"}
    flags = {"ROWS": 16, "BLOCK": gram_triton.BLOCK}
    yield "gram column means", gram_triton._column_means_kernel, means, flags, {}


def half_grams() -> Iterator[Case]:
    """Gram matrices of half rows, of two inputs, as a monitor takes them of features and of the hidden layer."""
    from fastrdm.kernels.linalg import half_gram_triton as kernels

    sizes, tile = {"height": "i32", "padded": "i32"}, {"DEPTH": kernels.DEPTH}
    parts = {"along_ptr": FLOAT, "size_ptr": FLOAT}
    found = dict.fromkeys(("inverse_ptr", "share_ptr", "whole_ptr"), "*fp64") | {"gram_ptr": FLOAT} | sizes
    for kind in ("*bf16", "*fp16"):
        columns = {"x_ptrs": (kind, kind), "widths": ("i32", "i32"), "starts": ("i32", "i32"), "shifted_ptr": kind}
        flags = {"ROWS": kernels.BLOCK, **tile}
        yield f"half gram {kind[1:]} columns", kernels._columns_kernel, columns | parts | sizes, flags, {}
        product = {"shifted_ptr": kind, "starts": ("i32",) * 3, "views": "i32"} | parts | found
        flags = {"NORMALIZE": True, "WIDEN": False, "BLOCK": kernels.BLOCK, **tile}
        yield f"half gram {kind[1:]} product", kernels._product_kernel, product, flags, kernels.OPTIONS
    means = {"gram_ptr": FLOAT, "inverse_ptr": "*fp64", "mean_ptr": "*fp64"} | sizes
    yield "half gram means", kernels._means_kernel, means, {"BLOCK": kernels.LINE}, {}
    results = found | dict.fromkeys(("mean_ptr", "plain_ptr", "centered_ptr"), "*fp64")
    flags = {"PLAIN": True, "CENTER": True, "TILE": kernels.TILE, "LINE": kernels.LINE}
    yield "half gram results", kernels._result_kernel, results, flags, {}


def cases(arch: int) -> list[Case]:
    """Every variant that runs on this architecture."""
    return [*products(arch), *product_variants(arch), *around(), *grams(), *half_grams()]


def compiled(
    kernel: Any,
    types: dict[str, Any],
    constants: dict[str, Any],
    options: dict[str, int] | None = None,
    integers: bool = False,
    arch: int = 90,
) -> Any:
    """The kernel as Triton compiles it for an architecture: 90 is sm_90.

    Pointers, and `integers` too, are taken as divisible by 16.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = types | dict.fromkeys(constants, "constexpr")
    signature = {argument: types[argument] for argument in kernel.arg_names}
    # The arguments one by one, and the elements of those that are tuples.
    places: dict[tuple[int, ...], str] = {
        (i,): kind for i, kind in enumerate(signature.values()) if isinstance(kind, str)
    }
    for i, kinds in enumerate(signature.values()):
        places |= {(i, j): kind for j, kind in enumerate(kinds) if isinstance(kinds, tuple)}
    sixteens = [place for place, kind in places.items() if kind[0] == "*" or (integers and kind == "i32")]
    aligned = {place: [["tt.divisibility", 16]] for place in sixteens}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


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
    """The columns that both tables of compiled kernels have."""
    registers, stack = resources(built.asm["cubin"])
    found = [unit for unit in ("wgmma.mma_async", "tcgen05.mma", "mma.sync") if unit in built.asm["ptx"]]
    return {
        "kernel": name,
        "registers": registers,
        "stack_bytes": stack,
        "shared_bytes": built.metadata.shared,
        "tensor_cores": found[0].partition(".")[0] if found else "none",
    }


def versions() -> dict[str, str]:
    """The columns torch and triton."""
    import triton

    return {"torch": torch.__version__, "triton": triton.__version__}


def rows(arch: int) -> Iterator[Row]:
    """A row for each variant."""
    for name, kernel, types, constants, options in cases(arch):
        built = compiled(kernel, types, constants, options, integers=True, arch=arch)
        found = [copy for copy in ("cp.async.bulk.tensor", "cp.async") if copy in built.asm["ptx"]]
        yield {**used(name, built), "copies": (found or ["none"])[0], "arch": f"sm_{arch}", **versions()}


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--arch", type=int, default=90, help="compute capability times ten: 80, 90, 100")
    arguments = parser.parse_args()
    common.require_packages("triton")
    common.print_rows(FIELDS, rows(arguments.arch))


if __name__ == "__main__":
    main()
