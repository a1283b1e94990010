"""Plan: numbers counted by hand, steps as the trainer has them, and silence where nothing was measured."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastrdm.commands import plan
from fastrdm.commands.plan import data, horizon_of, phases, throughput
from fastrdm.config import run_config
from fastrdm.config.run_config import Config
from fastrdm.efficiency.step_cost import build, measure, small_step
from fastrdm.runtime import checkpoint
from fastrdm.trainer import Trainer

SMALL = [
    "quickstart.yaml",
    "encoder.width=4",
    "method.projector.hidden=16",
    "method.projector.out=16",
    "loader.batch_size=16",
    "train.precision=fp32",
    "train.compile=false",
    "train.capture=false",
]
HEAD = (16 * 16 + 2 * 16) + (16 * 16 + 2 * 16) + 16 * 16 + (16 * 4 + 2 * 4) + (4 * 16 + 16)  # projector, predictor


def load(*settings: str) -> Config:
    return run_config.load([*SMALL, *settings])


def footprint(settings: Config, images: int = 16, classes: int = 0) -> Any:
    return measure(settings, *build(settings, horizon_of(settings, 1437, 1), classes), images)


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert plan.main([*SMALL, *arguments]) == 0
    return capsys.readouterr().out


def encoder_count(width: int) -> int:
    """Parameters of resnet_small with a CIFAR stem: convolutions and their BatchNorms."""

    def block(i: int, o: int) -> int:
        short = i * o + 2 * o if i != o else 0
        return 9 * i * o + 9 * o * o + 4 * o + short

    return 27 * width + 2 * width + block(width, width) + block(width, 2 * width) + block(2 * width, 4 * width)


def test_parameters_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    settings = load("evaluate.probe=false")
    assert settings.encoder.name == "resnet_small"
    encoder = encoder_count(4)
    out = told(capsys, "evaluate.probe=false")
    assert f"parameters: {encoder:,} of the encoder, {encoder + HEAD:,} trained in all" in out
    f = footprint(settings)
    assert (f.weights, f.gradients, f.optimizer) == (4 * (encoder + HEAD),) * 3
    with_probe = footprint(load(), classes=10)
    assert with_probe.weights - f.weights == 4 * (16 * 10 + 10)


def test_resnet18_has_torchvisions_parameters() -> None:
    learner, _ = build(load("encoder={name: resnet18, stem: imagenet, width: null}"), horizon_of(load(), 1437, 1), 0)
    assert sum(p.numel() for p in learner.method.online.encoder.parameters()) == 11_689_512 - 513_000


@pytest.mark.parametrize(("optimizer", "states"), [("sgd", 1), ("lars", 1), ("adamw", 2)])
def test_optimizer_state(optimizer: str, states: int) -> None:
    f = footprint(load(f"optim.name={optimizer}"))
    steps = 4 * 60 if optimizer == "adamw" else 0  # a counter a parameter tensor
    assert 0 <= f.optimizer - states * f.gradients <= steps


def test_an_ema_target_is_weights_without_gradients() -> None:
    plain, ema = footprint(load("preset=rdm_simsiam")), footprint(load("preset=rdm_simsiam", "method.ema={}"))
    assert ema.target == plain.weights
    assert ema.weights == 2 * plain.weights
    assert ema.gradients == plain.gradients


def test_double_precision_doubles() -> None:
    one, two = footprint(load()), footprint(load("train.precision=fp64"))
    assert two.weights == 2 * one.weights
    assert two.activations == pytest.approx(2 * one.activations, rel=0.02)


@pytest.mark.parametrize("preset", ["simsiam", "byol", "rdm_simsiam", "swav", "dino"])
def test_activations_are_linear_enough(preset: str) -> None:
    settings = load(f"preset={preset}", "loader.batch_size=32")
    learner, optimizer = build(settings, horizon_of(settings, 1437, 1), 0)
    extrapolated = measure(settings, learner, optimizer, 32).activations
    assert extrapolated == pytest.approx(small_step(settings, learner, 32)[0], rel=0.05)


def test_arithmetic_by_hand() -> None:
    settings = load()
    learner, optimizer = build(settings, horizon_of(settings, 1437, 1), 0)
    forward: list[int] = []

    def count(module: nn.Module, inputs: tuple[torch.Tensor], out: torch.Tensor) -> None:
        assert isinstance(module, nn.Conv2d | nn.Linear)
        per_value = module.weight[0].numel()
        forward.append(2 * out[0].numel() * per_value)

    handles = [m.register_forward_hook(count) for m in learner.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    size = settings.loader.views[0].size
    learner.method([torch.randn(4, 3, size, size)] * 2)
    for handle in handles:
        handle.remove()
    by_hand = 2 * (3 * sum(forward) - forward[0])  # two views; the images themselves get no gradient
    assert measure(settings, learner, optimizer, 16).flops == pytest.approx(by_hand)


def test_steps_and_checkpoint_are_the_trainers(tmp_path: Path) -> None:
    settings = load(f"run={tmp_path / 'run'}", "train.length=3st", "optim.warmup=1st", "monitor.every=0st")
    trainer = Trainer(settings)
    assert horizon_of(settings, data(settings, None).images, 1) == trainer.horizon
    f = footprint(settings, classes=10)
    assert f.weights == sum(p.nbytes for p in trainer.learner.parameters())
    assert trainer.train()
    (path,) = checkpoint.existing(settings.run and Path(settings.run))
    weights = (path / checkpoint.WEIGHTS).stat().st_size
    assert f.state_dict <= weights <= f.state_dict + 20_000  # and the header with the names
    assert f.optimizer <= (path / checkpoint.STATE).stat().st_size <= f.optimizer + 60_000


def test_what_the_trainer_refuses_is_refused() -> None:
    with pytest.raises(ValueError, match=r"loader.batch_size must be a multiple of 3 processes .*, got 16"):
        horizon_of(load(), 1437, 3)
    with pytest.raises(ValueError, match="at most the 8 images of the set, got 16"):
        horizon_of(load(), 8, 1)
    with pytest.raises(ValueError, match=r"optim.warmup must be no longer than the run of 2 steps"):
        horizon_of(load("train.length=2st", "optim.warmup=5st"), 1437, 1)


def test_phases() -> None:
    settings = run_config.load(
        [
            *(*SMALL, "preset=swav", "train.length=10ep", "optim.warmup=10%", "loader.views.0.size=16"),
            "loader.views.0.progressive=[[3, 8], [6, 12]]",
            "method.online=[{name: prototypes, count: 8, freeze: 2ep}]",
            "method.target=[{name: prototypes, count: 8, freeze: 2ep}, {name: sinkhorn, queue: 64, queue_start: 4ep}]",
        ]
    )
    horizon = horizon_of(settings, 1600, 1)
    learner, _ = build(settings, horizon, 0)
    assert phases(settings, learner, horizon) == [
        (100, "learning rate: warm-up ends"),
        (200, "prototypes: begin to learn"),
        (300, "view 0: grows to 12 px"),
        (400, "sinkhorn: the queue joins in"),
        (600, "view 0: grows to 16 px"),
    ]


def test_temperature_is_a_phase(capsys: pytest.CaptureFixture[str]) -> None:
    out = told(capsys, "preset=dino", "train.length=60ep", "monitor.every=0st", "method.target.1.warmup=30ep")
    assert "step 2,670 (epoch 30): center_sharpen: temperature reaches 0.07" in out


def test_nothing_measured_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert "time: no measurement for this: give --bench, --from RUN, --table CSV or --images-per-second X" in told(
        capsys
    )


def test_hours_from_a_given_rate(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--images", "36000", "--images-per-second", "100", "train.length=10ep", "optim.warmup=1ep"]
    out = told(capsys, *given, "--gpus", "2")
    assert "images: 36,000 (as given" in out
    assert "run: 22,500 steps = 10 epochs of 2,250; 360,000 images are seen" in out
    assert "step: 16 images, 8 a process" in out
    assert "time: 1.0 hours at 100 images/s (as given)" in out


def record(folder: Path, rates: list[float], settings: Config) -> Path:
    folder.mkdir()
    lines = [{"step": i, "epoch": i, "images_per_second": rate} for i, rate in enumerate(rates)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text(run_config.to_yaml(settings))
    return folder


def test_rate_from_a_run(tmp_path: Path) -> None:
    run = record(tmp_path / "run", [5.0, 100.0, 300.0, 200.0], load("train.length=3ep", "train.seed=7"))
    speed = throughput(load(), None, str(run))
    assert speed is not None
    assert speed.rate == 200.0  # the first line, in which everything starts, does not count
    assert "median of run on an unknown device" in speed.origin
    assert "differs" not in speed.origin
    other = throughput(load("encoder.width=8"), None, str(run))
    assert other is not None
    assert "that run differs in encoder.width: 4 -> 8" in other.origin
    empty = record(tmp_path / "empty", [], load())
    with pytest.raises(ValueError, match="--from must be a run that logged images_per_second"):
        throughput(load(), None, str(empty))
    with pytest.raises(ValueError, match="RUN must be the folder of a run"):
        throughput(load(), None, str(tmp_path / "none"))


def test_the_row_of_a_benchmarks_table_with_this_step_is_taken(tmp_path: Path) -> None:
    table = tmp_path / "step.csv"
    head = "preset,encoder,width,stem,size,crops,views,batch,precision,compile,capture,processes,contestant,clock"
    head += ",images_per_second,device"
    row = "simsiam,resnet_small,4,cifar,16,,2,16,fp32,no,no,1,{},wall,{},a machine"
    table.write_text("\n".join([head, row.format("step", 640), row.format("ceiling", 900)]))
    found = throughput(load("preset=simsiam"), None, None, str(table))
    assert found is not None and found.rate == 640
    assert found.origin == "a step on a machine, wall clock, one process, loading not counted"
    with pytest.raises(ValueError, match=r"--table must be a table .* width 8"):
        throughput(load("preset=simsiam", "encoder.width=8"), None, None, str(table))
    with pytest.raises(ValueError, match="--table must be a file"):
        throughput(load(), None, None, str(tmp_path))


def test_a_set_that_is_not_here_needs_its_size(tmp_path: Path) -> None:
    settings = load("loader.source=cifar10", f"loader.root={tmp_path / 'none'}", "loader.download=true")
    with pytest.raises(ValueError, match=r"loader.root must be .*; or give --images N"):
        data(settings, None)
    assert data(settings, 50_000).images == 50_000
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("option", ["--gpus", "--images", "--images-per-second"])
def test_options_must_be_positive(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} must be above 0, got 0"):
        plan.main([*SMALL, option, "0"])
