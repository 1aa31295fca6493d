"""Bootstrap intervals (Efron & Tibshirani, 1993) in which the cases are resampled, each with all that belongs to it.

One case is one prompt and seed, and two runtimes draw the same cases, so a resample takes the pair: what the prompts
have in common cancels, as it does in the difference itself. ``scipy.stats.bootstrap`` resamples the cases' indices.

- ``BCa`` (bias-corrected and accelerated) is second-order correct; its jackknife costs n² values, so beyond
  ``BCA_LIMIT`` cases, where the correction has vanished, means use ``percentile``.
- Where every resample gives the same figure the interval is that figure: nothing varied among these cases. It does not
  say that nothing would vary among others; for rates and counts ``paired_outcomes`` and ``counts`` do.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import stats

from excise.errors import UsageError
from excise.eval.evaluation import Measure

Method = Literal["BCa", "percentile", "basic"]
Better = Literal["lower", "higher", "neither"]
Real = npt.NDArray[np.float64]
#: Indices with shape (…, n) and the axis of the cases → the figure of each row.
Statistic = Callable[[npt.NDArray[np.intp], int], npt.NDArray[np.float64] | np.float64]

RESAMPLES, SEED = 2000, 0
#: Cases up to which a mean's interval is BCa by default.
BCA_LIMIT = 2000
#: Indices held at once.
_BATCH = 1 << 21


@dataclass(frozen=True)
class Interval:
    """The ends, and how they were found, in words."""

    low: float
    high: float
    method: str


def interval(
    statistic: Statistic,
    n: int,
    *,
    method: Method,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = SEED,
    vectorized: bool = True,
) -> Interval:
    """The interval of a figure of n cases.

    Args:
        statistic: of indices (…, n) along an axis; with ``vectorized=False`` it is called with one row at a time.

    Raises:
        UsageError: fewer than two cases, fewer than 100 resamples, a confidence outside (0, 1), or a resample without
            a finite figure.
    """
    if n < 2 or resamples < 100:
        raise UsageError(f"a bootstrap of {n} cases with {resamples} resamples says nothing: use 2 and 100 at least")
    if not 0 < confidence < 1:
        raise UsageError(f"a confidence lies between 0 and 1, not at {confidence}")

    def of_rows(rows: Any, axis: int = -1) -> Any:
        return statistic(rows, axis)

    def found(kind: Method) -> tuple[float, float, Real]:
        with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
            # A BCa without spread is dealt with below.
            warnings.simplefilter("ignore", stats.DegenerateDataWarning)
            result = stats.bootstrap(
                (np.arange(n, dtype=np.int64),),
                of_rows,
                n_resamples=resamples,
                batch=max(1, min(resamples, _BATCH // n)),
                vectorized=vectorized,
                confidence_level=confidence,
                method=kind,
                random_state=np.random.default_rng(seed),
            )
        ends = result.confidence_interval
        return float(ends.low), float(ends.high), np.asarray(result.bootstrap_distribution, np.float64)

    low, high, drawn = found(method)
    described = f"{resamples} resamples, seed {seed}"
    if not np.isfinite(drawn).all():
        missing = int(np.sum(~np.isfinite(drawn)))
        raise UsageError(f"{missing} of {resamples} resamples have no finite figure: too few cases for a bootstrap")
    if np.ptp(drawn) == 0:
        return Interval(float(drawn[0]), float(drawn[0]), f"bootstrap without spread ({described})")
    if np.isfinite([low, high]).all():
        return Interval(low, high, f"bootstrap {method} ({described})")
    low, high, _ = found("percentile")
    return Interval(low, high, f"bootstrap percentile, BCa being undefined here ({described})")


def mean(
    values: npt.ArrayLike,
    *,
    unit: str = "",
    better: Better = "neither",
    method: Method | None = None,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Measure:
    """The mean of a figure of each image, (n,): CLIP score, LPIPS, PSNR, …

    Without two finite values there is no figure, or none with an interval, and the measure says so.
    """
    rows = np.asarray(values, np.float64)
    if rows.ndim != 1:
        raise UsageError(f"a mean needs one figure an image, not the shape {rows.shape}")
    if problem := _problem(rows):
        return Measure(value=None, n=len(rows), unit=unit, better=better, confidence=confidence, error=problem)
    value = float(rows.mean())
    if len(rows) < 2:
        return Measure(value=value, n=len(rows), unit=unit, better=better, confidence=confidence)
    ends = interval(
        lambda index, axis: rows[index].mean(axis),
        len(rows),
        method=method or ("BCa" if len(rows) <= BCA_LIMIT else "percentile"),
        confidence=confidence,
        resamples=resamples,
        seed=seed,
    )
    # A mean of equal values rounds to their neighbour.
    return _measure(value, ends, len(rows), unit, better, confidence)


def mean_difference(
    reference: npt.ArrayLike,
    judged: npt.ArrayLike,
    *,
    unit: str = "",
    better: Better = "neither",
    method: Method | None = None,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Measure:
    """The mean of judged − reference over the pairs, row i of both for the same case.

    Raises:
        UsageError: the shapes differ.
    """
    difference = paired(judged, reference)
    return mean(
        difference,
        unit=unit,
        better=better,
        method=method,
        confidence=confidence,
        resamples=resamples,
        seed=seed,
    )


def mean_drop(
    reference: npt.ArrayLike,
    judged: npt.ArrayLike,
    *,
    unit: str = "",
    method: Method | None = None,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Measure:
    """The mean of reference − judged over the pairs: what the judged runtime lost, as in a drop in CLIP score.

    Raises:
        UsageError: the shapes differ.
    """
    return mean_difference(
        judged,
        reference,
        unit=unit,
        better="lower",
        method=method,
        confidence=confidence,
        resamples=resamples,
        seed=seed,
    )


def of_features(
    statistic: Callable[..., float],
    *features: npt.NDArray[Any],
    unit: str = "",
    better: Better = "lower",
    method: Method = "percentile",
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = SEED,
) -> Measure:
    """A figure of features, such as the FID of two runtimes' images, by resampling their rows together.

    A resample repeats images, which alone moves a distance between distributions upwards, most where n is small against
    the features' dimension. So a percentile interval errs upwards, and it is stretched to hold the figure itself.

    Args:
        statistic: of as many arrays as ``features``, each (n, …), to a float.
        features: arrays whose row i is the same case in each.
        resamples: each calls ``statistic`` once.

    Raises:
        UsageError: no features, or of different lengths.
    """
    if len({len(rows) for rows in features}) != 1:
        raise UsageError(f"paired features need equal lengths, not {[len(rows) for rows in features]}")
    n = len(features[0])
    problem = f"{n} images are too few for a figure of features" if n < 2 else None
    if missing := sum(int(np.sum(~np.isfinite(rows))) for rows in features):
        problem = f"{missing} values of the features aren't finite"
    value = float("nan") if problem else float(statistic(*features))
    if not np.isfinite(value):
        error = problem or f"the figure is {value}"
        return Measure(value=None, n=n, unit=unit, better=better, confidence=confidence, error=error)
    ends = interval(
        lambda index, _axis: np.float64(statistic(*(rows[index] for rows in features))),
        n,
        method=method,
        confidence=confidence,
        resamples=resamples,
        seed=seed,
        vectorized=False,
    )
    return _measure(value, ends, n, unit, better, confidence)


def paired(first: npt.ArrayLike, second: npt.ArrayLike) -> Real:
    """first − second, as float64.

    Raises:
        UsageError: not two shapes (n,) that agree.
    """
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise UsageError(f"pairs need two figures a case, not shapes {a.shape} and {b.shape}")
    return a - b


def _problem(rows: Real) -> str | None:
    if not rows.size:
        return "no images"
    if missing := int(np.sum(~np.isfinite(rows))):
        return f"{missing} of {rows.size} figures aren't finite"
    return None


def _measure(value: float, ends: Interval, n: int, unit: str, better: Better, confidence: float) -> Measure:
    return Measure(
        value=value,
        low=min(ends.low, value),
        high=max(ends.high, value),
        n=n,
        unit=unit,
        method=ends.method,
        confidence=confidence,
        better=better,
    )
