"""Counts of what a detector finds, such as nude parts, and the ratio of two runtimes' counts on the same cases.

An image may hold several parts, and none at all may be found: neither the binomial nor the bootstrap alone will do.

**A count** k has the exact Poisson interval (Garwood, Biometrika 28, 1936), ½ χ²_{α/2}(2k) to ½ χ²_{1−α/2}(2k + 2),
which is right at k = 0; parts that come together in one image scatter more, which a bootstrap over images sees. The
interval is the wider one at each end. A count of images, one or none each, is binomial: Clopper and Pearson's.

**A ratio** of paired counts x₁ / x₂ has Bonett and Price's interval (Statistics in Medicine 25, 2006): Wilson's for
each count out of the n* parts seen by either runtime, with a critical value k = z A / (B + C) that gives the ratio its
confidence where the counts are correlated; n₁₂ and n₂₁ are the parts that one runtime alone shows:

    A² = (n₁₂ + n₂₁ + 2) / ((x₁ + 1)(x₂ + 1)),  B² = (1 − p₁) / (x₁ + 1),  C² = (1 − p₂) / (x₂ + 1),
    p_i = (x_i + 1) / (n* + 2)

It keeps its width where nothing differs. With several parts an image, it too is joined with the bootstrap's.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from excise.errors import UsageError
from excise.eval.bootstrap import RESAMPLES, SEED, interval
from excise.eval.evaluation import Measure
from excise.eval.statistics import clopper_pearson

Counts = npt.NDArray[np.int64]


def count(
    per_image: npt.ArrayLike, *, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = SEED
) -> Measure:
    """All that was found in n images, with the interval of the count that n such images are expected to give.

    Args:
        per_image: whole numbers or booleans, (n,).

    Raises:
        UsageError: negative or fractional counts, or another shape.
    """
    found = _whole(per_image)
    n, total = len(found), int(found.sum())
    known: dict[str, Any] = {"n": n, "unit": "count", "confidence": confidence, "better": "lower"}
    if not n:
        return Measure(value=None, error="no images", **known)
    if found.max() <= 1:
        share = clopper_pearson(total, n, confidence)
        return Measure(value=total, low=share.low * n, high=share.high * n, method="exact", **known)
    low, high = garwood(total, confidence)
    method = "exact Poisson"
    if n > 1:
        ends = interval(
            lambda index, axis: found[index].sum(axis, dtype=np.float64),
            n,
            method="percentile",
            confidence=confidence,
            resamples=resamples,
            seed=seed,
        )
        low, high, method = min(low, ends.low), max(high, ends.high), f"wider of exact Poisson and {ends.method}"
    return Measure(value=total, low=low, high=high, method=method, **known)


def garwood(total: int, confidence: float = 0.95) -> tuple[float, float]:
    """The exact interval of a Poisson mean of which ``total`` was seen."""
    tail = (1 - confidence) / 2
    low = float(stats.chi2.ppf(tail, 2 * total)) / 2 if total else 0.0
    return low, float(stats.chi2.isf(tail, 2 * total + 2)) / 2


def ratio(
    reference: npt.ArrayLike,
    judged: npt.ArrayLike,
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Measure:
    """Judged count / reference count over the same n cases; without a figure where the reference counts none.

    Args:
        reference, judged: whole numbers or booleans, (n,), row i of both for the same case.

    Raises:
        UsageError: negative or fractional counts, or shapes that differ.
    """
    first, second = _whole(reference), _whole(judged)
    if first.shape != second.shape:
        raise UsageError(f"a paired ratio needs pairs, not {len(first)} and {len(second)} cases")
    n = len(first)
    known: dict[str, Any] = {"n": n, "unit": "ratio", "confidence": confidence, "better": "lower"}
    if not first.sum():
        return Measure(value=None, error="the reference counts none, so there is no ratio: judge the increase", **known)
    both = int(np.minimum(first, second).sum())
    low, high = bonett_price(both, int(first.sum()) - both, int(second.sum()) - both, confidence)
    method = "Bonett-Price"
    if n > 1 and max(first.max(), second.max()) > 1:
        low, high, method = _with_bootstrap(first, second, (low, high), confidence, resamples, seed)
    return Measure(value=int(second.sum()) / int(first.sum()), low=low, high=high, method=method, **known)


def bonett_price(both: int, only_reference: int, only_judged: int, confidence: float = 0.95) -> tuple[float, float]:
    """The interval of (both + only judged) / (both + only reference); the reference's count is at least 1.

    Raises:
        UsageError: a negative count, or none in the reference.
    """
    x1, x2 = both + only_judged, both + only_reference
    if min(both, only_reference, only_judged) < 0 or not x2:
        raise UsageError(f"no ratio of {x1} to {x2}, {both} of them in both")
    either = both + only_reference + only_judged
    spread = math.sqrt((only_reference + only_judged + 2) / ((x1 + 1) * (x2 + 1)))
    parts = (math.sqrt((1 - (x + 1) / (either + 2)) / (x + 1)) for x in (x1, x2))
    z = spread / sum(parts) * float(stats.norm.ppf(0.5 + confidence / 2))

    def wilson(x: int) -> tuple[float, float]:
        centre, reach = 2 * x + z * z, z * math.sqrt(z * z + 4 * x * (1 - x / either))
        # At x = 0 and x = n* an end is exact, which rounding would miss.
        low = 0.0 if x == 0 else (centre - reach) / (2 * (either + z * z))
        return low, 1.0 if x == either else (centre + reach) / (2 * (either + z * z))

    (low1, high1), (low2, high2) = wilson(x1), wilson(x2)
    return low1 / high2, high1 / low2


def _with_bootstrap(
    first: Counts, second: Counts, ends: tuple[float, float], confidence: float, resamples: int, seed: int
) -> tuple[float, float, str]:
    def statistic(index: npt.NDArray[np.intp], axis: int) -> npt.NDArray[np.float64]:
        with np.errstate(divide="ignore", invalid="ignore"):
            quotient: npt.NDArray[np.float64] = second[index].sum(axis) / first[index].sum(axis)
        return quotient

    try:
        drawn = interval(
            statistic, len(first), method="percentile", confidence=confidence, resamples=resamples, seed=seed
        )
    except UsageError:
        return *ends, "Bonett-Price; too few images with a part for a bootstrap"
    return min(ends[0], drawn.low), max(ends[1], drawn.high), f"wider of Bonett-Price and {drawn.method}"


def _whole(values: npt.ArrayLike) -> Counts:
    rows = np.asarray(values)
    if rows.ndim != 1:
        raise UsageError(f"counts need one whole number an image, not the shape {rows.shape}")
    found = rows.astype(np.int64)
    if not np.array_equal(found, rows) or (found < 0).any():
        raise UsageError("counts are whole numbers from 0")
    return found
