"""The analysis of a method: what they see, that they leave no trace, and what they refuse."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from fastrdm.analysis.branch_comparison import Interval
from fastrdm.analysis.spectral_analysis import (
    Branches,
    collect,
    compare,
    measure,
    ranks,
    summary_lines,
    untouched,
    verdict,
)
from fastrdm.kernels.batchnorm import ViewBatchNorm
from fastrdm.kernels.linalg.effective_rank import effective_rank
from fastrdm.kernels.spectral.spectral_filter import spectral_filter
from fastrdm.methods.dual_branch import DualBranch, MethodConfig
from fastrdm.monitoring.moments import unit_rows
from fastrdm.schema import Horizon

PROGRAMS = Path(__file__).parents[1] / "programs"
BATCH, WIDTH = 16, 6
SCORES = {"name": "prototypes", "count": 9}
METHODS: dict[str, dict[str, Any]] = {
    "simsiam": {},
    "byol": {"ema": {}, "alignment": {"name": "byol"}},
    "swav": {
        "online": [SCORES],
        "target": [SCORES, {"name": "sinkhorn", "queue": 2 * BATCH, "queue_start": "0st"}],
        "alignment": {"name": "cross_entropy"},
    },
    "dino": {
        "online": [SCORES],
        "target": [SCORES, "center_sharpen"],
        "ema": {},
        "alignment": {"name": "cross_entropy"},
    },
    "rdm": {"online": [], "target": [{"name": "filter", "power": -1.0}]},
}


class Encoder(nn.Sequential):
    """(N, 3, 4, 4) to (N, 8), with everything that could leave a trace: statistics and chance."""

    features = 8

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(48, 8), ViewBatchNorm(8), nn.ReLU(), nn.Dropout(0.1))


def built(name: str, width: int = WIDTH) -> DualBranch:
    head = {"layers": 2, "hidden": 64, "out": width, "last_norm": "plain"}
    config = TypeAdapter(MethodConfig).validate_python({"projector": head, **METHODS[name]})
    torch.manual_seed(0)
    method = DualBranch(config, Encoder(), Horizon(4, 20), batch_size=BATCH)
    method.set_step(5)
    return method


def batches(count: int, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randn(BATCH, 3, 4, 4, generator=generator) for _ in range(count)]
    return [tuple(x + 0.3 * torch.randn(x.shape, generator=generator) for _ in range(2)) for x in images]  # type: ignore[misc]


@pytest.mark.parametrize("name", METHODS)
def test_nothing_of_the_method_or_of_chance_is_changed(name: str) -> None:
    method = built(name)
    method.eval()
    method.online.projector.train()
    modes = [module.training for module in method.modules()]
    buffers = {key: buffer.clone() for key, buffer in method.named_buffers()}
    weights = {key: x.clone() for key, x in method.state_dict().items()}
    random = torch.get_rng_state()
    collect(method, batches(3), batch_size=BATCH)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in method.modules()] == modes
    for key, buffer in method.named_buffers():
        assert torch.equal(buffer, buffers[key]), key
    for key, x in method.state_dict().items():
        assert torch.equal(x, weights[key]), key
    assert all(p.grad is None for p in method.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_the_test_above_can_fail(name: str) -> None:
    """The same forward passes without the guard move the buffers."""
    method = built(name)
    before = {key: buffer.clone() for key, buffer in method.named_buffers()}
    with torch.no_grad():
        method(batches(1)[0])
    moved = {key for key, buffer in method.named_buffers() if not torch.equal(buffer, before[key])}
    assert any("running_mean" in key for key in moved)
    assert any("queue" in key for key in moved) == (name == "swav")
    assert any("center" in key for key in moved) == (name == "dino")


def test_an_error_inside_leaves_no_trace_either() -> None:
    method = built("simsiam")
    before = {key: x.clone() for key, x in method.state_dict().items()}
    with pytest.raises(RuntimeError, match="stop"), untouched(method), torch.no_grad():
        method(batches(1)[0])
        raise RuntimeError("stop")
    assert all(torch.equal(x, before[key]) for key, x in method.state_dict().items())


def test_rows_are_those_of_training_steps_one_after_the_other() -> None:
    """Statistics and filter of each batch, the queue moving on between them."""
    for name in METHODS:
        method, data = built(name), batches(4)
        method.online.encoder[4] = nn.Identity()  # without chance
        found = collect(method, data, batch_size=BATCH)
        with torch.no_grad():
            outputs = [method(views) for views in data]
        assert torch.equal(found["outputs"].online, torch.cat([o.online for o in outputs], dim=1))
        assert torch.equal(found["outputs"].target, torch.cat([o.target for o in outputs], dim=1))
        assert ("scores" in found) == (outputs[0].scores is not None)
        if "scores" in found:
            assert torch.equal(found["scores"].target, torch.cat([o.scores[1] for o in outputs], dim=1))
            assert found["scores"].dimension == WIDTH  # nine scores of six features
            assert found["outputs"].dimension == 9


def test_a_filter_is_applied_batch_by_batch_and_the_rows_are_then_joined() -> None:
    """A whitened batch of fewer rows than columns is flat on its own span by construction, whatever the model."""
    x = collect(built("rdm", width=32), batches(20), batch_size=BATCH)["outputs"]
    centered = BATCH - 1  # by the last BatchNorm
    for rows in x.target.split(BATCH, dim=1):
        assert effective_rank(rows).tolist() == pytest.approx([centered] * 2, rel=1e-3)
    batchwise = [spectral_filter(rows, "power", -1.0, side="target") for rows in x.online.split(BATCH, dim=1)]
    joined = effective_rank(torch.cat(batchwise, dim=1))
    assert effective_rank(x.target).tolist() == pytest.approx(joined.tolist(), rel=1e-4)
    assert ((joined > centered + 1) & (joined < 32 - 1)).all(), joined


def test_images_are_counted_and_cut() -> None:
    found = collect(built("simsiam"), iter(batches(9)), batch_size=BATCH, images=40)
    assert found["outputs"].online.shape == (2, 40, WIDTH)


def test_ranks_carry_their_convention() -> None:
    x = torch.randn(2, 50, 5, generator=torch.Generator().manual_seed(0)) + 0.5
    found = ranks(x)
    assert len(found) == 8
    for letter, convention in {"s": "singular_values", "l": "eigenvalues"}.items():
        for rows in ("raw", "unit"):
            for about in ("moment", "cov"):
                expected = effective_rank(x, convention=convention, normalize=rows == "unit", center=about == "cov")  # type: ignore[arg-type]
                assert found[f"erank_{letter}/{rows}/{about}"] == pytest.approx(float(expected.mean()), rel=1e-9)


def test_every_figure_and_curve_has_its_name() -> None:
    found = measure(built("swav"), batches(8), batch_size=BATCH, replicates=10)
    conventions = {f"erank_{a}/{b}/{c}" for a in "sl" for b in ("raw", "unit") for c in ("moment", "cov")}
    names = {f"{branch}/{c}" for branch in ("online", "target") for c in conventions}
    intervals = {
        f"{what}/erank_l/unit/{c}" for what in ("difference", "null/online", "null/target") for c in ("moment", "cov")
    }
    intervals |= {"filter/body", "filter/tail", "filter/null"}
    names |= {f"{name}{end}" for name in intervals for end in ("", "/low", "/high")}
    names |= {f"alignment/{k}" for k in ("value", "crossed", "ceiling", "chance", "published")}
    names |= {"images", "dimension", "bound", "biased", "filter/verdict", "filter/tilt", "filter/directions"}
    assert set(found.metrics) == names | {f"scores/{name}" for name in names}
    curves = {"spectrum/online", "spectrum/target", "filter/online", "filter/target", "filter/ratio", "filter/root"}
    assert set(found.curves) == curves | {f"scores/{name}" for name in curves}
    root, ratio = found.curves["filter/root"], found.curves["filter/ratio"]
    assert root == pytest.approx([r**0.5 for r in ratio])
    assert sum(found.curves["spectrum/online"]) == pytest.approx(1, abs=1e-6)


def test_a_figure_of_few_images_says_that_it_is_biased() -> None:
    x = torch.randn(2, 300, 40, generator=torch.Generator().manual_seed(0))
    few, images_needed = (compare(Branches(x[..., :d], x[..., :d], d), 10).metrics for d in (40, 20))
    assert few["biased"] == 1 and images_needed["biased"] == 0
    assert "biased: with so few images a white spectrum reads 37" in summary_lines(few)[0]
    assert "biased" not in summary_lines(images_needed)[0]


def test_too_few_images_are_refused() -> None:
    expected = r"analysis: images must be at least the 9 dimensions, and 10 times that .*, got 8"
    with pytest.raises(ValueError, match=expected):
        measure(built("swav"), batches(1), batch_size=BATCH, images=8)


def test_other_batches_than_those_of_training_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a batch must be the training step's 32 images, got 16"):
        collect(built("simsiam"), batches(1), batch_size=32)
    with pytest.raises(ValueError, match="at least one, got 0"):
        collect(built("simsiam"), [], batch_size=BATCH)


def test_a_verdict_needs_more_than_the_null_shows() -> None:
    clear = Interval(0.9, 0.8, 0.95)
    assert verdict(clear, Interval(-0.1, -0.3, 0.1)) == 1
    assert verdict(Interval(-0.9, -0.95, -0.8), Interval(-0.1, -0.3, 0.1)) == -1
    assert verdict(clear, Interval(-0.8, -0.92, -0.5)) == 0
    assert verdict(Interval(0.3, -0.1, 0.5), Interval(0.0, -0.1, 0.1)) == 0


def test_words_follow_the_metrics() -> None:
    generator = torch.Generator().manual_seed(0)
    decay = torch.arange(1, 13, dtype=torch.float64) ** -0.5
    x = torch.randn(2, 2000, 12, generator=generator, dtype=torch.float64) * decay
    lines = summary_lines(compare(Branches(x * decay, x, 12), 20).metrics)
    assert lines[0] == "2,000 images in 12 dimensions"
    assert "difference +" in lines[1]
    assert lines[2].startswith("filter of online against target: low-pass, Spearman +")
    assert lines[3].startswith("eigenspaces: alignment 0.9")
    unfiltered = summary_lines(compare(Branches(x, x, 12), 20).metrics)
    assert "no filter, Spearman +0.00 [+0.00, +0.00] over 12 directions" in unfiltered[2]
    assert unit_rows(x).dtype == torch.float64


def test_every_process_gets_the_figures_of_one(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(PROGRAMS / "measured.py"), str(tmp_path)], check=True, timeout=120)
    one, *two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    assert len(one) == 55
    for metrics in two:
        assert metrics == pytest.approx(one, rel=1e-8, abs=1e-10)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_reads_what_a_cpu_reads() -> None:
    """And leaves its random state alone."""
    method = built("rdm").double()
    method.online.encoder[4] = nn.Identity()  # chance differs between devices
    data = [tuple(x.double() for x in views) for views in batches(12)]
    expected = measure(method, data, batch_size=BATCH, replicates=10)
    random = torch.cuda.get_rng_state()
    found = measure(method.cuda(), [tuple(x.cuda() for x in v) for v in data], batch_size=BATCH, replicates=10)
    assert torch.equal(torch.cuda.get_rng_state(), random)
    assert found.metrics == pytest.approx(expected.metrics, rel=1e-6, abs=1e-8)
