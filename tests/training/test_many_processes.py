"""Compiled steps on several gloo processes, and every collective of a step as NCCL would get it, without a GPU."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastrdm.kernels import batchnorm
from fastrdm.kernels.spectral.matmul_solvers import newton_schulz_takes
from fastrdm.methods.presets import PRESETS
from fastrdm.methods.spectral_filter import FilterConfig
from fastrdm.models.settings import ENCODERS, resnet_row
from fastrdm.schema import Horizon
from fastrdm.training.learner import build_method
from tests.programs.compiled_processes import settings

pytestmark = pytest.mark.traced

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "tests" / "programs" / "compiled_processes.py"
SIX = ("simsiam", "byol", "swav", "dino", "rdm_simsiam", "rdm_byol_log1p")
WORLD = 8
CASES = [pytest.param(world, (preset,), marks=pytest.mark.slow) for world in (2, 4) for preset in SIX]


@pytest.mark.parametrize(("world", "presets"), [(2, ("rdm_byol_log1p",)), *CASES])
def test_compiled_and_eager_steps_of_several_processes_agree(
    tmp_path: Path, world: int, presets: tuple[str, ...]
) -> None:
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(world)]
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", str(PROGRAM), str(tmp_path), *presets]
    done = subprocess.run([sys.executable, *launch], capture_output=True, text=True, timeout=900, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line["preset"] for line in found] == list(presets)
    for line in found:
        print(line)
        assert line["losses"] < 1e-4 and line["weights"] < 1e-4, line
        assert line["processes"] == 0, "the processes' weights differ"
        assert line["graphs"] > 0 and line["breaks"] == 0, line


class Collectives(TorchDispatchMode):
    """Notes name, shape, dtype and device of everything that goes over the network."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[int, ...], torch.dtype, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name.startswith("_c10d_functional::") and "wait" not in name:
            x = args[0]
            self.seen.append((name.partition("::")[2].partition(".")[0], tuple(x.shape), x.dtype, x.device.type))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def eight_processes() -> Iterator[None]:
    """A group of eight processes of which this one is the first; nothing is sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("preset", PRESETS)
def test_what_goes_over_the_network_lies_on_the_gpu_in_full_precision(
    preset: str, eight_processes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward passes of all presets on fake CUDA tensors: shapes, dtypes and devices of every collective.

    DistributedDataParallel's own sum of gradients and the backward passes, for which torch's engine needs a driver, are
    not in it. Torch's fused kernels of BatchNorm have no fake, so that the path of compiled steps is taken.
    """
    monkeypatch.setattr(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)
    # As where a stream is captured: of small square matrices a library's solver would read a number on the host.
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(batchnorm, "_has_fused_kernels", lambda x: False)
    monkeypatch.setitem(ENCODERS, "resnet_small", resnet_row((1,), 8))
    method = build_method(settings(preset), Horizon(10, 20))
    for transform in (*method.config.online, *method.config.target):
        if isinstance(transform, FilterConfig):
            # Planned once a process with numbers that are read, which fake tensors do not have.
            for rows_known in (True, False):
                newton_schulz_takes(transform.kind, transform.power, rows_known)
    norms = [m for m in method.online.modules() if isinstance(m, batchnorm.ViewBatchNorm)]
    with FakeTensorMode(), Collectives() as network, torch.no_grad():
        method._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device="cuda"))
        out = method([torch.empty(2, 3, 8, 8, device="cuda") for _ in range(2)])
    assert out.loss.device.type == "cuda"
    assert {device for *_, device in network.seen} == {"cuda"}
    assert {dtype for *_, dtype, _ in network.seen} <= {torch.float32, torch.float64}
    gathered = [shape for name, shape, *_ in network.seen if name == "all_gather_into_tensor"]
    statistics = [(1, 2 * 2 * norm.num_features + 1) for norm in norms]
    for wanted in statistics:
        assert wanted in gathered, "one gather for all views of each BatchNorm: mean, variance and count"
