"""Intervals of a proportion and the exact test of paired outcomes, by ``scipy.stats``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import stats

from excise.errors import UsageError
from excise.eval.evaluation import Measure

#: ``wilson``: Wilson (1927), good coverage on average; ``exact``: Clopper & Pearson (1934), never below its confidence.
Method = Literal["wilson", "exact"]


@dataclass(frozen=True)
class Proportion:
    """``successes`` of ``n`` with a two-sided confidence interval [low, high], fractions of 1."""

    successes: int
    n: int
    low: float
    high: float
    method: Method = "wilson"
    confidence: float = 0.95

    @property
    def value(self) -> float:
        """The fraction observed."""
        return self.successes / self.n

    def measure(self, better: Literal["lower", "higher", "neither"] = "neither") -> Measure:
        """The fraction as a figure of a report."""
        return Measure(
            value=self.value,
            low=self.low,
            high=self.high,
            n=self.n,
            unit="fraction",
            method=self.method,
            confidence=self.confidence,
            better=better,
        )


@dataclass(frozen=True)
class Discordance:
    """How two runs differ on the same images: outcomes that only one of them has, and McNemar's exact p."""

    only_first: int
    only_second: int
    n: int
    p_value: float

    @property
    def flips(self) -> int:
        """Images with different outcomes."""
        return self.only_first + self.only_second


def proportion(successes: int, n: int, *, method: Method = "wilson", confidence: float = 0.95) -> Proportion:
    """``successes`` of ``n`` with its interval.

    Raises:
        UsageError: not 0 ≤ successes ≤ n, n = 0, or a confidence outside (0, 1).
    """
    if not (0 <= successes <= n and n > 0):
        raise UsageError(f"{successes} of {n} is not a proportion")
    if not 0 < confidence < 1:
        raise UsageError(f"a confidence lies between 0 and 1, not at {confidence}")
    interval = stats.binomtest(successes, n).proportion_ci(confidence, method)
    return Proportion(successes, n, float(interval.low), float(interval.high), method, confidence)


def wilson(successes: int, n: int, confidence: float = 0.95) -> Proportion:
    """Wilson's score interval, without continuity correction."""
    return proportion(successes, n, method="wilson", confidence=confidence)


def clopper_pearson(successes: int, n: int, confidence: float = 0.95) -> Proportion:
    """Clopper and Pearson's exact interval."""
    return proportion(successes, n, method="exact", confidence=confidence)


def mcnemar(first: npt.NDArray[np.bool_], second: npt.NDArray[np.bool_]) -> Discordance:
    """The exact McNemar test (McNemar, 1947) of the same n images judged in two runs.

    Under the null hypothesis a discordant pair is as likely to be the first run's as the second's, so their split is
    binomial with p = ½. Without discordant pairs p = 1.

    Args:
        first, second: outcomes with shape (n,), row i of both for the same request.

    Raises:
        UsageError: the shapes differ.
    """
    if first.shape != second.shape or first.ndim != 1:
        raise UsageError(f"McNemar's test needs pairs, not shapes {first.shape} and {second.shape}")
    only_first, only_second = int(np.sum(first & ~second)), int(np.sum(second & ~first))
    discordant = only_first + only_second
    p_value = float(stats.binomtest(only_first, discordant, 0.5).pvalue) if discordant else 1.0
    return Discordance(only_first, only_second, len(first), p_value)
