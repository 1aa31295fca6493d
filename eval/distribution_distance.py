"""Distances between two sets of images, from their features: Fréchet (FID) and kernel (KID).

**FID**, Heusel et al., 2017, arXiv 1706.08500: between the Gaussians with the sets' means and covariances,

    d² = |μ₁ − μ₂|² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁Σ₂)^½.

With any factors ``Σ = FᵀF``, ``tr (Σ₁Σ₂)^½`` is the sum of the singular values of ``F₁F₂ᵀ``: no square root of a matrix
that is not symmetric, no imaginary parts, and no digits lost where a covariance is singular.

FID is biased upwards, by about a constant over n (Chong & Forsyth, CVPR 2020, arXiv 1911.07023); with fewer images than
features the covariances are singular and the bias dominates. Compare it only between sets of one size.

**KID**, Bińkowski et al., 2018, arXiv 1801.01401: the unbiased squared maximum mean discrepancy with the kernel
``k(x, y) = (xᵀy / d + 1)³``. It may be negative.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from excise.errors import UsageError
from excise.eval.feature_statistics import FeatureStatistics, check_comparable

Array = npt.NDArray[np.float64]
Features = npt.NDArray[np.float32] | npt.NDArray[np.float64]

#: Rows of a kernel matrix that are in memory at once.
_KERNEL_ROWS = 1024


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """The Fréchet distance between two sets of which only the statistics are known.

    Name it with ``distance_name``. Sets with the same statistics are at most 1e-12 of their variance apart.

    Raises:
        UsageError: fewer than two images in a set, or sets of two extractors.
    """
    check_comparable(first, second)
    return frechet_from_moments(first.mean(), first.covariance(), second.mean(), second.covariance())


def frechet_from_moments(mean_a: Array, covariance_a: Array, mean_b: Array, covariance_b: Array) -> float:
    """The Fréchet distance between N(μ₁, Σ₁) and N(μ₂, Σ₂): means with shape (d,), covariances (d, d).

    For published reference statistics, such as clean-fid's ``mu`` and ``sigma``.

    Raises:
        UsageError: the shapes don't belong together.
    """
    d = len(mean_a)
    if {mean_a.shape, mean_b.shape} != {(d,)} or {covariance_a.shape, covariance_b.shape} != {(d, d)}:
        raise UsageError(
            f"a Fréchet distance needs moments of one width, not of shapes {mean_a.shape}, {covariance_a.shape}, "
            f"{mean_b.shape} and {covariance_b.shape}"
        )
    return _distance(mean_a, _root_of(covariance_a), mean_b, _root_of(covariance_b))


def frechet_of_features(first: Features, second: Features) -> float:
    """The Fréchet distance between two sets of features with shapes (n, d) and (m, d), in float64.

    Raises:
        UsageError: fewer than two rows in a set, or two widths.
    """
    a, b = _checked(first, second)
    return _distance(a.mean(0), _factor(a), b.mean(0), _factor(b))


def frechet_bootstrap(first: Features, second: Features, n_resamples: int, seed: int, *, paired: bool = False) -> Array:
    """Fréchet distances, with shape (n_resamples,), between sets drawn anew with replacement.

    A resample has fewer distinct images than its set, so its bias is larger (see above): resampled distances lie
    *above* ``frechet_of_features`` of the sets, with n < d all of them. Read their spread, not their position: subtract
    their mean's excess over the sets' distance before taking quantiles.

    A resample costs O(min(n, d)·n·d) and the singular values of a min(n, d)-square matrix: on one core 4 ms for 1000
    images with d = 128, and 40 ms for 500 with Inception's d = 2048.

    Args:
        first, second: features with shapes (n, d) and (m, d).
        paired: draw the same rows of both, which must be images of the same requests.

    Raises:
        UsageError: fewer than two rows in a set, two widths, no resamples, or pairs of sets that differ in size.
    """
    a, b = _checked(first, second)
    if n_resamples < 1:
        raise UsageError(f"a bootstrap takes at least 1 resample, not {n_resamples}")
    if paired and len(a) != len(b):
        raise UsageError(f"pairs need sets of one size, not {len(a)} and {len(b)}")
    # The distance doesn't see a common shift; without one, fewer digits cancel in the weighted sums.
    origin = (a.mean(0) + b.mean(0)) / 2
    a, b = a - origin, b - origin
    rng = np.random.default_rng(seed)
    distances = np.empty(n_resamples)
    for number in range(n_resamples):
        weights_a = _weights(rng, len(a))
        weights_b = weights_a if paired else _weights(rng, len(b))
        distances[number] = _distance(*_weighted(a, weights_a), *_weighted(b, weights_b))
    return distances


def kernel_distance(
    first: Features, second: Features, *, subsets: int | None = 100, subset_size: int = 1000, seed: int = 0
) -> float:
    """KID between features with shapes (n, d) and (m, d), in float64.

    Args:
        subsets: as in clean-fid, the mean over this many pairs of random subsets without replacement; None takes all
            pairs of images, once, so that nothing is random.
        subset_size: rows of a subset, at most those of the smaller set.
        seed: of the subsets. They are drawn as clean-fid draws them after ``numpy.random.seed(seed)``.

    Raises:
        UsageError: fewer than two rows in a set, two widths, or no subsets.
    """
    a, b = _checked(first, second)
    if subsets is None:
        return _mmd(a, b)
    size = min(len(a), len(b), subset_size)
    if subsets < 1 or size < 2:
        raise UsageError(f"KID takes at least 1 subset of at least 2 images, not {subsets} of {size}")
    # The legacy generator: its stream is frozen for good, and it is the one that clean-fid draws from.
    random = np.random.RandomState(seed)
    total = 0.0
    for _ in range(subsets):
        rows_b = b[random.choice(len(b), size, replace=False)]
        rows_a = a[random.choice(len(a), size, replace=False)]
        total += _mmd(rows_a, rows_b)
    return total / subsets


def _mmd(a: Array, b: Array) -> float:
    """The unbiased MMD²: a U-statistic within each set, the plain mean between them."""
    n, m = len(a), len(b)
    within = _kernel_sum(a, a, diagonal=False) / (n * (n - 1)) + _kernel_sum(b, b, diagonal=False) / (m * (m - 1))
    return within - 2 * _kernel_sum(a, b) / (n * m)


def _kernel_sum(a: Array, b: Array, *, diagonal: bool = True) -> float:
    total = 0.0
    for start in range(0, len(a), _KERNEL_ROWS):
        kernel = (a[start : start + _KERNEL_ROWS] @ b.T / a.shape[1] + 1) ** 3
        total += float(kernel.sum())
        if not diagonal:
            total -= float(np.diagonal(kernel, start).sum())
    return total


def _checked(first: Features, second: Features) -> tuple[Array, Array]:
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise UsageError(f"two sets of features need one width, not shapes {first.shape} and {second.shape}")
    if min(len(first), len(second)) < 2:
        raise UsageError(f"a distance between sets needs two images a side, not {len(first)} and {len(second)}")
    return first.astype(np.float64), second.astype(np.float64)


def _distance(mean_a: Array, factor_a: Array, mean_b: Array, factor_b: Array) -> float:
    """The distance from means (d,) and factors F (k, d) with Σ = FᵀF."""
    gap = mean_a - mean_b
    product = np.linalg.svd(factor_a @ factor_b.T, compute_uv=False).sum()
    distance = gap @ gap + np.square(factor_a).sum() + np.square(factor_b).sum() - 2 * product
    # It is a squared distance: what rounding leaves below zero is zero.
    return max(0.0, float(distance))


def _factor(rows: Array) -> Array:
    """A factor of the rows' sample covariance: the centred rows, or, of more rows than columns, their triangle."""
    centred = (rows - rows.mean(0)) / np.sqrt(len(rows) - 1)
    return centred if len(rows) <= rows.shape[1] else _triangle(centred)


def _triangle(rows: Array) -> Array:
    """R of ``rows = QR``, (d, d): RᵀR is rowsᵀ rows."""
    triangle: Array = np.linalg.qr(rows, mode="r")  # type: ignore[assignment]  # "r" gives R alone
    return triangle


def _root_of(covariance: Array) -> Array:
    """A factor of a covariance; directions whose variance is rounding are left out, as ``matrix_rank`` does it."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
    root: Array = (vectors[:, kept] * np.sqrt(values[kept])).T
    return root


def _weights(rng: np.random.Generator, n: int) -> npt.NDArray[np.intp]:
    return np.bincount(rng.integers(0, n, n), minlength=n)


def _weighted(rows: Array, weights: npt.NDArray[np.intp]) -> tuple[Array, Array]:
    """Mean and factor of the set in which row i occurs ``weights[i]`` times."""
    drawn = weights > 0
    rows, counts = rows[drawn], weights[drawn].astype(np.float64)
    n = counts.sum()
    mean = counts @ rows / n
    factor = (rows - mean) * np.sqrt(counts / (n - 1))[:, None]
    if len(factor) > factor.shape[1]:
        try:
            # Several times faster than the triangle by reflections; a resample doesn't need the last digits.
            factor = np.linalg.cholesky(factor.T @ factor).T
        except np.linalg.LinAlgError:
            factor = _triangle(factor)
    return mean, factor
