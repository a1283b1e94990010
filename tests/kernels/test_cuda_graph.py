"""The whole step as it would be recorded in a CUDA graph: a replay on the CPU equals the eager step, bit for bit."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastrdm import trainer
from fastrdm.config import run_config
from fastrdm.kernels.cuda_graph import WARM_UP, Captured
from fastrdm.methods.presets import PRESETS
from fastrdm.trainer import Trainer
from fastrdm.training import step

pytestmark = pytest.mark.traced

STEPS = 14  # three epochs of five, the last one short: prototypes thaw at step 5, the queue joins at 9
SMALL: dict[str, dict[str, Any]] = {
    "filter": {"solver": "newton_schulz"},
    "prototypes": {"count": 20, "freeze": "1ep"},
    "sinkhorn": {"queue": 32, "queue_start": "9st"},
    "predictor": {"hidden": 16},
}


class HostRead(AssertionError):
    """The host read a number from the device: a CUDA graph cannot be recorded over that."""


class _Listing(TorchDispatchMode):
    """Lists operators with their arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], list[Any], list[bool]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
            raise HostRead(str(func))
        result = func(*args, **kwargs)
        schema = func._schema
        written = [r.alias_info is not None and r.alias_info.is_write for r in schema.returns]
        view = bool(schema.returns) and all(r.alias_info and not r.alias_info.is_write for r in schema.returns)
        if not view:  # a view of a tensor that is written anew shows what was written
            self.calls.append((func, args, kwargs, results_of(result, len(written)), written))
        return result


class HostRecorder:
    """A stand-in for CUDA graphs: the operators that work runs are listed, and run again on the same tensors.

    It knows no Python: a number that work took from there stays what it was when it was recorded. Unlike a CUDA graph
    it runs the work while recording, so that the first replay does nothing.
    """

    def __init__(self) -> None:
        self.recordings = self.replays = 0

    def aside(self, work: Callable[[], Any]) -> Any:
        return work()

    def record(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self.recordings += 1
        with _Listing() as listing:
            result = work()
        fresh = True

        def replay() -> None:
            nonlocal fresh
            if not fresh:
                self.replays += 1
                run(listing)
            fresh = False

        return replay, result


def results_of(result: Any, count: int) -> list[Any]:
    return [result][:count] if count < 2 else list(result)


@torch.no_grad()
def run(listing: _Listing) -> None:
    """All of it once more, results into the tensors of the first time."""
    for func, args, kwargs, results, written in listing.calls:
        again = func(*args, **kwargs)
        for old, new, in_place in zip(results, results_of(again, len(written)), written, strict=True):
            if in_place:
                continue
            for a, b in zip(tree_leaves(old), tree_leaves(new), strict=True):
                if isinstance(a, Tensor) and a.data_ptr() != b.data_ptr():
                    a.detach().copy_(b)


def build(preset: str, *layers: dict[str, Any], capture: bool = False) -> Trainer:
    """A small run in float64, filters by products of matrices as on a GPU."""
    method: dict[str, Any] = {"projector": {"hidden": 16, "out": 12}}
    for side in ("online", "target"):
        transforms = [t if isinstance(t, dict) else {"name": t} for t in PRESETS[preset]["method"][side]]
        changed = {str(i): SMALL[t["name"]] for i, t in enumerate(transforms) if t["name"] in SMALL}
        even = [t.get("power") == 2 or "momentum" in t for t in transforms]  # which have a way of their own
        method[side] = {i: change for i, change in changed.items() if not even[int(i)]}
    loader = {"source": "digits", "subset": 80, "batch_size": 16, "views": {"*": {"size": 8}}}
    tree = {
        "preset": preset,
        "train": {"length": f"{STEPS}st", "precision": "fp64", "capture": capture},
        "method": method,
        "encoder": {"name": "resnet_small", "stem": "cifar", "width": 4},
        "loader": {**loader, "augment": "reference"},  # the compiled views are no operators of torch
        "optim": {"warmup": "4st"},
    }
    return Trainer(run_config.resolve(tree, *layers))


def trained(run: Trainer) -> list[Tensor]:
    """Losses and outputs of every step, and the state at the end."""
    seen = []
    for epoch in itertools.count():
        run.loader.set_epoch(epoch)
        for batch in run.loader:
            output = run.train_step(batch)
            run.step += 1
            seen += [output.loss.clone(), output.online.clone(), output.target.clone()]
            if run.step == STEPS:
                return seen + [x.clone() for x in run.learner.state_dict().values()]
    raise AssertionError


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> HostRecorder:
    """Records on the CPU what would be recorded on CUDA."""
    made = HostRecorder()
    for module in (step.cuda_graph, trainer):
        monkeypatch.setattr(module, "recorder", lambda device, key: made)
    return made


def same(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b)
    for number, (x, y) in enumerate(zip(a, b, strict=True)):
        assert torch.equal(x, y), f"tensor {number} differs by {(x - y).abs().max().item():.1e}"


@pytest.mark.parametrize("preset", PRESETS)
def test_replayed_steps_are_eager_steps(host: HostRecorder, preset: str) -> None:
    expected = trained(build(preset))
    assert not host.recordings
    same(trained(build(preset, capture=True)), expected)
    phases = 1 + (preset.startswith(("swav", "dino"))) + ("swav" in preset or "sinkhorn" in preset)
    assert host.recordings == phases + 1  # and the making of the views
    assert host.replays == 2 * STEPS - (phases + 1) * (WARM_UP + 1)


VARIANTS = {
    "accumulation": {"train": {"accumulate": 2}},
    "lars": {"optim": {"name": "lars", "clip_grad": 1.0}},
    "lamb": {"optim": {"name": "lamb", "clip_grad": 1.0, "clip_grad_of": "each"}},
    "adamw": {"optim": {"name": "adamw", "weight_decay": 0.04, "weight_decay_end": 0.4}},
    "lamb with a decay that changes": {"optim": {"name": "lamb", "weight_decay": 0.04, "weight_decay_end": 0.4}},
    "views that grow": {"loader": {"views": {"*": {"progressive": [[2, 6]]}}}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_replays_follow_what_changes(host: HostRecorder, variant: str) -> None:
    layer = VARIANTS[variant]
    expected = trained(build("byol", layer))
    same(trained(build("byol", layer, capture=True)), expected)
    assert host.recordings == 2 + 2 * (variant == "views that grow")


def test_a_number_that_python_keeps_is_found(host: HostRecorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """What these tests are worth: momentum as a number would be frozen at the step that was recorded."""

    def after_step(self: Any) -> None:
        momentum = float(self.horizon_share)
        for mine, theirs in zip(self.target.parameters(), self.online.parameters(), strict=True):
            mine.detach().lerp_(theirs.detach(), 1 - momentum)

    kind = type(build("byol").method)
    set_step = kind.set_step

    def set_step_and_share(self: Any, number: int) -> None:
        set_step(self, number)
        self.horizon_share = number / STEPS

    monkeypatch.setattr(kind, "after_step", after_step)
    monkeypatch.setattr(kind, "set_step", set_step_and_share)
    expected = trained(build("byol"))
    with pytest.raises(AssertionError, match="differs by"):
        same(trained(build("byol", capture=True)), expected)


def test_reading_a_number_is_refused(host: HostRecorder) -> None:
    captured = Captured(lambda x: x * x.sum().item(), host)
    x = torch.ones(3)
    for _ in range(WARM_UP):
        captured("phase", x)
    with pytest.raises(HostRead):
        captured("phase", x)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_no_captured_steps_without_cuda() -> None:
    with pytest.raises(ValueError, match=r"train\.capture must be false on cpu, got true: CUDA graphs need a CUDA"):
        build("simsiam", capture=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("preset", ["simsiam", "swav", "dino", "rdm_byol", "rdm_byol_log1p"])
def test_cuda_graphs_are_eager_steps(preset: str) -> None:
    expected = trained(build(preset))
    found = trained(build(preset, capture=True))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("preset", ["simsiam", "swav", "dino", "rdm_byol", "rdm_byol_log1p"])
def test_no_step_waits_for_the_device(preset: str) -> None:
    run = build(preset)
    batches = list(run.loader)
    for batch in batches[:WARM_UP]:
        run.train_step(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches[WARM_UP:]:
            run.train_step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_is_recorded_is_told_at_the_start(host: HostRecorder) -> None:
    run = build("swav", capture=True)
    assert list(run.prepared()) == [
        "captured anew from step 5: prototypes: begin to learn",
        "captured anew from step 9: sinkhorn: the queue joins in",
    ]
