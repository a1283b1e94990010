"""DALI and ffcv over many epochs: memory is asked for once."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastrdm.loaders.packing.pack import main

EPOCHS = """
import gc, sys
from fastrdm.loaders.build import build_loader
from fastrdm.loaders.spec import LoaderConfig, ViewSpec
from fastrdm.loaders.sources.open import open_source

def resident():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20

engine, source, root = sys.argv[1:]
views = ViewSpec(size=32, blur=0.5), ViewSpec(size=16)
config = LoaderConfig(source=source, root=root, batch_size=20, views=views, engine=engine, workers=1, prefetch=2)
loader = build_loader(config, open_source(config, "train"), seed=0)
sizes = []
for epoch in range(32):
    loader.set_epoch(epoch)
    for batch in loader:
        pass
    sizes.append(resident())
print(*sizes, flush=True)
"""


@pytest.mark.parametrize(
    ("engine", "source", "module"), [("dali", "folder", "nvidia.dali"), ("ffcv", "packed", "ffcv")]
)
def test_memory_does_not_grow_over_epochs(tmp_path: Path, engine: str, source: str, module: str) -> None:
    """Resident memory from epoch 5 to epoch 32, of 11 MB of pixels each: keeping one image in five would add 60 MB.

    The allowance is for ffcv, whose three buffers of 10 MB are taken anew each epoch, before or after the old are free.
    """
    pytest.importorskip(module, reason=f"needs pip install 'fastrdm[{engine}]'")
    generator = np.random.default_rng(0)
    for k in range(60):
        path = tmp_path / "images" / "one" / f"{k:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = generator.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((300 + k % 3, 200)).save(path)
    root = tmp_path / "images"
    if engine == "ffcv":
        main([str(root), str(tmp_path / "beton"), "--format", "beton", "--workers", "1"])
        root = tmp_path / "beton"
    command = [sys.executable, "-c", EPOCHS, engine, source, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    sizes = [float(size) for size in done.stdout.split()]
    assert len(sizes) == 32 and max(sizes[5:]) < sizes[4] + 30, sizes
