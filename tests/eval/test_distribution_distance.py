"""FID and KID beside clean-fid's own functions, closed forms, and the brute-force bootstrap."""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt
import pytest
from cleanfid.fid import fid_from_feats
from cleanfid.fid import kernel_distance as cleanfid_kernel_distance

from excise.errors import UsageError
from excise.eval.distribution_distance import (
    frechet_bootstrap,
    frechet_distance,
    frechet_from_moments,
    frechet_of_features,
    kernel_distance,
)
from excise.eval.feature_extractor import Fingerprint
from excise.eval.feature_statistics import FeatureStatistics, StatisticsFitter

FINGERPRINT = Fingerprint(name="random", weights="0" * 64, preprocessing="none")


def features(n: int, d: int, seed: int, shift: float = 0.0) -> npt.NDArray[np.float32]:
    """Not negative, correlated and of unequal spread, as pool features are."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).standard_normal((d, d)) / np.sqrt(d) * np.linspace(0.05, 1, d)
    rows: npt.NDArray[np.float32] = np.maximum(rng.standard_normal((n, d)) @ mixing + 0.3 + shift, 0).astype(np.float32)
    return rows


def statistics(rows: npt.NDArray[np.float32]) -> FeatureStatistics:
    fitter = StatisticsFitter(FINGERPRINT, rows.shape[1])
    fitter.add(rows)
    return fitter.statistics()


def cleanfid_distance(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> float:
    with warnings.catch_warnings():
        # clean-fid 0.1.35 calls scipy.linalg.sqrtm(disp=False), which SciPy 1.17 deprecates.
        warnings.filterwarnings("ignore", "The `disp` argument is deprecated", DeprecationWarning)
        return float(fid_from_feats(a.astype(np.float64), b.astype(np.float64)))


# Measured: 3e-14 of features, and 7e-8 of statistics, whose grid moves a feature by up to 8e-6. With n < d both are
# within 6e-7, where clean-fid takes the root of a singular product.
@pytest.mark.parametrize(("n", "of_features", "of_statistics"), [(400, 1e-11, 1e-6), (40, 1e-5, 1e-5)])
def test_the_frechet_distance_is_clean_fids(n: int, of_features: float, of_statistics: float) -> None:
    a, b = features(n, 64, 1), features(n + 50, 64, 2, shift=0.05)
    expected = cleanfid_distance(a, b)
    assert expected > 0.05
    assert frechet_of_features(a, b) == pytest.approx(expected, abs=of_features)
    assert frechet_distance(statistics(a), statistics(b)) == pytest.approx(expected, abs=of_statistics)


def test_shards_have_the_wholes_distance_to_the_last_bit() -> None:
    a, b = features(300, 16, 3), features(300, 16, 4)
    whole = frechet_distance(statistics(a), statistics(b))
    shards = statistics(a[200:]) + statistics(a[:77]) + statistics(a[77:200])
    assert frechet_distance(shards, statistics(b)) == whole


def test_diagonal_gaussians_have_a_closed_form() -> None:
    mean_a, mean_b = np.array([0.0, 1.0, 2.0]), np.array([1.0, 1.0, 0.0])
    variance_a, variance_b = np.array([1.0, 4.0, 0.0]), np.array([9.0, 4.0, 2.25])
    distance = frechet_from_moments(mean_a, np.diag(variance_a), mean_b, np.diag(variance_b))
    assert distance == pytest.approx(5 + np.square(np.sqrt(variance_a) - np.sqrt(variance_b)).sum(), rel=1e-14)


@pytest.mark.parametrize("n", [200, 10])
def test_a_set_is_at_no_distance_from_itself(n: int) -> None:
    a = features(n, 32, 5)
    assert frechet_of_features(a, a) < 1e-12
    assert frechet_distance(statistics(a), statistics(a)) < 1e-12


def test_distances_are_symmetric() -> None:
    a, b = features(50, 32, 6), features(60, 32, 7)
    assert frechet_of_features(a, b) == pytest.approx(frechet_of_features(b, a), rel=1e-12)
    assert kernel_distance(a, b, subsets=None) == pytest.approx(kernel_distance(b, a, subsets=None), rel=1e-9)


def test_two_extractors_have_no_distance() -> None:
    a = statistics(features(20, 4, 0))
    other = FeatureStatistics(FINGERPRINT.model_copy(update={"name": "other"}), a.exponent, a.count, a.total, a.outer)
    with pytest.raises(UsageError, match="second has name 'other', not 'random'"):
        frechet_distance(a, other)


@pytest.mark.parametrize(("n", "size"), [(120, 50), (40, 1000)])
def test_kid_is_clean_fids_on_the_same_subsets(n: int, size: int) -> None:
    a, b = features(n, 24, 8).astype(np.float64), features(n + 9, 24, 9, shift=0.1).astype(np.float64)
    state = np.random.get_state()
    np.random.seed(11)
    expected = cleanfid_kernel_distance(a, b, num_subsets=7, max_subset_size=size)
    np.random.set_state(state)
    # Measured: 7e-16.
    assert kernel_distance(a, b, subsets=7, subset_size=size, seed=11) == pytest.approx(expected, abs=1e-13)
    assert kernel_distance(a, b, subsets=7, subset_size=size, seed=12) != pytest.approx(expected, abs=1e-6)


def test_kid_draws_from_no_global_generator() -> None:
    a, b = features(60, 8, 0), features(60, 8, 1)
    state = np.random.get_state()[1].tobytes()
    assert kernel_distance(a, b, subsets=5, subset_size=20) == kernel_distance(a, b, subsets=5, subset_size=20)
    assert np.random.get_state()[1].tobytes() == state


def test_kid_of_all_pairs_is_the_definition() -> None:
    a, b = features(9, 5, 2).astype(np.float64), features(7, 5, 3).astype(np.float64)

    def k(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> float:
        return float((x @ y / 5 + 1) ** 3)

    within_a = [k(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j]
    within_b = [k(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j]
    between = [k(x, y) for x in a for y in b]
    expected = np.mean(within_a) + np.mean(within_b) - 2 * np.mean(between)
    assert kernel_distance(a, b, subsets=None) == pytest.approx(expected, abs=1e-12)


def test_kid_is_unbiased_where_fid_is_not() -> None:
    # Two sets of one distribution, many times: KID's mean is within 4 standard errors of 0, FID's is far above.
    pairs = [(features(30, 12, 2 * i), features(30, 12, 2 * i + 1)) for i in range(200)]
    kid = np.array([kernel_distance(a, b, subsets=None) for a, b in pairs])
    fid = np.array([frechet_of_features(a, b) for a, b in pairs])
    assert abs(kid.mean()) < 4 * kid.std() / np.sqrt(len(kid))
    assert fid.min() > 0.05
    shifted = np.array([kernel_distance(a, b + np.float32(0.2), subsets=None) for a, b in pairs])
    assert shifted.mean() > 10 * kid.std() / np.sqrt(len(kid))


def test_kid_in_blocks_is_kid(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = features(50, 6, 4), features(41, 6, 5)
    whole = kernel_distance(a, b, subsets=None)
    monkeypatch.setattr("excise.eval.distribution_distance._KERNEL_ROWS", 7)
    assert kernel_distance(a, b, subsets=None) == pytest.approx(whole, abs=1e-12)


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize(("n", "m", "paired"), [(90, 70, False), (20, 25, False), (80, 80, True)])
def test_the_bootstrap_is_brute_force(n: int, m: int, paired: bool, dead: bool) -> None:
    a, b = features(n, 32, 1), features(m, 32, 2)
    # A feature that is never active makes every covariance singular.
    a[:, 7], b[:, 7] = a[:, 7] * (not dead), b[:, 7] * (not dead)
    rng, expected = np.random.default_rng(5), []
    for _ in range(10):
        rows_a = rng.integers(0, n, n)
        rows_b = rows_a if paired else rng.integers(0, m, m)
        expected.append(frechet_of_features(a[rows_a], b[rows_b]))
    # Measured: 5e-15.
    np.testing.assert_allclose(frechet_bootstrap(a, b, 10, 5, paired=paired), expected, atol=1e-11)


def test_the_bootstrap_is_seeded_and_lies_above_the_distance() -> None:
    a, b = features(80, 16, 3), features(80, 16, 4, shift=0.1)
    resampled = frechet_bootstrap(a, b, 200, 0)
    assert np.array_equal(resampled, frechet_bootstrap(a, b, 200, 0))
    assert not np.array_equal(resampled, frechet_bootstrap(a, b, 200, 1))
    assert resampled.mean() > frechet_of_features(a, b) + resampled.std()


def test_pairs_of_equal_sets_never_differ() -> None:
    a = features(40, 8, 6)
    assert frechet_bootstrap(a, a, 20, 0, paired=True).max() < 1e-12
    assert frechet_bootstrap(a, a, 20, 0).min() > 1e-3


def test_bad_sets_are_refused() -> None:
    a = features(10, 4, 0)
    with pytest.raises(UsageError, match="two images a side, not 1 and 10"):
        frechet_of_features(a[:1], a)
    with pytest.raises(UsageError, match="one width"):
        kernel_distance(a, features(10, 5, 0))
    with pytest.raises(UsageError, match="at least 2 images, not 3 of 1"):
        kernel_distance(a, a, subsets=3, subset_size=1)
    with pytest.raises(UsageError, match="at least 1 subset"):
        kernel_distance(a, a, subsets=0)
    with pytest.raises(UsageError, match="at least 1 resample"):
        frechet_bootstrap(a, a, 0, 0)
    with pytest.raises(UsageError, match="one size, not 10 and 9"):
        frechet_bootstrap(a, a[:9], 5, 0, paired=True)
    with pytest.raises(UsageError, match="moments of one width"):
        frechet_from_moments(np.zeros(3), np.eye(3), np.zeros(3), np.eye(4))
