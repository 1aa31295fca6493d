"""Projection onto the probability simplex, by bisection.

The point of {x ≥ 0, Σx = 1} that is nearest to a is max(a − μ, 0), with the one μ at which it sums to 1 (Held, Wolfe &
Crowder, *Validation of subgradient optimization*, 1974). Its sum falls with μ, from at least 1 at μ = max(a) − 1 to 0
at μ = max(a): so μ is found by halving that interval.
"""

from __future__ import annotations

import torch
from torch import Tensor

from excise.errors import NumericsError

#: The interval is 1 wide: after so many halvings it is below float64's rounding of numbers near 1.
HALVINGS = 54


def project_to_simplex(rows: Tensor) -> Tensor:
    """The nearest point of the simplex to each row.

    UnlearnDiffAtk's code stops at an interval of 1e-5, so its rows may sum to 1 within a few times that; this goes on
    to float64's rounding, on all rows together.

    Args:
        rows: with shape (n, m), m at least 1.

    Returns:
        With the shape and dtype of ``rows``.

    Raises:
        NumericsError: a row isn't finite.
    """
    values = rows.detach().double()
    if not bool(values.isfinite().all()):
        raise NumericsError("a row that isn't finite has no nearest point of the simplex: lower the learning rate")
    high = values.amax(dim=1, keepdim=True)
    low = high - 1
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        above = (values - middle).clamp(min=0).sum(1, keepdim=True) > 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return (values - (low + high) / 2).clamp(min=0).to(rows.dtype)
