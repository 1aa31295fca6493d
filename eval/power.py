"""What a gate would catch: exact probabilities by binomial sums, and the number of images that a goal needs.

A right runtime detects the concept in a share p₀ of n cases, as the reference does, and flips a share f of all cases by
rounding, half of them each way. A wrong one detects it in δ more:

    P(only in the judged runtime) = f/2 + δ,    P(only in the reference) = f/2

With Y ~ Bin(n, p₀) the reference's detections, C | Y ~ Bin(Y, (f/2) / p₀) those that the judged runtime lacks, and
B | Y ~ Bin(n − Y, (f/2 + δ) / (1 − p₀)) those that it adds, every rule below rejects from some B on, given Y and C:

| rule | rejects where |
|---|---|
| ``RateAtMost`` | the upper end of the judged runtime's rate, (Y − C + B) / n, is above a bound |
| ``RateAtMostTimes`` | it is above ``times`` · Y / n + ``plus`` |
| ``IncreaseAtMost`` | the upper end of Tango's interval of (B − C) / n is above a bound |
| ``FlipsByChance`` | McNemar's exact p of (B, C) is below α |

At δ = 0 the same sum is the probability that a right runtime is rejected. Sums leave out what lies in tails of 10⁻¹⁰.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

import numpy as np
import numpy.typing as npt
from scipy import stats

from excise.errors import UsageError
from excise.eval.evaluation import Measure
from excise.eval.paired_outcomes import tango_score
from excise.eval.statistics import Method

Ints = npt.NDArray[np.int64]
Real = npt.NDArray[np.float64]

_TAIL = 1e-10


class Rule(Protocol):
    """A condition that a judged runtime must meet."""

    #: Whether it also rejects a runtime that detects less.
    two_sided: ClassVar[bool]

    def rejects(self, n: int, reference: Ints, lost: Ints, added: Ints) -> npt.NDArray[np.bool_]:
        """Whether it fails with these detections: the reference's, those lost of them, and those added; broadcast."""
        ...

    def limit(self, base_rate: float) -> float:
        """The increase that endless cases would still let pass; at or below 0, a right runtime fails."""
        ...


@dataclass(frozen=True)
class RateAtMost:
    """The upper end of the judged runtime's own rate is at most ``bound``, a fraction."""

    bound: float
    method: Method = "exact"
    confidence: float = 0.95
    two_sided: ClassVar[bool] = False

    def rejects(self, n: int, reference: Ints, lost: Ints, added: Ints) -> npt.NDArray[np.bool_]:
        """As in ``Rule``."""
        return upper_end(reference - lost + added, n, self.method, self.confidence) > self.bound

    def limit(self, base_rate: float) -> float:
        """As in ``Rule``."""
        return self.bound - base_rate


@dataclass(frozen=True)
class RateAtMostTimes:
    """The upper end of the judged runtime's rate is at most ``times`` the reference's observed one, and ``plus``."""

    times: float = 2.0
    plus: float = 0.0
    method: Method = "exact"
    confidence: float = 0.95
    two_sided: ClassVar[bool] = False

    def rejects(self, n: int, reference: Ints, lost: Ints, added: Ints) -> npt.NDArray[np.bool_]:
        """As in ``Rule``."""
        bound = self.times * reference / n + self.plus
        return upper_end(reference - lost + added, n, self.method, self.confidence) > bound

    def limit(self, base_rate: float) -> float:
        """As in ``Rule``."""
        return self.times * base_rate + self.plus - base_rate


@dataclass(frozen=True)
class IncreaseAtMost:
    """The upper end of the paired increase is at most ``bound``, a fraction of the cases."""

    bound: float
    confidence: float = 0.95
    two_sided: ClassVar[bool] = False

    def rejects(self, n: int, reference: Ints, lost: Ints, added: Ints) -> npt.NDArray[np.bool_]:
        """As in ``Rule``."""
        z = float(stats.norm.ppf(0.5 + self.confidence / 2))
        return (added - lost > n * self.bound) | (tango_score(added, lost, n, self.bound) > -z)

    def limit(self, base_rate: float) -> float:
        """As in ``Rule``."""
        return self.bound


@dataclass(frozen=True)
class FlipsByChance:
    """McNemar's exact two-sided p is at least ``alpha``."""

    alpha: float = 0.001
    two_sided: ClassVar[bool] = True

    def rejects(self, n: int, reference: Ints, lost: Ints, added: Ints) -> npt.NDArray[np.bool_]:
        """As in ``Rule``."""
        p = 2 * stats.binom.cdf(np.minimum(lost, added), lost + added, 0.5)
        return np.asarray((added != lost) & (p < self.alpha))

    def limit(self, base_rate: float) -> float:
        """As in ``Rule``: with enough cases any increase is seen."""
        return _TAIL


def upper_end(successes: npt.ArrayLike, n: int, method: Method = "exact", confidence: float = 0.95) -> Real:
    """The upper end of ``statistics.proportion``'s interval, elementwise."""
    k = np.asarray(successes, np.float64)
    if method == "exact":
        ends: Real = np.where(k >= n, 1.0, stats.beta.isf((1 - confidence) / 2, k + 1, np.maximum(n - k, 1)))
        return ends
    z2 = float(stats.norm.ppf(0.5 + confidence / 2)) ** 2
    wilson: Real = (k + z2 / 2 + np.sqrt(z2 * (k * (1 - k / n) + z2 / 4))) / (n + z2)
    return np.minimum(wilson, 1.0)


def gate_probabilities(
    rule: Rule, n: int, base_rate: float, increases: Sequence[float], *, churn: float = 0.0
) -> tuple[float, ...]:
    """``catch_probability`` of several increases, for little more than one costs."""
    exact = _Sum.of(rule, n, base_rate, churn)
    return tuple(exact.probability(increase) for increase in increases)


def catch_probability(rule: Rule, n: int, base_rate: float, increase: float, *, churn: float = 0.0) -> float:
    """How likely ``rule`` is to reject a runtime that detects ``increase`` more of the cases.

    Args:
        base_rate, increase, churn: p₀, δ and f above, fractions of the n cases. With ``increase=0`` the result is the
            rate at which right runtimes are rejected.

    Raises:
        UsageError: no cases, or rates that no runtime can have.
    """
    return _Sum.of(rule, n, base_rate, churn).probability(increase)


def smallest_increase(
    rule: Rule, n: int, base_rate: float, *, power: float = 0.95, churn: float = 0.0, unit: Literal["count", "fraction"]
) -> Measure:
    """The smallest increase in detections that ``rule`` rejects with probability ``power``, over n cases.

    Args:
        unit: ``count`` gives images of n, ``fraction`` their share.

    Raises:
        UsageError: no cases, rates that no runtime can have, or a power outside (0, 1).
    """
    if not 0 < power < 1:
        raise UsageError(f"a power lies between 0 and 1, not at {power}")
    exact = _Sum.of(rule, n, base_rate, churn)
    low, high = 0.0, exact.most
    method = f"exact binomial, power {power:g}"
    if exact.probability(high) < power:
        error = f"no increase is caught with probability {power:g} in {n} cases"
        return Measure(value=None, n=n, unit=unit, method=method, better="lower", error=error)
    if exact.probability(low) >= power:
        error = f"the rule rejects a right runtime too in {n} cases: take more, or another bound"
        return Measure(value=None, n=n, unit=unit, method=method, better="lower", error=error)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if exact.probability(middle) >= power else (middle, high)
    return Measure(
        value=high * n if unit == "count" else high, n=n, unit=unit, method=method, confidence=power, better="lower"
    )


@dataclass(frozen=True)
class _Sum:
    """The sum over Y and C, with the least B that the rule rejects in each term; independent of the increase."""

    n: int
    base_rate: float
    churn: float
    weight: Real = field(repr=False)  #: P(Y, C), one a term
    absent: Ints = field(repr=False)  #: n − Y
    least: Ints = field(repr=False)  #: of B, the first that is rejected for too many; n + 1 where none is
    last: Ints | None = field(repr=False)  #: of B, the last that is rejected for too few; −1 where none is

    @classmethod
    def of(cls, rule: Rule, n: int, base_rate: float, churn: float) -> _Sum:
        if n < 1:
            raise UsageError(f"a gate needs cases, not {n}")
        if not 0 <= base_rate < 1:
            raise UsageError(f"a base rate is a fraction from 0, below 1, not {base_rate}")
        if not 0 <= churn <= 2 * min(base_rate, 1 - base_rate):
            raise UsageError(
                f"with a base rate of {base_rate:g}, flips by rounding are a share of 0 to "
                f"{2 * min(base_rate, 1 - base_rate):g} of the cases, not {churn:g}"
            )
        reference = _support(n, base_rate)
        loss = churn / 2 / base_rate if base_rate else 0.0
        lost = np.arange(int(stats.binom.isf(_TAIL, int(reference[-1]), loss)) + 1, dtype=np.int64)
        y, c = (part.ravel() for part in np.meshgrid(reference, lost, indexing="ij"))
        weight = stats.binom.pmf(y, n, base_rate) * stats.binom.pmf(c, y, loss)
        likely = weight > _TAIL / len(weight)
        y, c, weight = y[likely], c[likely], weight[likely]
        if not rule.two_sided:
            least = _first(lambda b: rule.rejects(n, y, c, b), np.zeros_like(y), n - y)
            return cls(n, base_rate, churn, weight, n - y, least, None)
        # With as many added as lost there is nothing to reject.
        most = np.minimum(c, n - y)
        least = _first(lambda b: rule.rejects(n, y, c, b), most, n - y)
        last = _first(lambda b: ~rule.rejects(n, y, c, b), np.zeros_like(y), most) - 1
        return cls(n, base_rate, churn, weight, n - y, least, last)

    @property
    def most(self) -> float:
        """The largest increase that there is room for."""
        return 1 - self.base_rate - self.churn / 2

    def probability(self, increase: float) -> float:
        if not 0 <= increase <= self.most + 1e-12:
            raise UsageError(
                f"an increase of {increase:g} on a base rate of {self.base_rate:g} is no fraction of the cases"
            )
        share = min(1.0, (self.churn / 2 + increase) / (1 - self.base_rate))
        rejected = stats.binom.sf(self.least - 1, self.absent, share)
        if self.last is not None:
            rejected = rejected + stats.binom.cdf(self.last, self.absent, share)
        return float(min(1.0, np.sum(self.weight * rejected)))


def _support(n: int, rate: float) -> Ints:
    """Every count that isn't in a tail of the binomial."""
    low, high = int(stats.binom.ppf(_TAIL, n, rate)), int(stats.binom.isf(_TAIL, n, rate))
    return np.arange(max(0, low), high + 1, dtype=np.int64)


def _first(holds: Callable[[Ints], npt.NDArray[np.bool_]], low: Ints, high: Ints) -> Ints:
    """The first whole number in [low, high] from which on ``holds``, elementwise; high + 1 where there is none."""
    never = ~holds(high)
    while np.any(low < high):
        middle = (low + high) // 2
        found = holds(middle)
        low, high = np.where(found, low, np.minimum(middle + 1, high)), np.where(found, middle, high)
    return np.where(never, high + 1, low)
