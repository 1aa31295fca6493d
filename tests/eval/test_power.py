"""Power against simulation with the report's own functions, closed forms, and limits that no rule can beat."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from scipy import stats

from excise.errors import UsageError
from excise.eval.paired_outcomes import flips_p_value, tango
from excise.eval.power import (
    FlipsByChance,
    IncreaseAtMost,
    RateAtMost,
    RateAtMostTimes,
    Rule,
    catch_probability,
    gate_probabilities,
    smallest_increase,
    upper_end,
)
from excise.eval.power_plan import Goal, achieved, plan
from excise.eval.statistics import proportion

RULES: tuple[Rule, ...] = (RateAtMost(0.25), RateAtMostTimes(2.0), IncreaseAtMost(0.08), FlipsByChance(0.01))


@pytest.mark.parametrize("method", ["exact", "wilson"])
def test_upper_ends_are_those_of_reports(method: str) -> None:
    for successes in range(41):
        own = proportion(successes, 40, method=method).high  # type: ignore[arg-type]
        assert upper_end(successes, 40, method) == pytest.approx(own, abs=1e-12)  # type: ignore[arg-type]


@cache
def upper_of_report(successes: int, n: int) -> float:
    return proportion(successes, n, method="exact").high


@cache
def increase_of_report(added: int, lost: int, n: int) -> float:
    return tango(added, lost, n)[1]


@cache
def p_of_report(added: int, lost: int) -> float:
    reference = np.array([False] * added + [True] * lost, np.bool_)
    return flips_p_value(reference, ~reference).value if added + lost else 1.0  # type: ignore[return-value]


def simulated(rule: Rule, n: int, base: float, added: float, churn: float, runs: int) -> float:
    """The share of runs that the rule rejects, judged with what a report would say."""
    rng = np.random.default_rng(0)
    rejected = 0
    for _ in range(runs):
        reference = rng.random(n) < base
        draw = rng.random(n)
        lost = reference & (draw < churn / 2 / base)
        gained = ~reference & (draw < (churn / 2 + added) / (1 - base))
        judged = (reference & ~lost) | gained
        match rule:
            case RateAtMost():
                rejected += upper_of_report(int(judged.sum()), n) > rule.bound
            case RateAtMostTimes():
                high = upper_of_report(int(judged.sum()), n)
                rejected += high > rule.times * reference.sum() / n + rule.plus
            case IncreaseAtMost():
                rejected += increase_of_report(int(gained.sum()), int(lost.sum()), n) > rule.bound
            case FlipsByChance():
                rejected += p_of_report(int(gained.sum()), int(lost.sum())) < rule.alpha
    return rejected / runs


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize(("added", "churn"), [(0.0, 0.05), (0.08, 0.0), (0.08, 0.05)])
def test_probabilities_are_what_simulation_finds(rule: Rule, added: float, churn: float) -> None:
    runs = 1500
    exact = catch_probability(rule, 120, 0.15, added, churn=churn)
    found = simulated(rule, 120, 0.15, added, churn, runs)
    # Four standard errors; the largest of the twelve differences was 1.9.
    assert found == pytest.approx(exact, abs=4 * np.sqrt(max(exact * (1 - exact), 1 / runs) / runs))


def test_a_fixed_bound_has_a_closed_form() -> None:
    """It rejects from some count k on, and P(X ≥ k) is 0.95 at the 0.95 quantile of Beta(k, n − k + 1)."""
    n, base = 200, 0.1
    k = next(k for k in range(n + 1) if proportion(k, n, method="exact").high > 0.25)
    expected = stats.beta.ppf(0.95, k, n - k + 1) - base
    found = smallest_increase(RateAtMost(0.25), n, base, unit="fraction")
    assert found.value == pytest.approx(expected, abs=1e-8)
    counted = smallest_increase(RateAtMost(0.25), n, base, unit="count")
    assert counted.value == pytest.approx(expected * n, abs=1e-6)
    assert (counted.n, counted.unit) == (n, "count")


def test_flips_without_churn_have_a_closed_form() -> None:
    # Only gains: k of k flips have p = 2 / 2^k, which is below 0.01 from k = 8 on.
    expected = stats.binom.sf(7, 96, 0.1)
    # The reference's detections beyond the tails that are left out: 1e-10.
    assert catch_probability(FlipsByChance(0.01), 96, 0.3, 0.1) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_the_smallest_increase_is_where_power_begins(rule: Rule) -> None:
    least = smallest_increase(rule, 142, 0.14, churn=0.01, unit="fraction").value
    assert least is not None
    below, at = gate_probabilities(rule, 142, 0.14, (least - 1e-4, least), churn=0.01)
    assert below < 0.95 <= at
    assert at == pytest.approx(0.95, abs=1e-6)


def test_mcnemar_keeps_its_level_whatever_the_churn() -> None:
    for n, churn in ((96, 0.02), (142, 0.2), (1000, 0.1)):
        assert catch_probability(FlipsByChance(0.01), n, 0.2, 0.0, churn=churn) <= 0.01


def test_more_images_catch_smaller_increases() -> None:
    least = [smallest_increase(FlipsByChance(0.001), n, 0.1, unit="fraction").value for n in (50, 200, 800, 3200)]
    assert least == sorted(least, key=lambda value: -(value or 0))


def test_a_rule_that_rejects_everything_has_no_power() -> None:
    found = smallest_increase(RateAtMost(0.01), 20, 0.0, unit="count")
    assert found.value is None
    assert found.error is not None
    assert "right runtime" in found.error
    none = smallest_increase(FlipsByChance(0.001), 8, 0.2, unit="count")
    assert none.value is None
    assert none.error is not None
    assert "no increase" in none.error


@pytest.mark.parametrize(
    "goal",
    [
        Goal(IncreaseAtMost(0.025), base_rate=0.05, increase=0.05),
        Goal(RateAtMostTimes(2.0), base_rate=0.14, increase=0.2, churn=0.01),
        Goal(FlipsByChance(0.01), base_rate=0.14, increase=0.1, churn=0.02),
        Goal(RateAtMost(0.25), base_rate=0.14, increase=0.2),
    ],
    ids=lambda goal: type(goal.rule).__name__,
)
def test_a_plan_is_met_from_there_on(goal: Goal) -> None:
    found = plan(goal)
    for n in range(found.n, found.n + 25):
        there = achieved(goal, n)
        assert there.catch >= goal.power
        assert there.false_alarm <= goal.false_alarm
    fewer = achieved(goal, found.n - 1)
    assert fewer.catch < goal.power or fewer.false_alarm > goal.false_alarm


def test_a_paired_plan_without_churn_has_a_closed_form() -> None:
    """A right runtime has no flips, and passes once z² / (n + z²) ≤ bound."""
    z2 = stats.norm.ppf(0.975) ** 2
    found = plan(Goal(IncreaseAtMost(0.025), base_rate=0.05, increase=0.05))
    assert found.n == int(np.ceil(z2 * (1 - 0.025) / 0.025))


def test_goals_that_no_number_of_images_meets_are_refused() -> None:
    with pytest.raises(UsageError, match="allows an increase of"):
        plan(Goal(RateAtMostTimes(2.0), base_rate=0.14, increase=0.1))
    with pytest.raises(UsageError, match="rejects a right runtime"):
        plan(Goal(RateAtMost(0.1), base_rate=0.14, increase=0.1))
    with pytest.raises(UsageError, match="200 cases are too few"):
        plan(Goal(IncreaseAtMost(0.005), base_rate=0.05, increase=0.01), most=200)


def test_impossible_rates_are_refused() -> None:
    with pytest.raises(UsageError, match="base rate"):
        catch_probability(RateAtMost(0.1), 10, 1.0, 0.0)
    with pytest.raises(UsageError, match="no fraction"):
        catch_probability(RateAtMost(0.1), 10, 0.5, 0.6)
    with pytest.raises(UsageError, match="flips by rounding"):
        catch_probability(RateAtMost(0.1), 10, 0.05, 0.0, churn=0.2)
    with pytest.raises(UsageError, match="power"):
        smallest_increase(RateAtMost(0.1), 10, 0.05, power=95, unit="count")
    with pytest.raises(UsageError, match="can't be"):
        Goal(RateAtMost(0.1), base_rate=0.9, increase=0.2)
    with pytest.raises(UsageError, match="false alarm rate"):
        Goal(RateAtMost(0.1), base_rate=0.1, increase=0.2, false_alarm=0)
    with pytest.raises(UsageError, match="needs cases"):
        catch_probability(RateAtMost(0.1), 0, 0.5, 0.1)
