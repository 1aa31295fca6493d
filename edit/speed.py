"""SPEED: UCE's step confined to the null space of what is kept (Li et al., ICLR 2026, arXiv 2503.07392).

The paper's columns are tokens: concepts ``C₁``, targets ``C*``, and ``K₂``, the null prompt's start token and centres.
A start token is the same in every prompt, so that it isn't erased and says nothing of what is kept. The paper edits
models with CLIP; a text encoder without one (T5) has every position erased and kept, and ``K₂`` is the centres alone.

``P`` projects on the directions that the kept prompts hardly use. The change of a weight W is

    Δ = W (C* C₁ᵀ − C₁ C₁ᵀ) P [I − M K₂ (K₂ᵀ P M K₂ + λ I)⁻¹ K₂ᵀ P] M          M = (C₁ C₁ᵀ P + ρ I)⁻¹

Here rows are tokens: ``C = C₁ᵀ``, ``K = K₂ᵀ``. With ``H = P M = P (P CᵀC P + ρ I)⁻¹ P``, which is symmetric, the two
brackets are ``H − H Kᵀ (K H Kᵀ + λ I)⁻¹ K H``, by Woodbury's identity ``P S⁻¹ P`` with

    S = P CᵀC P + λ⁻¹ P KᵀK P + ρ I        W ← W (I + (C* − C)ᵀ (C P) S⁻¹)

which is UCE, eq. 3, for the tokens ``C P`` with changes ``C* − C``, keeping ``K P`` with the weight 1/λ: the minimum of
``‖(W + ΔP) Cᵀ − W C*ᵀ‖² + λ⁻¹ ‖ΔP Kᵀ‖² + ρ ‖ΔP‖²``. So ``Fitter`` solves it, by one Cholesky factorisation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from excise.edit.cholesky import finite
from excise.edit.fitter import Fitter, Scales
from excise.edit.tokens import Concept, Rule, rows
from excise.edit.transform import Step, Transform
from excise.errors import NumericsError, UsageError

__all__ = ["all_but_start", "centres_of", "null_basis", "speed"]

#: Lloyd's iteration on the few tokens of a prompt ends long before.
_ROUNDS = 100


def all_but_start(concept: Concept) -> tuple[Tensor, Tensor]:
    """``C`` and ``C*`` with shape (t, d), or (t − 1, d): every position but the start token, where there is one."""
    return concept.tokens[concept.start :], concept.target[concept.start :]


def speed(
    concepts: Sequence[Concept],
    kept: Iterable[Tensor],
    *,
    null: Tensor,
    ridge: float = 0.7,
    null_ridge: float = 0.5,
    threshold: float = 0.1,
    centres: int = 3,
    rule: Rule = all_but_start,
) -> Transform:
    """SPEED's edit as one step. The paper applies it to V alone: the caller chooses the sites.

    Args:
        concepts: what to erase, and its targets. The first one tells whether ``kept`` and ``null`` have a start token:
            their first row, if so.
        kept: token matrices with shape (n, d), read once. Memory is O(d²).
        null: the tokens of the prompt ``""`` with shape (t, d).
        ridge: ρ; the defaults are the paper's for nudity.
        null_ridge: λ.
        threshold: singular values of the kept prompts' covariance below it are free to change.
        centres: how many k-means centres of the null prompt's other tokens are held.
        rule: which tokens of a concept go to which of its target.

    Raises:
        UsageError: no concepts, widths that differ, or an argument out of range.
        NumericsError: the kept prompts leave nothing free, a singular system, inf or nan.
    """
    if not concepts:
        raise UsageError("no concept to erase: give at least one")
    if not (math.isfinite(null_ridge) and null_ridge > 0):
        raise UsageError(f"null_ridge = {null_ridge:g}: give a positive λ")
    scales = Scales(1.0, keep=1 / null_ridge, ridge=ridge)
    dim, start, device = concepts[0].dim, concepts[0].start, concepts[0].tokens.device
    free = null_basis(kept, dim, threshold, start=start, device=device)
    projector = free @ free.T
    held = rows(null, dim).to(device)
    if not len(held):
        raise UsageError("null has no tokens: give those of the prompt ''")
    held = torch.cat([held[:start], centres_of(held[start:], centres)])
    fitter = Fitter(dim, device=device).keep(held @ projector)
    for concept in concepts:
        tokens, targets = (rows(part, dim).to(device) for part in rule(concept))
        projected = tokens @ projector
        fitter.erase(projected, projected + (targets - tokens))
    step = fitter.fit(scales)
    if step.change is None:
        # Of many tokens: the rounding errors beyond the null space, which S⁻¹ amplifies, are left out.
        change = step.shared.clone()
        change.diagonal().sub_(1)
        step = Step.low_rank(change @ free, free.T)
    return Transform((step,), dim)


def null_basis(
    kept: Iterable[Tensor], dim: int, threshold: float, *, start: int, device: torch.device | str = "cpu"
) -> Tensor:
    """The singular vectors of ``Σ xᵀx / n`` whose values are below ``threshold``: ``N`` (d, k), float64, ``P = N Nᵀ``.

    The sum is over the tokens of all kept prompts but their start tokens, and n is their number. It is not centred:
    W has to keep the tokens, not their differences. Nothing kept gives all of them.

    Args:
        kept: token matrices with shape (n, d), read once.
        dim: d.
        threshold: in the square of the embeddings' unit.
        start: the start tokens before each prompt's own, 0 or 1.
        device: where to sum.

    Raises:
        UsageError: a width other than d, or a threshold that isn't a positive number.
        NumericsError: every direction is kept, inf or nan.
    """
    if not (math.isfinite(threshold) and threshold > 0):
        raise UsageError(f"threshold = {threshold:g}: give a positive singular value")
    covariance = torch.zeros(dim, dim, dtype=torch.float64, device=device)
    count = 0
    for tokens in kept:
        part = rows(tokens, dim)[start:].to(device)
        covariance.addmm_(part.T, part)
        count += len(part)
    # Symmetric and positive semi-definite: eigenvectors are the singular vectors.
    values, vectors = torch.linalg.eigh(finite(covariance / max(count, 1)))
    free: Tensor = vectors[:, values < threshold]
    if free.shape[1] == 0:
        raise NumericsError(f"the kept prompts use all {dim} directions above threshold = {threshold:g}: raise it")
    return free


def centres_of(tokens: Tensor, count: int) -> Tensor:
    """The k-means centres of the rows of ``tokens`` (n, d) with shape (k, d): ``count``, or as many rows as differ.

    Lloyd's iteration from the first row and, one after the other, the row that is farthest from those chosen: it needs
    no random numbers, so that an edit is the same everywhere.

    Raises:
        UsageError: ``count`` is negative.
    """
    if count < 0:
        raise UsageError(f"centres = {count}: give 0 or more")
    chosen = tokens[: min(count, 1)]
    while len(chosen) < min(count, len(tokens)):
        distance, farthest = _distances(tokens, chosen).min(dim=1).values.max(dim=0)
        if float(distance) == 0:
            break
        chosen = torch.cat([chosen, tokens[farthest][None]])
    for _ in range(_ROUNDS if len(chosen) else 0):
        nearest = torch.nn.functional.one_hot(_distances(tokens, chosen).argmin(dim=1), len(chosen)).to(tokens)
        sizes = nearest.sum(dim=0)[:, None]
        # A centre that lost all its rows stays where it is.
        moved = torch.where(sizes > 0, nearest.T @ tokens / sizes.clamp(min=1), chosen)
        if torch.equal(moved, chosen):
            break
        chosen = moved
    return chosen


def _distances(tokens: Tensor, centres: Tensor) -> Tensor:
    """With shape (n, k), exactly 0 between equal rows."""
    return torch.cdist(tokens, centres, compute_mode="donot_use_mm_for_euclid_dist")
