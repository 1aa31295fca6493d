"""``G = Σ_i W_iᵀ W_i``: all that a shared edit needs to know of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from excise.edit.cholesky import is_finite
from excise.errors import NumericsError, UsageError

#: Rows promoted to float64 at a time: long enough for a fast product, 25 MB at d = 768.
_ROWS = 4096

#: Columns of G at a time. Only blocks on and below the diagonal are computed: 9/16 of the products with eight blocks.
_BLOCKS = 8


def gram(weights: Sequence[Tensor]) -> Tensor:
    """``Σ_i W_iᵀ W_i`` with shape (d, d), summed in float64, for ``weights`` (o_i × d) of any dtype.

    Raises:
        UsageError: no weights, or widths that differ.
        NumericsError: a weight holds inf or nan.
    """
    if not weights or any(weight.ndim != 2 or weight.shape[1] != weights[0].shape[1] for weight in weights):
        raise UsageError(f"weights of shapes {[tuple(weight.shape) for weight in weights]}: give some, all (o, d)")
    dim = weights[0].shape[1]
    total = torch.zeros(dim, dim, dtype=torch.float64, device=weights[0].device)
    starts = range(0, dim, -(-dim // _BLOCKS))
    for batch in _batches(weights):
        for start in starts:
            columns = slice(start, start + starts.step)
            total[start:, columns].addmm_(batch[:, start:].T, batch[:, columns])
    lower = total.tril()
    if not is_finite(lower):
        raise NumericsError("a weight holds inf or nan: load the model in float32 from an intact file")
    return lower + lower.tril(-1).T


def _batches(weights: Sequence[Tensor]) -> Iterator[Tensor]:
    """The rows of all weights in order, float64, some thousands at a time."""
    batch: list[Tensor] = []
    for weight in weights:
        if batch and sum(map(len, batch)) + len(weight) > _ROWS:
            yield torch.cat(batch).to(torch.float64)
            batch = []
        batch.append(weight.detach())
    yield torch.cat(batch).to(torch.float64)
