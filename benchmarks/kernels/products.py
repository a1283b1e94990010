"""Products of the solver newton_schulz by their tiles, and two other ways to make them; CUDA, CSV to stdout.

    python -m benchmarks.kernels.products > benchmarks/results/products_h200.csv
    python -m benchmarks.kernels.products --ways > benchmarks/results/products_ways_h200.csv

microseconds: device time of one product, a tenth of a replay of a CUDA graph of ten, median, the L2 cache overwritten
before each. axpby: a symmetric step of a chain, (n, n) by (n, n); product: (n, n) by features (n, 2048), or (n, 4096)
for n = 2048; square: features by their transpose. Tiles are rows x columns x depth x warps x stages.

By default every tile is timed, ten replays each; fp16x3_triton.tile_of takes the fastest. `--ways` times two ways to
make the same products at the tiles that are taken, in turns of five replays. two programs a tile: each sums half of
the terms, and a second launch adds the halves. descriptors: operands are loaded by tensor descriptors (TMA). Training
takes the first way of each pair; a second one that is faster in its rows becomes the default by PROGRAMS_A_TILE or
WIDE_BY_DESCRIPTORS in fp16x3_triton.
"""

import statistics
from collections.abc import Callable, Iterator
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
# By kernel: the constant of fp16x3_triton that chooses the way to make it, and the ways by its value.
WAYS: dict[str, tuple[str, dict[int, str]]] = {
    "square": ("PROGRAMS_A_TILE", {1: "one program a tile", 2: "two programs a tile"}),
    "product": ("WIDE_BY_DESCRIPTORS", {False: "pointers", True: "descriptors"}),
}
CHAIN = 10
TURNS = 6
FIELDS = ["kernel", "n", "views", "tile", "way", "microseconds", *common.ENVIRONMENT, "triton"]


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


def matrices() -> Iterator[tuple[int, int, "SplitMatrix", "SplitMatrix"]]:
    """n, views, symmetric matrices (views, n, n) and features (views, n, width) of every size."""
    from fastrdm.kernels.linalg.fp16x3_triton import SplitMatrix

    generator = torch.Generator("cuda").manual_seed(0)
    for n, views in SIZES:
        g = torch.randn(views, n, n, device="cuda", generator=generator)
        wide = torch.randn(views, n, max(2048, 2 * n), device="cuda", generator=generator)
        yield n, views, SplitMatrix((g + g.mT) / n), SplitMatrix(wide / 64)


def by_tile() -> Iterator[Row]:
    """A row for each kernel, size and tile."""
    from fastrdm.kernels.linalg import fp16x3_triton

    for n, views, square, x in matrices():
        for kernel, tiles in KERNELS.items():
            for numbers in tiles:
                tile = fp16x3_triton.Tile(*numbers)
                with patch.object(fp16x3_triton, "tile_of", lambda *shape, tile=tile: tile):
                    replay, _ = graphed(lambda: chain(kernel, square, x))  # noqa: B023 (called at once)
                yield {"kernel": kernel, "n": n, "views": views, **timed(tile, device_times(replay, 10))}


def by_way() -> Iterator[Row]:
    """A row for each way to make a product, the two of one kernel and size timed in turns.

    Sizes whose sums no two programs would share are left out.
    """
    from fastrdm.kernels.linalg import fp16x3_triton

    for n, views, square, x in matrices():
        width, device = x.dense.shape[-1], x.dense.device
        for kernel, (constant, ways) in WAYS.items():
            replays: dict[str, Callable[[], None]] = {}
            for value, way in ways.items():
                with patch.object(fp16x3_triton, constant, value):
                    shared = fp16x3_triton.programs_a_tile(True, views, n, width, device)
                    if kernel != "square" or shared == value:
                        replays[way], _ = graphed(lambda: chain(kernel, square, x))  # noqa: B023 (called at once)
            if len(replays) < 2:
                continue
            times: dict[str, list[float]] = {way: [] for way in replays}
            for _ in range(TURNS):
                for way, replay in replays.items():
                    times[way] += device_times(replay, 5)
            symmetric = kernel == "square"
            tile = fp16x3_triton.tile_of(symmetric, n, n if symmetric else width, fp16x3_triton.has_wgmma(device))
            for way, found in times.items():
                yield {"kernel": kernel, "n": n, "views": views, "way": way, **timed(tile, found)}


def timed(tile: tuple[int, ...], milliseconds: list[float]) -> Row:
    """The columns of a chain that took so long."""
    microseconds = f"{1e3 * statistics.median(milliseconds) / CHAIN:.2f}"
    return {"tile": "x".join(map(str, tile)), "microseconds": microseconds}


def rows(ways: bool) -> Iterator[Row]:
    """The rows that were asked for, and where they were measured."""
    import triton

    where = {**common.environment(torch.device("cuda")), "triton": triton.__version__}
    for found in by_way() if ways else by_tile():
        yield {**found, **where}


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument(
        "--ways", action="store_true", help="other ways to make the products, in turns with the default"
    )
    arguments = parser.parse_args()
    common.require_cuda("benchmarks.kernels.products")
    common.print_rows(FIELDS, rows(arguments.ways))


if __name__ == "__main__":
    main()
