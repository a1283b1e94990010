"""k-NN against a reference in plain Python, the order of feature sets, and the probe beside the encoder."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastrdm.evaluation.features import FeatureSet, feature_set, feature_sets
from fastrdm.evaluation.knn import knn_accuracy, knn_hits, top_hits, wilson_interval
from fastrdm.evaluation.online_probe import OnlineProbe


def reference(bank: FeatureSet, query: FeatureSet, k: int, temperature: float) -> float:
    """Share of queries whose k nearest rows by cosine vote for their class with weights exp(cosine / temperature)."""
    right = 0
    for x, label in zip(query.features.double().tolist(), query.labels.tolist(), strict=True):
        near = []
        for y, other in zip(bank.features.double().tolist(), bank.labels.tolist(), strict=True):
            cosine = sum(a * b for a, b in zip(x, y, strict=True)) / math.hypot(*x) / math.hypot(*y)
            near.append((cosine, other))
        votes: dict[int, float] = {}
        for cosine, other in sorted(near, reverse=True)[:k]:
            votes[other] = votes.get(other, 0.0) + math.exp(cosine / temperature)
        right += max(votes, key=lambda other: votes[other]) == label
    return right / len(query.labels)


def random_set(rows: int, seed: int, classes: int = 5, width: int = 6) -> FeatureSet:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (rows,), generator=g)
    centers = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    return FeatureSet(centers[labels] + 1.5 * torch.randn(rows, width, generator=g), labels)


def rows(*vectors: list[float], labels: list[int]) -> FeatureSet:
    return FeatureSet(torch.tensor(vectors), torch.tensor(labels))


@pytest.mark.parametrize("k", [1, 3, 20, 80, 1000])
@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0, 100.0])
def test_knn_equals_the_reference(k: int, temperature: float) -> None:
    bank, query = random_set(80, seed=0), random_set(60, seed=1)
    expected = reference(bank, query, k, temperature)
    assert 0.15 < expected < 0.95
    assert knn_accuracy(bank, query, k, temperature) == pytest.approx(expected)


@pytest.mark.parametrize(("size", "k"), [(201, 20), (9_999, 20), (10_000, 200)])
def test_default_k_goes_by_the_size_of_the_bank(size: int, k: int) -> None:
    query = random_set(1000, seed=1)
    bank = random_set(size, seed=0)
    others = {n: knn_accuracy(bank, query, n, 10.0) for n in (20, 200)}
    assert others[20] != others[200]  # else the test could not tell
    assert knn_accuracy(bank, query, None, 10.0) == others[k]


def test_weights_go_by_temperature() -> None:
    # the nearest row at cosine 0.8 votes for 0; two at 0.6 vote for 1: e^(0.2 / T) > 2 when T < 0.2885
    bank = rows([0.8, 0.6, 0.0], [0.6, 0.8, 0.0], [0.6, 0.0, 0.8], labels=[0, 1, 1])
    for label, temperatures in {0: (1e-4, 0.07, 0.28), 1: (0.3, 10.0)}.items():
        query = rows([2.0, 0.0, 0.0], labels=[label])
        assert [knn_accuracy(bank, query, 3, t) for t in temperatures] == [1.0] * len(temperatures)


def test_the_bank_is_not_copied() -> None:
    """Beside a block of queries, k-NN makes no tensor of the bank's size."""
    bank, made = FeatureSet(torch.randn(4096, 64), torch.arange(4096) % 10), list[int]()

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            views = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
            new = isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in views
            made.append(out.numel() if new else 0)
            return out

    with Sizes():
        knn_hits(bank, FeatureSet(torch.randn(8, 64), torch.arange(8)), 5, 0.07)
    assert max(made) == 8 * 4096


def test_two_encoders_share_one_pass_over_the_images() -> None:
    read = []

    def batches() -> Any:
        for part in torch.arange(12).split(5):
            read.append(len(part))
            yield part[:, None].float(), part, part % 3

    both = feature_sets([lambda x: x, lambda x: -x], batches())
    assert read == [5, 5, 2]
    assert torch.equal(both[0].features, -both[1].features) and both[0].labels.tolist() == [0, 1, 2] * 4


def test_the_length_of_features_does_not_count() -> None:
    bank, query = random_set(50, seed=0), random_set(40, seed=1)
    longer = FeatureSet(bank.features * torch.linspace(0.1, 9.0, 50)[:, None], bank.labels)
    assert knn_accuracy(longer, query, 5, 0.07) == knn_accuracy(bank, query, 5, 0.07)


def test_equal_rows_vote_together() -> None:
    bank = rows([1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0], labels=[1, 0, 1, 2])
    assert knn_accuracy(bank, rows([3.0, 0.0], labels=[1]), 3, 0.07) == 1.0
    assert knn_accuracy(bank, rows([3.0, 0.0], labels=[0]), 4, 0.07) == 0.0


def test_far_rows_still_vote() -> None:
    bank = rows([-1.0, 0.0], [-1.0, 0.1], labels=[3, 3])
    assert knn_accuracy(bank, rows([1.0, 0.0], labels=[3]), 2, 1e-3) == 1.0  # exp(-2 / T) is 0 in float32


def test_more_queries_than_a_block_and_classes_the_bank_lacks() -> None:
    bank = rows([1.0, 0.0], [0.0, 1.0], labels=[0, 1])
    angles = torch.linspace(0, math.pi / 2, 2501)
    labels = (angles > math.pi / 4).long()
    labels[:500] = 7
    query = FeatureSet(torch.stack([angles.cos(), angles.sin()], dim=1), labels)
    assert knn_accuracy(bank, query, 1, 0.07) == pytest.approx(2001 / 2501, abs=1 / 2501)


def test_rows_without_label_take_no_part() -> None:
    bank, query = random_set(50, seed=0), random_set(40, seed=1)
    expected = knn_accuracy(bank, query, 5, 0.07)

    def with_unknown(known: FeatureSet) -> FeatureSet:
        features = torch.cat([torch.randn(20, 6), known.features])
        return FeatureSet(features, torch.cat([torch.full((20,), -1), known.labels]))

    assert knn_accuracy(with_unknown(bank), with_unknown(query), 5, 0.07) == expected
    unknown = FeatureSet(torch.randn(4, 6), torch.full((4,), -1))
    assert math.isnan(knn_accuracy(unknown, query, 5, 0.07))
    assert math.isnan(knn_accuracy(bank, unknown, 5, 0.07))
    assert math.isnan(OnlineProbe(6, 5).accuracy(unknown))


def test_feature_sets_keep_the_order_of_the_source() -> None:
    index = torch.tensor([4, 2, 0, 5, 1, 3])
    batches = [(x[:, None].double(), x, x % 3) for x in index.split(4)]
    found = feature_set(lambda images: images * 10, batches)
    assert found.features.dtype == torch.float32
    assert found.features.tolist() == [[0.0], [10.0], [20.0], [30.0], [40.0], [50.0]]
    assert found.labels.tolist() == [0, 1, 2, 0, 1, 2]


def test_feature_sets_carry_no_gradient() -> None:
    layer = torch.nn.Linear(1, 2)
    found = feature_set(layer, [(torch.ones(3, 1), torch.arange(3), torch.zeros(3, dtype=torch.int64))])
    assert not found.features.requires_grad


def probe_and_batch() -> tuple[OnlineProbe, Tensor, Tensor]:
    torch.manual_seed(0)
    return OnlineProbe(4, 3).double(), torch.randn(2, 5, 4, dtype=torch.float64), torch.tensor([0, -1, 2, 1, -1])


def test_probe_is_cross_entropy_over_labeled_rows_of_all_views() -> None:
    probe, features, labels = probe_and_batch()
    known = [0, 2, 3]
    logits = torch.cat([probe.linear(features[view, known]) for view in (0, 1)])
    expected = F.cross_entropy(logits, labels[known].repeat(2))
    loss = probe.loss(features, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)

    changed = features.clone()
    changed[:, [1, 4]] += 100
    assert torch.equal(probe.loss(changed, labels), loss)
    assert probe.loss(features, torch.full((5,), -1)).item() == 0


def test_probe_passes_features_no_gradient() -> None:
    probe, features, labels = probe_and_batch()
    features.requires_grad_()
    probe.loss(features, labels).backward()
    assert features.grad is None
    assert probe.linear.weight.grad is not None
    assert probe.linear.weight.grad.abs().sum() > 0


def test_probe_accuracy() -> None:
    probe, features, _ = probe_and_batch()
    answers = probe.linear(features[0]).argmax(1)
    labels = answers.clone()
    labels[0] = (labels[0] + 1) % 3
    labels[1] = -1
    assert probe.accuracy(FeatureSet(features[0].float(), labels)) == 3 / 4


@pytest.mark.parametrize(("right", "of"), [(0, 10), (10, 10), (1, 1), (7, 9), (250, 360), (38_000, 50_000)])
def test_wilson_equals_scipys(right: int, of: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(right, of).proportion_ci(0.95, method="wilson")
    low, high = wilson_interval(right, of)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert wilson_interval(right, of, 0.5)[1] < high or right == of


def test_wilson_of_nothing_is_everything() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_top_hits_equal_a_sorted_list() -> None:
    g = torch.Generator().manual_seed(0)
    scores = torch.randint(5, (200, 9), generator=g).double()  # ties in every row: the lower class comes first
    labels = torch.randint(9, (200,), generator=g)
    expected = [0, 0, 0]
    for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
        place = sorted(range(9), key=lambda c: (-row[c], c)).index(label)
        expected = [count + (place < top) for count, top in zip(expected, (1, 3, 20), strict=True)]
    assert top_hits(scores, labels, (1, 3, 20)).tolist() == expected
    assert expected[0] < expected[1] < expected[2] == 200


def test_no_number_is_no_hit() -> None:
    scores = torch.tensor([[math.nan, 0.0], [-math.inf, 1.0], [2.0, 1.0]])
    assert top_hits(scores, torch.tensor([0, 0, 0]), (1, 2)).tolist() == [1, 1]
    assert top_hits(scores, torch.tensor([5, 5, 5]), (1, 2)).tolist() == [0, 0]


def test_knn_top_5_counts_only_classes_with_a_vote() -> None:
    bank = rows([1.0, 0.0], [0.9, 0.1], [0.8, 0.2], [0.0, 1.0], labels=[3, 1, 1, 0])
    query = rows([1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0], labels=[3, 1, 0, 2])
    assert knn_hits(bank, query, 3, 10.0, (1, 5)) == ([1, 2], 4)
    assert knn_hits(bank, query, 4, 10.0, (1, 5)) == ([1, 3], 4)
