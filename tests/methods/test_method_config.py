"""Methods that cannot be are refused when the configuration is read, by key and value."""

from typing import Any

import pytest

from fastrdm.config import run_config

SCORES = {"name": "prototypes", "count": 50}
CROSS_ENTROPY = {"name": "cross_entropy"}
SWAV = {"online": [SCORES], "target": [SCORES, "sinkhorn"], "alignment": CROSS_ENTROPY}


def resolve(method: dict[str, Any]) -> run_config.Config:
    return run_config.resolve({"preset": "simsiam", "method": method})


def with_target(*transforms: Any) -> dict[str, Any]:
    return {**SWAV, "target": [SCORES, *transforms]}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "one prototype": (
        {**SWAV, "online": [{"name": "prototypes", "count": 1}]},
        "method.online.0.count: input should be greater than or equal to 2, got 1",
    ),
    "no alignment temperature": (
        {**SWAV, "alignment": {**CROSS_ENTROPY, "temperature": 0.0}},
        "method.alignment.temperature: input should be greater than 0, got 0.0",
    ),
    "negative sharpening": (
        with_target({"name": "center_sharpen", "temperature": -0.07}),
        "method.target.1.temperature: input should be greater than 0, got -0.07",
    ),
    "no warm-up temperature": (
        with_target({"name": "center_sharpen", "warmup_temperature": 0}),
        "method.target.1.warmup_temperature: input should be greater than 0, got 0",
    ),
    "no epsilon": (
        with_target({"name": "sinkhorn", "epsilon": 0}),
        "method.target.1.epsilon: input should be greater than 0, got 0",
    ),
    "no iterations": (
        with_target({"name": "sinkhorn", "iterations": 0}),
        "method.target.1.iterations: input should be greater than or equal to 1, got 0",
    ),
    "negative queue": (
        with_target({"name": "sinkhorn", "queue": -1}),
        "method.target.1.queue: input should be greater than or equal to 0, got -1",
    ),
    "center momentum": (
        with_target({"name": "center_sharpen", "momentum": 1.5}),
        "method.target.1.momentum: input should be less than or equal to 1, got 1.5",
    ),
    "EMA below 0": (
        {"ema": {"momentum": -0.1}},
        "method.ema.momentum: input should be greater than or equal to 0, got -0.1",
    ),
    "EMA above 1": ({"ema": {"final": 1.01}}, "method.ema.final: input should be less than or equal to 1, got 1.01"),
    "filter behind prototypes": (
        {**SWAV, "online": [SCORES, {"name": "filter", "power": 1.0}]},
        "method.online.1: filter takes features, but prototypes gives scores",
    ),
    "filter on probabilities": (
        with_target("sinkhorn", {"name": "filter", "power": -0.5}),
        "method.target.2: filter takes features, but sinkhorn gives probabilities",
    ),
    "predictor behind prototypes": (
        {**SWAV, "online": [SCORES, "predictor"]},
        "method.online.1: predictor takes features, but prototypes gives scores",
    ),
    "sinkhorn without prototypes": (
        {**SWAV, "target": ["sinkhorn"]},
        "method.target.0: sinkhorn takes scores, but the projector gives features",
    ),
    "features in the cross-entropy": (
        {**SWAV, "online": []},
        "method.online: alignment cross_entropy takes scores here, but the projector gives features",
    ),
    "scores as a target": (
        with_target(),
        "method.target: alignment cross_entropy takes probabilities here, but prototypes gives scores",
    ),
    "probabilities in the cosine": (
        {**SWAV, "alignment": {"name": "negative_cosine"}},
        "method.online: alignment negative_cosine takes features here, but prototypes gives scores",
    ),
    "no power": ({"online": ["filter"]}, "method.online.0.power must be a number for kind=power, got None"),
    "power of a logarithm": (
        {"online": [{"name": "filter", "kind": "log", "power": 1.0}]},
        "method.online.0.power must be left out for kind=log, got 1.0",
    ),
    "endless power": (
        {"online": [{"name": "filter", "power": float("inf")}]},
        "method.online.0.power: input should be a finite number, got inf",
    ),
    "cutoff of everything": (
        {"target": [{"name": "filter", "power": -1.0, "cutoff": 1.0}]},
        "method.target.0.cutoff: input should be less than 1, got 1.0",
    ),
    "unknown solver": (
        {"target": [{"name": "filter", "power": -1.0, "solver": "svd"}]},
        "method.target.0.solver must be one of auto, eigh, newton_schulz, gram_power, got 'svd'",
    ),
    "two numbers of prototypes": (
        {**SWAV, "online": [{"name": "prototypes", "count": 51}]},
        "prototypes.count must be the same on both branches, got 51 and 50",
    ),
    "two freezes": (
        {**SWAV, "online": [{**SCORES, "freeze": "2ep"}]},
        "prototypes.freeze must be the same on both branches, got 2ep and 0ep",
    ),
    "nothing to train": ({"online": ["stop"]}, "method.online: stop belongs to method.target"),
    "predictor without gradient": (
        {"target": ["predictor", "stop"]},
        "method.target: predictor belongs to method.online",
    ),
    "unknown transform": ({"online": ["predictr"]}, "method.online.0 must be a transform, got 'predictr'"),
    "duration": ({"online": [{**SCORES, "freeze": "2"}]}, "a duration is written '50ep'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    method, message = REFUSED[case]
    with pytest.raises(ValueError) as refusal:
        resolve(method)
    assert message in str(refusal.value)


@pytest.mark.parametrize("ema", [{"momentum": 0.0, "final": 0.0}, {"momentum": 1, "final": 1}])
def test_the_ends_of_the_range_are_allowed(ema: dict[str, float]) -> None:
    assert resolve({"ema": ema}).method.ema is not None


def test_branches_may_hold_what_no_paper_has() -> None:
    log1p, half = {"name": "filter", "kind": "log1p"}, {"name": "filter", "power": -0.5}
    method = resolve(
        {**SWAV, "online": [log1p, "predictor", SCORES], "target": ["stop", half, SCORES, "sinkhorn"]}
    ).method
    assert [t.name for t in method.online] == ["filter", "predictor", "prototypes"]
    assert [t.name for t in method.target] == ["stop", "filter", "prototypes", "sinkhorn"]
