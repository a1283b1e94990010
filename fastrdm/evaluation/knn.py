"""k-NN accuracy of features and its confidence interval; settings of the evaluations during a run."""

import math
from collections.abc import Sequence

import torch
from scipy.special import ndtri
from torch import Tensor

from fastrdm.evaluation.features import FeatureSet
from fastrdm.evaluation.settings import EvaluateConfig as EvaluateConfig
from fastrdm.kernels.collectives import process_count, process_rank
from fastrdm.kernels.linalg.gram import unit_rows
from fastrdm.runtime.distributed import sum_over_processes


def wilson_interval(right: int, of: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (1927) of the share right / of; (0, 1) for of=0."""
    if not of:
        return 0.0, 1.0
    z = float(ndtri((1 + confidence) / 2))
    share, spread = right / of, z * z / of
    half = z * math.sqrt(share * (1 - share) / of + spread / (4 * of))
    low, high = ((share + spread / 2 + side * half) / (1 + spread) for side in (-1, 1))
    return max(low, 0.0), min(high, 1.0)


def top_hits(scores: Tensor, labels: Tensor, tops: Sequence[int]) -> Tensor:
    """Number of rows (len(tops),) int64 of scores (N, C) whose label (N,) is among the t highest, for each t of `tops`.

    Of equal scores the lower class comes first; a label that has no column, or no finite score, is no hit.
    """
    classes = scores.shape[1]
    own = scores.gather(1, labels.clamp(max=classes - 1)[:, None])
    number = torch.arange(classes, device=scores.device)
    before = (scores > own) | ((scores == own) & (number < labels[:, None]))
    place = before.sum(1).masked_fill((labels >= classes) | ~own[:, 0].isfinite(), classes)
    return torch.stack([(place < min(top, classes)).sum() for top in tops])


def knn_accuracy(bank: FeatureSet, query: FeatureSet, k: int | None, temperature: float) -> float:
    """Share of labeled queries that `knn_hits` counts as right.

    nan if no row is labeled on either side, or if a feature is no finite number.
    """
    if not (bank.features.isfinite().all() and query.features.isfinite().all()):
        return float("nan")
    hits, of = knn_hits(bank, query, k, temperature)
    return hits[0] / of if of else float("nan")


@torch.no_grad()
def knn_hits(
    bank: FeatureSet, query: FeatureSet, k: int | None, temperature: float, tops: Sequence[int] = (1,)
) -> tuple[list[int], int]:
    """Queries whose class is among the t first of a weighted k-NN vote, for each t of `tops`, and all queries, counted.

    Wu et al. 2018; a class without a vote is never right. Each process answers its share of the queries; rows without
    label take no part. k=None: 200, and 20 for a bank below 10,000 rows.
    """
    bank, query = bank.labeled(), query.labeled()
    if not len(bank.labels) or not len(query.labels):
        return [0] * len(tops), 0
    count = min(k or (200 if len(bank.labels) >= 10_000 else 20), len(bank.labels))
    # The bank is read as it is, with its rows' lengths beside it: normalized rows would be another copy of it.
    lengths = torch.linalg.vector_norm(bank.features, dim=1, dtype=torch.float64)
    scale = torch.where(lengths > 0, 1 / lengths, 0.0).clamp(max=torch.finfo(bank.features.dtype).max)
    scale = scale.to(bank.features.dtype)
    asked = unit_rows(query.features[process_rank() :: process_count()])
    labels = query.labels[process_rank() :: process_count()]
    classes = int(bank.labels.max()) + 1
    right = torch.zeros(len(tops), dtype=torch.int64, device=scale.device)
    for features, answers in zip(asked.split(1024), labels.split(1024), strict=True):
        cosine, neighbor = (features @ bank.features.T).mul_(scale).topk(count, dim=1)
        weights = ((cosine - cosine[:, :1]) / temperature).exp()  # over the nearest one's: never all zero
        votes = weights.new_zeros(len(features), classes).scatter_add_(1, bank.labels[neighbor], weights)
        right += top_hits(votes.masked_fill(votes == 0, -math.inf), answers, tops)
    return sum_over_processes(right).tolist(), len(query.labels)
