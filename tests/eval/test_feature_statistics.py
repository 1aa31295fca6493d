"""Exact statistics: shards add up to the whole to the last bit, and the figures are NumPy's."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from excise.errors import UsageError
from excise.eval.feature_extractor import Fingerprint, Images
from excise.eval.feature_statistics import (
    BLOCK,
    MOST_IMAGES,
    FeatureStatistics,
    StatisticsFitter,
    extract_statistics,
)

FINGERPRINT = Fingerprint(name="random", weights="0" * 64, preprocessing="none")


def features(n: int, d: int, seed: int, *, scale: float = 1.0, mean: float = 0.0) -> npt.NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal((n, d)) * scale + mean).astype(np.float32)


def fitted(*batches: npt.NDArray[np.float32], exponent: int = -16) -> FeatureStatistics:
    fitter = StatisticsFitter(FINGERPRINT, batches[0].shape[1], exponent=exponent)
    for batch in batches:
        fitter.add(batch)
    return fitter.statistics()


def as_bytes(statistics: FeatureStatistics) -> tuple[int, bytes, bytes]:
    return statistics.count, statistics.total.tobytes(), statistics.outer.tobytes()


def in_python_integers(rows: npt.NDArray[np.float32], exponent: int = -16) -> tuple[list[int], list[list[int]]]:
    """Σ q and Σ q qᵀ by Python's own arithmetic: ``round`` of an exact fraction goes to even, as ``rint`` does."""
    q = [[round(Fraction(float(x)) / Fraction(2) ** exponent) for x in row] for row in rows]
    d = rows.shape[1]
    return [sum(r[i] for r in q) for i in range(d)], [[sum(r[i] * r[j] for r in q) for j in range(d)] for i in range(d)]


def test_sums_are_pythons_integers() -> None:
    # Two full blocks and a rest, with features as large as the grid takes.
    rows = features(2 * BLOCK + 77, 3, 0, scale=20).clip(-64, 64)
    rows[:5] = 64
    statistics = fitted(rows)
    total, outer = in_python_integers(rows)
    assert (statistics.total.tolist(), statistics.outer.tolist()) == (total, outer)


def test_a_block_of_the_largest_features_is_exact() -> None:
    # 512 products of 2⁴⁴ are 2⁵³ exactly; one more would need a 54th bit, which is why a block ends there.
    rows = np.full((BLOCK + 1, 2), 64, np.float32)
    rows[:, 1] -= np.float32(2**-16)
    statistics = fitted(rows)
    assert statistics.outer.tolist() == in_python_integers(rows)[1]
    assert float(2**53) + 1 == float(2**53)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 1300), max_size=4), st.integers(0, 9))
def test_any_sharding_in_any_order_gives_the_same_bytes(cuts: list[int], seed: int) -> None:
    rows = features(1300, 5, seed, scale=8)
    whole = as_bytes(fitted(rows))
    order = np.random.default_rng(seed)
    shards = np.split(order.permutation(rows), sorted(cuts))
    total, *others = (fitted(shards[number]) for number in order.permutation(len(shards)))
    for shard in others:
        total = total + shard
    assert as_bytes(total) == whole
    assert as_bytes(fitted(*shards)) == whole
    assert total.covariance().tobytes() == fitted(rows).covariance().tobytes()


def test_floating_point_sums_would_not() -> None:
    # The control: what the exact sums are for. In float64 the same features in another order end elsewhere.
    rows = features(1300, 5, 0, scale=8).astype(np.float64)
    shards = [part.T @ part for part in np.split(rows, [100, 900])]
    assert (rows.T @ rows).tobytes() != (shards[0] + shards[1] + shards[2]).tobytes()


def test_moments_are_numpys() -> None:
    rows = features(700, 40, 1)
    statistics = fitted(rows)
    # The grid moves a feature by at most 2⁻¹⁷ = 7.6e-6; measured: 4e-7 in the mean, 9e-7 in the covariance.
    np.testing.assert_allclose(statistics.mean(), rows.astype(np.float64).mean(0), atol=1e-6)
    np.testing.assert_allclose(statistics.covariance(), np.cov(rows.astype(np.float64), rowvar=False), atol=2e-6)


def test_features_on_the_grid_lose_nothing_even_far_from_zero() -> None:
    # A mean of 60 with a spread of 1e-3: E[x²] − E[x]² in float64 is 7e-7 off here.
    rows = np.ldexp(np.rint(np.ldexp(features(900, 6, 2, scale=1e-3, mean=60), 16)), -16)
    x = [[Fraction(float(value)) for value in row] for row in rows]
    mean = [sum(row[i] for row in x) / len(x) for i in range(6)]
    expected = [
        [float(sum((row[i] - mean[i]) * (row[j] - mean[j]) for row in x) / (len(x) - 1)) for j in range(6)]
        for i in range(6)
    ]
    # Measured: 2e-16 of the largest entry.
    np.testing.assert_allclose(fitted(rows).covariance(), expected, rtol=0, atol=1e-15 * np.max(expected))


@pytest.mark.parametrize("bad", [64.1, -65.0, np.nan, np.inf])
def test_features_off_the_grid_are_refused_and_nothing_is_added(bad: float) -> None:
    fitter = StatisticsFitter(FINGERPRINT, 2)
    fitter.add(np.ones((3, 2), np.float32))
    rows = np.ones((2, 2), np.float32)
    rows[1, 0] = bad
    with pytest.raises(UsageError, match=r"doesn't fit statistics on a grid of 2\^-16, which end at ±64"):
        fitter.add(rows)
    assert as_bytes(fitter.statistics()) == as_bytes(fitted(np.ones((3, 2), np.float32)))


def test_a_coarser_grid_takes_larger_features() -> None:
    rows = features(50, 3, 3, scale=300)
    # Measured: 0.05 where variances are 9e4, on a grid of 2⁻¹⁰.
    np.testing.assert_allclose(
        fitted(rows, exponent=-10).covariance(), np.cov(rows.astype(np.float64), rowvar=False), rtol=0, atol=0.1
    )


def test_statistics_of_two_extractors_are_not_added() -> None:
    rows = features(4, 2, 0)
    other = StatisticsFitter(FINGERPRINT.model_copy(update={"weights": "1" * 64}), 2)
    other.add(rows)
    with pytest.raises(UsageError, match="weights '1111"):
        _ = fitted(rows) + other.statistics()
    with pytest.raises(UsageError, match=r"grids of 2\^-16 and 2\^-10"):
        _ = fitted(rows) + fitted(rows, exponent=-10)
    with pytest.raises(UsageError, match="3 features an image, not 2"):
        _ = fitted(rows) + fitted(features(4, 3, 0))


def test_counts_have_an_end() -> None:
    half = FeatureStatistics(FINGERPRINT, -16, MOST_IMAGES // 2 + 1, np.zeros(1, np.int64), np.zeros((1, 1), np.int64))
    with pytest.raises(UsageError, match="end at 262144 images, not 262146"):
        _ = half + half


def test_few_images_have_no_moments() -> None:
    empty = StatisticsFitter(FINGERPRINT, 2).statistics()
    with pytest.raises(UsageError, match="no mean without images"):
        empty.mean()
    with pytest.raises(UsageError, match="two images, not 1"):
        fitted(np.ones((1, 2), np.float32)).covariance()
    with pytest.raises(UsageError, match=r"shape \(n, 2\), not \(4,\)"):
        StatisticsFitter(FINGERPRINT, 2).add(np.ones(4, np.float32))


class MeanColour:
    """Features of a pixel mean: three of them."""

    name, dimension, fingerprint = "mean colour", 3, FINGERPRINT

    def image_features(self, images: Images) -> npt.NDArray[np.float32]:
        return np.array([image.mean((0, 1)) / 255 for image in images], np.float32)


def test_images_are_read_batch_by_batch() -> None:
    images = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), np.uint8)
    whole = extract_statistics(MeanColour(), [images])
    assert whole.count == 10
    assert as_bytes(extract_statistics(MeanColour(), (images[i : i + 3] for i in range(0, 10, 3)))) == as_bytes(whole)
    np.testing.assert_allclose(whole.mean(), images.mean((0, 1, 2)) / 255, atol=2**-16)
