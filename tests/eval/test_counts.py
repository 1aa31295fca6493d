"""Counts and their ratios against published intervals, closed forms, and coverage with clustered counts."""

from __future__ import annotations

import math

import numpy as np
import pytest

from excise.errors import UsageError
from excise.eval.counts import bonett_price, count, garwood, ratio
from excise.eval.statistics import clopper_pearson


@pytest.mark.parametrize(
    ("total", "low", "high"),
    # Garwood's limits, Biometrika 28 (1936), as tables have them since.
    [(0, 0, 3.689), (1, 0.0253, 5.572), (10, 4.795, 18.390), (50, 37.11, 65.92)],
)
def test_garwood_matches_the_table(total: int, low: float, high: float) -> None:
    assert garwood(total) == pytest.approx((low, high), abs=5e-3)


def test_bonett_price_matches_the_published_interval() -> None:
    # Cavo et al. 2012 in Fagerland, Lydersen & Laake (2014): 59, 6, 16, 80.
    assert bonett_price(59, 16, 6) == pytest.approx((0.7579, 0.9910), abs=5e-5)


def test_the_ratio_turns_with_the_runtimes() -> None:
    low, high = bonett_price(30, 4, 9)
    assert bonett_price(30, 9, 4) == pytest.approx((1 / high, 1 / low))


def test_equal_counts_still_leave_doubt() -> None:
    same = ratio([1] * 5 + [0] * 91, [1] * 5 + [0] * 91)
    assert same.value == 1
    assert same.low is not None
    assert same.high is not None
    # That none of five parts moved says no more than 0.69 to 1.45.
    assert same.low == pytest.approx(0.69, abs=0.01)
    assert same.high == pytest.approx(1 / same.low)


def test_a_count_of_images_is_binomial() -> None:
    found = count(np.arange(96) < 5)
    share = clopper_pearson(5, 96)
    assert (found.value, found.n, found.method) == (5, 96, "exact")
    assert (found.low, found.high) == pytest.approx((share.low * 96, share.high * 96))


def test_nothing_found_still_has_an_upper_end() -> None:
    assert count([0] * 96).high == pytest.approx(96 * (1 - 0.025 ** (1 / 96)))


def test_clustered_parts_widen_the_interval() -> None:
    clustered, spread = np.zeros(200, int), np.zeros(200, int)
    clustered[:10], spread[:30], spread[30:35] = 7, 2, 2
    assert clustered.sum() == spread.sum() == 70
    wide, narrow = count(clustered), count(spread)
    assert wide.high is not None
    assert narrow.high is not None
    # Poisson's upper end of 70 is 88.4; ten images of seven parts each leave more open.
    assert wide.high > 105
    assert narrow.high < 95
    assert "bootstrap" in wide.method


def test_counts_cover_the_truth() -> None:
    """One image in six has parts, one to four of them: the count scatters more than Poisson's interval allows."""
    rng = np.random.default_rng(3)
    n, runs = 150, 300
    truth = n / 6 * 2.5
    covered = poisson = 0
    for _ in range(runs):
        parts = np.where(rng.random(n) < 1 / 6, rng.integers(1, 5, n), 0)
        found = count(parts, resamples=400)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= truth <= found.high
        low, high = garwood(int(parts.sum()))
        poisson += low <= truth <= high
    # 0.940 and 0.770 with this seed.
    assert 0.91 <= covered / runs <= 0.98
    assert poisson / runs <= 0.85


def test_ratios_cover_the_truth() -> None:
    rng = np.random.default_rng(4)
    n, runs = 150, 300
    covered = 0
    for _ in range(runs):
        seen = rng.random(n) < 0.25
        parts = np.where(seen, rng.integers(1, 4, n), 0)
        kept = rng.binomial(parts, 0.7)  # the judged runtime keeps 70 % of the parts
        found = ratio(parts, kept, resamples=400)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 0.7 <= found.high
    # 0.960 with this seed.
    assert covered / runs >= 0.92


def test_a_doubled_count_is_seen() -> None:
    doubled = ratio(np.arange(300) < 20, np.arange(300) < 40)
    assert doubled.value == 2
    assert doubled.low is not None
    assert doubled.low > 1.4


def test_no_reference_count_has_no_ratio() -> None:
    found = ratio([0, 0, 0], [1, 0, 2])
    assert found.value is None
    assert found.error is not None
    assert "counts none" in found.error


def test_the_same_seed_gives_the_same_interval() -> None:
    parts = np.random.default_rng(0).integers(0, 4, 80)
    assert count(parts, seed=5) == count(parts, seed=5)
    assert count(parts, seed=5) != count(parts, seed=6)


@pytest.mark.parametrize("values", [[0.5, 1], [-1, 2], [[1, 2]], [math.inf]])
def test_what_is_no_count_is_refused(values: list[float]) -> None:
    with np.errstate(invalid="ignore"), pytest.raises(UsageError, match="whole number"):
        count(values)


def test_pairs_are_needed() -> None:
    with pytest.raises(UsageError, match="2 and 1 cases"):
        ratio([1, 2], [1])
    with pytest.raises(UsageError, match="no ratio"):
        bonett_price(0, 0, 3)
