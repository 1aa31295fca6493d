"""A trace keeps means of equal shares, and refuses what isn't a number."""

from __future__ import annotations

import numpy as np
import pytest

from excise.errors import NumericsError
from excise.eval.loss_trace import LossTrace


def test_few_losses_are_kept_as_they_are() -> None:
    trace = LossTrace(3)
    for loss in (3.0, 1.0, 2.0):
        trace.add(loss)
    assert trace.values == (3, 1, 2)
    assert (trace.iterations, trace.last) == (3, 2)


def test_many_become_means_of_consecutive_ones() -> None:
    losses = np.random.default_rng(0).random(47)
    trace = LossTrace(47, limit=10)
    for loss in losses:
        trace.add(float(loss))
    expected = [losses[start : start + 5].mean() for start in range(0, 47, 5)]
    np.testing.assert_allclose(trace.values, expected, rtol=1e-12)


def test_a_search_that_stops_early_has_a_short_trace() -> None:
    trace = LossTrace(3000, limit=200)
    for loss in (1.0, 3.0):
        trace.add(loss)
    assert trace.values == (2,)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_refused(loss: float) -> None:
    trace = LossTrace(10)
    trace.add(1.0)
    with pytest.raises(NumericsError, match=r"at iteration 2 of 10: attack the model in float32"):
        trace.add(loss)
