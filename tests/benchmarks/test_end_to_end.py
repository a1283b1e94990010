"""Loaders in turns: one that fails costs no other its row, and one whose package is missing is named."""

import argparse
import importlib
from pathlib import Path
from typing import Any

import pytest

from benchmarks.training import end_to_end
from benchmarks.training.end_to_end import Timed

SMALL = ["preset=simsiam", "encoder.width=4", "loader.batch_size=16", "loader.subset=80", "train.length=100ep"]
BRIEF = ["--no-reference", "--blocks", "1", "--steps", "1", "--pause", "0"]


def test_a_loader_that_fails_at_first_is_left_out_of_the_turns() -> None:
    ran: list[str] = []

    def run(name: str) -> Timed:
        ran.append(name)
        if name == "bad":
            raise RuntimeError("no such decoder")
        return Timed(2.0, 1.0)

    runs: Any = {name: (lambda name=name: run(name)) for name in ("a", "bad", "b")}
    found, failed = end_to_end.timed_blocks(runs, 2, 0.0)
    assert failed == {"bad": "RuntimeError: no such decoder"}
    assert found == {"a": [Timed(2.0, 1.0)] * 2, "b": [Timed(2.0, 1.0)] * 2}
    assert ran == ["a", "bad", "b", "a", "b", "a", "b"], "a round that is not counted, then turns"


def test_what_cannot_be_attached_is_said_and_the_others_are_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = end_to_end.common.import_error
    monkeypatch.setattr(end_to_end.common, "import_error", lambda *m: "No module" if "ffcv" in m else absent(*m))
    loaders = ["--loader", "resident", "loader.engine=resident", "--loader", "ffcv", "loader.engine=ffcv"]
    broken = ["--loader", "broken", "loader.engine=native", "loader.source=folder", "loader.root=/nowhere"]
    with pytest.raises(SystemExit) as end:
        end_to_end.main([*SMALL, *BRIEF, *loaders, *broken])
    assert str(end.value).startswith("broken failed: ValueError: ")
    told = capsys.readouterr()
    assert [line.split(",")[8] for line in told.out.splitlines()] == ["contestant", "resident", "synthetic"]
    assert "ffcv: skipped, No module" in told.err


def test_kernels_have_a_kind_and_ranges_none() -> None:
    module = importlib.import_module("benchmarks.training.step_kernels")
    kinds = {
        "triton_poi_fused_relu_0": "triton",
        "_crop_kernel": "triton",
        "sm90_xmma_fprop_implicit_gemm_bf16bf16_nhwc": "convolution",
        "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTN": "product",
        "void cutlass::Kernel2<cutlass_80_tensorop_s1688gemm_256x64>": "product",
        "Memcpy DtoD (Device -> Device)": "copy",
        "ncclDevKernel_AllReduce_Sum_f32_RING_LL": "collective",
        "void at::native::vectorized_elementwise_kernel": "other",
    }
    assert {name: module.kind_of(name) for name in kinds} == kinds

    class Event:
        def __init__(self, key: str, kind: Any, annotation: bool = False) -> None:
            self.key, self.device_type, self.is_user_annotation, self.count = key, kind, annotation, 4
            self.self_device_time_total, self.self_cpu_time_total = 2000.0, 3000.0

    from torch.autograd import DeviceType

    cuda, cpu = DeviceType.CUDA, DeviceType.CPU
    events = [Event("k", cuda), Event("training step", cuda, True), Event("aten::add", cpu)]
    assert list(module.recorded(events, module.torch.device("cuda"))) == [("k", 4, 2.0)]
    assert list(module.recorded(events, module.torch.device("cpu"))) == [("aten::add", 4, 3.0)]


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_step_in_a_group_of_one_process_is_recorded_after_its_first_ones(
    wrapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a recorder that runs the work, as on a GPU: the wrapper is built aside, and losses are those of the step."""
    module = importlib.import_module("benchmarks.training.ddp_rank")
    seen: list[str] = []

    class Running:
        def aside(self, work: Any) -> Any:
            seen.append("aside")
            return work()

        def record(self, work: Any) -> Any:
            seen.append("recorded")
            result = work()
            return lambda: seen.append("replayed"), result

    args = argparse.ArgumentParser()
    module.add_arguments(args)
    small = args.parse_args(["--width", "4", "--size", "8", "--batch", "16"])
    small.preset = "simsiam"
    monkeypatch.setattr(module, "recorder", lambda device, key: Running())
    assert module.join(module.torch.device("cpu"), str(tmp_path)) == "gloo"
    try:
        trainer = module.trainer_of("simsiam", small, False, False)
        batch = next(iter(trainer.loader))
        _, wanted = module.contestant(small, batch, False, False, False)
        _, found = module.contestant(small, batch, wrapped, False, True)
    finally:
        module.distributed.stop()
    assert seen == [*["aside"] * (1 + module.AHEAD), "recorded", *["replayed"] * module.COMPARED]
    assert (found == found[0]).all(), "what was recorded writes to the same place"
    assert found[0].item() == pytest.approx(wanted[0].item(), rel=1e-5)
