"""A sample of paired rows in place of moments in groups: the same ranks, and intervals that hold what they promise."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor

from fastrdm.monitoring import paired_rows, rank_statistics, window
from fastrdm.monitoring.moments import add, zeros
from fastrdm.monitoring.paired_rows import IMAGES, PairedRows
from fastrdm.monitoring.rank_statistics import CENTERED_CONVENTION, HEADLINE_CONVENTION, rank
from fastrdm.monitoring.window import Shape, Window, WindowReport, bytes_of

CPU = torch.device("cpu")
WIDTH = 40
SHAPE = Shape(4096, {"online": WIDTH, "target": WIDTH, "hidden": 12, "features": 12}, 64, 8,
              (HEADLINE_CONVENTION, CENTERED_CONVENTION))  # fmt: skip


def batch(step: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Rows of 64 images: the online branch amplifies a direction of the target and turns its last one round."""
    generator = torch.Generator().manual_seed(step)
    image = torch.randn(1, 64, WIDTH, generator=generator, dtype=torch.float64) * torch.linspace(2, 0.3, WIDTH)
    target = image + 0.3 * torch.randn(2, 64, WIDTH, generator=generator, dtype=torch.float64) + 0.2
    online = target.clone()
    online[..., 0] *= 3
    online[..., -1] *= -1
    rest = torch.randn(2, 64, 12, generator=generator, dtype=torch.float64)
    return {name: x.to(dtype) for name, x in
            {"online": online, "target": target, "hidden": rest, "features": rest}.items()}  # fmt: skip


def filled(steps: range = range(32), into: Window | None = None) -> Window:
    into = into or Window(SHAPE, CPU)
    for step in steps:
        into.add(batch(step))
    return into


@pytest.fixture
def grouped() -> WindowReport:
    return window.read(filled(), 1)


def paired(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "GROUPED_WIDTH", 30)
    monkeypatch.setattr(paired_rows, "IMAGES", 1024)


def test_ranks_are_those_of_all_rows_and_intervals_those_of_the_sample(
    grouped: WindowReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bounds: a rank by a thousandth, a half-width to between a half and twice that of all rows in groups."""
    paired(monkeypatch)
    full = filled()
    assert full.pairs is not None and full.pairs.filled == 1024, "32 of the 64 images of each batch"
    assert len(full.moments["online/unit"].panels[0]) == 1 and "cross" not in full.moments
    found = window.read(full, 1)
    assert found.metrics.keys() == grouped.metrics.keys()
    assert [line["tap"] for line in found.spectra] == [line["tap"] for line in grouped.spectra]
    for key, value in found.metrics.items():
        if not key.endswith(("low", "high")):
            assert value == pytest.approx(grouped.metrics[key], rel=1e-3, abs=1e-3), key
    for name in ("difference", "null"):
        for convention in (HEADLINE_CONVENTION, CENTERED_CONVENTION):
            key = f"{name}/{convention}/window"
            half, other = ((m[f"{key}/high"] - m[f"{key}/low"]) / 2 for m in (found.metrics, grouped.metrics))
            assert 0.5 < half / other < 2, key
            assert (found.metrics[f"{key}/high"] + found.metrics[f"{key}/low"]) / 2 == pytest.approx(found.metrics[key])
    assert found.metrics["filter/negative_share/window"] == 1 / WIDTH


def test_a_window_goes_on_in_the_middle_with_its_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    before = filled(range(10)).state_dict()
    paired(monkeypatch)
    first = filled(range(10))
    second = Window(SHAPE, CPU)
    assert not second.load_state_dict(before, keep=True), "one that kept groups is dropped"
    assert second.load_state_dict(deepcopy(first.state_dict()), keep=True)
    reports = [window.read(filled(range(10, 32), each), 1) for each in (first, second)]
    assert reports[0] == reports[1]


@pytest.mark.parametrize("tied", [0.0, 0.05, 0.1, 0.2])
def test_intervals_of_a_sample_hold_the_mean_of_all_images(tied: float) -> None:
    """40 batches of 256 images, 52 of each in the sample, tied by at most a fifth of their deviation."""
    generator = torch.Generator().manual_seed(0)
    held, halves = 0, 0.0
    for _ in range(200):
        together = tied * torch.randn(40, 1, generator=generator, dtype=torch.float64)
        effects = torch.randn(40, 256, generator=generator, dtype=torch.float64) + together
        clusters = torch.arange(40).repeat_interleave(52)
        half = rank_statistics.sampled_half_width(effects[:, :52].flatten(), clusters, 40 * 256)
        held += abs(effects.mean().item()) < half
        halves += half / 200
    exact = 1.96 * (tied**2 / 40 + 1 / (40 * 256)) ** 0.5
    assert held >= 180, "nine tenths of intervals of 95 %"
    assert 0.98 * exact < halves < 1.3 * exact


def test_a_batch_is_a_cluster_unless_a_window_has_few() -> None:
    rows = PairedRows(3, CPU)
    x = torch.nn.functional.normalize(torch.randn(2, 2048, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
    rows.add(x, -x, 4 * 2 * 2048, 8, 5)
    assert rows.filled == IMAGES // 4 and set(rows.clusters[: rows.filled].tolist()) == {5}
    rows.add(x, -x, 2 * 2048, 8, None)
    assert rows.filled == IMAGES, "no more than there is room for"
    assert rows.clusters[IMAGES // 4 :].tolist() == [b % 8 for b in range(IMAGES * 3 // 4)]
    torch.testing.assert_close(rows.rows[0, :, :512].float(), x[:, :512], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(rows.rows[0], -rows.rows[1])


def test_lean_eigenvalues_are_off_by_less_than_what_counts_as_rounding() -> None:
    x = torch.randn(2, 900, 150, generator=torch.Generator().manual_seed(1)) * torch.logspace(0, -4, 150) + 0.5
    x = torch.nn.functional.normalize(x, dim=-1)
    moments = zeros(150, 1, CPU, torch.float32, block=64)
    add(moments, x)
    for center in (False, True):
        exact = rank_statistics.eigen(moments, center)
        for vectors in (False, True):
            lean = rank_statistics.lean_eigen(moments, center, vectors)
            torch.testing.assert_close(lean.values, exact.values, rtol=0, atol=moments.noise.item())
            assert rank(lean, "erank_l") == pytest.approx(rank(exact, "erank_l"), rel=1e-3)
        matrix = moments.matrix(center).float()
        torch.testing.assert_close((lean.vectors * lean.values.float()) @ lean.vectors.mT, matrix, rtol=0, atol=1e-5)
        torch.testing.assert_close(moments.matrix(center, dtype=torch.float32), matrix)


@pytest.mark.parametrize(("features", "bound"), [(512, 70), (2048, 93)])
def test_windows_of_heads_of_2048_take_less_than_100_mib(features: int, bound: int) -> None:
    shape = Shape(20480, {"online": 2048, "target": 2048, "hidden": 2048, "features": features}, 2048, 8, ())
    assert bytes_of(shape, CPU) < bound * 2**20
    one = Window(shape, CPU)
    one.add({tap: torch.ones(2, 4, width) for tap, width in shape.widths.items()})
    assert one.pairs is not None
    held = sum(x.nbytes for m in one.moments.values() for x in (m.first, *m.panels)) + one.pairs.rows.nbytes
    assert bytes_of(shape, CPU) == held
