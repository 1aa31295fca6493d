"""FID and KID of two runtimes' images of the same cases, with the interval of resampled cases.

A case is resampled with both its images, so what the prompts have in common cancels. A resample repeats images, which
alone moves a distance between distributions, most where n is small against the features' dimension: the mean of the
resampled distances less the distance itself. That excess is subtracted before their quantiles are taken.

**KID** of a resample in which case i stands w_i times, and of the kernel k of ``distribution_distance``, is

    (wᵀK_xx w − Σ w_i k(x_i, x_i) + wᵀK_yy w − Σ w_i k(y_i, y_i)) / n(n − 1) − 2 wᵀK_xy w / n²

so that the kernel is evaluated once, in blocks of rows, however many resamples there are.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from excise.eval.bootstrap import SEED
from excise.eval.distribution_distance import frechet_bootstrap, frechet_of_features, kernel_distance
from excise.eval.evaluation import Measure
from excise.eval.feature_extractor import distance_name

Features = npt.NDArray[np.float32] | npt.NDArray[np.float64]
Real = npt.NDArray[np.float64]

#: Resamples of a distance: each of FID costs a decomposition.
RESAMPLES = 200
#: Rows of the kernel that are held at once.
_ROWS = 1024


def distance(
    metric: Literal["fid", "kid"],
    extractor: str,
    first: Features,
    second: Features,
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Measure:
    """FID or KID between features with shape (n, d), row i of both for the same case.

    Args:
        extractor: whose features they are: with another than Inception's the unit says so.

    Raises:
        UsageError: sets of two sizes or two widths.
    """
    unit, n = distance_name(metric.upper(), extractor), len(first)
    broken = sum(int(np.sum(~np.isfinite(rows))) for rows in (first, second))
    if n < 2 or broken:
        error = f"{broken} values of the features aren't finite" if broken else f"{n} images: at least two are needed"
        return Measure(value=None, n=n, unit=unit, better="lower", confidence=confidence, error=error)
    if metric == "fid":
        if np.array_equal(first, second):
            # Rounding would leave a trace of a distance.
            return Measure(
                value=0.0, low=0.0, high=0.0, n=n, unit=unit, method="equal features", confidence=confidence,
                better="lower",
            )  # fmt: skip
        value, drawn = (
            frechet_of_features(first, second),
            frechet_bootstrap(first, second, resamples, seed, paired=True),
        )
    else:
        value = kernel_distance(first, second, subsets=None)
        drawn = kernel_bootstrap(first, second, resamples, seed)
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn - (drawn.mean() - value), [tail, 1 - tail])
    # A Fréchet distance is never negative; the unbiased kernel distance may be.
    low = max(0.0, float(low)) if metric == "fid" else float(low)
    return Measure(
        value=value,
        low=min(low, value),
        high=max(float(high), value),
        n=n,
        unit=unit,
        method=f"bootstrap percentile, excess subtracted ({resamples} resamples, seed {seed})",
        confidence=confidence,
        better="lower",
    )


def kernel_bootstrap(first: Features, second: Features, resamples: int, seed: int) -> Real:
    """Kernel distances, with shape (resamples,), of cases drawn anew with replacement, the same of both sets."""
    x, y = first.astype(np.float64), second.astype(np.float64)
    n, d = x.shape
    random = np.random.default_rng(seed)
    weights = np.stack([np.bincount(random.integers(0, n, n), minlength=n) for _ in range(resamples)]).astype(
        np.float64
    )
    within, between = np.zeros(resamples), np.zeros(resamples)
    for start in range(0, n, _ROWS):
        rows = slice(start, start + _ROWS)
        chosen = weights[:, rows]
        for sign, a, b in ((1, x, x), (1, y, y), (0, x, y)):
            kernel = (a[rows] @ b.T / d + 1) ** 3
            sums = np.einsum("rn,rn->r", chosen @ kernel, weights)
            if sign:
                within += sums - chosen @ np.diagonal(kernel, start)
            else:
                between += sums
    distances: Real = within / (n * (n - 1)) - 2 * between / n**2
    return distances
