"""Settings reach the place that they are for: each of these once did not in a test of mutation, and nothing was red."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastrdm.config import run_config
from fastrdm.evaluation import evaluator, finetune
from fastrdm.evaluation.evaluator import Evaluator
from fastrdm.evaluation.settings import KnnConfig
from fastrdm.kernels.augment.layout import COLUMNS, Column
from fastrdm.kernels.batchnorm import ViewBatchNorm
from fastrdm.kernels.linalg.effective_rank import statistics
from fastrdm.kernels.spectral.spectral_filter import spectral_filter
from fastrdm.loaders.augment import reference
from fastrdm.loaders.spec import ViewSpec
from fastrdm.loaders.supervised import crop_and_flip
from fastrdm.methods import spectral_filter as filters
from fastrdm.methods.alignment import align
from fastrdm.methods.dual_branch import DualBranch, MethodConfig
from fastrdm.methods.losses import CrossEntropyConfig, cross_entropy
from fastrdm.methods.sinkhorn import Sinkhorn, SinkhornConfig, sinkhorn_knopp
from fastrdm.methods.spectral_filter import FilterConfig, SpectralFilter
from fastrdm.methods.transform import BranchContext, TransformContext
from fastrdm.models.encoders import EncoderConfig, build_encoder
from fastrdm.monitoring.monitor import MonitorConfig, RankMonitor
from fastrdm.monitoring.rank_statistics import half_width
from fastrdm.optim.optimizers import OptimConfig, Role, build_optimizer, parameter_groups
from fastrdm.runtime.distributed import Processes
from fastrdm.schema import Horizon
from fastrdm.trainer import Trainer

HORIZON = Horizon(10, 10)
CPU = torch.device("cpu")


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def context(side: Any = "online") -> TransformContext:
    return TransformContext(side, 6, 6, 8, True, HORIZON)


@pytest.mark.parametrize("temperature", [0.1, 0.7])
def test_alignment_temperature(temperature: float) -> None:
    online, target = rand(2, 8, 5), torch.softmax(rand(2, 8, 5, seed=1), -1)
    config = CrossEntropyConfig(temperature=temperature)
    logs = torch.log_softmax(online / temperature, -1)
    expected = -((target[1] * logs[0]).sum(-1).mean() + (target[0] * logs[1]).sum(-1).mean()) / 2
    torch.testing.assert_close(align(online, target, cross_entropy, config), expected)


@pytest.mark.parametrize(("epsilon", "iterations"), [(0.05, 3), (0.2, 3), (0.05, 7)])
def test_sinkhorn_epsilon_and_iterations(epsilon: float, iterations: int) -> None:
    layer = Sinkhorn(SinkhornConfig(epsilon=epsilon, iterations=iterations), context("target"))
    layer.set_step(0)
    x = torch.nn.functional.normalize(rand(2, 8, 6), dim=-1)
    branch = BranchContext(None, None)
    expected = sinkhorn_knopp(x, epsilon, iterations)
    torch.testing.assert_close(layer(x, branch), expected)


def test_filter_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = SpectralFilter(FilterConfig(power=-0.5, solver="gram_power"), context("target"))
    with pytest.raises(ValueError, match="gram_power"):
        layer(rand(2, 8, 6), BranchContext(None, None))


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_rows_of_a_spectral_filter_are_those_of_its_process(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The solver of matrix products takes a process's rows out of all rows, by number."""
    whole = rand(2, 24, 32).float()
    own = whole[:, 8 * rank : 8 * rank + 8]
    monkeypatch.setattr(filters, "gather_rows", lambda x, dim: whole)
    monkeypatch.setattr(filters, "process_rank", lambda: rank)
    layer = SpectralFilter(FilterConfig(power=-0.5, solver="newton_schulz"), context("target"))
    expected = spectral_filter(whole.double(), "power", -0.5)[:, 8 * rank : 8 * rank + 8]
    torch.testing.assert_close(layer(own, BranchContext(None, None)).double(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("sync", [True, False])
def test_sync_bn_of_projector_and_predictor(sync: bool) -> None:
    config = MethodConfig(online=({"name": "predictor"},))  # type: ignore[arg-type]
    encoder = build_encoder(EncoderConfig(name="resnet_small", width=4, sync_bn=sync))
    method = DualBranch(config, encoder, HORIZON, batch_size=8, sync_bn=sync)
    parts = {"projector": method.online.projector, "predictor": method.online_transforms, "encoder": encoder}
    for name, part in parts.items():
        norms = [module.sync for module in part.modules() if isinstance(module, ViewBatchNorm)]
        assert norms and set(norms) == {sync}, name


def test_knn_temperature_of_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(evaluator, "knn_hits", lambda bank, query, k, temperature, tops: asked.append((k, temperature)))
    monkeypatch.setattr(Evaluator, "features", (None, None))
    monkeypatch.setattr(Evaluator, "_accuracy", lambda *_: {})
    measures = Evaluator.__new__(Evaluator)
    measures.tops = (1,)
    monkeypatch.setattr(evaluator, "knn_hits", lambda *a: (asked.append(a[2:4]), ([0], 1))[1])
    measures.knn(KnnConfig(k=9, temperature=0.3))
    assert asked == [(9, 0.3)]


def test_betas_of_lamb_and_adam() -> None:
    for name in ("lamb", "adamw"):
        config = OptimConfig(name=name, betas=(0.7, 0.8))  # type: ignore[arg-type]
        layer = nn.Linear(3, 2)
        groups = parameter_groups([Role("network", list(layer.named_parameters()))], config)
        optimizer = build_optimizer(groups, config, CPU)
        assert all(tuple(group["betas"]) == (0.7, 0.8) for group in optimizer.param_groups), name


@pytest.mark.parametrize("threshold", [32, 128, 200])
def test_solarize_threshold_of_the_reference(threshold: int) -> None:
    spec = ViewSpec(
        size=8, jitter=0, grayscale=0, solarize=1, solarize_threshold=threshold, mean=(0,) * 3, std=(1,) * 3
    )
    levels = torch.arange(64, dtype=torch.float32).view(1, 1, 8, 8).expand(1, 3, 8, 8) * 4 / 255
    parameters = torch.zeros(1, COLUMNS)
    parameters[:, Column.SOLARIZE] = 1
    made = reference.color(levels.clone(), parameters, spec, torch.float32) * 255
    expected = torch.where(levels * 255 >= threshold, 255 - levels * 255, levels * 255)
    torch.testing.assert_close(made, expected, atol=0.02, rtol=0)


TINY = [
    "encoder.width=4",
    "method.projector.hidden=16",
    "method.projector.out=12",
    "loader.subset=80",
    "loader.views.*.size=8",
    "train.length=1ep",
    "optim.warmup=0st",
]


def test_the_rate_does_not_hang_on_accumulation() -> None:
    rates = []
    for parts in (1, 4):
        trainer = Trainer(run_config.load([*TINY, "loader.batch_size=16", f"train.accumulate={parts}"]))
        rates.append([float(group["base_lr"]) for group in trainer.optimizer.param_groups])
        trainer.watch.close()
    assert rates[0] == rates[1]
    base = run_config.load(TINY).optim.lr
    assert rates[0][0] == pytest.approx(base * 16 / 256)


def test_rates_of_fine_tuning_are_of_256_images(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, float] = {}

    def groups(roles: Any, config: Any, scale: float) -> Any:
        made["scale"] = scale
        raise InterruptedError

    monkeypatch.setattr(finetune, "parameter_groups", groups)
    encoder = build_encoder(EncoderConfig(name="resnet_small", width=4))
    with pytest.raises(InterruptedError):
        finetune.finetune(finetune.FinetuneConfig(), encoder, 3, None, 64, print)  # type: ignore[arg-type]
    assert made == {"scale": 0.25}


def test_the_interval_of_groups_is_students() -> None:
    effects, shares = torch.tensor([1.0, 3.0, 2.0, 6.0]).double(), torch.full((4,), 0.25).double()
    deviation = effects.std(correction=1).item()  # G - 1 in the denominator
    expected = 3.1824463 * deviation / math.sqrt(4)
    assert half_width(effects, shares) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("first", [1, 2, 4, 7])
def test_the_slope_begins_at_its_first_index(first: int) -> None:
    index = torch.arange(1, 33, dtype=torch.float64)
    values = index**-2.0
    values[: first - 1] *= 50  # before the first index anything may stand
    found = statistics(values, torch.tensor(True), slope_range=(first, 0.5)).slope.item()
    assert found == pytest.approx(2.0, abs=1e-9)
    inside = values.clone()
    inside[first - 1] *= 50
    assert statistics(inside, torch.tensor(True), slope_range=(first, 0.5)).slope.item() != pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize(("images", "expected"), [(7, 1), (8, 8), (64, 8)])
def test_without_an_image_for_each_group_there_are_no_groups(images: int, expected: int) -> None:
    encoder = build_encoder(EncoderConfig(name="resnet_small", width=4))
    method = DualBranch(MethodConfig(), encoder, HORIZON, batch_size=images)
    monitor = RankMonitor(MonitorConfig(groups=8), method, 2, images, Processes(0, 1, CPU))
    assert monitor.shape.groups == expected


def test_crop_and_flip_leaves_no_other_operation() -> None:
    """Every chance of the view is off, by name: an operation that is added later must be, too."""
    everything = ViewSpec(jitter=1, grayscale=1, blur=1, solarize=1, size=16)
    plain = crop_and_flip(everything, (0.3, 0.9), 0.25)
    chances = {"jitter", "grayscale", "blur", "solarize"}
    for field in dataclasses.fields(ViewSpec):
        value = getattr(plain, field.name)
        if field.name in chances:
            assert value == 0, field.name
        elif field.name not in ("scale", "ratio", "flip"):
            assert value == getattr(everything, field.name), field.name
    assert (plain.scale, plain.ratio, plain.flip) == ((0.3, 0.9), (3 / 4, 4 / 3), 0.25)
    assert np.isclose(plain.ratio[0] * plain.ratio[1], 1)
