"""What a run says of its speed: arithmetic counted once, peaks of known GPUs, memory, filters, the first step."""

import json
import multiprocessing
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from fastrdm import cli
from fastrdm.config import run_config
from fastrdm.efficiency.peak_flops import PEAKS, peak_tflops
from fastrdm.efficiency.step_cost import build, small_step, step_flops
from fastrdm.efficiency.utilization import UtilizationMeter, age, compile_cache, peak_memory
from fastrdm.methods.presets import PRESETS
from fastrdm.runtime.timers import Stopwatch
from fastrdm.schema import Horizon
from fastrdm.trainer import Trainer

CPU = torch.device("cpu")
HORIZON = Horizon(5, 50)
SMALL = [
    "quickstart.yaml",
    "encoder.width=4",
    "method.projector={hidden: 16, out: 12}",
    "loader.batch_size=16",
    "loader.views.*.size=8",
]
RUN = ["train.length=8st", "optim.warmup=1st", "loader.subset=80", "evaluate.baselines=false", "log.report=false"]


def load(*arguments: str) -> run_config.Config:
    return run_config.load([*SMALL, *arguments])


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("preset", ["simsiam", "byol", "swav", "dino", "rdm_byol_log1p", "rdm_simsiam_both"])
def test_what_is_counted_is_what_a_step_computes(preset: str) -> None:
    assert preset in PRESETS
    settings = load(f"preset={preset}", "train.precision=bf16")
    before = torch.get_rng_state()
    counted = step_flops(settings, HORIZON, 10, 16, [8, 8])
    assert torch.equal(torch.get_rng_state(), before)
    learner, _ = build(settings, HORIZON, 10)
    assert counted == small_step(settings, learner, 16)[1] > 0
    twice = load(f"preset={preset}", "train.precision=bf16", "encoder.checkpointing=true")
    assert step_flops(twice, HORIZON, 10, 16, [8, 8]) == counted


def test_arithmetic_grows_with_the_views_and_is_counted_for_each_size_once(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(load(*RUN, "train.length=4ep", "train.accumulate=2", "loader.views.*.progressive=[[2, 4]]"))
    asked: list[tuple[int, tuple[int, ...]]] = []

    def counted(*arguments: Any) -> int:
        asked.append(arguments[3:])
        return step_flops(*arguments)

    monkeypatch.setattr("fastrdm.efficiency.utilization.step_flops", counted)
    small, _, large, _ = (trainer.utilization.step_flops(epoch) for epoch in range(4))
    assert asked == [(8, (4, 4)), (8, (8, 8))]
    assert large == 2 * step_flops(trainer.settings, trainer.horizon, 10, 8, [8, 8]) > 2 * small


def test_peaks_are_found_by_the_devices_name() -> None:
    assert peak_tflops("NVIDIA H100 80GB HBM3", "bf16") == peak_tflops("NVIDIA H200", "fp16") == 989
    assert peak_tflops("NVIDIA H100 PCIe", "bf16") == 756
    assert peak_tflops("NVIDIA A100-SXM4-80GB", "fp32") == 156, "TF32"
    assert peak_tflops("NVIDIA L40S", "bf16") == 362
    assert peak_tflops("NVIDIA L4", "bf16") == 121
    for unknown in ("NVIDIA GH200 480GB", "NVIDIA A1000", "a CPU"):
        assert peak_tflops(unknown, "bf16") is None, unknown
    assert peak_tflops("NVIDIA A100-SXM4-80GB", "fp64") is None
    for name, (half, tf32) in PEAKS.items():
        assert peak_tflops(f"NVIDIA {name}", "bf16") == half
        assert half == pytest.approx(2 * tf32, rel=0.02), "tensor cores do half as much in TF32"


def test_a_run_prints_and_logs_its_metrics(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["preset=rdm_simsiam_log1p", f"run={tmp_path}", "log.every=4", "log.peak_tflops=0.5"]
    assert cli.train([*SMALL, *RUN, *arguments]) == 0
    out = capfd.readouterr().out
    assert "arithmetic: shares are of 0.5 TFLOP/s, a CPU, fp32" in out
    assert out.count("first step: ") == 1
    first, second = (line for line in lines(tmp_path) if "loss" in line)
    flops = step_flops(load("preset=rdm_simsiam_log1p"), HORIZON, 10, 16, [8, 8])
    for line in (first, second):
        assert line["gflops"] == pytest.approx(line["images_per_second"] / 16 * flops / 1e9)
        assert line["flop_utilization"] == pytest.approx(line["gflops"] / 500)
        assert 0 < line["filter_share"] < 1
        assert 50 < line["peak_memory_mib"] < 64_000
        assert line["seconds_to_first_step"] == first["seconds_to_first_step"] > 0
    assert f"{second['gflops']:,.1f} GFLOP/s of a process ({100 * second['flop_utilization']:.1f} % of the peak)" in out
    assert f"spectral filters {100 * second['filter_share']:.1f} %" in out
    assert f"first step {first['seconds_to_first_step']:.1f} s" in out


def test_without_a_peak_or_a_filter_there_are_no_shares(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.train([*SMALL, *RUN, "preset=simsiam", f"run={tmp_path}"]) == 0
    told = "arithmetic: no peak known of a CPU, so GFLOP/s and no share; log.peak_tflops sets one"
    assert capfd.readouterr().out.count(told) == 1
    (line,) = (line for line in lines(tmp_path) if "loss" in line)
    assert line["gflops"] > 0
    assert not {"flop_utilization", "filter_share"} & line.keys()


def test_filters_are_timed_with_their_gradient_and_without_what_warms_up(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(load(*RUN, "preset=rdm_simsiam_both", "train.accumulate=2"))
    laps = iter([9.0, 0.2, 0.1, 0.3, 0.1, 0.5, 9.0, 0.04, 0.05, 0.04, 0.04, 0.01])
    seen: list[tuple[str, torch.Size, bool]] = []
    monkeypatch.setattr(Stopwatch, "lap", lambda self: next(laps))
    for transform in (trainer.method.online_transforms[0], trainer.method.target_transforms[0]):
        transform.register_forward_hook(lambda t, args, y: seen.append((t.side, y.shape, y.requires_grad)))
    metrics = trainer.utilization.read(0, steps=10, seconds=20.0)
    assert metrics["filter_share"] == pytest.approx((0.2 + 0.04) * 2 * 10 / 20)
    assert set(seen) == {("online", (2, 8, 12), True), ("target", (2, 8, 12), False)}
    assert "filter_share" in trainer.utilization.read(0, steps=1, seconds=1.0), "timed once"


def test_the_age_of_a_process_is_counted_from_its_start() -> None:
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()

    def child() -> None:
        time.sleep(0.5)
        theirs.send(age())

    began = time.perf_counter()
    process = fork.Process(target=child)
    process.start()
    told = ours.recv()
    process.join()
    assert 0.49 < told < time.perf_counter() - began + 0.1, "give or take a tick of the kernel's clock"
    assert age() > told


def test_memory_is_the_largest_that_the_process_had() -> None:
    before = peak_memory(CPU)
    held = torch.ones(2**26)  # 256 MiB
    after = peak_memory(CPU)
    assert after >= before
    assert after >= held.nbytes
    del held
    assert peak_memory(CPU) >= after


def test_the_first_step_is_told_once_with_the_state_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    method: Any = SimpleNamespace()
    gauge = UtilizationMeter(load(), method, HORIZON, 0, SimpleNamespace(device=CPU, world=1))  # type: ignore[arg-type]
    monkeypatch.setitem(counters, "inductor", {"fxgraph_cache_hit": 0, "fxgraph_cache_miss": 0})
    assert compile_cache() == "nothing was compiled"
    monkeypatch.setitem(counters, "inductor", {"fxgraph_cache_hit": 3, "fxgraph_cache_miss": 1})
    said: list[str] = []
    gauge.after_step(said.append)
    gauge.after_step(said.append)
    assert len(said) == 1
    assert said[0].endswith("s after the start of the process; 3 of 4 compiled graphs were in the cache")


def test_torch_counts_its_cache_as_we_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setitem(counters, "inductor", Counter())
    for told in ("0 of 1", "1 of 2"):
        torch.compiler.reset()
        torch.compile(lambda x: (x * 2).sin())(torch.ones(3))
        assert compile_cache() == f"{told} compiled graphs were in the cache"
