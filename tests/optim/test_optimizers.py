"""Groups are tabulated; each optimizer follows its formula, resumes bit for bit and never reads the device."""

import copy
import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastrdm.optim.optimizers import (
    OptimConfig,
    Role,
    build_optimizer,
    clip_gradients,
    fused_adam,
    learning_rates,
    parameter_groups,
    set_learning_rates,
    set_weight_decays,
)

CPU = torch.device("cpu")
NAMES = ("sgd", "lars", "adamw", "lamb")
SHAPES = {"conv": (4, 3, 3, 3), "dense": (5, 4), "zero": (3, 2), "still": (2, 3), "bias": (5,), "scale": ()}


def parameters(dtype: torch.dtype = torch.float64) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = {k: nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for k, s in SHAPES.items()}
    made["zero"].data.zero_()
    return made


def give_gradients(params: dict[str, nn.Parameter], seed: int) -> None:
    """`zero` starts as zeros, `still` has a gradient of zeros."""
    generator = torch.Generator().manual_seed(seed)
    for p in params.values():
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
    params["still"].grad = torch.zeros_like(params["still"])


def built(params: dict[str, nn.Parameter], config: OptimConfig, **role: Any) -> torch.optim.Optimizer:
    return build_optimizer(parameter_groups([Role("all", list(params.items()), **role)], config), config, CPU)


def lars_by_hand(w: Tensor, g: Tensor, v: Tensor, rate: float, config: OptimConfig) -> tuple[Tensor, Tensor]:
    """Weight and momentum after one step, as in solo-learn (solo/utils/lars.py, lines 131 to 165)."""
    if not (config.exclude_bias_norm and w.ndim <= 1) and w.norm() > 0 and g.norm() > 0:
        local = config.eta * w.norm() / (g.norm() + config.weight_decay * w.norm() + 1e-8)
        if config.clip:
            local = min(local / rate, 1)
        g = (g + config.weight_decay * w) * local
    v = config.momentum * v + g
    return w - rate * v, v


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("exclude", [True, False])
def test_lars_follows_its_formula(clip: bool, exclude: bool) -> None:
    config = OptimConfig(name="lars", lr=0.5, weight_decay=0.1, clip=clip, exclude_bias_norm=exclude, eta=0.5)
    params = parameters()
    expected = {name: (p.detach().clone(), torch.zeros_like(p)) for name, p in params.items()}
    optimizer = built(params, config)
    for step, rate in enumerate([0.5, 0.25, 2.0, 0.125]):  # exact in float32
        set_learning_rates(optimizer, [rate] * len(optimizer.param_groups))
        give_gradients(params, step)
        optimizer.step()
        for name, p in params.items():
            assert p.grad is not None
            expected[name] = lars_by_hand(*expected[name][:1], p.grad, expected[name][1], rate, config)
            torch.testing.assert_close(p.detach(), expected[name][0], rtol=0, atol=1e-14, msg=f"{name}, step {step}")


@pytest.mark.parametrize("clip", [True, False])
def test_lars_equals_timms_where_no_norm_is_zero(clip: bool) -> None:
    lars = pytest.importorskip("timm.optim.lars").Lars
    ours, theirs = parameters(), parameters()
    for each in (ours, theirs):
        del each["zero"], each["still"]  # timm decays these; the authors' code does not
    config = OptimConfig(name="lars", lr=0.5, weight_decay=0.1, clip=clip, eta=0.5)
    optimizer = built(ours, config)
    oracle = lars(theirs.values(), 0.5, 0.9, weight_decay=0.1, trust_coeff=0.5, trust_clip=clip)
    for seed in range(5):
        for each, stepper in ((ours, optimizer), (theirs, oracle)):
            each["still"] = nn.Parameter(torch.zeros(1))
            give_gradients(each, seed)
            del each["still"]
            stepper.step()
    for name, p in ours.items():
        torch.testing.assert_close(p, theirs[name], rtol=0, atol=1e-13)


def test_lamb_equals_timms() -> None:
    lamb = pytest.importorskip("timm.optim.lamb").Lamb
    ours, theirs = parameters(), parameters()
    config = OptimConfig(name="lamb", lr=0.25, weight_decay=0.1)
    optimizer = built(ours, config)
    oracle = lamb(theirs.values(), 0.25, weight_decay=0.1, max_grad_norm=None)
    for seed in range(5):
        for each, stepper in ((ours, optimizer), (theirs, oracle)):
            give_gradients(each, seed)
            stepper.step()
    for name, p in ours.items():
        torch.testing.assert_close(p, theirs[name], rtol=0, atol=1e-12)


def test_lamb_excludes_biases_from_decay_and_adaptation() -> None:
    params = parameters()
    before = params["bias"].detach().clone()
    optimizer = built(params, OptimConfig(name="lamb", lr=0.25, weight_decay=0.1, exclude_bias_norm=True))
    give_gradients(params, 0)
    optimizer.step()
    step = params["bias"].grad.sign()  # type: ignore[union-attr]
    torch.testing.assert_close(params["bias"].detach(), before - 0.25 * step, rtol=0, atol=1e-4)  # Adam's first step


def test_sgd_follows_its_formula() -> None:
    params = parameters()
    weights = {name: p.detach().clone() for name, p in params.items()}
    velocity = {name: torch.zeros_like(p) for name, p in weights.items()}
    optimizer = built(params, OptimConfig(lr=0.5, weight_decay=0.1))
    for seed, rate in enumerate([0.5, 0.25, 0.125]):
        set_learning_rates(optimizer, [rate])
        give_gradients(params, seed)
        optimizer.step()
        for name, w in weights.items():
            grad = params[name].grad
            assert grad is not None
            velocity[name] = 0.9 * velocity[name] + grad + 0.1 * w
            weights[name] = w - rate * velocity[name]
            torch.testing.assert_close(params[name].detach(), weights[name], rtol=0, atol=1e-14)


def test_adamw_equals_torchs_plain_one() -> None:
    ours, theirs = parameters(), parameters()
    optimizer = built(ours, OptimConfig(name="adamw", lr=0.25, weight_decay=0.1, betas=(0.9, 0.95)))
    oracle = torch.optim.AdamW(theirs.values(), 0.25, (0.9, 0.95), weight_decay=0.1, foreach=False, fused=False)
    for seed in range(5):
        for each, stepper in ((ours, optimizer), (theirs, oracle)):
            give_gradients(each, seed)
            stepper.step()
    for name, p in ours.items():
        torch.testing.assert_close(p, theirs[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_parameter_whose_gradient_comes_late_starts_fresh(name: str) -> None:
    config = OptimConfig(name=name, lr=0.25)  # type: ignore[arg-type]
    late, prompt = parameters(), parameters()
    optimizer, other = built(late, config), built(prompt, config)
    for seed in range(3):
        give_gradients(late, seed)
        late["dense"].grad = None
        before = late["dense"].detach().clone()
        optimizer.step()
        assert torch.equal(late["dense"].detach(), before)
    for params, stepper in ((late, optimizer), (prompt, other)):
        give_gradients(params, 7)
        stepper.step()
    torch.testing.assert_close(late["dense"], prompt["dense"], rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_resumes_bit_for_bit_into_the_same_rate_tensors(name: str) -> None:
    config = OptimConfig(name=name, lr=0.3, exclude_bias_norm=True)  # type: ignore[arg-type]
    params = parameters(torch.float32)
    optimizer = built(params, config)
    for seed in range(3):
        give_gradients(params, seed)
        optimizer.step()
    set_learning_rates(optimizer, [0.1, 0.2])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    copied = copy.deepcopy(params)
    resumed = built(copied, config)
    rates = [group["lr"] for group in resumed.param_groups]
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert [group["lr"] for group in resumed.param_groups] == [pytest.approx(0.1), pytest.approx(0.2)]
    assert all(group["lr"] is rate for group, rate in zip(resumed.param_groups, rates, strict=True))
    for seed in range(3, 6):
        for each, stepper in ((params, optimizer), (copied, resumed)):
            set_learning_rates(stepper, [0.05 * seed, 0.07 * seed])
            give_gradients(each, seed)
            stepper.step()
    assert all(torch.equal(params[key], copied[key]) for key in params)
    torch.testing.assert_close(optimizer.state_dict()["state"], resumed.state_dict()["state"], rtol=0, atol=0)


def test_loading_keeps_present_settings_and_refuses_other_parameters() -> None:
    params = parameters()
    state = built(params, OptimConfig(weight_decay=0.5)).state_dict()
    optimizer = built(params, OptimConfig(weight_decay=0.25))
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["weight_decay"] == 0.25
    swapped = dict(reversed(params.items()))
    with pytest.raises(ValueError, match="must be for the same parameters, scale here, got 'conv'"):
        built(swapped, OptimConfig()).load_state_dict(state)
    del swapped["conv"]
    with pytest.raises(ValueError, match="must be for the same parameters"):
        built(swapped, OptimConfig()).load_state_dict(state)
    foreign = torch.optim.SGD(params.values(), 0.1).state_dict()
    with pytest.raises(ValueError, match=r"same parameters, conv here, got '\(unnamed\)'"):
        built(params, OptimConfig()).load_state_dict(foreign)


@pytest.mark.parametrize("name", NAMES)
def test_a_rising_decay_is_that_of_the_step(name: str) -> None:
    config = OptimConfig(name=name, weight_decay=0.1, weight_decay_end=0.5, exclude_bias_norm=True)  # type: ignore[arg-type]
    params = parameters()
    groups = parameter_groups([Role("all", list(params.items()))], config)
    optimizer = build_optimizer(groups, config, CPU)
    found = []
    for step in (0, 5, 10):
        set_weight_decays(optimizer, groups, step, 10, config)
        found.append([float(group.get("decay", 0)) for group in optimizer.param_groups])
    assert found == [[pytest.approx(0.1), 0.0], [pytest.approx(0.3), 0.0], [0.5, 0.0]]
    fixed, other = parameters(), OptimConfig(name=name, weight_decay=0.5, exclude_bias_norm=True)  # type: ignore[arg-type]
    constant = built(fixed, other)
    for some, stepped in ((params, optimizer), (fixed, constant)):
        give_gradients(some, 1)
        set_learning_rates(stepped, [0.1, 0.1])
        stepped.step()
    for key, p in params.items():
        torch.testing.assert_close(p, fixed[key], rtol=0, atol=2e-7, msg=key)  # decays are float32


@pytest.mark.parametrize("name", NAMES)
def test_a_run_whose_decay_rises_resumes_bit_for_bit_into_the_same_tensors(name: str) -> None:
    config = OptimConfig(name=name, weight_decay=0.1, weight_decay_end=0.5)  # type: ignore[arg-type]
    params = parameters(torch.float32)
    groups = parameter_groups([Role("all", list(params.items()))], config)
    optimizer = build_optimizer(groups, config, CPU)

    def go(some: dict[str, nn.Parameter], stepped: torch.optim.Optimizer, step: int) -> None:
        set_weight_decays(stepped, groups, step, 6, config)
        give_gradients(some, step)
        stepped.step()

    for step in range(3):
        go(params, optimizer, step)
    copied = copy.deepcopy(params)
    resumed = built(copied, config)
    decay = resumed.param_groups[0]["decay"]
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.param_groups[0]["decay"] is decay and decay == optimizer.param_groups[0]["decay"] != 0.1
    for step in range(3, 6):
        go(params, optimizer, step)
        go(copied, resumed, step)
    assert all(torch.equal(params[key], copied[key]) for key in params)


def test_gradients_are_clipped_as_one_or_each_by_itself() -> None:
    for of in ("all", "each"):
        params = parameters()
        params["conv"].grad = None
        rest = [p for key, p in params.items() if key != "conv"]
        for p in rest:
            p.grad = torch.full_like(p, 2.0)
        params["scale"].grad = torch.tensor(0.25, dtype=torch.float64)
        before = [p.grad.clone() for p in rest if p.grad is not None]
        with NoHostRead():
            clip_gradients(params.values(), OptimConfig(clip_grad=0.5, clip_grad_of=of))  # type: ignore[arg-type]
        whole = torch.cat([g.flatten() for g in before]).norm()
        for p, g in zip(rest, before, strict=True):
            factor = min(0.5 / float(g.norm()), 1.0) if of == "each" else 0.5 / float(whole)
            torch.testing.assert_close(p.grad, g * factor, rtol=1e-5, atol=0)
        assert params["conv"].grad is None


def test_gradients_stay_without_a_limit() -> None:
    params = parameters()
    give_gradients(params, 0)
    before = [p.grad.clone() for p in params.values() if p.grad is not None]
    clip_gradients(params.values(), OptimConfig())
    assert all(torch.equal(p.grad, g) for p, g in zip(params.values(), before, strict=True) if p.grad is not None)


class NoHostRead(TorchDispatchMode):
    """Fails on what would make the host wait for a CUDA device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a tensor was read on the host"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("end", [None, 0.5])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_reads_nothing_on_the_host(name: str, end: float | None) -> None:
    params = parameters()
    config = OptimConfig(name=name, clip=True, exclude_bias_norm=True, weight_decay_end=end)  # type: ignore[arg-type]
    optimizer = built(params, config)
    give_gradients(params, 0)
    before = {key: p.detach().clone() for key, p in params.items()}
    with pytest.raises(AssertionError, match="read on the host"), NoHostRead():
        float(params["conv"].detach().sum())
    with NoHostRead():
        set_learning_rates(optimizer, [0.1, 0.1])
        set_weight_decays(optimizer, optimizer.param_groups, 1, 2, config)
        optimizer.step()
    assert all(not torch.equal(p, before[key]) for key, p in params.items() if key != "still")


def scaled_step(
    optimizer: torch.optim.Optimizer, params: dict[str, nn.Parameter], seed: int, scaler: Any, clip: bool
) -> None:
    """A step on gradients as a loss times the scale has them; seeds 0 and 3 overflow."""
    give_gradients(params, seed)
    for p in params.values():
        assert p.grad is not None
        p.grad.mul_(scaler.scale(torch.ones(())))
    if seed in (0, 3):
        params["dense"].grad[0, 0] = torch.inf  # type: ignore[index]
    if clip:
        scaler.unscale_(optimizer)
        clip_gradients(params.values(), OptimConfig(clip_grad=0.5))
    scaler.step(optimizer)
    scaler.update()


def tensors_of(optimizer: torch.optim.Optimizer, params: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Weights and state."""
    state = {f"{k} {key}": x for k, p in params.items() for key, x in optimizer.state[p].items()}
    return {key: x.detach().clone() for key, x in {**params, **state}.items()}


@pytest.mark.parametrize("clip", [False, True], ids=["", "clip"])
@pytest.mark.parametrize("end", [None, 0.5])
@pytest.mark.parametrize("name", NAMES)
def test_a_scaler_reads_nothing_on_the_host_and_steps_like_the_ordinary_one(
    name: str, end: float | None, clip: bool
) -> None:
    config = OptimConfig(name=name, lr=0.25, weight_decay=0.1, weight_decay_end=end, exclude_bias_norm=True)  # type: ignore[arg-type]
    ours, ordinary = parameters(torch.float32), parameters(torch.float32)
    quick, slow = built(ours, config), built(ordinary, config)
    slow._step_supports_amp_scaling = False  # type: ignore[attr-defined]  # reads found_inf and may leave out the step
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2) for _ in range(2)]
    for seed in range(6):
        before = tensors_of(quick, ours)
        with NoHostRead():
            set_weight_decays(quick, quick.param_groups, seed, 6, config)
            scaled_step(quick, ours, seed, scalers[0], clip)
        set_weight_decays(slow, slow.param_groups, seed, 6, config)
        scaled_step(slow, ordinary, seed, scalers[1], clip)
        after, expected = tensors_of(quick, ours), tensors_of(slow, ordinary)
        fresh = {key: torch.zeros_like(x) for key, x in after.items()}  # of AdamW, before its first step
        assert all(torch.equal(x, (fresh | before)[key]) for key, x in after.items()) == (seed in (0, 3))
        for key, x in after.items():
            torch.testing.assert_close(
                x, (fresh | expected)[key], rtol=1e-6, atol=1e-7, msg=lambda m, k=key: f"{k}: {m}"
            )
        assert scalers[0].get_scale() == scalers[1].get_scale()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_step_follows_the_rate(name: str) -> None:
    config = OptimConfig(name=name, lr=0.25, clip=True)  # type: ignore[arg-type]
    both, optimizers = [], []
    for _ in range(2):
        params = {key: nn.Parameter(p.data.float().cuda()) for key, p in parameters().items()}
        for p in params.values():
            p.grad = torch.ones_like(p)
        groups = parameter_groups([Role("all", list(params.items()))], config)
        optimizers.append(build_optimizer(groups, config, torch.device("cuda")))
        both.append(params)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    for optimizer in optimizers:  # the first step, before recording
        optimizer.step()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        optimizers[1].step()
    for rate in (0.5, 0.125):
        for optimizer in optimizers:
            set_learning_rates(optimizer, [rate])
        optimizers[0].step()
        graph.replay()
    for key, p in both[0].items():
        torch.testing.assert_close(p, both[1][key], rtol=0, atol=0)


APEX = OptimConfig(name="adamw", backend="apex")


def fake_apex(folder: Path, inside: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package apex with this folder in it, found first, and no other module of its kind."""
    (folder / "apex" / inside).mkdir(parents=True)
    (folder / "apex" / "__init__.py").write_text("")
    (folder / "apex" / "optimizers.py").write_text("class FusedAdam: ...")
    monkeypatch.syspath_prepend(str(folder))
    for name in [name for name in sys.modules if name.partition(".")[0] in ("apex", "amp_C")]:
        monkeypatch.delitem(sys.modules, name)


def test_apex_is_refused_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    with pytest.raises(ValueError, match=r"optim.backend must be torch where there is no CUDA device, got 'apex'"):
        build_optimizer([], APEX, CPU)
    with pytest.raises(ValueError, match=r"torch while NVIDIA's apex is not installed .*github.com/NVIDIA/apex"):
        fused_adam(cuda, find=lambda name: None)
    fake_apex(tmp_path / "pypi", "models", monkeypatch)
    with pytest.raises(ValueError, match=r"apex here is PyPI's of that name, not NVIDIA's .pip uninstall apex"):
        fused_adam(cuda)
    fake_apex(tmp_path / "nvidia", "multi_tensor_apply", monkeypatch)
    with pytest.raises(ValueError, match="apex here has no CUDA extensions"):
        fused_adam(cuda)
    (tmp_path / "nvidia" / "amp_C.py").write_text("")
    assert fused_adam(cuda).__name__ == "FusedAdam"
    for name in ("apex", "apex.optimizers"):
        sys.modules.pop(name, None)


def test_table_of_groups() -> None:
    encoder, probe = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), nn.Linear(4, 2)
    encoder[0].bias.requires_grad_(False)
    roles = [
        Role("encoder", list(encoder.named_parameters())),
        Role("probe", list(probe.named_parameters()), lr=0.1, weight_decay=0.0, schedule="constant", adapt=False),
    ]
    keys = ("name", "param_names", "base_lr", "weight_decay", "schedule", "adapt")

    def table(config: OptimConfig) -> list[tuple[Any, ...]]:
        return [tuple(group[key] for key in keys) for group in parameter_groups(roles, config, scale=2.0)]

    assert table(OptimConfig(lr=0.5, weight_decay=1e-4)) == [
        ("encoder", ["0.weight", "1.weight", "1.bias"], 1.0, 1e-4, "cosine", True),
        ("probe", ["weight", "bias"], 0.2, 0.0, "constant", False),
    ]
    assert table(OptimConfig(lr=0.5, weight_decay=1e-4, exclude_bias_norm=True)) == [
        ("encoder", ["0.weight"], 1.0, 1e-4, "cosine", True),
        ("encoder.bias_norm", ["1.weight", "1.bias"], 1.0, 0.0, "cosine", False),
        ("probe", ["weight"], 0.2, 0.0, "constant", False),
        ("probe.bias_norm", ["bias"], 0.2, 0.0, "constant", False),
    ]


def test_rates_of_groups() -> None:
    config = OptimConfig(lr=0.5, min_lr=1e-3)
    roles = [Role("a", [("p", nn.Parameter(torch.ones(2)))]), Role("b", [("q", nn.Parameter(torch.ones(2)))], lr=0.1)]
    groups = parameter_groups([roles[0], roles[1]._replace(schedule="constant")], config, scale=0.5)
    assert learning_rates(groups, 0, 100, 10, config) == [3e-5, 0.05]
    assert learning_rates(groups, 10, 100, 10, config) == [0.25, 0.05]
    assert learning_rates(groups, 55, 100, 10, config) == [pytest.approx((0.25 + 1e-3) / 2), 0.05]
    assert learning_rates(groups, 100, 100, 10, config) == [1e-3, 0.05]
    config = OptimConfig(lr=0.5, min_lr=1e-3, schedule="linear")
    assert learning_rates(groups, 40, 100, 10, config) == [pytest.approx(0.25 * 2 / 3 + 1e-3 / 3), 0.05]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": -0.1}, "optim.lr must be at least 0, got -0.1"),
        ({"betas": (0.9, 1.0)}, r"optim.betas must be in \[0, 1\), got 1.0"),
        ({"eta": 0.0}, "optim.eta must be above 0"),
        ({"clip_grad": 0.0}, "optim.clip_grad must be above 0"),
        ({"weight_decay_end": -0.1}, "optim.weight_decay_end must be at least 0, got -0.1"),
        (
            {"weight_decay": 0.0, "weight_decay_end": 0.4},
            "optim.weight_decay must be above 0 where weight_decay_end is",
        ),
        ({"warmup": "10"}, "a duration is written '50ep'"),
        ({"name": "sgd", "backend": "apex"}, "optim.name must be adamw with backend=apex, whose other .* got 'sgd'"),
        (
            {"name": "adamw", "backend": "apex", "weight_decay_end": 0.4},
            "optim.weight_decay_end must be null with backend=apex, where decay is a number, got 0.4",
        ),
        (
            {"name": "adamw", "backend": "apex", "clip_grad": 3.0},
            "optim.clip_grad must be null with backend=apex, which unscales, got 3.0",
        ),
        ({"name": "adam"}, "'sgd', 'lars', 'adamw' or 'lamb'"),
        ({"learning_rate": 0.1}, "learning_rate"),
    ],
)
def test_bad_configs_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimConfig(**values)
