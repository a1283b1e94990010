"""FFCV's loader with a decoder of ours: every image once, whole, so that any number of views can be cut from it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from ffcv.fields.rgb_image import SimpleRGBImageDecoder
from ffcv.libffcv import imdecode
from ffcv.loader import Loader
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.compiler import Compiler
from ffcv.traversal_order.base import TraversalOrder
from numpy.typing import NDArray


class WholeImage(SimpleRGBImageDecoder):  # type: ignore[misc]  # ffcv has no types
    """Rows (B, largest + 1) uint8: pixels (H, W, 3) back to back, and in the last byte 1 where decoding failed."""

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, Any]:
        """One row an image, as long as the largest needs."""
        shape = (3 * int((self.metadata["height"].astype(np.int64) * self.metadata["width"]).max()) + 1,)
        kind = np.dtype("u1")
        return replace(previous_state, jit_mode=True, shape=shape, dtype=kind), AllocationQuery(shape, kind)

    def generate_code(self) -> Callable[..., Any]:
        """The function that numba compiles to decode an image."""
        read, decode, parallel = self.memory_read, Compiler.compile(imdecode), Compiler.get_iterator()

        def whole(batch_indices: Any, rows: Any, metadata: Any, storage_state: Any) -> Any:
            for k in parallel(len(batch_indices)):
                entry = metadata[batch_indices[k]]
                data = read(entry["data_ptr"], storage_state)
                height, width = np.uint32(entry["height"]), np.uint32(entry["width"])
                failed = decode(data, rows[k], height, width, height, width, 0, 0, 1, 1, False, False)
                rows[k, -1] = failed != 0
            return rows[: len(batch_indices)]

        whole.is_parallel = True  # type: ignore[attr-defined]
        return whole


class Given(TraversalOrder):  # type: ignore[misc]
    """A traversal order that is given from outside."""

    order: NDArray[np.int64]

    def sample_order(self, _: int) -> NDArray[np.int64]:
        """(N,) sample numbers."""
        return self.order


def open_beton(path: Path, batch_size: int, threads: int, ahead: int) -> Any:
    """FFCV's loader of decoded images."""
    loader = Loader(
        str(path), batch_size, threads, pipelines={"image": [WholeImage()], "label": None}, batches_ahead=ahead
    )
    loader.traversal_order = Given(loader)
    return loader


def epoch(loader: Any, order: NDArray[np.int64]) -> Any:
    """Iterator over batches of the samples `order` (N,), N a multiple of the batch size."""
    loader.traversal_order.order = loader.first_traversal_order = order
    return iter(loader)
