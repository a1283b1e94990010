"""The loop: precisions, accumulation, compilation, what must not touch the weights, and the command as printed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastrdm import trainer
from fastrdm.config import run_config
from fastrdm.evaluation import sets
from fastrdm.monitoring.verdict import judge
from fastrdm.report.run_files import read_runs
from fastrdm.runtime import checkpoint
from fastrdm.trainer import Trainer

SMALL = [
    "quickstart.yaml",
    "train.length=4st",
    "optim.warmup=1st",
    "encoder.width=4",
    "method.projector.hidden=16",
    "method.projector.out=12",
    "loader.subset=80",
    "loader.batch_size=16",
    "loader.views.*.size=8",
    "evaluate.baselines=false",
]


def make(tmp_path: Path, *arguments: str) -> Trainer:
    return Trainer(run_config.load([*SMALL, f"run={tmp_path / 'run'}", *arguments]))


def weights(t: Trainer, part: str = "method.") -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in t.learner.state_dict().items() if name.startswith(part)}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp64"])
@pytest.mark.parametrize("preset", ["simsiam", "rdm_byol_log1p", "dino"])
def test_every_precision_trains(tmp_path: Path, preset: str, precision: str) -> None:
    t = make(tmp_path, f"preset={preset}", f"train.precision={precision}", "optim.warmup=0st", "train.length=16st")
    before = weights(t)  # 16 steps: the scaler of fp16 skips some before it finds its scale
    assert t.train()
    assert torch.isfinite(torch.tensor(t.metrics["loss"]))
    moved = [name for name, x in weights(t).items() if not torch.equal(x, before[name])]
    assert any("encoder.conv1" in name for name in moved)
    kind = torch.float64 if precision == "fp64" else torch.float32
    assert all(x.dtype == kind for x in weights(t).values() if x.is_floating_point()), "weights stay wide"


def test_evaluation_log_and_probe_leave_the_weights_alone(tmp_path: Path) -> None:
    runs = {
        "all": ["evaluate.every=1st", "evaluate.baselines=true", "log.every=1", "checkpoint.every=1st"],
        "none": ["evaluate.every=100st", "evaluate.probe=false", "log.every=100"],
    }
    ended = {}
    for name, arguments in runs.items():
        t = make(tmp_path / name, "preset=byol", *arguments)
        assert t.train()
        ended[name] = weights(t)
    assert same(*ended.values())


def test_accumulated_gradients_are_the_mean_over_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    t = make(tmp_path, "train.accumulate=2", "train.precision=fp64", "evaluate.probe=false")
    batch = next(iter(t.loader))
    start = {n: x.clone() for n, x in t.learner.state_dict().items()}
    expected = []
    for rows in (slice(0, 8), slice(8, 16)):
        t.learner.load_state_dict(start)
        loss, _ = t.learner(tuple(v[rows] for v in batch.views), batch.label[rows])
        expected.append(torch.autograd.grad(loss, [p for p in t.learner.parameters() if p.requires_grad]))
    t.learner.load_state_dict(start)
    seen: list[torch.Tensor] = []
    parameters = [p for p in t.learner.parameters() if p.requires_grad]
    t.optimizer.register_step_pre_hook(lambda *_: seen.extend(p.grad.clone() for p in parameters))
    t.train_step(batch)
    for grad, first, second in zip(seen, *expected, strict=True):
        torch.testing.assert_close(grad, (first + second) / 2, rtol=1e-10, atol=1e-12)


def test_clipping_bounds_the_methods_gradient_and_spares_the_probes(tmp_path: Path) -> None:
    norms: dict[str, list[float]] = {"method": [], "probe": []}
    t = make(tmp_path, "optim.clip_grad=0.001", "evaluate.probe_lr=0.1")

    def note(*_: Any) -> None:
        for part, module in (("method", t.method), ("probe", t.learner.probe)):
            assert module is not None
            grads = [p.grad for p in module.parameters() if p.grad is not None]
            norms[part].append(torch.cat([g.flatten() for g in grads]).norm().item())

    t.optimizer.register_step_pre_hook(note)
    assert t.train()
    assert all(n == pytest.approx(0.001, rel=1e-3) for n in norms["method"])
    assert min(norms["probe"]) > 0.01


def test_rates_follow_the_schedule_and_the_predictor_keeps_its_own(tmp_path: Path) -> None:
    t = make(tmp_path, "train.length=10st", "optim.warmup=2st", "optim.lr=1.0", "optim.warmup_lr=0.0")
    rates: dict[str, list[float]] = {group["name"]: [] for group in t.optimizer.param_groups}

    def note(*_: Any) -> None:
        for group in t.optimizer.param_groups:
            rates[group["name"]].append(group["lr"].item())

    t.optimizer.register_step_pre_hook(note)
    assert t.train()
    peak = 16 / 256
    assert rates["predictor"] == pytest.approx([peak] * 10)
    assert rates["network"][0] == 0 and rates["network"][2] == pytest.approx(peak)
    falling = rates["network"][2:]
    assert falling == sorted(falling, reverse=True) and 0 < falling[-1] < 0.1 * peak
    assert rates["probe"][2] == pytest.approx(0.1 * peak)


def test_compiled_and_eager_runs_agree(tmp_path: Path) -> None:
    ended = {}
    for switch in ("false", "true"):
        t = make(tmp_path / switch, "preset=rdm_byol_log1p", f"train.compile={switch}", "train.length=3st")
        assert t.train()
        ended[switch] = weights(t)
    for name, x in ended["false"].items():
        torch.testing.assert_close(ended["true"][name], x, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_a_run_can_be_longer_than_whole_epochs_and_ends_where_it_says(tmp_path: Path) -> None:
    t = make(tmp_path, "train.length=7st")
    assert t.horizon.steps_per_epoch == 5
    assert t.train() and t.step == 7
    assert checkpoint.existing(tmp_path / "run")[0].name == "step-00000007"


def test_unlabeled_images_train_without_a_probe_or_knn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sets.open_whole

    def unlabeled(*arguments: Any) -> Any:
        source = whole(*arguments)
        source.labels = source.labels * 0 - 1
        return source

    monkeypatch.setattr(sets, "open_whole", unlabeled)
    t = make(tmp_path, "evaluate.baselines=true", "loader.subset=null")
    assert t.learner.probe is None
    assert t.train()
    assert "knn" not in t.metrics and "loss" in t.metrics


def test_torchrun_with_two_processes_trains_and_prints_one_summary(tmp_path: Path) -> None:
    script = Path(trainer.__file__).with_name("train.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]  # a free port
    command += [str(script), *SMALL, f"run={tmp_path / 'run'}"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("finished 4 steps") == 1
    assert "on 2 x cpu" in done.stdout


def test_the_verdict_stands_in_the_live_line_the_summary_and_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    t = make(tmp_path, "log.every=1", "evaluate.baselines=true", "evaluate.every=2st")
    assert t.train()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    expected = judge(lines, 16)
    assert expected.state != "not judged"
    assert all(line["knn_images"] == len(t.test) for line in lines if "knn" in line)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["verdict"], summary["verdict_reason"]) == (expected.state, expected.reason)
    assert t.judge.verdict() == expected
    (run,) = read_runs([tmp_path / "run"])
    assert run.verdict() == expected
    live = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    shown = [
        f"  rank online {line['online/erank_l/unit/cov/batch']:.1f} target {line['target/erank_l/unit/cov/batch']:.1f}"
        f"  deviation {line['target/std/batch']:.2f}  k-NN "
        for line in lines
        if "loss" in line
    ]
    assert len(shown) == 4 and len(live) == 2, "not on a terminal: the first line, and the last"
    assert shown[0] in live[0] and shown[-1] in live[-1]
    assert live[0].endswith("  not judged"), "one line does not decide"


def test_a_run_that_goes_on_is_judged_by_all_its_lines(tmp_path: Path) -> None:
    small = ["log.every=1", "evaluate.baselines=true", "evaluate.every=1st", "checkpoint.every=2st"]
    t = make(tmp_path / "whole", *small)
    assert t.train()
    first = make(tmp_path / "cut", *small)
    first.stop.ask()
    assert not first.train()
    second = make(tmp_path / "cut", *small)
    assert second.train()
    assert second.judge.verdict() == t.judge.verdict()
    assert second.judge.levels == t.judge.levels is not None
    assert second.judge.accuracies == t.judge.accuracies
