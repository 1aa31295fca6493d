"""Intervals and tests against published values and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from excise.errors import UsageError
from excise.eval.statistics import clopper_pearson, mcnemar, proportion, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), table I, methods 3 and 5.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0000, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_matches_newcombe(successes: int, n: int, low: float, high: float) -> None:
    interval = wilson(successes, n)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2527, 0.3676), (15, 148, 0.0578, 0.1617), (0, 20, 0.0000, 0.1684), (1, 29, 0.0009, 0.1776)],
)
def test_clopper_pearson_matches_newcombe(successes: int, n: int, low: float, high: float) -> None:
    interval = clopper_pearson(successes, n)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-5)


def test_clopper_pearson_of_nothing_has_a_closed_form() -> None:
    assert clopper_pearson(0, 96).high == pytest.approx(1 - 0.025 ** (1 / 96), rel=1e-9)


def test_intervals_hold_the_observed_value() -> None:
    for successes in range(13):
        for interval in (wilson(successes, 12), clopper_pearson(successes, 12)):
            assert interval.low - 1e-12 <= interval.value <= interval.high + 1e-12


@pytest.mark.parametrize(("successes", "n"), [(1, 0), (0, 0), (-1, 4), (5, 4)])
def test_impossible_counts_are_refused(successes: int, n: int) -> None:
    with pytest.raises(UsageError, match="not a proportion"):
        wilson(successes, n)


def test_impossible_confidence_is_refused() -> None:
    with pytest.raises(UsageError, match="between 0 and 1"):
        proportion(1, 2, confidence=1.0)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (3, 3), (10, 0), (2, 9)])
def test_mcnemar_is_the_binomial_sum(first: int, second: int) -> None:
    agree = 4
    a = np.array([True] * first + [False] * second + [True] * agree)
    b = np.array([False] * first + [True] * second + [True] * agree)
    tail = sum(math.comb(first + second, k) for k in range(min(first, second) + 1)) / 2 ** (first + second)
    found = mcnemar(a, b)
    assert (found.only_first, found.only_second, found.flips) == (first, second, first + second)
    assert found.n == first + second + agree
    assert found.p_value == pytest.approx(min(1.0, 2 * tail), rel=1e-12)


def test_mcnemar_needs_pairs() -> None:
    with pytest.raises(UsageError, match="pairs"):
        mcnemar(np.array([True]), np.array([True, False]))


def test_a_proportion_is_a_figure_of_a_report() -> None:
    measure = wilson(15, 148).measure("lower")
    assert (measure.value, measure.n, measure.unit, measure.method) == (15 / 148, 148, "fraction", "wilson")
    assert (measure.low, measure.high) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert measure.better == "lower"


def test_mcnemar_matches_the_published_p() -> None:
    # Cavo et al., 2012, as in Fagerland, Lydersen & Laake, Statistics in Medicine 33 (2014): 59, 6, 16, 80.
    first = np.array([True] * 59 + [True] * 6 + [False] * 16 + [False] * 80)
    second = np.array([True] * 59 + [False] * 6 + [True] * 16 + [False] * 80)
    assert mcnemar(first, second).p_value == pytest.approx(0.052479, abs=5e-7)
