"""The label of a run that the figures are judged by, measured with frozen weights on held-out images.

None of it is a figure that a run logs. Two augmented views of every test image pass through the networks as in
training, in batches of a quarter of them, and centered views of all images give features for two classifiers.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrdm.analysis.spectral_analysis import untouched
from fastrdm.evaluation.features import FeatureSet
from fastrdm.evaluation.knn import knn_accuracy
from fastrdm.loaders.build import build_loader
from fastrdm.loaders.spec import LoaderConfig
from fastrdm.trainer import Trainer

RIDGE = 1e-3  # of the linear classifier, on standardized features
POINT_SPREAD, LEAST_INFORMATION, LEADING = 0.005, 0.01, 0.7
FALL, FALL_ERRORS = 0.05, 2


class Outcome(NamedTuple):
    """A column of the table each."""

    retrieval: float  # share of images whose view 2 lies nearest to their view 1 among all views 2, by embedding
    nearer: float  # share of other images whose view 2 is farther from view 1 than the image's own; 0.5: chance
    spread: float  # of embeddings of unit length: 1 - |mean|^2, 0 is one point
    directions: float  # that hold 90 % of the variance of embeddings of unit length
    directions99: float  # that hold 99 %
    leading: float  # share of the variance in the first direction
    information: float  # nats about the image in the target's assignment to prototypes; nan without prototypes
    embedding_knn: float  # accuracy of the embeddings
    knn: float  # of the encoder's features
    linear: float
    random_knn: float  # of the encoder as it was before training
    random_linear: float


@torch.no_grad()
def embeddings(trainer: Trainer) -> tuple[Tensor, Tensor | None]:
    """Target embeddings (2, N, D) of two views of the test images, and assignments (2, N, K) where there are some."""
    settings, method = trainer.settings, trainer.method
    network = method.target or method.online
    loader = build_loader(
        held_out(settings.loader, len(trainer.test)), trainer.test, seed=12345, rank=0, world=1,
        device=trainer.processes.device, dtype=trainer.dtype,
    )  # fmt: skip
    projections, targets = [], []
    with untouched(method):
        for batch in loader:
            projections.append(network(batch.views[:2], None).projection.double())
            targets.append(method(batch.views).target.double())
    loader.close()
    assigned = torch.cat(targets, dim=1) if method.online.prototypes is not None else None
    return torch.cat(projections, dim=1), assigned


def held_out(config: LoaderConfig, images: int) -> LoaderConfig:
    """The run's own views, in batches that leave out as few images as possible."""
    return replace(config, batch_size=max(images // 4, 2), subset=None)


def retrieval(z: Tensor) -> tuple[float, float]:
    """Two shares of features (2, N, D): rows of view 1 nearest to their own view 2, and nearer than to one other.

    A row whose distance to others equals that to its own counts as a guess among them.
    """
    a, b = z - z.mean((0, 1))
    scale = b.norm(dim=1).mean().clamp_min(1e-12)
    distance = torch.cdist(a / scale, b / scale)
    own = distance.diagonal()[:, None]
    nearer, equal = (distance < own - 1e-9).sum(1), ((distance - own).abs() <= 1e-9).sum(1)
    beaten = (nearer + (equal - 1) / 2) / (len(own) - 1)
    return ((nearer == 0) / equal).mean().item(), 1 - beaten.mean().item()


def information(p: Tensor) -> float:
    """Mutual information, in nats, of an image and the prototype that its target names, of rows (2, N, K)."""
    p = p.flatten(0, 1)
    return float(torch.special.entr(p.mean(0)).sum() - torch.special.entr(p).sum(1).mean())


def linear_accuracy(bank: FeatureSet, query: FeatureSet) -> float:
    """Return the accuracy of a ridge regression to classes on standardized features."""
    mean, deviation = bank.features.double().mean(0), bank.features.double().std(0).clamp_min(1e-8)
    x, y = ((s.features.double() - mean) / deviation for s in (bank, query))
    x, y = F.pad(x, (0, 1), value=1.0), F.pad(y, (0, 1), value=1.0)
    gram = x.T @ x / len(x) + RIDGE * torch.eye(x.shape[1], dtype=x.dtype)
    weights = torch.linalg.solve(gram, x.T @ F.one_hot(bank.labels).double() / len(x))
    return float(((y @ weights).argmax(1) == query.labels).double().mean())


def accuracies(trainer: Trainer) -> tuple[float, float]:
    """k-NN and linear accuracy of the online encoder's features."""
    bank, query = trainer.feature_sets(trainer.method.online.encoder)
    return knn_accuracy(bank, query, 20, 0.07), linear_accuracy(bank, query)


def measure(trainer: Trainer, random: tuple[float, float]) -> Outcome:
    """After training; `random` are the accuracies before it."""
    z, assigned = embeddings(trainer)
    unit = F.normalize(z, dim=-1).flatten(0, 1)
    values = torch.linalg.eigvalsh(unit.T.cov()).flip(0).clamp_min(0)
    shares = values / values.sum().clamp_min(1e-300)
    network = trainer.method.target or trainer.method.online
    encoded = trainer.feature_sets(lambda x: network([x], None).projection[0])
    own, nearer = retrieval(F.normalize(z, dim=-1))
    knn, linear = accuracies(trainer)
    return Outcome(
        retrieval=own,
        nearer=nearer,
        spread=1 - unit.mean(0).square().sum().item(),
        directions=int((shares.cumsum(0) < 0.9).sum()) + 1,
        directions99=int((shares.cumsum(0) < 0.99).sum()) + 1,
        leading=shares[0].item(),
        information=information(assigned) if assigned is not None else float("nan"),
        embedding_knn=knn_accuracy(*encoded, 20, 0.07),
        knn=knn,
        linear=linear,
        random_knn=random[0],
        random_linear=random[1],
    )


def error_of_difference(first: float, second: float, images: int) -> float:
    """Binomial standard error of the difference of two accuracies, each measured on as many images."""
    return math.sqrt((first * (1 - first) + second * (1 - second)) / images)


def gain(outcome: Outcome) -> float:
    """Rise of k-NN and linear accuracy over the untrained encoder, summed."""
    return outcome.knn - outcome.random_knn + outcome.linear - outcome.random_linear


def label(outcome: Outcome, images: int, best: float, errors: Sequence[float] = (0, 0, 0)) -> str:
    """The state that an outcome on a number of test images stands for; `best` is the run's highest k-NN accuracy.

    Complete collapse: unit-length embeddings spread by less than 0.5 % of their length's square, or the targets tell
    less than 0.01 nat about the image. Dimensional collapse: one direction holds 70 % of the embeddings' variance.
    Weak: k-NN and linear accuracy together did not rise above those of the untrained encoder, or the k-NN accuracy
    fell from its best by more than 5 points and two standard errors. `errors` are added to spread, leading share and
    gain, in standard errors of each.
    """
    o = outcome
    # Standard errors of the variances of Gaussian rows, for the spectrum for which they are largest.
    spread = o.spread * (1 + errors[0] * math.sqrt(2 / images))
    leading = o.leading + errors[1] * 2 * o.leading * (1 - o.leading) / math.sqrt(images)
    pairs = ((o.knn, o.random_knn), (o.linear, o.random_linear))
    gained = gain(o) + errors[2] * math.hypot(*(error_of_difference(*pair, images) for pair in pairs))
    if spread < POINT_SPREAD or o.information < LEAST_INFORMATION:
        return "complete collapse"
    if leading > LEADING:
        return "dimensional collapse"
    fell = best - o.knn > max(FALL, FALL_ERRORS * error_of_difference(best, o.knn, images))
    return "healthy" if gained > 0 and not fell else "weak"


def possible_labels(outcome: Outcome, images: int, best: float) -> tuple[str, ...]:
    """`label`, and the labels that it would be if what was measured were off by one standard error."""
    off = sorted(product((0, -1, 1), repeat=3), key=lambda errors: sum(map(abs, errors)))
    return tuple(dict.fromkeys(label(outcome, images, best, errors) for errors in off))
