"""Settings of the evaluations during a run. No torch."""

from pydantic import Field
from pydantic.dataclasses import dataclass

from fastrdm.schema import STRICT, Duration


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluateConfig:
    """k-NN on unit-norm features of the center view, and the online linear probe."""

    every: Duration = "10%"
    """Time between two evaluations. `0st` evaluates at the end of the run only."""

    k: int | None = Field(default=None, ge=1)
    """Neighbors that vote. `null` takes 200, and 20 where the bank has fewer than 10,000 images."""

    bank: int | None = Field(default=None, ge=1)
    """Number of training images among which neighbors are searched, equally many of each class. `null` uses all."""

    temperature: float = Field(default=0.07, gt=0)
    """Temperature of the vote: a neighbor weighs exp(cosine / temperature)."""

    baselines: bool = True
    """Measure raw pixels and the random encoder before training."""

    probe: bool = True
    """Train a linear classifier on the detached features beside the encoder. It has no effect on the encoder."""

    probe_lr: float = Field(default=0.1, gt=0)
    """Learning rate of that classifier, for a batch of 256 images. The authors' CIFAR scripts use 0.1."""

    batch_size: int = Field(default=256, ge=1)
    """Images of one evaluation pass of one process."""

    source: str | None = None
    """Images to evaluate on, named as in `loader.source`; null takes the run's own. A set of its own lets an unlabeled
    run be judged while it trains.
    """

    root: str | None = None
    """Folder of `evaluate.source`; null takes that of the run's own images."""

    labels: str = "auto"
    """Where the labels of an evaluation set of its own come from, as in `loader.labels`."""

    holdout: float | None = Field(default=None, gt=0)
    """Share of the training images, or from 1 on their number, that is set aside for evaluation where a set has no
    split for it: the same share of each class. null sets none of the run's own images aside, and 0.2 of an evaluation
    set of its own.
    """
