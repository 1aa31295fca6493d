"""The floor: how far runs of one and the same PyTorch model get apart, the yardstick for what a runtime may differ by.

Another batch size, thread count or number format rounds otherwise, and the sampler makes pictures of it. Nothing that a
runtime does below this floor is the runtime's fault; a policy's bound can be a multiple of it.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
import numpy.typing as npt

from excise.errors import UsageError
from excise.eval.bootstrap import RESAMPLES, SEED, interval
from excise.eval.evaluation import Measure

Real = npt.NDArray[np.float64]


def run_differences(runs: npt.ArrayLike) -> Real:
    """The paired differences of every two of the runs, with shape (pairs of runs, n).

    Args:
        runs: a figure of each case in each run, (runs, n): detections as 0 and 1, CLIP scores, …

    Raises:
        UsageError: fewer than two runs.
    """
    rows = np.asarray(runs, np.float64)
    if rows.ndim != 2 or len(rows) < 2:
        raise UsageError(f"a floor needs two runs of the same cases, not the shape {rows.shape}")
    return np.stack([second - first for first, second in combinations(rows, 2)])


def floor(
    differences: npt.ArrayLike,
    *,
    quantile: float | None = None,
    unit: str = "",
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Measure:
    """The mean |difference| of runs of one model, or a quantile of it over cases and pairs of runs.

    The interval resamples cases, each with the differences of all pairs of runs, since those hang together.

    Args:
        differences: with shape (n,), or (pairs of runs, n) as ``run_differences`` gives.
        quantile: such as 0.95: how far apart all but one image in twenty are at most. By default the mean.

    Raises:
        UsageError: another shape, or a quantile outside [0, 1].
    """
    rows = np.atleast_2d(np.asarray(differences, np.float64))
    if rows.ndim != 2:
        raise UsageError(f"differences are (n,) or (pairs of runs, n), not {rows.shape}")
    if quantile is not None and not 0 <= quantile <= 1:
        raise UsageError(f"a quantile lies between 0 and 1, not at {quantile}")
    cases = np.abs(rows.T)
    n = len(cases)
    if n < 2 or not np.isfinite(cases).all():
        error = "differences that aren't finite" if n >= 2 else f"{n} cases are too few for a floor"
        return Measure(value=None, n=n, unit=unit, better="neither", confidence=confidence, error=error)
    # Shape (…, n, pairs): the cases' axis and the pairs' axis are summarised together.
    if quantile is None:
        value, what = float(cases.mean()), "mean"
        ends = interval(
            lambda index, axis: cases.mean(1)[index].mean(axis),
            n,
            method="percentile",
            confidence=confidence,
            resamples=resamples,
            seed=seed,
        )
    else:
        share = quantile
        value, what = float(np.quantile(cases, share)), f"{share:g} quantile"
        ends = interval(
            lambda index, _axis: np.quantile(cases[index], share),
            n,
            method="percentile",
            confidence=confidence,
            resamples=resamples,
            seed=seed,
            vectorized=False,
        )
    return Measure(
        value=value,
        low=min(ends.low, value),
        high=max(ends.high, value),
        n=n,
        unit=unit,
        method=f"{what} of {len(rows)} pairs of runs; {ends.method}",
        confidence=confidence,
    )
