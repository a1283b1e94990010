"""Products of the spectral solver by their tiles, on CUDA; CSV to stdout. fp16x3_triton.tile_of takes the fastest.

    python -m benchmarks.kernels.products > benchmarks/results/products_h200.csv

microseconds: device time of one product, a tenth of a replay of a CUDA graph of ten, median of ten, the L2 cache
overwritten before each. axpby: a symmetric step of a chain, (n, n) by (n, n); product: (n, n) by features (n, 2048), or
(n, 4096) for n = 2048; square: features by their transpose. Tiles are rows x columns x depth x warps x stages.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator
from unittest.mock import patch

import torch
import triton
from torch import Tensor

from benchmarks.kernels.spectral import environment
from benchmarks.kernels.spectral_bars import device_times, graphed
from fastrdm.kernels.linalg import fp16x3_triton
from fastrdm.kernels.linalg.fp16x3_triton import Fp16x3Triton, SplitMatrix, Tile

SIZES = [(128, 2), (256, 2), (512, 2), (2048, 1)]  # n, views
SQUARES = [(32, 32, 64, 2, 4), (32, 32, 128, 4, 3), (64, 64, 32, 4, 5), (64, 64, 64, 4, 3), (64, 64, 64, 4, 4)]
SQUARES += [(64, 64, 64, 8, 4), (64, 64, 128, 4, 2), (128, 128, 32, 8, 4), (128, 128, 64, 8, 2), (128, 128, 64, 8, 3)]
OBLONG = [(32, 128, 64, 4, 4), (64, 64, 64, 4, 4), (64, 128, 64, 4, 3), (64, 128, 64, 8, 3), (64, 256, 32, 8, 3)]
OBLONG += [(128, 64, 64, 4, 3), (128, 128, 64, 8, 3), (128, 256, 32, 8, 3)]
KERNELS = {"axpby": SQUARES, "square": SQUARES, "product": OBLONG}
CHAIN = 10


def chain(kernel: str, square: SplitMatrix, x: SplitMatrix) -> tuple[Tensor, None]:
    """CHAIN products, one after the other."""
    precision, y = Fp16x3Triton(), square if kernel == "axpby" else x
    for _ in range(CHAIN):
        if kernel == "axpby":
            y = precision.axpby(square, y, alpha=0.5, beta=0.5, add=square, gamma=0.1)
        elif kernel == "product":
            y = precision.bounded_product(square, y)
        else:
            y = precision.square(x)
    return y.dense, None


def rows() -> Iterator[str]:
    generator = torch.Generator("cuda").manual_seed(0)
    for n, views in SIZES:
        g = torch.randn(views, n, n, device="cuda", generator=generator)
        square = SplitMatrix((g + g.mT) / n)
        x = SplitMatrix(torch.randn(views, n, max(2048, 2 * n), device="cuda", generator=generator) / 64)
        for kernel, tiles in KERNELS.items():
            for tile in tiles:
                with patch.object(fp16x3_triton, "tile_of", lambda *shape, tile=tile: Tile(*tile)):
                    replay, _ = graphed(lambda: chain(kernel, square, x))  # noqa: B023 (called at once)
                ms = statistics.median(device_times(replay, 10)) / CHAIN
                cut = "x".join(map(str, tile))
                yield f"{kernel},{n},{views},{cut},{1e3 * ms:.2f},{environment(g.device)},{triton.__version__}"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_products.py needs a CUDA device")
    print("kernel,n,views,tile,microseconds,device,threads,torch,commit,triton")
    for row in rows():
        print(row, flush=True)


if __name__ == "__main__":
    main()
