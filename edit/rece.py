"""RECE: derive what would bring a concept back, erase that too, and again (Gong et al., ECCV 2024, arXiv 2407.12383).

The embedding ``c'`` with which the edited weights ``W_i T_i`` best regenerate what the original ones made of ``c``:

    eq. 7   min over c' of   Σ_i ‖W_i T_i c' − W_i c‖² + λ ‖c'‖²
    eq. 8   (λ I + Σ_i T_iᵀ W_iᵀ W_i T_i) c' = Σ_i T_iᵀ W_iᵀ W_i c

An epoch derives ``C'`` for all tokens of every concept and solves UCE's closed form with it. A shared ``T`` needs no
layer for that: with ``G = Σ_i W_iᵀ W_i``, computed once, eq. 8 is ``(λ I + Tᵀ G T) c' = Tᵀ G c``, d × d for any number
of layers. Both sides are brought along from step to step: after ``T ← T (I + U V)`` with r tokens that is O(r d²), and
of the O(d³) work only the Cholesky factorisations are left.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from excise.edit.cholesky import solve
from excise.edit.fitter import Fitter, Scales
from excise.edit.gram import gram
from excise.edit.tokens import Concept, Rule, all_pairs, last_subject_pairs, rows, width
from excise.edit.transform import Step, Transform
from excise.edit.uce import Technique, check_technique, projections
from excise.errors import UsageError

__all__ = ["EPOCH_SCALES", "Anchor", "Epoch", "Rece", "derive", "rece", "residual"]

#: Of every epoch in the published code.
EPOCH_SCALES = Scales(1.0, keep=0.1, ridge=0.1)

#: What an epoch edits: ``current`` weights, erasing C' alone (published), or ``original`` ones, erasing C and all C'.
Anchor = Literal["current", "original"]


@dataclass(frozen=True)
class Epoch:
    """One round of derive and erase.

    Attributes:
        derived: ``C'`` of each concept, float64 with shape (t, d).
        transform: the whole edit after this epoch.
        residual: ``Σ‖W_i T_i c' − W_i c‖² / Σ‖W_i c‖²`` over all concepts and tokens, for the edit that ``C'`` was
            derived against, the one before this epoch: 0 is a concept that came back entirely, near 1 one that can't.
    """

    derived: tuple[Tensor, ...]
    transform: Transform
    residual: float


@dataclass(frozen=True)
class Rece:
    """An edit and how it came about.

    Attributes:
        uce: the edit of the first stage.
        epochs: one for each round.
    """

    uce: Transform
    epochs: tuple[Epoch, ...]

    @property
    def transform(self) -> Transform:
        """The edit after the last epoch."""
        return self.epochs[-1].transform if self.epochs else self.uce


def rece(
    weights: Sequence[Tensor],
    concepts: Sequence[Concept],
    kept: Iterable[Tensor],
    *,
    uce_scales: Scales,
    epoch_scales: Scales = EPOCH_SCALES,
    epochs: int,
    ridge: float,
    technique: Technique = "replace",
    anchor: Anchor = "current",
    rule: Rule = last_subject_pairs,
) -> Rece:
    """UCE, then ``epochs`` rounds of eq. 8 and UCE's closed form on what it derived.

    Args:
        weights: original K and V weights, each with shape (o_i, d), of any dtype.
        concepts: what to erase, and its targets.
        kept: token matrices with shape (n, d), read once and kept in every stage.
        uce_scales: s, λ₁ and λ₂ of the first stage.
        epoch_scales: the same of every epoch.
        epochs: 0 is UCE.
        ridge: λ of eq. 8.
        technique: as in ``uce``, in every stage.
        anchor: ``current`` edits the weights as the last epoch left them and erases ``C'`` alone, as published;
            ``original`` solves afresh from the original weights, with ``C`` by ``rule`` and every ``C'`` so far in the
            erase set, in one step that replaces the edit before it.
        rule: which tokens the first stage erases; ``C'`` is always erased at every position.

    Raises:
        UsageError: no weights, no concepts, widths that differ, or an argument out of range.
        NumericsError: a singular system, inf or nan.
    """
    check_technique(technique)
    if anchor not in get_args(Anchor):
        raise UsageError(f"anchor = {anchor!r}: give one of {', '.join(get_args(Anchor))}")
    if epochs < 0:
        raise UsageError(f"epochs = {epochs}: give 0 or more")
    _check_ridge(ridge)
    dim = width(weights, concepts)
    unedited = Transform((), dim)
    keeping = Fitter(dim, device=weights[0].device).keep_all(kept)

    def erase(fitter: Fitter, tokens: Tensor, targets: Tensor, transform: Transform) -> None:
        alphas = projections(weights, transform, tokens, targets) if technique == "tensor" else None
        fitter.erase(tokens, targets, alphas)

    fitter = keeping.copy()
    for concept in concepts:
        erase(fitter, *rule(concept), unedited)
    step = fitter.fit(uce_scales)
    transform = first = unedited.then(step)
    tokens = torch.cat([rows(concept.tokens, dim) for concept in concepts]).to(weights[0].device)
    # Of the edit that ``step`` comes on top of.
    equation = _Equation.unedited(gram(weights), tokens) if epochs and step.is_shared else None

    rounds: list[Epoch] = []
    for _ in range(epochs):
        if equation is None:
            regenerated, error = _regenerate_by_site(weights, transform, tokens, ridge)
        else:
            edited = equation.after(step)
            regenerated, error = edited.regenerate(transform.matrix(), tokens, ridge)
            equation = edited if anchor == "current" else equation
        derived = _parts(regenerated, concepts)
        base = transform if anchor == "current" else unedited
        if anchor == "current":
            fitter = keeping.copy()
        for concept, part in zip(concepts, derived, strict=True):
            erase(fitter, part, all_pairs(concept)[1], base)
        step = fitter.fit(epoch_scales)
        transform = base.then(step).collapse()
        rounds.append(Epoch(derived, transform, error))
    return Rece(first, tuple(rounds))


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
    _check_ridge(ridge)
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
    return _ratio(((error @ gram) * error).sum(), ((original @ gram) * original).sum())


@dataclass(frozen=True)
class _Equation:
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
    def unedited(cls, gram: Tensor, tokens: Tensor) -> _Equation:
        """For ``T = I`` and ``C`` with shape (n, d)."""
        return cls(gram, gram, gram @ tokens.T)

    def after(self, step: Step) -> _Equation:
        """For ``T M`` in place of ``T``: ``Mᵀ A M = (A M)ᵀ M`` for the symmetric ``A = Tᵀ G T``."""
        return _Equation(self.gram, step.applied_to(step.applied_to(self.normal).T), step.applied_to(self.right.T).T)

    def regenerate(self, transform: Tensor, tokens: Tensor, ridge: float) -> tuple[Tensor, float]:
        """``C'`` with shape (n, d), and its residual."""
        derived = _solve(self.normal, self.right, ridge)
        return derived, residual(self.gram, transform, derived, tokens)


def _regenerate_by_site(
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
    return derived, _ratio(error, size)


def _parts(derived: Tensor, concepts: Sequence[Concept]) -> tuple[Tensor, ...]:
    """The rows of each concept."""
    ends = list(accumulate(len(concept.tokens) for concept in concepts))
    return tuple(derived[start:end] for start, end in pairwise([0, *ends]))


def _solve(normal: Tensor, right: Tensor, ridge: float) -> Tensor:
    """``((λ I + normal)⁻¹ right)ᵀ``."""
    regular = normal.clone()
    regular.diagonal().add_(ridge)
    return solve(regular, right, ridge=ridge, name="the ridge of eq. 8").T


def _ratio(error: Tensor, size: Tensor) -> float:
    # A concept that every weight maps to 0 regenerates itself.
    return float(error / size) if float(size) > 0 else 0.0


def _check_ridge(ridge: float) -> None:
    if not (math.isfinite(ridge) and ridge >= 0):
        raise UsageError(f"ridge = {ridge:g}: give a finite λ of eq. 8, 0 or more")
