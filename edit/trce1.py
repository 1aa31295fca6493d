"""TRCE, stage 1: UCE on the first end-of-text token alone, with no ridge (Chen et al., ICCV 2025, arXiv 2503.07389).

The end-of-text token holds what the prompt means, whichever words carry it. Row c of ``C`` (one for each concept) is
the concept's first end-of-text token, row c* of ``C*`` its target's, rows of ``P`` are tokens to keep:

    min over W_i of   s ‖W_i Cᵀ − W_i⁰ C*ᵀ‖² + λ₁ ‖(W_i − W_i⁰) Pᵀ‖²

    S = s CᵀC + λ₁ PᵀP          W_i = W_i⁰ (I + s (C* − C)ᵀ C S⁺)

It is UCE, eq. 3, with λ₂ = 0. A few prompts don't span all d directions, ``S`` is singular then, and of the many
minima this is the one with the smallest ``‖W_i − W_i⁰‖``: the limit of UCE for λ₂ → 0+. Directions that no token uses
stay as they are, and where the concepts' tokens are independent of the kept ones and of each other, concepts reach
their targets and kept tokens don't move.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from excise.edit.cholesky import finite
from excise.edit.fitter import Fitter, Scales
from excise.edit.tokens import Concept, rows
from excise.edit.transform import Step, Transform
from excise.errors import UsageError

__all__ = ["first_end_pairs", "trce1"]


def first_end_pairs(concept: Concept) -> tuple[Tensor, Tensor]:
    """``C`` and ``C*`` with shape (1, d): the first end-of-text token, the last that the attention mask counts."""
    first, first_target = concept.tokens_length - 1, concept.target_length - 1
    return concept.tokens[first : first + 1], concept.target[first_target : first_target + 1]


def trce1(
    concepts: Sequence[Concept],
    kept: Iterable[Tensor],
    *,
    erase_scale: float = 1.0,
    keep_scale: float = 1.0,
    tolerance: float = 1e-6,
) -> Transform:
    """The edit of TRCE's first stage as one step.

    Args:
        concepts: what to erase, and its targets.
        kept: token matrices with shape (n, d), read once, all their tokens. Memory is O(d²).
        erase_scale: s.
        keep_scale: λ₁.
        tolerance: singular values of the stacked rows ``√s C, √λ₁ P`` below this part of the largest count as 0 in
            ``S⁺``. Summing ``PᵀP`` in float64 leaves noise up to 4·10⁻⁷ of it at d = 768.

    Raises:
        UsageError: no concepts, widths that differ, or an argument out of range.
        NumericsError: inf or nan.
    """
    if not concepts:
        raise UsageError("no concept to erase: give at least one")
    if not (math.isfinite(tolerance) and 0 < tolerance < 1):
        raise UsageError(f"tolerance = {tolerance:g}: give a part of the largest singular value, between 0 and 1")
    scales = Scales(erase_scale, keep=keep_scale, ridge=0)
    dim, device = concepts[0].dim, concepts[0].tokens.device
    gram = Fitter(dim, device=device).keep_all(kept).kept
    pairs = [first_end_pairs(concept) for concept in concepts]
    source = torch.cat([rows(tokens, dim) for tokens, _ in pairs]).to(device)
    target = torch.cat([rows(targets, dim) for _, targets in pairs]).to(device)
    scale = math.sqrt(scales.erase)
    squares, vectors = torch.linalg.eigh(finite(scales.keep * gram))
    kept_rows = squares.clamp(min=0).sqrt()[:, None] * vectors.T
    # With A = U Σ Vᵀ the stack, √s C S⁺ is U's first rows times Σ⁺ Vᵀ: S itself would square A's condition once more.
    left, values, right = torch.linalg.svd(torch.cat([scale * source, kept_rows]), full_matrices=False)
    used = values > tolerance * values.max()
    step = Step.low_rank(scale * (target - source).T, (left[: len(source), used] / values[used]) @ right[used])
    finite(step.shared)
    return Transform((step,), dim)
