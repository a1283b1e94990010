"""Products of the solver newton_schulz by their tiles, on CUDA; CSV to stdout. fp16x3_triton.tile_of takes the fastest.

    python -m benchmarks.kernels.products > benchmarks/results/products_h200.csv

microseconds: device time of one product, a tenth of a replay of a CUDA graph of ten, median of ten, the L2 cache
overwritten before each. axpby: a symmetric step of a chain, (n, n) by (n, n); product: (n, n) by features (n, 2048), or
(n, 4096) for n = 2048; square: features by their transpose. Tiles are rows x columns x depth x warps x stages.
"""

import statistics
from collections.abc import Iterator
from typing import TYPE_CHECKING
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.common import Row
from benchmarks.kernels.spectral_bars import device_times, graphed

if TYPE_CHECKING:
    from fastrdm.kernels.linalg.fp16x3_triton import SplitMatrix

SIZES = [(128, 2), (256, 2), (512, 2), (2048, 1)]  # n, views
SQUARES = [(32, 32, 64, 2, 4), (32, 32, 128, 4, 3), (64, 64, 32, 4, 5), (64, 64, 64, 4, 3), (64, 64, 64, 4, 4)]
SQUARES += [(64, 64, 64, 8, 4), (64, 64, 128, 4, 2), (128, 128, 32, 8, 4), (128, 128, 64, 8, 2), (128, 128, 64, 8, 3)]
OBLONG = [(32, 128, 64, 4, 4), (64, 64, 64, 4, 4), (64, 128, 64, 4, 3), (64, 128, 64, 8, 3), (64, 256, 32, 8, 3)]
OBLONG += [(128, 64, 64, 4, 3), (128, 128, 64, 8, 3), (128, 256, 32, 8, 3)]
KERNELS = {"axpby": SQUARES, "square": SQUARES, "product": OBLONG}
CHAIN = 10
FIELDS = ["kernel", "n", "views", "tile", "microseconds", *common.ENVIRONMENT, "triton"]


def chain(kernel: str, square: "SplitMatrix", x: "SplitMatrix") -> tuple[Tensor, None]:
    """CHAIN products, one after the other."""
    from fastrdm.kernels.linalg.fp16x3_triton import Fp16x3Triton

    precision, y = Fp16x3Triton(), square if kernel == "axpby" else x
    for _ in range(CHAIN):
        if kernel == "axpby":
            y = precision.axpby(square, y, alpha=0.5, beta=0.5, add=square, gamma=0.1)
        elif kernel == "product":
            y = precision.bounded_product(square, y)
        else:
            y = precision.square(x)
    return y.dense, None


def rows() -> Iterator[Row]:
    """A row for each kernel, size and tile."""
    import triton

    from fastrdm.kernels.linalg import fp16x3_triton

    where = {**common.environment(torch.device("cuda")), "triton": triton.__version__}
    generator = torch.Generator("cuda").manual_seed(0)
    for n, views in SIZES:
        g = torch.randn(views, n, n, device="cuda", generator=generator)
        square = fp16x3_triton.SplitMatrix((g + g.mT) / n)
        wide = torch.randn(views, n, max(2048, 2 * n), device="cuda", generator=generator)
        x = fp16x3_triton.SplitMatrix(wide / 64)
        for kernel, tiles in KERNELS.items():
            for numbers in tiles:
                tile = fp16x3_triton.Tile(*numbers)
                with patch.object(fp16x3_triton, "tile_of", lambda *shape, tile=tile: tile):
                    replay, _ = graphed(lambda: chain(kernel, square, x))  # noqa: B023 (called at once)
                ms = statistics.median(device_times(replay, 10)) / CHAIN
                named = {"kernel": kernel, "n": n, "views": views, "tile": "x".join(map(str, numbers))}
                yield {**named, "microseconds": f"{1e3 * ms:.2f}", **where}


def main() -> None:
    common.parser(__doc__).parse_args()
    common.require_cuda("benchmarks.kernels.products")
    common.print_rows(FIELDS, rows())


if __name__ == "__main__":
    main()
