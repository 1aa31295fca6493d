"""Solves with symmetric positive definite matrices: by Cholesky, never by an explicit inverse."""

from __future__ import annotations

import torch
from torch import Tensor

from excise.errors import NumericsError


def solve(matrix: Tensor, rhs: Tensor, *, ridge: float, name: str) -> Tensor:
    """``matrix⁻¹ rhs`` for a symmetric positive definite ``matrix`` that ``ridge · I`` is already part of.

    Args:
        matrix: float64 with shape (d, d); only its lower triangle is read.
        rhs: float64 with shape (d, n).
        ridge: what the error message tells the user to raise.
        name: the name of ``ridge`` in that message.

    Raises:
        NumericsError: ``matrix`` is singular to working precision, or it or ``rhs`` isn't finite.
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal().abs()
    # A pivot that is rounding error passes the factorisation, and its solution is noise.
    floor = torch.finfo(matrix.dtype).eps * len(pivots)
    if int(info) != 0 or not bool((pivots.min() / pivots.max()) ** 2 > floor):
        if not is_finite(matrix):
            raise NumericsError("the system holds inf or nan: look for inf or nan in the model, or lower the scales")
        raise NumericsError(f"the system is singular to working precision with {name} = {ridge:g}: raise {name}")
    return finite(torch.cholesky_solve(rhs, factor))


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry is inf or nan: one pass and no mask, since both reach the extremes."""
    return tensor.numel() == 0 or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def finite(result: Tensor) -> Tensor:
    """``result``, or ``NumericsError`` where it holds inf or nan."""
    if not is_finite(result):
        raise NumericsError("the closed form gives inf or nan: look for inf or nan in the model, or raise the ridge")
    return result
