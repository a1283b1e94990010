"""Compile the spectral Triton kernels for sm_90 without a GPU and print what they use, one CSV row a kernel.

    python benchmarks/compile_spectral.py > benchmarks/results/spectral_sm90.csv

Registers and spills a thread, shared memory a block in bytes, and whether the tensor cores of Hopper (wgmma) are used.
"""

import os
import re
import subprocess
import tempfile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastrdm.kernels import symmetric

FLOAT, TYPES = "*fp32", ("*fp32", "*bf16", "*fp16")
TILE = {"BLOCK": symmetric.BLOCK, "DEPTH": symmetric.DEPTH}


def cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    """Name, kernel, argument types and constants of every variant that runs."""
    axpby = dict.fromkeys(("a_ptr", "b_ptr", "add_ptr", "out_ptr"), FLOAT) | {"n": "i32"}
    axpby |= dict.fromkeys(("alpha", "beta", "gamma"), "fp32")
    out: list[tuple[str, Any, dict[str, str], dict[str, Any]]] = [
        ("axpby", symmetric._axpby_kernel, axpby, {"ADD": True, **TILE})
    ]
    for kind in TYPES:
        gram = {"x_ptr": kind, "scale_ptr": FLOAT, "mean_ptr": FLOAT, "part_ptr": FLOAT}
        gram |= dict.fromkeys(("height", "width", "share", "splits"), "i32")
        for tall in (False, True):
            for three in (False, True):
                flags = {"TALL": tall, "CENTER": True, "THREE": three, **TILE}
                name = f"gram {kind[1:]} {'x^T x' if tall else 'x x^T'} {'fp16x3' if three else 'half'}"
                out.append((name, symmetric._gram_kernel, gram, flags))
    sums = {"part_ptr": FLOAT, "unit_ptr": FLOAT, "out_ptr": FLOAT, "n": "i32", "splits": "i32"}
    out.append(("gram sum", symmetric._sum_kernel, sums, {"BLOCK": symmetric.BLOCK}))
    rows = {"x_ptr": "*bf16", "scale_ptr": FLOAT, "width": "i32"}
    out.append(("gram row scales", symmetric._row_scales_kernel, rows, {"BLOCK": 1024}))
    means = {"x_ptr": "*bf16", "scale_ptr": FLOAT, "mean_ptr": FLOAT, "height": "i32", "width": "i32"}
    out.append(("gram column means", symmetric._column_means_kernel, means, {"ROWS": 16, "BLOCK": symmetric.BLOCK}))
    return out


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes (spills) of a thread, as cuobjdump reports them."""
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.check_output([tool, "--dump-resource-usage", file.name], text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])


def main() -> None:
    print("kernel,registers,stack_bytes,shared_bytes,wgmma,torch,triton")
    for name, kernel, types, constants in cases():
        signature = types | dict.fromkeys(constants, "constexpr")
        aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind != "fp32"}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        registers, stack = resources(built.asm["cubin"])
        wgmma = "wgmma.mma_async" in built.asm["ptx"]
        shared = built.metadata.shared
        print(f"{name},{registers},{stack},{shared},{wgmma},{torch.__version__},{triton.__version__}", flush=True)


if __name__ == "__main__":
    main()
