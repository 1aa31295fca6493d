"""Paired increases against published intervals, the score test's definition, and coverage."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from scipy import optimize, stats

from excise.errors import UsageError
from excise.eval.paired_outcomes import flips, flips_p_value, increase, tango, tango_score
from excise.eval.statistics import mcnemar

Outcomes = npt.NDArray[np.bool_]


def outcomes(both: int, only_reference: int, only_judged: int, neither: int) -> tuple[Outcomes, Outcomes]:
    reference = np.array([True] * (both + only_reference) + [False] * (only_judged + neither))
    judged = np.array([True] * both + [False] * only_reference + [True] * only_judged + [False] * neither)
    return reference, judged


@pytest.mark.parametrize(
    ("only_judged", "only_reference", "n", "low", "high"),
    # Fagerland, Lydersen & Laake, Statistics in Medicine 33 (2014): Bentur et al. 2009 and Cavo et al. 2012.
    [(1, 7, 21, -0.517, -0.026), (6, 16, 161, -0.1240, -0.0054)],
)
def test_tango_matches_published_intervals(
    only_judged: int, only_reference: int, n: int, low: float, high: float
) -> None:
    assert tango(only_judged, only_reference, n) == pytest.approx((low, high), abs=5e-4 if n == 21 else 5e-5)


def test_the_score_is_that_of_the_likelihood() -> None:
    """The spread at delta is that of the constrained maximum-likelihood estimate, here found by a general optimiser."""
    b, c, n, delta = 9, 4, 60, 0.12

    def loss(q: float) -> float:
        return -(b * np.log(q + delta) + c * np.log(q) + (n - b - c) * np.log(1 - 2 * q - delta))

    q = float(optimize.minimize_scalar(loss, bounds=(1e-9, (1 - delta) / 2 - 1e-9), options={"xatol": 1e-12}).x)
    expected = (b - c - n * delta) / np.sqrt(n * (2 * q + delta * (1 - delta)))
    # The optimiser's own accuracy: measured 3.3e-9.
    assert tango_score(b, c, n, delta) == pytest.approx(expected, rel=1e-7)


def test_the_score_at_zero_is_mcnemars_asymptotic_test() -> None:
    # (b − c) / √(b + c); Cavo et al.: Z = −2.132.
    assert tango_score(6, 16, 161, 0.0) == pytest.approx(-10 / np.sqrt(22))


@pytest.mark.parametrize("n", [20, 96, 4703])
def test_agreeing_pairs_exclude_what_they_can(n: int) -> None:
    z2 = stats.norm.ppf(0.975) ** 2
    assert tango(0, 0, n) == pytest.approx((-z2 / (n + z2), z2 / (n + z2)), rel=1e-9)


def test_the_interval_turns_with_the_runtimes() -> None:
    low, high = tango(7, 2, 50)
    assert tango(2, 7, 50) == pytest.approx((-high, -low))
    assert tango(5, 0, 5)[1] == 1.0
    assert tango(0, 5, 5)[0] == -1.0


@pytest.mark.parametrize(("only_judged", "only_reference"), [(0.06, 0.02), (0.1, 0.0), (0.05, 0.05), (0.02, 0.02)])
def test_the_upper_end_is_rarely_too_low(only_judged: float, only_reference: float) -> None:
    """Exactly, by the trinomial sum: the end that a gate judges is below the truth in 2.5 % of cases, about."""
    n, missed = 96, 0.0
    law = stats.multinomial(n, [only_judged, only_reference, 1 - only_judged - only_reference])
    for b in range(26):
        for c in range(18):
            weight = float(law.pmf([b, c, n - b - c]))
            if weight > 1e-6:
                missed += weight * (tango(b, c, n)[1] < only_judged - only_reference)
    # 0.0208, 0.0107, 0.0216 and 0.0202.
    assert 0.01 <= missed <= 0.022


def test_figures_of_a_report() -> None:
    reference, judged = outcomes(30, 2, 9, 55)
    measure = increase(reference, judged)
    assert measure.value == pytest.approx(7 / 96)
    assert (measure.low, measure.high) == pytest.approx(tango(9, 2, 96))
    changed = flips(reference, judged)
    assert (changed.value, changed.n, changed.unit) == (11, 96, "count")
    assert changed.low is not None
    assert changed.high is not None
    assert changed.low < 11 < changed.high
    p = flips_p_value(reference, judged)
    assert p.value == mcnemar(reference, judged).p_value
    assert (p.low, p.high, p.better) == (None, None, "higher")


def test_flips_p_value_keeps_its_level() -> None:
    rng = np.random.default_rng(2)
    ps = []
    for _ in range(2000):
        reference = rng.random(96) < 0.3
        flipped = rng.random(96) < 0.1
        # A right runtime: what flips does so whichever way it was.
        judged = np.where(flipped, rng.random(96) < 0.3, reference)
        ps.append(flips_p_value(reference, judged).value)
    # 0.0025 with this seed: so few flips make the exact test conservative.
    assert np.mean(np.array(ps) < 0.05) <= 0.05


def test_a_wrong_runtime_is_seen() -> None:
    p = flips_p_value(*outcomes(5, 0, 12, 79)).value
    assert p is not None
    assert p < 0.001
    low = increase(*outcomes(5, 0, 12, 79)).low
    assert low is not None
    assert low > 0.05


def test_no_cases_have_no_figure() -> None:
    none = np.array([], np.bool_)
    for measure in (increase(none, none), flips(none, none), flips_p_value(none, none)):
        assert measure.value is None
        assert measure.error is not None


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(UsageError, match="3 and 4 flips of 5 cases"):
        tango(3, 4, 5)
    with pytest.raises(UsageError, match="pairs"):
        increase(np.array([True]), np.array([True, False]))
