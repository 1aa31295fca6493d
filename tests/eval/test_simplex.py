"""The projection onto the simplex against the exact one by sorting, and against what defines it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from excise.errors import NumericsError
from excise.eval.simplex import project_to_simplex


def by_sorting(row: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Held, Wolfe & Crowder's algorithm: exact, with the support read off the sorted entries."""
    falling = np.sort(row)[::-1]
    excess = np.cumsum(falling) - 1
    support = np.nonzero(falling - excess / np.arange(1, len(row) + 1) > 0)[0][-1] + 1
    return np.maximum(row - excess[support - 1] / support, 0)


@pytest.mark.parametrize("scale", [1e-4, 0.01, 1.0, 30.0])
@pytest.mark.parametrize("width", [1, 2, 7, 4000])
def test_is_the_exact_projection(width: int, scale: float) -> None:
    rows = np.random.default_rng(width).normal(0, scale, (6, width)) + 1 / width
    projected = project_to_simplex(torch.from_numpy(rows)).numpy()
    oracle = np.stack([by_sorting(row) for row in rows])
    np.testing.assert_allclose(projected, oracle, rtol=0, atol=1e-14 * max(1, scale))


def test_a_point_of_the_simplex_stays() -> None:
    points = np.random.default_rng(0).dirichlet(np.full(50, 0.3), 8)
    np.testing.assert_allclose(project_to_simplex(torch.from_numpy(points)).numpy(), points, atol=1e-15)


def test_a_row_far_above_the_others_becomes_a_corner() -> None:
    row = torch.zeros(1, 5)
    row[0, 3] = 7
    assert project_to_simplex(row).tolist() == [[0, 0, 0, 1, 0]]


def test_equal_entries_share() -> None:
    assert torch.allclose(project_to_simplex(torch.full((2, 711), 40.0)), torch.tensor(1 / 711), atol=1e-9)


def test_float32_stays_float32_and_sums_to_one() -> None:
    projected = project_to_simplex(torch.randn(5, 5000, generator=torch.Generator().manual_seed(0)))
    assert projected.dtype == torch.float32
    assert bool((projected >= 0).all())
    # The published bisection stops at 1e-5.
    np.testing.assert_allclose(projected.double().sum(1).numpy(), 1, atol=1e-6)


def test_nothing_is_nearer() -> None:
    """No random point of the simplex is nearer to a row than its projection."""
    rng = np.random.default_rng(1)
    row = rng.normal(0, 0.5, 12)
    ours = project_to_simplex(torch.from_numpy(row[None])).numpy()[0]
    others = rng.dirichlet(np.full(12, 0.4), 5000)
    assert np.linalg.norm(ours - row) <= np.linalg.norm(others - row, axis=1).min()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(NumericsError, match="isn't finite"):
        project_to_simplex(torch.tensor([[0.0, value]]))
