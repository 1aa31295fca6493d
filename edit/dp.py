"""Double Projections: a safe target, and kept concepts that don't move at all (DP, CVPR 2026, arXiv 2604.10032).

The paper's columns are tokens. ``S`` are the tokens of what is safe, ``U₂`` an orthonormal basis of the left null space
of the kept tokens, and a concept's token c becomes its projection on the safe subspace:

    c* = S (SᵀS)⁺ Sᵀ c        ΔW = W (c* − c) xᵀ / ‖x‖² U₂ᵀ        x = U₂ᵀ c

It is the smallest change with ``ΔW c = W (c* − c)`` and ``ΔW k = 0`` for every kept k. For the rows ``C`` of all tokens
of all concepts, with ``X = C U₂``, the smallest change for all of them at once puts the pseudo-inverse of ``X`` in the
place of ``xᵀ / ‖x‖²``:

    W ← W (I + (C* − C)ᵀ (Xᵀ)⁺ U₂ᵀ)

All at once, not one after the other: a second step by the formula moves what the first has set, since its concepts
aren't kept; and the answer doesn't depend on the order of the concepts. Tokens that contradict one another (more than
U₂ has directions, or the same one with two targets) get the least-squares answer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from excise.edit.cholesky import finite
from excise.edit.tokens import Concept, Rule, last_subject_pairs, rank, rows
from excise.edit.transform import Step, Transform
from excise.errors import NumericsError, UsageError

__all__ = ["dp", "free_basis", "onto_span"]


def dp(
    concepts: Sequence[Concept],
    kept: Iterable[Tensor],
    *,
    rank_tolerance: float | None = None,
    reach_tolerance: float = 1e-6,
    rule: Rule = last_subject_pairs,
) -> Transform:
    """The edit of Double Projections as one step.

    Args:
        concepts: what to erase, and its target: all the target's tokens span this concept's safe subspace ``S``.
        kept: token matrices with shape (n, d), read once. Memory is O(d²). They must leave directions free: no more
            than d − 1 tokens in all, or tokens of lower rank.
        rank_tolerance: singular values of the kept or the safe tokens below this part of the largest count as 0; by
            default those that a float32 text encoder's rounding accounts for (``excise.edit.tokens.rank``). A larger
            one frees directions that kept tokens hardly use, and lets them move by as much.
        reach_tolerance: singular values of ``X`` below this part of ``C``'s largest count as 0: erasing by the small
            part of a token that the kept ones leave over takes a step as large as that part is small. So do those below
            what the kept tokens themselves have in the free directions: those would move as far as the concept.
        rule: which tokens of a concept are erased; only the first of its two matrices is read.

    Raises:
        UsageError: no concepts, widths that differ, or a tolerance out of range.
        NumericsError: the kept tokens span everything, or a whole concept; inf or nan.
    """
    if not concepts:
        raise UsageError("no concept to erase: give at least one")
    for name, value in (("rank_tolerance", rank_tolerance), ("reach_tolerance", reach_tolerance)):
        if value is not None and not (math.isfinite(value) and 0 <= value < 1):
            raise UsageError(f"{name} = {value:g}: give a part of the largest singular value, from 0 up to 1")
    dim, device = concepts[0].dim, concepts[0].tokens.device
    free, kept_there = free_basis(kept, dim, rank_tolerance, device=device)
    sources, changes = [], []
    for index, concept in enumerate(concepts):
        tokens = rows(rule(concept)[0], dim).to(device)
        if float((tokens @ free).norm()) <= max(reach_tolerance * float(tokens.norm()), kept_there):
            raise NumericsError(f"concept {index} lies in the span of the kept tokens: keep fewer of them")
        sources.append(tokens)
        changes.append(onto_span(concept.target.to(device), tokens, rank_tolerance) - tokens)
    source, change = torch.cat(sources), torch.cat(changes)
    left, values, right = torch.linalg.svd(finite(source @ free), full_matrices=False)
    floor = max(reach_tolerance * float(torch.linalg.matrix_norm(source, 2)), kept_there)
    used = int((values > floor).sum())
    # Both factors of the change keep kept tokens still: ``k U₂`` is 0 before anything is scaled up.
    step = Step.low_rank(change.T @ (left[:, :used] / values[:used]), right[:used] @ free.T)
    finite(step.shared)
    return Transform((step,), dim)


def free_basis(
    kept: Iterable[Tensor], dim: int, tolerance: float | None, *, device: torch.device | str = "cpu"
) -> tuple[Tensor, float]:
    """``U₂`` with shape (d, k), orthonormal, float64: what is orthogonal to all rows of ``kept``; all where none are.

    And the largest singular value that counted as 0, ``‖K U₂‖``: how much of the kept tokens there is all the same.

    Kept tokens are read once into a d × d triangle, by QR. ``KᵀK`` would square their condition and take directions
    that they use at 10⁻⁸ of the largest for free ones.

    Args:
        kept: token matrices with shape (n, d).
        dim: d.
        tolerance: as ``rank_tolerance`` of ``dp``.
        device: where to work.

    Raises:
        UsageError: a width other than d.
        NumericsError: no direction is left, inf or nan.
    """
    triangle = torch.zeros(0, dim, dtype=torch.float64, device=device)
    pending: list[Tensor] = []
    for tokens in kept:
        pending.append(rows(tokens, dim).to(device))
        if sum(map(len, pending)) >= dim:
            triangle = torch.linalg.qr(torch.cat([triangle, *pending]), mode="r").R
            pending = []
    _, values, right = torch.linalg.svd(finite(torch.cat([triangle, *pending])), full_matrices=True)
    used = _rank(values, tolerance)
    if used == dim:
        raise NumericsError(f"the kept tokens span all {dim} directions: keep fewer, or raise rank_tolerance")
    return right[used:].T, max(values[used:].tolist(), default=0.0)


def onto_span(safe: Tensor, tokens: Tensor, tolerance: float | None) -> Tensor:
    """``c*`` of every row c of ``tokens`` (m, d): its orthogonal projection on the span of the rows of ``safe`` (n, d).

    Args:
        safe: rows may depend on one another.
        tokens: what to project.
        tolerance: of ``safe``, as ``rank_tolerance`` of ``dp``.
    """
    given = rows(safe, tokens.shape[1])
    _, values, right = torch.linalg.svd(given, full_matrices=False)
    basis = right[: _rank(values, tolerance)]
    projected: Tensor = tokens @ basis.T @ basis
    return projected


def _rank(values: Tensor, tolerance: float | None) -> int:
    if tolerance is None or not len(values):
        return rank(values)
    return int((values > tolerance * values[0]).sum())
