"""FID and KID with intervals: the figures of ``distribution_distance``, resampled by hand to compare."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from excise.eval import distance_bootstrap
from excise.eval.distance_bootstrap import distance, kernel_bootstrap
from excise.eval.distribution_distance import frechet_of_features, kernel_distance

N, D = 40, 6


def drawn(shift: float = 0.0, seed: int = 0, n: int = N) -> npt.NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal((n, D)) + shift).astype(np.float32)


def test_a_resampled_kernel_distance_is_that_of_the_drawn_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distance_bootstrap, "_ROWS", 16)
    x, y = drawn(), drawn(0.3, seed=1)
    found = kernel_bootstrap(x, y, 20, seed=5)
    random = np.random.default_rng(5)
    expected = []
    for _ in range(20):
        rows = random.integers(0, N, N)
        expected.append(kernel_distance(x[rows], y[rows], subsets=None))
    # Measured: at most 5e-14 apart, with distances of 0.3 to 3.
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("metric", ["fid", "kid"])
def test_the_figure_is_the_distance_and_its_interval_holds_it(metric: str) -> None:
    x, y = drawn(), drawn(1.0, seed=1)
    found = distance(metric, "Inception", x, y)  # type: ignore[arg-type]
    exact = frechet_of_features(x, y) if metric == "fid" else kernel_distance(x, y, subsets=None)
    assert found.value == exact
    assert found.low is not None
    assert found.high is not None
    assert found.low < exact < found.high
    assert (found.n, found.unit, found.better) == (N, metric.upper(), "lower")
    assert distance(metric, "demo:clip", x, y).unit == f"{metric.upper()} (features of demo:clip)"  # type: ignore[arg-type]
    assert distance(metric, "Inception", x, y) == found  # type: ignore[arg-type]


def test_equal_features_are_no_distance_apart() -> None:
    found = distance("fid", "Inception", drawn(), drawn())
    assert (found.value, found.low, found.high) == (0, 0, 0)
    # The unbiased estimate of KID's zero is below it: within a set, no image is compared with itself.
    kid = distance("kid", "Inception", drawn(), drawn())
    assert kid.value is not None
    assert kid.value < 0


def test_the_excess_of_resampled_distances_is_subtracted() -> None:
    """With fewer images than features, nearly every plain resample lies above the distance itself."""
    x, y = drawn(n=12), drawn(0.5, seed=1, n=12)
    value = frechet_of_features(x, y)
    plain = distance_bootstrap.frechet_bootstrap(x, y, 200, 0, paired=True)
    assert np.quantile(plain, 0.1) > value
    found = distance("fid", "Inception", x, y)
    assert found.low is not None
    assert found.high is not None
    assert found.low < value < found.high < np.quantile(plain, 0.975)


def test_what_has_no_distance_says_why() -> None:
    assert distance("fid", "Inception", drawn(n=1), drawn(n=1)).error == "1 images: at least two are needed"
    broken = drawn()
    broken[3, 2] = np.nan
    assert distance("kid", "Inception", drawn(), broken).error == "1 values of the features aren't finite"
