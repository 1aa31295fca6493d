"""LEACE: after it no linear probe finds the concept (Belrose et al., NeurIPS 2023, arXiv 2306.03819).

x is a token, z its label, one-hot over the concepts and 0 for targets and kept tokens. No linear predictor of z from
``r(x)`` with an intercept beats a constant if and only if ``Cov(r(x), z) = 0``. Of all linear r = T that reach this,
the one that moves the tokens least, ``min E‖T x − x‖²``, is

    T = I − Mʰ U Uᵀ (Mʰ)⁺          M = E x xᵀ,  Mʰ its square root,  U an orthonormal basis of colsp((Mʰ)⁺ Σ),
                                   Σ = Cov(x, z), d × k

an oblique projection along colsp Σ: ``T² = T``, ``T Σ = 0``, and the rank of ``I − T`` is that of Σ. K and V have no
bias, so that r has to be linear, and M is the second moment about 0, where the paper's affine r, which can put the mean
back, has the covariance. Where M is singular, directions that no token uses stay as they are. The weights read ``T x``:
``W_i ← W_i T``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from excise.edit.cholesky import finite
from excise.edit.tokens import Concept, Rule, all_pairs, rows
from excise.edit.transform import Step, Transform
from excise.errors import UsageError

__all__ = ["LeaceFitter", "leace"]


def leace(
    concepts: Sequence[Concept],
    kept: Iterable[Tensor],
    *,
    tolerance: float = 1e-12,
    correlation_tolerance: float = 1e-8,
    rule: Rule = all_pairs,
) -> Transform:
    """The eraser of LEACE as one step of rank ≤ the number of concepts.

    Every concept is a class of its own; its target's tokens and the kept ones are the class of the rest.

    Args:
        concepts: what to erase, and its targets.
        kept: token matrices with shape (n, d), read once. Memory is O(d²).
        tolerance: as in ``LeaceFitter.fit``.
        correlation_tolerance: as in ``LeaceFitter.fit``.
        rule: which tokens of a concept and of its target are counted. Every position by default, as of kept prompts:
            otherwise the classes differ by position, and the probe finds that.

    Raises:
        UsageError: no concepts, widths that differ, or an argument out of range.
        NumericsError: inf or nan.
    """
    if not concepts:
        raise UsageError("no concept to erase: give at least one")
    dim = concepts[0].dim
    fitter = LeaceFitter(dim, len(concepts), device=concepts[0].tokens.device)
    for label, concept in enumerate(concepts):
        tokens, targets = rule(concept)
        fitter.update(tokens, label).update(targets, None)
    for tokens in kept:
        fitter.update(tokens, None)
    return Transform((fitter.fit(tolerance=tolerance, correlation_tolerance=correlation_tolerance),), dim)


class LeaceFitter:
    """Accumulates ``Σ x xᵀ``, and ``Σ x`` and the number of tokens for each label; ``fit`` solves. Memory is O(d²)."""

    def __init__(self, dim: int, labels: int, *, device: torch.device | str = "cpu") -> None:
        self.dim = dim
        self._second = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        # The last row is for tokens without a label.
        self._sums = self._second.new_zeros(labels + 1, dim)
        self._counts = self._second.new_zeros(labels + 1)

    def update(self, tokens: Tensor, label: int | None) -> LeaceFitter:
        """Count the rows of ``tokens`` (n, d) to concept ``label``, or to none.

        Raises:
            UsageError: another width, or a label that isn't from 0 to the number of labels − 1.
            NumericsError: inf or nan.
        """
        labels = len(self._counts) - 1
        if label is not None and not 0 <= label < labels:
            raise UsageError(f"label = {label}: give None or 0 to {labels - 1}")
        given = rows(tokens, self.dim).to(self._second.device)
        index = labels if label is None else label
        self._second.addmm_(given.T, given)
        self._sums[index] += given.sum(dim=0)
        self._counts[index] += len(given)
        return self

    def fit(self, *, tolerance: float = 1e-12, correlation_tolerance: float = 1e-8) -> Step:
        """The projection ``T``; the identity where no linear probe finds a label.

        Args:
            tolerance: eigenvalues of M below this part of the largest count as 0: rounding errors of the sum.
            correlation_tolerance: correlations of tokens and labels below this count as 0.

        Raises:
            UsageError: an argument out of range.
            NumericsError: inf or nan.
        """
        for name, value in (("tolerance", tolerance), ("correlation_tolerance", correlation_tolerance)):
            if not (math.isfinite(value) and 0 < value < 1):
                raise UsageError(f"{name} = {value:g}: give a number between 0 and 1")
        total = self._counts.sum().clamp(min=1)
        squares, vectors = torch.linalg.eigh(finite(self._second / total))
        used = squares > tolerance * squares.max()
        roots, basis = squares[used].sqrt(), vectors[:, used]
        share = self._counts[:-1, None] / total
        covariance = self._sums[:-1] / total - share * self._sums.sum(dim=0) / total
        # In units of z's deviation its norm is a correlation. A label of no or of all tokens has nothing to find.
        deviation = (share * (1 - share)).sqrt()
        correlation = torch.where(deviation > 0, covariance / deviation, 0.0) @ basis / roots
        _, values, right = torch.linalg.svd(correlation, full_matrices=False)
        found = right[values > correlation_tolerance]
        step = Step.low_rank(-(basis * roots) @ found.T, found / roots @ basis.T)
        finite(step.shared)
        return step
