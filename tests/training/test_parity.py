"""The same run on 1, 2 and 4 processes: order, views, loss, outputs, gradients, weights, EMA, running statistics."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastrdm.methods.presets import PRESETS

SCRIPT = Path(__file__).parents[1] / "programs" / "parity.py"
# in float32 each preset's first step is compared; later ones amplify rounding, and float64 is there for them
TOLERANCE = {"fp64": 1e-10, "fp32": 1e-5}
FAST = ["simsiam", "byol", "swav", "dino", "rdm_simsiam_log1p", "rdm_byol_target0.5"]
MORE = ["dino_crops", "power_anneals", "crossed", "whitened"]
CASES = [*(("fp64", name) for name in [*PRESETS, *MORE]), *(("fp32", name) for name in FAST)]


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of runs for each precision: of all names and numbers of processes that are selected, and no other."""
    selected = [item.callspec.params for item in request.session.items if item.path == request.path]
    folders = {}
    for precision in dict.fromkeys(s["precision"] for s in selected):
        mine = [s for s in selected if s["precision"] == precision]
        worlds, names = (dict.fromkeys(s[key] for s in mine) for key in ("world", "name"))
        folders[precision] = tmp_path_factory.mktemp(precision)
        command = [sys.executable, str(SCRIPT), str(folders[precision]), precision, f"1,{','.join(map(str, worlds))}"]
        subprocess.run([*command, *names], check=True, timeout=600)
    return folders


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(("precision", "name"), CASES)
def test_processes_do_not_change_the_run(runs: dict[str, Path], precision: str, name: str, world: int) -> None:
    one, many = (torch.load(runs[precision] / f"{name}-{n}.pt", weights_only=True) for n in (1, world))
    assert one.keys() == many.keys()
    assert len(one) > 50
    largest = max(x.abs().max().item() for key, x in one.items() if "/gradient/" in key)
    for key, expected in one.items():
        if precision == "fp32" and not key.startswith("0/"):
            continue
        if not expected.is_floating_point() or key.endswith("views"):
            assert torch.equal(expected, many[key]), key
        else:
            # a bias before a BatchNorm has no gradient but rounding: it is compared with the largest gradient there is
            scale = largest if "/gradient/" in key else max(expected.abs().max().item(), 1e-2)
            error = (expected - many[key]).abs().max().item() / scale
            assert error < TOLERANCE[precision], f"{key}: {error:.1e}"
