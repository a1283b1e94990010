"""The monitor: what a window says of known rows, what it never touches, processes, resume, bad input."""

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrdm import cli
from fastrdm.config import run_config
from fastrdm.kernels.linalg.effective_rank import effective_rank
from fastrdm.methods.dual_branch import Output
from fastrdm.monitoring import monitor
from fastrdm.monitoring.monitor import HEADLINE_CONVENTION, MonitorConfig, RankMonitor, tap_widths, taps
from fastrdm.monitoring.window import WindowReport
from fastrdm.trainer import Trainer

SMALL = [
    "quickstart.yaml",
    "train.length=8st",
    "optim.warmup=1st",
    "encoder.width=4",
    "method.projector.hidden=16",
    "method.projector.out=12",
    "loader.subset=80",
    "loader.batch_size=16",
    "loader.views.*.size=8",
    "evaluate.baselines=false",
    "log.every=4",
    "log.report=false",
    "monitor.rows=64",
    "monitor.every=1st",
]
SCORES = "{name: prototypes, count: 20}"


def make(tmp_path: Path, *arguments: str) -> Trainer:
    return Trainer(run_config.load([*SMALL, f"run={tmp_path / 'run'}", *arguments]))


def lines(run: Path, name: str = "metrics") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def output(images: int = 16, seed: int = 0, **widths: int) -> Output:
    """Random rows; the online branch is the target with its first direction amplified."""
    target = draw(2, images, widths.get("target", 12), seed=seed)
    online = target * torch.cat([torch.tensor([4.0]), torch.ones(target.shape[-1] - 1)])
    hidden, features = (draw(2, images, widths.get(n, 12), seed=seed + i) for i, n in ((1, "hidden"), (2, "features")))
    return Output(torch.zeros(()), online, target, None, features, hidden, {})


def watch(tmp_path: Path, *arguments: str) -> RankMonitor:
    return make(tmp_path, "encoder.width=1", "method.projector.hidden=12", *arguments).monitor


def fill(watcher: RankMonitor, steps: int, start: int = 1, **widths: int) -> None:
    for step in range(start, start + steps):
        watcher.push(output(seed=10 * step, **widths), step)


def poll(watcher: RankMonitor) -> WindowReport:
    reading = watcher.poll()
    assert reading is not None
    return reading


@pytest.mark.parametrize("arguments", [(), ("preset=byol",), ("preset=dino", f"method.online=[{SCORES}]",
    f"method.target=[{SCORES}, center_sharpen]")])  # fmt: skip
def test_widths_are_those_of_the_outputs(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    t = make(tmp_path, *arguments)
    batch = next(iter(t.loader))
    assert tap_widths(t.method) == {name: x.shape[-1] for name, x in taps(t.method(batch.views)).items()}


def test_a_window_says_what_all_its_rows_say(tmp_path: Path) -> None:
    watcher = watch(tmp_path, "monitor.rows=128", "monitor.conventions=[erank_l/unit/moment, erank_l/unit/cov, "
                    "erank_s/raw/moment, erank_s/unit/cov]")  # fmt: skip
    widths = watcher.shape.widths
    fill(watcher, 3, **widths)
    assert watcher.poll() is None, "it is not full"
    fill(watcher, 1, start=4, **widths)
    reading = poll(watcher)
    assert watcher.poll() is None, "a reading is handed out once"
    outputs = [output(seed=10 * step, **widths) for step in range(1, 5)]
    for tap in widths:
        rows = torch.cat([taps(o)[tap].flatten(0, 1) for o in outputs])
        for convention in watcher.shape.conventions:
            kind, scale, about = convention.split("/")
            expected = effective_rank(
                rows,
                convention="eigenvalues" if kind == "erank_l" else "singular_values",
                normalize=scale == "unit",
                center=about == "cov",
            )
            assert reading.metrics[f"{tap}/{convention}/window"] == pytest.approx(expected.item()), (tap, convention)
        unit = rows / rows.norm(dim=1, keepdim=True)
        deviation = unit.std(0, correction=0).mean() * rows.shape[1] ** 0.5
        assert reading.metrics[f"{tap}/std/window"] == pytest.approx(deviation.item())
        shares = torch.linalg.svdvals(unit) ** 2 / len(rows)
        assert reading.metrics[f"{tap}/participation_ratio/window"] == pytest.approx(1 / (shares**2).sum().item())
        assert reading.metrics[f"{tap}/stable_rank/window"] == pytest.approx(1 / shares[0].item())
        (spectrum,) = (line for line in reading.spectra if line["tap"] == tap)
        assert spectrum["rows"] == 128
        assert spectrum["eigenvalues"] == pytest.approx(shares.tolist())
    features = torch.cat([o.features.flatten(0, 1) for o in outputs])
    assert reading.metrics["rankme"] == pytest.approx(effective_rank(features, convention="singular_values").item())
    assert reading.metrics["lidar"] > 1


def test_the_amplified_branch_has_the_lower_rank_and_the_null_none(tmp_path: Path) -> None:
    watcher = watch(tmp_path, "monitor.rows=1280")
    fill(watcher, 40, **watcher.shape.widths)
    metrics = poll(watcher).metrics
    for convention in ("erank_l/unit/moment", "erank_l/unit/cov"):
        online, target = (metrics[f"{branch}/{convention}/window"] for branch in ("online", "target"))
        key = f"difference/{convention}/window"
        assert metrics[key] == pytest.approx(target - online)
        assert 0 < metrics[f"{key}/low"] < metrics[key] < metrics[f"{key}/high"]
        key = f"null/{convention}/window"
        assert metrics[f"{key}/low"] < 0 < metrics[f"{key}/high"]
    assert metrics["filter/negative_share/window"] == 0


def test_taps_wider_than_asked_are_sampled_and_say_so(tmp_path: Path) -> None:
    watcher = watch(tmp_path, "monitor.max_width=12", "method.projector.out=30", "monitor.rows=64")
    assert watcher.shape.wide("online") and not watcher.shape.wide("features")
    assert any("online, target, hidden above monitor.max_width=12" in line for line in watcher.describe())
    fill(watcher, 2, **watcher.shape.widths)
    reading = poll(watcher)
    rows = output(seed=10, **watcher.shape.widths).target.flatten(0, 1)[:12]
    expected = effective_rank(rows, normalize=True).item()
    assert reading.metrics["target/erank_l/unit/moment/sample"] == pytest.approx(expected)
    assert not [key for key in reading.metrics if key.startswith(("target/", "difference/")) and "/window" in key]
    assert {line["tap"]: line["rows"] for line in reading.spectra}["target"] == 12


def test_windows_open_where_they_should_and_can_be_switched_off(tmp_path: Path) -> None:
    watcher = watch(tmp_path, "monitor.every=5st", "monitor.rows=64")
    opened = []
    for step in range(1, 13):
        watcher.push(output(seed=step, **watcher.shape.widths), step)
        opened += [step] if watcher.poll() else []
    assert opened == [2, 7, 12]
    off = watch(tmp_path / "off", "monitor.every=0st")
    fill(off, 5, **watcher.shape.widths)
    assert watch(tmp_path / "short", "monitor.every=0.5%").every == 1, "a share of a short run is not switched off"
    assert off.window is None and off.describe() == ["monitor: metrics of batches only"]


def test_where_moments_are_large_a_window_takes_a_share_of_more_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "GROUPED_WIDTH", 8)
    watcher = watch(tmp_path, "monitor.rows=64", "monitor.every=8st", "monitor.groups=4")
    fill(watcher, 7, **watcher.shape.widths)
    assert watcher.poll() is None
    fill(watcher, 1, start=8, **watcher.shape.widths)
    reading = poll(watcher)
    outputs = [output(seed=10 * step, **watcher.shape.widths) for step in range(1, 9)]
    for tap in watcher.shape.widths:
        rows = torch.cat([taps(o)[tap][:, ::4].flatten(0, 1) for o in outputs])
        expected = effective_rank(rows, normalize=True).item()
        assert reading.metrics[f"{tap}/erank_l/unit/moment/window"] == pytest.approx(expected)
    low, high = (reading.metrics[f"null/erank_l/unit/moment/window/{end}"] for end in ("low", "high"))
    assert low < 0 < high, "groups of batches give an interval as before"
    spreads = {
        "monitor.every=5st": 2,  # a window has ended when the next begins
        "monitor.every=1st": 1,
        "monitor.groups=8": 2,  # of 16 images
        "monitor.groups=0": 4,
        "train.length=4st": 2,
    }
    base = ("monitor.rows=64", "monitor.every=8st", "monitor.groups=4")
    found = {more: watch(tmp_path / more, *base, more).shape.spread for more in spreads}
    assert found == spreads


def test_figures_of_a_batch_are_means_over_views(tmp_path: Path) -> None:
    watcher = watch(tmp_path)
    out = output()
    metrics = watcher.batch(out)
    expected = [effective_rank(view, normalize=True).item() for view in out.target]
    assert metrics[f"target/{HEADLINE_CONVENTION}/batch"] == pytest.approx(sum(expected) / 2)
    assert metrics["target/std/batch"] == pytest.approx(1, abs=0.1), "white rows are healthy"
    constant = out._replace(target=torch.ones(2, 16, 12))
    assert watcher.batch(constant)["target/std/batch"] == pytest.approx(0, abs=1e-6)


def test_a_log_line_takes_one_batched_eigensolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    solve = torch.linalg.eigvalsh

    def counted(x: torch.Tensor, **how: str) -> torch.Tensor:
        calls.append(len(x))
        return solve(x, **how)

    monkeypatch.setattr(torch.linalg, "eigvalsh", counted)
    # Sixteen rows of at least so many dimensions: every Gram matrix is (16, 16).
    metrics = watch(tmp_path).batch(output(target=20, hidden=32, features=24))
    assert calls == [16], "two views, two conventions and four taps"
    assert sum("erank" in name for name in metrics) == 8


def test_half_taps_of_a_training_step_go_to_the_kernels_of_half_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks of a log line on CUDA, here through Triton's interpreter, of a method trained in bfloat16."""
    pytest.importorskip("triton")
    from fastrdm.kernels.linalg import half_gram_triton

    trainer = make(tmp_path, "train.precision=bf16", "method.projector.out=20")
    out = trainer.method(next(iter(trainer.loader)).views)
    want = trainer.monitor.batch(out)
    calls: list[list[Tensor]] = []
    half_grams, unit_grams = half_gram_triton.half_grams, monitor.unit_grams

    def recorded(inputs: list[Tensor], *arguments: Any) -> list[list[Tensor]]:
        calls.append(inputs)
        return half_grams(inputs, *arguments)

    def on_cuda(*arguments: Any) -> list[list[Tensor]]:
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "is_cuda", True)
            return unit_grams(*arguments)

    monkeypatch.setattr(half_gram_triton, "half_grams", recorded)
    monkeypatch.setattr(monitor, "unit_grams", on_cuda)
    assert trainer.monitor.batch(out) == pytest.approx(want, rel=1e-5)
    (given,) = calls
    for x, name in zip(given, ("hidden", "features"), strict=True):
        assert x.dtype == torch.bfloat16 and torch.equal(x, taps(out)[name])


def test_rows_that_are_not_finite_give_no_figures_and_no_error(tmp_path: Path) -> None:
    watcher = watch(tmp_path)
    for step in (1, 2):
        out = output(**watcher.shape.widths)
        watcher.push(out._replace(hidden=out.hidden * torch.nan), step)
    assert poll(watcher).metrics == {}


def test_rows_that_are_all_zero_have_rank_0(tmp_path: Path) -> None:
    watcher = watch(tmp_path)
    for step in (1, 2):
        out = output(**watcher.shape.widths)
        watcher.push(Output(*(x * 0 if isinstance(x, Tensor) else x for x in out)), step)
    reading = poll(watcher)
    assert {value for key, value in reading.metrics.items() if "erank" in key or key in ("rankme", "lidar")} == {0.0}
    assert all(torch.tensor(value).isfinite() for value in reading.metrics.values())
    assert set(reading.spectra[0]["eigenvalues"]) == {0.0}


def test_too_few_rows_for_a_spectrum_are_refused_with_the_bound(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"monitor.rows must be at least 16, .*widest tap.*, got 15"):
        make(tmp_path, "monitor.rows=15")
    with pytest.raises(ValueError, match=r"monitor.groups must be 0 .no interval. or 4 to 32, got 3"):
        run_config.load(["monitor.groups=3"])
    with pytest.raises(ValueError, match=r"monitor.conventions must be a list with erank_l/unit/moment"):
        run_config.load(["monitor.conventions=[erank_s/raw/moment]"])


def test_a_run_too_short_for_a_window_is_told(tmp_path: Path) -> None:
    told = make(tmp_path, "monitor.rows=1000").monitor.describe()
    assert "note: the run has 256 rows, no window fills; ranks of batches are at most 16" in told


def test_the_monitor_leaves_the_weights_alone(tmp_path: Path) -> None:
    ended = []
    for i, arguments in enumerate((["monitor.every=1st", "log.every=1"], ["monitor.every=0st", "log.every=100"])):
        t = make(tmp_path / str(i), *arguments)
        assert t.train()
        ended.append({name: x.clone() for name, x in t.learner.state_dict().items() if name.startswith("method.")})
    assert ended[0].keys() == ended[1].keys()
    assert all(torch.equal(x, ended[1][name]) for name, x in ended[0].items())


def test_a_half_filled_window_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    first, second = (watch(tmp_path / name, "monitor.rows=128") for name in "ab")
    fill(first, 2, **first.shape.widths)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for watcher in (first, second):
        fill(watcher, 2, start=3, **first.shape.widths)
    expected = poll(first)
    assert poll(second) == expected
    fill(first, 4, start=5, **first.shape.widths)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    other = watch(tmp_path / "c", "monitor.rows=96")
    other.load_state_dict(first.state_dict())
    assert other.window is None, "a window of another shape is dropped"
    assert poll(other).step == 8, "a reading not handed out yet is not"


def test_two_processes_read_what_one_reads(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "programs" / "windows.py"
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, timeout=300)
    one, two = (
        [line for line in lines(tmp_path / world) if any(key.endswith("/window") for key in line)] for world in "12"
    )
    assert len(one) == 2
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        keys = [key for key in a if "/" in key or key in ("rankme", "lidar", "loss")]
        assert len(keys) > 50
        for key in keys:
            assert b[key] == pytest.approx(a[key], rel=1e-6, abs=1e-8), key


def test_what_is_logged_and_drawn(tmp_path: Path) -> None:
    assert make(tmp_path, "monitor.rows=128").train()
    metrics = next(line for line in lines(tmp_path / "run") if "loss" in line)
    for key in ("difference/erank_l/unit/moment/window/low", "null/erank_l/unit/cov/window", "features/slope/window",
                "hidden/std/batch", "rankme", "lidar", "monitor_seconds", "monitor_share"):  # fmt: skip
        assert isinstance(metrics[key], float), key
    spectra = lines(tmp_path / "run", "spectra")
    assert [(line["step"], line["tap"]) for line in spectra] == [
        (step, tap) for step in (4, 8) for tap in ("online", "target", "hidden", "features")
    ]
    assert spectra[0]["convention"] == "unit/moment" and spectra[0]["epoch"] == 0.8


@pytest.mark.parametrize(("action", "code", "saved"), [("warn", 0, 8), ("stop", 3, 2), ("checkpoint_and_stop", 3, 4)])
def test_an_alarm_does_what_it_is_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], action: str, code: int, saved: int
) -> None:
    arguments = ["monitor.alarms.dimensional_rank=1000", "monitor.alarms.dimensional_patience=0st"]
    arguments += [f"monitor.alarms.action={action}", "checkpoint.every=2st", "log.every=3", f"run={tmp_path / 'run'}"]
    if action == "checkpoint_and_stop":
        arguments.append("log.every=4")
    assert cli.train([*SMALL, *arguments]) == code
    told = capfd.readouterr().out
    assert "alarm: dimensional collapse at target" in told
    assert ("stopped by an alarm" in told) == (code == cli.EXIT_ALARM)
    events = lines(tmp_path / "run", "alarms")
    assert {event["tap"] for event in events} == {"target", "hidden", "features"}
    advice = {"cause", "remedy", "page"}
    assert events[0].keys() == {"step", "epoch", "alarm", "tap", "value", "threshold", "action", "text"} | advice
    assert "See docs/collapse.md#dimensional-collapse." in told
    assert max(int(p.name[-8:]) for p in (tmp_path / "run" / "checkpoints").iterdir()) == saved


def test_a_loss_that_is_not_finite_is_an_alarm_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer.train_step

    def train_step(self: Trainer, batch: Any) -> Output:
        out = step(self, batch)
        return out._replace(loss=out.loss * torch.nan) if self.step == 5 else out

    monkeypatch.setattr(Trainer, "train_step", train_step)
    assert cli.train([*SMALL, f"run={tmp_path / 'run'}"]) == cli.EXIT_FAILED
    (event,) = lines(tmp_path / "run", "alarms")
    assert (event["alarm"], event["step"], event["value"]) == ("non_finite_loss", 6, None)
    assert "steps 5 to 6" in event["text"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("out", [12, 1100])
def test_pushing_and_polling_do_not_wait_for_the_device(
    tmp_path: Path, out: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings, begin = [], threading.Event()
    read = monitor._read_on_cuda

    def read_later(*arguments: Any) -> WindowReport:
        begin.wait()  # the reader may wait for its stream, but torch refuses that to all threads at once
        return read(*arguments)

    monkeypatch.setattr(monitor, "_read_on_cuda", read_later)
    for device in ("cpu", "cuda"):
        arguments = (f"train.device={device}", f"method.projector.out={out}", "monitor.rows=1120")
        watcher = watch(tmp_path / device, *arguments)
        rows = [output(seed=step, **watcher.shape.widths) for step in range(1, 36)]
        rows = [Output(*(x.to(device) if isinstance(x, Tensor) else x for x in o)) for o in rows]
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if device == "cuda" else "default")
        for step, o in enumerate(rows, start=1):
            watcher.push(o, step)
            watcher.poll() if device == "cuda" and step < 35 else None
        torch.cuda.set_sync_debug_mode("default")
        begin.set()
        watcher.finish()
        readings.append(poll(watcher).metrics)
        watcher.close()
    assert readings[1] == pytest.approx(readings[0], rel=1e-6, abs=1e-9)


def test_the_memory_that_is_told_is_the_windows(tmp_path: Path) -> None:
    watcher = watch(tmp_path, "monitor.rows=1000")
    fill(watcher, 1, **watcher.shape.widths)
    assert watcher.window is not None
    held = sum(x.nbytes for m in watcher.window.moments.values() for x in (m.first, *m.panels))
    assert monitor.bytes_of(watcher.shape, torch.device("cpu"), output().online.element_size()) == held
    wide = watcher.shape._replace(widths=dict(online=2048, target=2048, hidden=2048, features=512))
    assert monitor.bytes_of(wide, torch.device("cpu")) < 100 * 2**20
    assert MonitorConfig().every == "5%"
