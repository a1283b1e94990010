"""Settings of the evaluations, during a run and by `fastrdm eval`. No torch."""

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from fastrdm.optim.schedules import cosine_ramp
from fastrdm.optim.settings import OptimConfig
from fastrdm.schema import STRICT, Duration, Pair, require, steps_of


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


@dataclass(frozen=True, kw_only=True, config=STRICT)
class KnnConfig:
    """k-NN by cosine on features of the center view."""

    k: int | None = Field(default=None, ge=1)
    """Neighbors that vote in `fastrdm eval`. `null` takes 200, and 20 where fewer than 10,000 images are labeled."""

    temperature: float = Field(default=0.07, gt=0)
    """Temperature of the vote in `fastrdm eval`: a neighbor weighs exp(cosine / temperature)."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FitConfig:
    """Training of a classifier on labels."""

    epochs: int = Field(default=100, ge=1)
    """Epochs for which the classifier is trained."""

    batch_size: int = Field(default=256, ge=1)
    """Images of one training step of the classifier. A set with fewer images makes one batch."""

    optimizer: Literal["sgd", "lars"] = "sgd"
    """Optimizer of the classifier."""

    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of the classifier's optimizer."""

    weight_decay: float = Field(default=0.0, ge=0)
    """Share of the weight that is added to the gradient of the classifier."""

    eta: float = Field(default=0.001, gt=0)
    """Trust coefficient of the classifier's LARS optimizer: step over weight norm."""

    schedule: Literal["cosine", "step"] = "cosine"
    """Schedule of the learning rate: cosine falls to 0, step multiplies it by `gamma` at each of `milestones`."""

    by_epoch: bool = False
    """Change the learning rate between epochs only, instead of at every step."""

    milestones: tuple[Duration, ...] = ("60%", "80%")
    """Times at which the step schedule multiplies the learning rate by `gamma`."""

    gamma: float = Field(default=0.1, gt=0)
    """Factor of the step schedule."""

    scale: Pair = (0.08, 1.0)
    """Least and largest share of the image's area that a random crop covers while the classifier is trained."""

    flip: float = Field(default=0.5, ge=0, le=1)
    """Probability of a horizontal flip while the classifier is trained."""

    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the initial weights, the order, the views and the choice of labeled images."""

    def __post_init__(self) -> None:
        require(0 < self.scale[0] <= self.scale[1] <= 1, "scale", "0 < low <= high <= 1", self.scale)

    def factor(self, step: int, steps_per_epoch: int) -> float:
        """Learning rate at `step` as a share of the peak rate."""
        if self.by_epoch:
            step -= step % steps_per_epoch
        total = self.epochs * steps_per_epoch
        if self.schedule == "cosine":
            return cosine_ramp(step, total, 1.0, 0.0)
        return self.gamma ** sum(step >= steps_of(m, steps_per_epoch, total) for m in self.milestones)

    def optim(self) -> OptimConfig:
        """Settings of the optimizer."""
        return OptimConfig(
            name=self.optimizer, momentum=self.momentum, weight_decay=self.weight_decay, eta=self.eta, clip=False
        )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LinearConfig(FitConfig):
    """A linear classifier on frozen features."""

    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
    """Learning rates for a batch of 256 images. All are trained together, and the best one is chosen on held-out
    training images.
    """

    augment: bool = False
    """Train on random crops and flips, with new features in every epoch. `false` computes the features of the center
    view once.
    """

    held_out: float = Field(default=0.1, gt=0, lt=1)
    """Share of the training images that is held out to choose among several learning rates."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.rates) > 0 and min(self.rates) > 0, "rates", "rates above 0", self.rates)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FinetuneConfig(FitConfig):
    """Fine-tuning with crops and flips, BatchNorm in training mode."""

    epochs: int = 20
    """Epochs of fine-tuning."""

    labels: tuple[float, ...] = (0.01, 0.1, 1.0)
    """Shares of the training images whose labels are used. Each share is a run of its own."""

    lr: float = 0.01
    """Learning rate of the encoder, for a batch of 256 images."""

    head_lr: float = 0.2
    """Learning rate of the classifier in fine-tuning, for a batch of 256 images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.epochs >= 1, "epochs", "at least 1", self.epochs)
        proper = len(self.labels) > 0 and all(0 < share <= 1 for share in self.labels)
        require(proper, "labels", "shares in (0, 1]", self.labels)
        require(min(self.lr, self.head_lr) >= 0, "lr and head_lr", "at least 0", (self.lr, self.head_lr))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvalConfig:
    """Everything that `fastrdm eval` measures."""

    knn: KnnConfig = KnnConfig()
    linear: LinearConfig = LinearConfig()
    finetune: FinetuneConfig = FinetuneConfig()
