"""Compiled steps against eager ones: the same numbers, one graph a phase, no graph breaks, one message on failure."""

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

from fastrdm.config import run_config
from fastrdm.kernels.triton_support import HAS_TRITON
from fastrdm.methods import dual_branch
from fastrdm.methods.alignment import align
from fastrdm.methods.presets import PRESETS
from fastrdm.methods.spectral_filter import SpectralFilter
from fastrdm.models.settings import ENCODERS, resnet_row
from fastrdm.schema import Horizon
from fastrdm.trainer import Trainer
from fastrdm.training.learner import build_method

pytestmark = pytest.mark.traced

STEPS, SETTLED = 20, 3  # steps of a run; from the third step of a phase on nothing may be compiled
SMALL = [
    "quickstart.yaml",
    *("encoder.name=resnet_small", "encoder.width=8", "method.projector.hidden=32", "method.projector.out=16"),
    *("loader.subset=160", "loader.batch_size=16", "loader.views.*.size=8", "optim.warmup=4st", "optim.warmup_lr=0.0"),
    *("train.length=2ep", "evaluate.baselines=false", "log.every=100"),
]
QUICK = {"prototypes": {"count": 24, "freeze": "5st"}, "sinkhorn": {"queue": 64, "queue_start": "8st"}}
QUICK["center_sharpen"] = {"warmup": "12st"}
SHOWN = ("swav", "rdm_byol_log1p")  # always tested, in fp32; all of them with -m slow


@pytest.fixture(autouse=True)
def _one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that compiles quickly."""
    monkeypatch.setitem(ENCODERS, "resnet_small", resnet_row((1,), 8))


class Run(NamedTuple):
    """What is compared of a run."""

    losses: Tensor  # (steps,)
    weights: Tensor  # all parameters, at the end
    moved: float  # their distance from the start
    graphs: list[int]  # compiled so far, after each step
    phases: list[Any]  # what a step works on and how


def settings(preset: str, *more: str) -> run_config.Config:
    """Everything that a method changes over time happens within the run."""
    more += ("method.projector.out=8",) if preset == "w_mse" else ()  # fewer dimensions than rows
    c = run_config.load([f"preset={preset}", *SMALL])
    for side in ("online", "target"):
        for i, transform in enumerate(getattr(c.method, side)):
            more += tuple(f"method.{side}.{i}.{k}={v}" for k, v in QUICK.get(transform.name, {}).items())
    return run_config.load([f"preset={preset}", *SMALL, *more])


def parameters(trainer: Trainer) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.learner.parameters()])


def jolt(trainer: Trainer, seed: int) -> None:
    """Weights that differ by a rounding of the run's precision, in fp32 by four of them; the target's alike."""
    generator = torch.Generator().manual_seed(seed)
    rounding = 2.0 ** -(9 if trainer.settings.train.precision == "bf16" else 21)
    for p in trainer.method.online.parameters():
        p.data *= 1 + rounding * (2 * torch.randint(2, p.shape, generator=generator) - 1)
    if trainer.method.target:
        trainer.method.target.load_state_dict(trainer.method.online.state_dict())


def run(folder: Path, preset: str, *more: str, jolted: int = 0) -> Run:
    torch.compiler.reset()
    counters.clear()
    trainer = Trainer(settings(preset, f"run={folder}", *more))
    if jolted:
        jolt(trainer, jolted)
    start, losses, graphs, phases = parameters(trainer), [], [], []
    for epoch in range(2):
        trainer.loader.set_epoch(epoch)
        for batch in trainer.loader:
            losses.append(trainer.train_step(batch).loss.detach())
            trainer.step += 1
            graphs.append(counters["stats"]["unique_graphs"])
            phases.append((trainer.method.phase(), [view.shape for view in batch.views]))
        trainer.feature_sets(trainer.method.online.encoder)  # in evaluation mode, and back
    assert len(losses) == STEPS and not counters["graph_break"]
    end = parameters(trainer)
    return Run(torch.stack(losses), end, (end - start).norm().item(), graphs, phases)


def check_graphs(found: Run) -> None:
    """One or more graphs at the start, and none once a phase has settled."""
    assert found.graphs[0] > 0
    begins = [i for i in range(STEPS) if i == 0 or found.phases[i] != found.phases[i - 1]]
    grown = [i for i in range(1, STEPS) if found.graphs[i] > found.graphs[i - 1]]
    assert all(any(begin <= i < begin + SETTLED for begin in begins) for i in grown), (begins, found.graphs)


def apart(a: Run, b: Run) -> tuple[float, float]:
    """Largest difference of a loss, and distance of the weights at the end."""
    return (a.losses - b.losses).abs().max().item(), (a.weights - b.weights).norm().item()


def envelope(folder: Path, eager: Run, preset: str, *more: str) -> list[float]:
    """How far eager runs from weights a rounding apart come from an eager run at most."""
    others = [run(folder / f"other{i}", preset, *more, jolted=i) for i in range(1, 9)]
    return [max(far) for far in zip(*(apart(eager, other) for other in others), strict=True)]


@pytest.mark.parametrize("preset", [p if p in SHOWN else pytest.param(p, marks=pytest.mark.slow) for p in PRESETS])
def test_compiled_and_eager_steps_agree(tmp_path: Path, preset: str) -> None:
    """To 1e-4, unless four roundings of the weights take the eager run itself farther: over a kink of a ReLU, say."""
    eager = run(tmp_path / "eager", preset)
    compiled = run(tmp_path / "compiled", preset, "train.compile=true")
    found = apart(eager, compiled)
    scale = eager.losses.abs().max().item(), eager.weights.norm().item()
    told = [f"{name} {a / b:.1e}" for name, a, b in zip(("loss", "weights"), found, scale, strict=True)]
    print(f"{preset}: {', '.join(told)}, of the way {found[1] / eager.moved:.1e}; graphs {compiled.graphs[-1]}")
    check_graphs(compiled)
    assert eager.moved > 0.01 * scale[1], "the run must go somewhere"
    if any(a > 1e-4 * b for a, b in zip(found, scale, strict=True)):
        around = envelope(tmp_path, eager, preset)
        theirs = [f"{a / b:.1e}" for a, b in zip(around, scale, strict=True)]
        print(f"{preset}: eager runs a rounding apart: {', '.join(theirs)}")
        assert all(a <= max(1e-4 * b, 2 * e) for a, b, e in zip(found, scale, around, strict=True)), told


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_compiled_bf16_steps_are_as_near_as_eager_ones_from_weights_a_rounding_apart(
    tmp_path: Path, preset: str
) -> None:
    bf16 = "train.precision=bf16"
    eager = run(tmp_path / "eager", preset, bf16)
    around = envelope(tmp_path, eager, preset, bf16)
    compiled = run(tmp_path / "compiled", preset, bf16, "train.compile=true")
    found = apart(eager, compiled)
    told = [f"{a:.1e} of {b:.1e}" for a, b in zip(found, around, strict=True)]
    print(f"{preset} bf16: loss {told[0]}, weights {told[1]}; graphs {compiled.graphs[-1]}")
    check_graphs(compiled)
    assert all(a <= 2 * b for a, b in zip(found, around, strict=True)), told


GROWS = "loader.views.*.progressive=[[1, 6]]"
CHANGES = {
    "views grow": ("rdm_byol_log1p", GROWS),
    "views grow, parts": ("dino", GROWS, "train.accumulate=2"),
    "views grow, queue": ("swav", GROWS),
}


@pytest.mark.parametrize(
    "change", [c if c == "views grow, queue" else pytest.param(c, marks=pytest.mark.slow) for c in CHANGES]
)
@torch._dynamo.config.patch(recompile_limit=1)
def test_nothing_is_compiled_once_a_phase_has_settled(tmp_path: Path, change: str) -> None:
    """As many graphs as phases, however few torch allows by itself."""
    eager = run(tmp_path / "eager", *CHANGES[change])
    compiled = run(tmp_path / "compiled", *CHANGES[change], "train.compile=true")
    loss, weights = apart(eager, compiled)
    phases = len(set(map(str, compiled.phases)))
    print(f"{change}: {phases} phases, graphs {compiled.graphs}, loss {loss:.1e}, weights {weights:.1e}")
    assert phases > 1
    check_graphs(compiled)
    assert loss <= 1e-4 * eager.losses.abs().max() and weights <= 1e-4 * eager.weights.norm()


TRACED = ("dino", "swav_target", "rdm_byol_log1p")  # always tested; all of them with -m slow


@pytest.mark.parametrize("preset", [p if p in TRACED else pytest.param(p, marks=pytest.mark.slow) for p in PRESETS])
def test_the_method_is_one_graph_on_cuda(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced with fake tensors, without a device: what a method does there alone must not break its graph."""
    torch.compiler.reset()
    # modules take tensors of another kind only in place of their parameters
    monkeypatch.setattr(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)
    method = build_method(settings(preset), Horizon(10, STEPS))
    graphs = []

    def listed(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with FakeTensorMode():
        method._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device="cuda"))
        method.compile(fullgraph=True, dynamic=False, backend=listed)
        out = method([torch.empty(16, 3, 8, 8, device="cuda") for _ in range(method.config.target_views)])
    (graph,) = graphs
    assert out.loss.device.type == "cuda"
    filters = [node for node in graph.graph.nodes if node.target is torch.ops.fastrdm.spectral_filter.default]
    transforms = *method.online_transforms, *method.target_transforms
    assert len(filters) == sum(isinstance(t, SpectralFilter) for t in transforms)
    best = "fp16x3-triton" if HAS_TRITON else "fp16x3"
    waits = any(t.waits(c) for t, c in zip(method.online_transforms, method.config.online, strict=True))
    solvers = ["eigh"] if waits else ["newton_schulz", "gram_power"]  # which is not captured
    assert all(node.args[-2:] in [(solver, best) for solver in solvers] for node in filters)


@pytest.mark.parametrize("fault", ["compiler", "graph break"])
def test_a_failure_ends_in_one_message(tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing runs eagerly unless it was asked for."""
    torch.compiler.reset()
    trainer = Trainer(settings("simsiam", f"run={tmp_path}", "train.compile=true"))
    if fault == "compiler":
        monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
        monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    else:
        monkeypatch.setattr(dual_branch, "align", lambda *x: torch._dynamo.graph_break() or align(*x))
    with pytest.raises(ValueError, match=r"train.compile=true failed: .*; train.compile=false runs eagerly") as caught:
        trainer.train_step(next(iter(trainer.loader)))
    assert "\n" not in str(caught.value) and trainer.step == 0


def test_a_compiler_that_fails_is_done_without_where_compiling_was_chosen_automatically(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.compiler.reset()
    trainer = Trainer(settings("simsiam", f"run={tmp_path / 'compiled'}", "train.compile=true"))
    said: list[str] = []
    trainer.stepper.instead = said.append
    monkeypatch.setattr(dual_branch, "align", lambda *x: torch._dynamo.graph_break() or align(*x))
    plain = Trainer(settings("simsiam", f"run={tmp_path / 'plain'}", "train.compile=false"))
    for batch in itertools.islice(trainer.loader, 2):
        expected, found = (t.train_step(batch).loss for t in (plain, trainer))
        assert torch.equal(expected, found)
    assert len(said) == 1 and said[0].startswith("note: not compiled, for torch.compile failed: ")
