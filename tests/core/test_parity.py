"""Distances between outputs: exact, lost and partly lost edits; deviations against other formulas."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import cosine

from excise.errors import NumericsError
from excise.parity import deviation, parity


@given(seed=st.integers(0, 99), share=st.floats(0, 1), scale=st.sampled_from([1e-6, 1.0, 1e6]))
def test_a_share_of_the_edit_that_is_lost(seed: int, share: float, scale: float) -> None:
    base, edited = scale * np.random.default_rng(seed).standard_normal((2, 3, 4))
    found = parity(base, edited, edited + share * (base - edited))
    assert found.relative == pytest.approx(share, abs=1e-9)
    assert found.max_abs == pytest.approx(share * found.edit_max_abs, rel=1e-9, abs=1e-12 * scale)


@given(seed=st.integers(0, 99))
def test_deviation_is_what_other_formulas_give(seed: int) -> None:
    reference, found = np.random.default_rng(seed).standard_normal((2, 3, 4))
    measured = deviation(reference, found)
    assert measured.max_abs == max(abs(x - y) for x, y in zip(found.flat, reference.flat, strict=True))
    assert measured.relative**2 == pytest.approx(((found - reference) ** 2).sum() / (reference**2).sum())
    assert measured.cosine == pytest.approx(1 - cosine(reference.ravel(), found.ravel()))


def test_deviation_of_the_same_and_of_nothing() -> None:
    ones = np.ones((2, 2), np.float16)
    assert deviation(ones, ones) == deviation(ones.astype(np.float64), ones)
    assert deviation(ones, ones).relative == 0
    assert deviation(ones, 0 * ones).cosine == 0
    assert deviation(ones, 0 * ones).relative == 1
    # summed in float64: in float16 the norm would overflow
    assert deviation(6e4 * ones, 6e4 * ones).relative == 0


def test_what_has_no_answer_is_refused() -> None:
    ones = np.ones((2, 2))
    with pytest.raises(NumericsError, match="equal shapes"):
        deviation(ones, ones[:1])
    with pytest.raises(NumericsError, match="all zeros"):
        deviation(0 * ones, ones)
    for broken in (np.inf, np.nan):
        with pytest.raises(NumericsError, match="finite"):
            deviation(ones, broken * ones)
    with pytest.raises(NumericsError, match="changes none"):
        parity(ones, ones, 2 * ones)
