"""The sum of WᵀW in blocks."""

from __future__ import annotations

import pytest
import torch

from excise.edit.gram import gram
from excise.errors import NumericsError, UsageError


@pytest.mark.parametrize("dim", [1, 3, 4, 30, 33])
def test_is_the_sum(dim: int) -> None:
    generator = torch.Generator().manual_seed(dim)
    shapes = (3, torch.float16), (5000, torch.float32), (7, torch.float64), (2500, torch.bfloat16), (1, torch.float32)
    weights = [torch.randn(rows, dim, generator=generator).to(dtype) for rows, dtype in shapes]
    expected = sum((w.double().T @ w.double() for w in weights), torch.zeros(dim, dim, dtype=torch.float64))
    result = gram([torch.nn.Parameter(weight) for weight in weights])
    assert result.dtype == torch.float64
    assert not result.requires_grad
    assert torch.equal(result, result.T)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-10)


def test_refusals() -> None:
    with pytest.raises(UsageError, match="weights of shapes"):
        gram([])
    with pytest.raises(UsageError, match=r"\(2, 3\), \(2, 4\)"):
        gram([torch.ones(2, 3), torch.ones(2, 4)])
    with pytest.raises(NumericsError, match="inf or nan"):
        gram([torch.full((2, 3), torch.inf)])
