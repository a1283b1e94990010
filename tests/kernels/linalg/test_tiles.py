"""Tiles of the Triton products by what the device's tensor cores read."""

import pytest
import torch

pytest.importorskip("triton")

from fastrdm.kernels.linalg import fp16x3_triton


@pytest.mark.parametrize(
    ("capability", "depth"), [((8, 0), 32), ((8, 9), 32), ((9, 0), 64), ((10, 0), 64), ((12, 0), 32)]
)
def test_large_tiles_are_half_as_deep_without_wgmma(
    capability: tuple[int, int], depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On sm_80 a depth of 64 spills 120 bytes a thread; on sm_86, sm_89 and sm_120 its operands do not fit."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    fp16x3_triton.has_wgmma.cache_clear()
    wgmma = fp16x3_triton.has_wgmma(torch.device("cuda", 0))
    fp16x3_triton.has_wgmma.cache_clear()
    for rows in (200, 2048):
        tile = fp16x3_triton.tile_of(False, rows, 2048, wgmma)
        assert tile.depth == depth
        # Two parts of both operands in every stage, float16.
        held = tile.stages * 2 * tile.depth * (tile.rows + tile.columns) * 2
        assert held <= (99 if depth == 32 else 227) * 1024
    assert fp16x3_triton.tile_of(True, 512, 512, wgmma).depth == 64, "symmetric tiles are small enough everywhere"


def test_a_cpu_takes_the_tiles_that_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert fp16x3_triton.has_wgmma(torch.device("cpu"))
