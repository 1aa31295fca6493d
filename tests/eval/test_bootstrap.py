"""Bootstrap intervals against scipy's own, closed forms, and coverage; pairs stay pairs."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from excise.errors import UsageError
from excise.eval.bootstrap import BCA_LIMIT, interval, mean, mean_difference, mean_drop, of_features
from excise.eval.evaluation import Measure
from excise.eval.floor import floor, run_differences


def ends(measure: Measure) -> tuple[float, float]:
    assert measure.low is not None
    assert measure.high is not None
    return measure.low, measure.high


def test_the_mean_is_scipys_bca() -> None:
    values = np.random.default_rng(0).gamma(2, size=60)
    own = stats.bootstrap((values,), np.mean, n_resamples=500, method="BCa", random_state=np.random.default_rng(7))
    found = mean(values, resamples=500, seed=7)
    assert found.value == pytest.approx(values.mean())
    assert ends(found) == pytest.approx((own.confidence_interval.low, own.confidence_interval.high), rel=1e-12)
    assert found.method == "bootstrap BCa (500 resamples, seed 7)"


def test_many_images_use_percentiles_near_the_normal_interval() -> None:
    values = np.random.default_rng(1).normal(size=BCA_LIMIT + 1)
    found = mean(values, resamples=1000)
    assert "percentile" in found.method
    reach = 1.96 * values.std(ddof=1) / np.sqrt(len(values))
    # Off by 10 % and 4 % of the reach, which is what 1000 resamples scatter by (about 5 %).
    assert ends(found) == pytest.approx((values.mean() - reach, values.mean() + reach), abs=0.15 * reach)


def test_means_cover_the_truth() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(300):
        low, high = ends(mean(rng.gamma(4, 0.25, 60), resamples=400))
        covered += low <= 1.0 <= high
    # 0.943 with this seed.
    assert 0.91 <= covered / 300 <= 0.98


def test_pairs_cancel_what_prompts_have_in_common() -> None:
    rng = np.random.default_rng(3)
    reference = rng.normal(31, 4, 200)
    judged = reference - 0.2 + rng.normal(0, 0.1, 200)
    drop = mean_drop(reference, judged)
    low, high = ends(drop)
    assert drop.value == pytest.approx(0.2, abs=0.03)
    assert high - low < 0.05
    # Unpaired, the same images wouldn't show it: the interval is an order of magnitude wider.
    low, high = ends(mean(rng.permutation(reference) - judged))
    assert high - low > 0.5


def test_a_drop_is_a_negative_difference() -> None:
    rng = np.random.default_rng(4)
    reference, judged = rng.normal(size=(2, 50))
    difference, drop = mean_difference(reference, judged), mean_drop(reference, judged)
    assert difference.value is not None
    assert drop.value == pytest.approx(-difference.value)
    assert drop.better == "lower"


def test_equal_figures_have_no_spread() -> None:
    found = mean([0.25] * 10)
    assert ends(found) == (0.25, 0.25)
    assert "without spread" in found.method


@pytest.mark.parametrize(
    ("values", "error"), [([], "no images"), ([1.0, float("nan")], "1 of 2 figures aren't finite")]
)
def test_what_is_no_figure_says_why(values: list[float], error: str) -> None:
    found = mean(values)
    assert (found.value, found.low, found.high, found.error) == (None, None, None, error)


def test_one_image_has_no_interval() -> None:
    found = mean([3.0])
    assert (found.value, found.low, found.high) == (3.0, None, None)


def squared_distance(first: np.ndarray, second: np.ndarray) -> float:
    return float(((first.mean(0) - second.mean(0)) ** 2).sum())


def test_features_are_resampled_in_pairs() -> None:
    rng = np.random.default_rng(5)
    first = rng.normal(size=(100, 4))
    second = first + 0.01 * rng.normal(size=(100, 4))
    found = of_features(squared_distance, first, second, resamples=200)
    assert found.value == pytest.approx(squared_distance(first, second))
    # As large as the noise's means, 4 · 10⁻⁴ / 100; sets that are resampled apart would differ by 4 · 2 / 100.
    assert ends(found)[1] < 5e-5
    far = of_features(squared_distance, first, rng.permutation(second), resamples=200)
    assert ends(far)[1] > 1e-2
    assert of_features(squared_distance, first, second, resamples=200) == found


def test_the_interval_of_features_holds_the_figure() -> None:
    rng = np.random.default_rng(6)
    first, second = rng.normal(size=(2, 30, 8))
    found = of_features(squared_distance, first, second, resamples=200)
    low, high = ends(found)
    assert found.value is not None
    assert low <= found.value <= high


def test_features_that_give_no_figure_say_why() -> None:
    rows = np.ones((5, 2))
    rows[1, 1] = np.nan
    assert of_features(squared_distance, rows, np.ones((5, 2))).error == "1 values of the features aren't finite"
    assert of_features(lambda _a: float("inf"), np.ones((5, 2))).error == "the figure is inf"
    with pytest.raises(UsageError, match="equal lengths"):
        of_features(squared_distance, np.ones((5, 2)), np.ones((4, 2)))


def test_bad_bootstraps_are_refused() -> None:
    with pytest.raises(UsageError, match="2 and 100 at least"):
        interval(lambda index, axis: index.mean(axis), 1, method="percentile")
    with pytest.raises(UsageError, match="between 0 and 1"):
        interval(lambda index, axis: index.mean(axis), 9, method="percentile", confidence=95)
    with pytest.raises(UsageError, match="pairs need two figures"):
        mean_drop([1.0, 2.0], [1.0])


def test_the_floor_is_what_right_runs_differ_by() -> None:
    rng = np.random.default_rng(7)
    truth = rng.normal(30, 3, 400)
    runs = truth + rng.normal(0, 0.1, (3, 400))
    found = floor(run_differences(runs))
    low, high = ends(found)
    # The mean |difference| of two normal variables is 2 σ / √π.
    assert low <= 0.2 / np.sqrt(np.pi) <= high
    assert high - low < 0.02
    assert found.n == 400
    assert "3 pairs of runs" in found.method
    wide = floor(run_differences(runs), quantile=0.95, resamples=300)
    low, high = ends(wide)
    assert low <= 1.96 * 0.1 * np.sqrt(2) <= high


def test_equal_runs_have_no_floor() -> None:
    assert ends(floor(run_differences(np.ones((2, 20))))) == (0, 0)


def test_a_floor_needs_two_runs() -> None:
    with pytest.raises(UsageError, match="two runs"):
        run_differences([[1.0, 2.0]])
    with pytest.raises(UsageError, match="quantile"):
        floor([1.0, 2.0], quantile=95)
    assert floor([1.0]).value is None
