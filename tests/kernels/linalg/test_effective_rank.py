import itertools
import math

import pytest
import torch
from torch import Tensor

from fastrdm.kernels.linalg.effective_rank import effective_rank, effective_ranks, spectrum_stats
from fastrdm.kernels.linalg.gram import gram, unit_rows


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(s: Tensor, b: int, d: int) -> Tensor:
    left, right = torch.linalg.qr(rand(b, len(s)))[0], torch.linalg.qr(rand(d, len(s), seed=1))[0]
    x: Tensor = (left * s) @ right.mT
    return x


def entropy_rank(values: Tensor) -> float:
    q = values[values > 0] / values.sum()
    return math.exp(-(q * q.log()).sum().item())


@pytest.mark.parametrize("b, d", [(20, 50), (50, 20), (30, 30)])
@pytest.mark.parametrize("convention", ["eigenvalues", "singular_values"])
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_effective_rank_is_the_definition(b: int, d: int, convention: str, center: bool, normalize: bool) -> None:
    x = rand(b, d) * torch.arange(1, d + 1) ** -0.5 + 0.3
    how = {"convention": convention, "center": center, "normalize": normalize}
    y = torch.nn.functional.normalize(x, dim=1) if normalize else x
    y = y - y.mean(0) if center else y
    s = torch.linalg.svdvals(y)
    want = entropy_rank(s if convention == "singular_values" else s * s)
    assert effective_rank(x, **how).item() == pytest.approx(want, rel=1e-9)  # type: ignore[arg-type]
    fast = effective_rank(x.float(), precision="fp32", **how)  # type: ignore[arg-type]
    assert fast.item() == pytest.approx(want, rel=1e-5 if not center or d < b else 1e-3) and fast.dtype == torch.float32


def test_known_spectra() -> None:
    assert effective_rank(with_spectrum(torch.ones(7).double(), 20, 30)).item() == pytest.approx(7, rel=1e-9)
    r = 0.5  # geometric: entropy of (1 - r) r^k / (1 - r^n)
    s = r ** torch.arange(12, dtype=torch.float64)
    q = s / s.sum()
    want = math.exp(-(q * q.log()).sum().item())
    got = effective_rank(with_spectrum(s, 20, 30), convention="singular_values")
    assert got.item() == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.parametrize("convention", ["eigenvalues", "singular_values"])
def test_edge_inputs(convention: str, precision: str) -> None:
    def rank(x: Tensor) -> float:
        return effective_rank(x, convention=convention, precision=precision).item()  # type: ignore[arg-type]

    for shape in ((4, 9), (9, 4), (1, 5), (5, 1), (1, 1)):
        assert rank(torch.zeros(shape)) == 0
        assert rank(torch.ones(shape)) == pytest.approx(1, abs=1e-6)
        bad = torch.ones(shape)
        bad[0, 0] = math.nan
        assert math.isnan(rank(bad))
        bad[0, 0] = math.inf
        assert math.isnan(rank(bad))
    assert rank(rand(300, 1) @ rand(1, 40)) == pytest.approx(1, abs=1e-6), "rounding adds no directions"
    x = rand(9, 20)
    for scale in (1e-15, 1e15):
        assert rank(x * scale) == pytest.approx(rank(x), rel=1e-5)


def test_effective_rank_of_extreme_scales_in_float64() -> None:
    x = rand(9, 20)
    for scale in (1e-20, 1e20):
        assert effective_rank((x * scale).float()).item() == pytest.approx(effective_rank(x).item(), rel=1e-6)


def test_effective_rank_is_invariant() -> None:
    x = rand(12, 30) * torch.arange(1, 31) ** -0.7
    turn = torch.linalg.qr(rand(30, 30, seed=2))[0]
    variants = [x @ turn, x[torch.randperm(12)], 7 * x, x.mT, torch.nn.functional.pad(x, (0, 4, 0, 3)), -x]
    for convention in ("eigenvalues", "singular_values"):
        want = effective_rank(x, convention=convention).item()
        for other in variants:
            assert effective_rank(other, convention=convention).item() == pytest.approx(want, rel=1e-9)
    batch = torch.stack([x, 2 * x @ turn, x.flip(0)])
    torch.testing.assert_close(effective_rank(batch), effective_rank(x).expand(3))


def test_statistics_of_a_known_spectrum() -> None:
    values = torch.tensor([8.0, 4.0, 2.0, 2.0]).double()
    stats = spectrum_stats(gram(with_spectrum(values.sqrt(), 4, 11)), topk=2, slope_range=(1, 1.0))
    torch.testing.assert_close(stats.eigenvalues, values)
    assert stats.participation_ratio.item() == pytest.approx(16**2 / 88)
    assert stats.stable_rank.item() == pytest.approx(2)
    assert stats.erank_l.item() == pytest.approx(entropy_rank(values))
    assert stats.erank_s.item() == pytest.approx(entropy_rank(values.sqrt()))
    torch.testing.assert_close(stats.topk, torch.tensor([0.5, 0.25]).double())
    assert stats.ok.item() is True


def test_slope_finds_the_exponent_of_a_power_law() -> None:
    for alpha in (0.5, 1.0, 2.0):
        index = torch.arange(1, 41, dtype=torch.float64)
        x = torch.stack([with_spectrum(index ** (-alpha / 2), 40, 60)] * 2)
        torch.testing.assert_close(spectrum_stats(gram(x)).slope, torch.tensor([alpha, alpha]).double())


def test_the_chain_of_ranks() -> None:
    """1 <= stable rank <= participation ratio <= erank of eigenvalues <= of singular values <= n: Renyi's orders."""
    x = torch.stack([rand(16, 40, seed=i) * torch.arange(1, 41) ** (-i / 4) for i in range(6)])
    stats = spectrum_stats(gram(x))
    chain = [
        torch.ones(6),
        stats.stable_rank,
        stats.participation_ratio,
        stats.erank_l,
        stats.erank_s,
        torch.full((6,), 16),
    ]
    for smaller, larger in itertools.pairwise(chain):
        assert (smaller <= larger + 1e-9).all()


def test_what_is_not_finite_spoils_its_own_matrix_alone() -> None:
    x = rand(3, 5, 9)
    x[1, 0, 0] = math.nan
    stats = spectrum_stats(gram(x))
    assert stats.ok.tolist() == [True, False, True]
    for name, value in stats._asdict().items():
        if name != "ok":
            assert value[1].isnan().all() and value[[0, 2]].isfinite().all(), name
    zero = spectrum_stats(torch.zeros(2, 4, 4))
    assert zero.ok.all() and all(not value.any() for name, value in zero._asdict().items() if name != "ok")


@pytest.mark.parametrize("precision", ["fp32", "half", "fp16x3"])
def test_statistics_of_extreme_scales_are_defined(precision: str) -> None:
    x = rand(9, 20).float()
    for scale in (1e-15, 1e15):
        stats = spectrum_stats(gram(x * scale, precision=precision))
        assert stats.ok and stats.erank_l.item() == pytest.approx(effective_rank(x).item(), rel=1e-3)
    large = spectrum_stats(gram(x * 1e20, precision=precision))  # squares beyond float32
    assert not large.ok and large.erank_l.isnan() and large.eigenvalues.isnan().all()
    small = spectrum_stats(gram(x * 1e-25, precision=precision))  # squares below it
    assert small.ok and small.erank_l == 0 and not small.eigenvalues.any()


def test_bars_of_the_monitor() -> None:
    """One pass over rounded features is enough: effective ranks within 1e-3."""
    for alpha in (0.5, 1.0, 2.0):
        s = torch.arange(1, 65, dtype=torch.float64) ** (-alpha / 2)
        x = with_spectrum(s, 64, 256)
        x = x * (64 * 256) ** 0.5 / x.norm()
        stats = spectrum_stats(gram(x.to(torch.bfloat16), precision="half"))
        assert stats.erank_l.item() == pytest.approx(entropy_rank(s * s), rel=1e-3)
        assert stats.erank_s.item() == pytest.approx(entropy_rank(s), rel=1e-3)


def test_refuses() -> None:
    with pytest.raises(ValueError, match="convention must be eigenvalues or singular_values, got 'sv'"):
        effective_rank(torch.zeros(2, 2), convention="sv")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"takes floats of shape .* got \(2,\)"):
        effective_rank(torch.zeros(2))
    with pytest.raises(ValueError, match="precision must be fp64 or fp32"):
        effective_rank(torch.zeros(2, 2), precision="bf16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"takes Gram matrices .* got \(2, 3\)"):
        spectrum_stats(torch.zeros(2, 3))


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
def test_no_rows_have_rank_0(precision: str) -> None:
    for shape, want in (((0, 7), ()), ((2, 0, 7), (2,)), ((3, 7, 0), (3,)), ((0, 4, 7), (0,))):
        rank = effective_rank(torch.zeros(shape), precision=precision)  # type: ignore[arg-type]
        assert rank.shape == want and (rank == 0).all()
        assert rank.dtype == {"fp64": torch.float64, "fp32": torch.float32}[precision]


@pytest.mark.parametrize("convention", ["eigenvalues", "singular_values"])
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("size", [1e200, 1e-200, 1e307, 1e-300, 3e-13])
def test_the_rank_does_not_hang_on_the_scale(convention: str, center: bool, normalize: bool, size: float) -> None:
    x = rand(20, 12) * torch.arange(1, 13) ** -0.7 + 0.2
    how = {"convention": convention, "center": center, "normalize": normalize}
    want = effective_rank(x, **how).item()  # type: ignore[arg-type]
    assert effective_rank(x * size, **how).item() == pytest.approx(want, rel=1e-9)  # type: ignore[arg-type]
    fast = effective_rank(x * size, precision="fp32", **how)  # type: ignore[arg-type]
    assert fast.item() == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_of_any_length_count_alike_where_rows_are_normalized(dtype: torch.dtype) -> None:
    x = rand(20, 12)
    lengths = torch.logspace(-30, 30, 20, dtype=torch.float64)[:, None]
    want = effective_rank(x, normalize=True).item()
    assert effective_rank((x * lengths).to(dtype), normalize=True).item() == pytest.approx(want, rel=1e-5)
    tiny = effective_rank((x * lengths).to(dtype), normalize=True, precision="fp32")
    assert tiny.item() == pytest.approx(want, rel=1e-4)


def test_unit_rows_are_those_of_torch_bit_for_bit_and_keep_zeros() -> None:
    x = rand(50, 33) * torch.logspace(-9, 9, 50, dtype=torch.float64)[:, None]
    for rows in (x, x.float()):
        assert torch.equal(unit_rows(rows), torch.nn.functional.normalize(rows, dim=-1))
    assert (unit_rows(torch.zeros(2, 3)) == 0).all() and unit_rows(torch.tensor([[math.inf, 1.0]])).isnan().any()


def test_ranks_of_several_stacks_are_those_of_each_and_take_one_eigensolve_a_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stacks = [rand(2, 9, 20), rand(1, 9, 30, seed=1), rand(3, 9, 5, seed=2)]
    stacks[0][1] = 0
    stacks[1][0, 3, 4] = math.nan
    want = [effective_rank(x) for x in stacks]
    calls: list[tuple[int, ...]] = []
    solve = torch.linalg.eigvalsh

    def counted(x: Tensor, **how: str) -> Tensor:
        calls.append(tuple(x.shape))
        return solve(x, **how)

    monkeypatch.setattr(torch.linalg, "eigvalsh", counted)
    got = effective_ranks([gram(x) for x in stacks])
    assert sorted(calls) == [(3, 5, 5), (3, 9, 9)]
    for ranks, expected in zip(got, want, strict=True):
        torch.testing.assert_close(ranks, expected, rtol=1e-9, atol=0, equal_nan=True)
