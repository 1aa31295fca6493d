"""RECE's eq. 8: the embedding with which edited weights best regenerate a concept (ECCV 2024, arXiv 2407.12383).

For edited weights ``W_i T_i`` and the tokens ``c`` of a concept:

    eq. 7   min over c' of   Σ_i ‖W_i T_i c' − W_i c‖² + λ ‖c'‖²
    eq. 8   (λ I + Σ_i T_iᵀ W_iᵀ W_i T_i) c' = Σ_i T_iᵀ W_iᵀ W_i c

A shared ``T`` needs no layer for that: with ``G = Σ_i W_iᵀ W_i``, computed once, eq. 8 is
``(λ I + Tᵀ G T) c' = Tᵀ G c``, d × d for any number of layers. Both sides are brought along from step to step: after
``T ← T (I + U V)`` with r tokens that is O(r d²), and of the O(d³) work only the Cholesky factorisations are left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from excise.edit.cholesky import solve
from excise.edit.tokens import rows
from excise.edit.transform import Step, Transform
from excise.errors import UsageError


def derive(gram: Tensor, transform: Tensor, tokens: Tensor, ridge: float) -> Tensor:
    """``C'`` of eq. 8 with shape (t, d), float64: the ridge solution of eq. 7 for every token by itself.

    Args:
        gram: ``G`` of the original weights with shape (d, d), float64.
        transform: ``T`` with shape (d, d), float64.
        tokens: ``C`` with shape (t, d).
        ridge: λ; with 0 the system must be regular.

    Raises:
        UsageError: a shape, or a λ that is negative or not finite.
        NumericsError: a singular system, inf or nan.
    """
    check_ridge(ridge)
    dim = len(gram)
    if gram.shape != (dim, dim) or transform.shape != (dim, dim):
        raise UsageError(f"a gram of shape {tuple(gram.shape)}, a transform of {tuple(transform.shape)}: give (d, d)")
    cross = transform.T @ gram
    return _solve(cross @ transform, cross @ rows(tokens, dim).T.to(gram.device), ridge)


def residual(gram: Tensor, transform: Tensor, derived: Tensor, tokens: Tensor) -> float:
    """``Σ_i ‖W_i T c' − W_i c‖² / Σ_i ‖W_i c‖²`` over the rows: how badly ``derived`` regenerates ``tokens``.

    Args:
        gram: ``G`` with shape (d, d), float64.
        transform: ``T`` with shape (d, d), float64.
        derived: ``C'`` with shape (t, d).
        tokens: ``C`` with shape (t, d).
    """
    original = rows(tokens, len(gram)).to(gram.device)
    error = rows(derived, len(gram)).to(gram.device) @ transform.T - original
    return ratio(((error @ gram) * error).sum(), ((original @ gram) * original).sum())


@dataclass(frozen=True)
class Equation:
    """Eq. 8 but for its ridge, for a shared ``T``.

    Attributes:
        gram: ``G`` with shape (d, d).
        normal: ``Tᵀ G T`` with shape (d, d).
        right: ``Tᵀ G Cᵀ`` with shape (d, n).
    """

    gram: Tensor
    normal: Tensor
    right: Tensor

    @classmethod
    def unedited(cls, gram: Tensor, tokens: Tensor) -> Equation:
        """For ``T = I`` and ``C`` with shape (n, d)."""
        return cls(gram, gram, gram @ tokens.T)

    def after(self, step: Step) -> Equation:
        """For ``T M`` in place of ``T``: ``Mᵀ A M = (A M)ᵀ M`` for the symmetric ``A = Tᵀ G T``."""
        return Equation(self.gram, step.applied_to(step.applied_to(self.normal).T), step.applied_to(self.right.T).T)

    def regenerate(
        self, transform: Tensor, tokens: Tensor, ridge: float, moments: Tensor | None
    ) -> tuple[Tensor, float]:
        """``C'`` with shape (n, d), and its residual: over the rows, or over those whose ``CᵀC`` ``moments`` is."""
        derived = _solve(self.normal, self.right, ridge)
        if moments is None:
            return derived, residual(self.gram, transform, derived, tokens)
        error = derived @ transform.T - tokens
        return derived, ratio((error @ self.gram @ error.T * moments).sum(), (self.gram * moments).sum())


def regenerate_by_site(
    weights: Sequence[Tensor], transform: Transform, tokens: Tensor, ridge: float
) -> tuple[Tensor, float]:
    """The same for an edit that differs from site to site, with one weight in float64 at a time."""
    device = tokens.device
    normal = torch.zeros(transform.dim, transform.dim, dtype=torch.float64, device=device)
    right = torch.zeros(transform.dim, len(tokens), dtype=torch.float64, device=device)
    for site, weight in enumerate(weights):
        original = weight.detach().to(torch.float64)
        edited = transform.on_weight(original, site)
        normal.addmm_(edited.T, edited)
        right.addmm_(edited.T, original @ tokens.T)
    derived = _solve(normal, right, ridge)
    error, size = torch.zeros_like(normal[0, 0]), torch.zeros_like(normal[0, 0])
    for site, weight in enumerate(weights):
        original = weight.detach().to(torch.float64)
        error += ((transform.on_tokens(derived, site) - tokens) @ original.T).square().sum()
        size += (tokens @ original.T).square().sum()
    return derived, ratio(error, size)


def _solve(normal: Tensor, right: Tensor, ridge: float) -> Tensor:
    """``((λ I + normal)⁻¹ right)ᵀ``."""
    regular = normal.clone()
    regular.diagonal().add_(ridge)
    return solve(regular, right, ridge=ridge, name="the ridge of eq. 8").T


def ratio(error: Tensor, size: Tensor) -> float:
    """``error / size``; 0 for tokens that every weight maps to 0, or where there are none."""
    return float(error / size) if float(size) > 0 else 0.0


def check_ridge(ridge: float) -> None:
    """Raise ``UsageError`` unless λ is finite and not negative."""
    if not (math.isfinite(ridge) and ridge >= 0):
        raise UsageError(f"ridge = {ridge:g}: give a finite λ of eq. 8, 0 or more")
