"""Permutation tests against scipy's, brute force, and their level; they see what they should."""

from __future__ import annotations

from itertools import product

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from excise.errors import UsageError
from excise.eval.permutation import mmd_p_value, sign_flip_p_value

Real = npt.NDArray[np.float64]


def value(measure: object) -> float:
    found = getattr(measure, "value", None)
    assert isinstance(found, float)
    return found


@pytest.mark.parametrize("n", [2, 4, 9, 12])
def test_few_pairs_give_scipys_exact_p(n: int) -> None:
    rng = np.random.default_rng(n)
    reference = rng.normal(size=n)
    judged = reference + 0.4 + rng.normal(size=n)
    own = stats.permutation_test(
        (judged - reference,), lambda d, axis: d.mean(axis), permutation_type="samples", vectorized=True
    )
    found = sign_flip_p_value(reference, judged)
    assert found.method == f"sign flips, all {2**n}"
    assert value(found) == pytest.approx(own.pvalue, abs=1e-15)


def test_ties_count_as_extreme() -> None:
    # |Σ ± d| is 6 or more in all ways but those of 1 + 2 − 3 and 3 − 1 − 2: values that rounding must not part.
    assert value(sign_flip_p_value([0.0, 0.0, 0.0], [0.1, 0.2, 0.3])) == 2 / 8
    assert value(sign_flip_p_value([0.0, 0.0, 0.0], [0.1, 0.2, -0.3])) == 1.0


def test_pairs_that_agree_change_nothing() -> None:
    assert value(sign_flip_p_value([1.0, 2.0], [1.0, 2.0])) == 1.0
    few = sign_flip_p_value([0.0] * 3 + [5.0] * 1000, [1.0] * 3 + [5.0] * 1000)
    assert (few.value, few.n, few.method) == (0.25, 1003, "sign flips, all 8")


def test_drawn_flips_agree_with_exact_ones() -> None:
    rng = np.random.default_rng(0)
    reference = rng.normal(size=12)
    judged = reference + 0.5 * rng.normal(size=12) + 0.15
    exact = value(sign_flip_p_value(reference, judged))
    drawn = sign_flip_p_value(reference, judged, resamples=4000)
    assert drawn.method == "sign flips, 4000 drawn"
    # Three standard errors of 4000 draws.
    assert value(drawn) == pytest.approx(exact, abs=3 * np.sqrt(exact * (1 - exact) / 4000))


def test_a_drawn_p_is_never_zero() -> None:
    assert value(sign_flip_p_value(np.zeros(50), np.ones(50), resamples=199)) == 1 / 200


def kernel_sum(x: Real, y: Real) -> float:
    """The squared MMD, as its definition has it, with the polynomial kernel."""

    def mean(a: Real, b: Real) -> float:
        return float(np.mean((a @ b.T / a.shape[1] + 1) ** 3))

    return mean(x, x) + mean(y, y) - 2 * mean(x, y)


def test_mmd_is_brute_force_over_all_swaps() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(6, 3))
    y = x + 0.3 + 0.5 * rng.normal(size=(6, 3))
    observed = kernel_sum(x, y)
    extreme = 0
    for swaps in product([False, True], repeat=6):
        swap = np.array(swaps)[:, None]
        extreme += kernel_sum(np.where(swap, y, x), np.where(swap, x, y)) >= observed * (1 - 1e-10)
    found = mmd_p_value(x, y, kernel="polynomial")
    assert found.method == "MMD, polynomial kernel, all 64"
    assert value(found) == extreme / 64


def test_mmd_sees_a_change_of_spread_that_means_hide() -> None:
    rng = np.random.default_rng(2)
    reference = rng.normal(size=80)
    judged = 2 * reference
    assert value(sign_flip_p_value(reference, judged, resamples=999)) > 0.05
    assert value(mmd_p_value(reference, judged, resamples=499)) < 0.01


@pytest.mark.parametrize("kernel", ["rbf", "polynomial"])
def test_mmd_keeps_its_level(kernel: str) -> None:
    rng = np.random.default_rng(3)
    rejected = 0
    for _ in range(300):
        truth = rng.normal(size=(30, 4))
        x, y = truth + 0.2 * rng.normal(size=(2, 30, 4))
        rejected += value(mmd_p_value(x, y, kernel=kernel, resamples=99)) <= 0.05  # type: ignore[arg-type]
    # 0.05 ± 3 standard errors; measured 0.043 and 0.047.
    assert rejected / 300 <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 300)
    assert rejected > 0


def test_sign_flips_keep_their_level_with_skewed_figures() -> None:
    rng = np.random.default_rng(4)
    ps = []
    for _ in range(400):
        both = rng.exponential(size=(2, 25)) + rng.exponential(size=25)
        ps.append(value(sign_flip_p_value(both[0], both[1], resamples=199)))
    # 0.05 ± 3 standard errors; measured 0.050.
    assert 0.01 <= np.mean(np.array(ps) <= 0.05) <= 0.083


def test_a_block_of_rows_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(2, 40, 3))
    whole = mmd_p_value(x, y, resamples=199)
    monkeypatch.setattr("excise.eval.permutation._ROWS", 7)
    monkeypatch.setattr("excise.eval.permutation._BATCH", 40 * 33)
    assert mmd_p_value(x, y, resamples=199) == whole


def test_a_runtime_that_changed_nothing_has_p_one() -> None:
    rows = np.random.default_rng(6).normal(size=(40, 3))
    assert value(mmd_p_value(rows, rows)) == 1.0
    assert value(mmd_p_value(np.ones((20, 2)), np.ones((20, 2)))) == 1.0


def test_what_can_not_be_tested_says_why() -> None:
    assert sign_flip_p_value([], []).value is None
    assert sign_flip_p_value([np.nan, 1.0], [1.0, 1.0]).error == "1 figures aren't finite"
    assert mmd_p_value(np.array([[np.inf]]), np.array([[1.0]])).value is None
    with pytest.raises(UsageError, match="equal shapes"):
        mmd_p_value(np.ones((3, 2)), np.ones((3, 3)))
    with pytest.raises(UsageError, match="99 at least"):
        sign_flip_p_value([1.0], [2.0], resamples=10)
