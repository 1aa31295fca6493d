"""RECE: derive what would bring a concept back, erase that too, and again (Gong et al., ECCV 2024, arXiv 2407.12383).

An epoch derives ``C'`` for all tokens of every concept (``regenerate.py``) and solves UCE's closed form with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, islice, pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from excise.edit.fitter import Fitter, Scales
from excise.edit.gram import gram as gram_of
from excise.edit.regenerate import Equation, check_ridge, regenerate_by_site
from excise.edit.tokens import Concept, Rule, all_pairs, last_subject_pairs, of_width, rows, width
from excise.edit.transform import Transform
from excise.edit.uce import Technique, check_technique, erase_tokens
from excise.errors import UsageError

__all__ = ["EPOCH_SCALES", "Anchor", "Epoch", "Rece", "Rounds", "rece"]

#: Of every epoch in the published code.
EPOCH_SCALES = Scales(1.0, keep=0.1, ridge=0.1)

#: What an epoch edits: ``current`` weights, erasing C' alone (published), or ``original`` ones, erasing C and all C'.
Anchor = Literal["current", "original"]


@dataclass(frozen=True)
class Epoch:
    """One round of derive and erase.

    Attributes:
        derived: ``C'`` of each concept, float64 with shape (t, d); () where there are more tokens than dimensions.
        regeneration: then ``R`` with shape (d, d), which makes ``C' = C R`` of any tokens.
        transform: the whole edit after this epoch.
        residual: ``Σ‖W_i T_i c' − W_i c‖² / Σ‖W_i c‖²`` over all concepts and tokens, for the edit that ``C'`` was
            derived against, the one before this epoch: 0 is a concept that came back entirely, near 1 one that can't.
    """

    derived: tuple[Tensor, ...]
    regeneration: Tensor | None
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
    concepts: Iterable[Concept],
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
    """UCE, then ``epochs`` rounds of eq. 8 and UCE's closed form on what it derived: ``Rounds``, so many of them.

    Raises:
        UsageError: as ``Rounds``, or a negative number of epochs.
        NumericsError: a singular system, inf or nan.
    """
    if epochs < 0:
        raise UsageError(f"epochs = {epochs}: give 0 or more")
    rounds = Rounds(
        weights,
        concepts,
        Fitter(width(weights), device=weights[0].device).keep_all(kept),
        uce_scales=uce_scales,
        epoch_scales=epoch_scales,
        ridge=ridge,
        technique=technique,
        anchor=anchor,
        rule=rule,
    )
    return Rece(rounds.uce, tuple(islice(rounds, epochs)))


class Rounds(Iterator[Epoch]):
    """RECE as an iterator without end: UCE's stage at the start, one epoch at each ``next``.

    Up to d tokens are derived row by row. Of more, ``CᵀC`` and ``C*ᵀC`` are kept, and eq. 8 is solved for the identity:
    its rows are ``R`` with ``C' = C R``, so that ``C'ᵀC' = Rᵀ CᵀC R``. Memory is O(d²) for any number of concepts.

    Attributes:
        uce: the edit of the first stage.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        concepts: Iterable[Concept],
        keeping: Fitter,
        *,
        uce_scales: Scales,
        epoch_scales: Scales = EPOCH_SCALES,
        ridge: float,
        technique: Technique = "replace",
        anchor: Anchor = "current",
        rule: Rule = last_subject_pairs,
        gram: Callable[[], Tensor] | None = None,
    ) -> None:
        """Run UCE's stage.

        Args:
            weights: original K and V weights, each with shape (o_i, d), of any dtype.
            concepts: what to erase, and its targets; read once.
            keeping: what is kept and held in every stage; it is left as it is.
            uce_scales: s, λ₁ and λ₂ of the first stage.
            epoch_scales: the same of every epoch.
            ridge: λ of eq. 8.
            technique: as in ``uce``, in every stage.
            anchor: ``current`` edits the weights as the last epoch left them and erases ``C'`` alone, as published;
                ``original`` solves afresh from the original weights, with ``C`` by ``rule`` and every ``C'`` so far in
                the erase set, in one step that replaces the edit before it.
            rule: which tokens the first stage erases; ``C'`` is always erased at every position.
            gram: gives ``G`` of the weights, where it is at hand; called at the first epoch.

        Raises:
            UsageError: no weights, no concepts, widths that differ, or an argument out of range.
            NumericsError: a singular system, inf or nan.
        """
        check_technique(technique)
        if anchor not in get_args(Anchor):
            raise UsageError(f"anchor = {anchor!r}: give one of {', '.join(get_args(Anchor))}")
        check_ridge(ridge)
        self._dim = width(weights)
        self._weights, self._keeping, self._anchor, self._technique = weights, keeping, anchor, technique
        self._ridge, self._scales = ridge, epoch_scales
        self._gram = gram or (lambda: gram_of(weights))
        self._unedited = Transform((), self._dim)
        self._fitter = keeping.copy()
        self._concepts: list[Concept] = []
        self._moments: tuple[Tensor, Tensor] | None = None
        many = False
        for concept in of_width(concepts, self._dim):
            self._erase(*rule(concept), self._unedited)
            self._concepts.append(concept)
            if technique == "replace" and sum(len(waiting.tokens) for waiting in self._concepts) > self._dim:
                self._fold()
                many = True
        if many:
            self._fold()
        self._step = self._fitter.fit(uce_scales)
        self.uce = self._transform = self._unedited.then(self._step)
        self._equation: Equation | None = None

    @cached_property
    def _tokens(self) -> Tensor:
        """``C`` of all concepts, or the identity where its moments stand for it."""
        device = self._weights[0].device
        if self._moments is not None:
            return torch.eye(self._dim, dtype=torch.float64, device=device)
        return torch.cat([rows(concept.tokens, self._dim) for concept in self._concepts]).to(device)

    def __next__(self) -> Epoch:
        """The next epoch."""
        if self._step.is_shared:
            base = self._equation or Equation.unedited(self._gram(), self._tokens)
            edited = base.after(self._step)
            tokens = None if self._moments is None else self._moments[0]
            regenerated, error = edited.regenerate(self._transform.matrix(), self._tokens, self._ridge, tokens)
            self._equation = edited if self._anchor == "current" else base
        else:
            regenerated, error = regenerate_by_site(self._weights, self._transform, self._tokens, self._ridge)
        current = self._anchor == "current"
        start = self._transform if current else self._unedited
        if current:
            self._fitter = self._keeping.copy()
        derived: tuple[Tensor, ...] = ()
        if self._moments is None:
            derived = _parts(regenerated, self._concepts)
            for concept, part in zip(self._concepts, derived, strict=True):
                self._erase(part, all_pairs(concept)[1], start)
        else:
            erased, cross = self._moments
            self._fitter.erase_moments(regenerated.T @ erased @ regenerated, cross @ regenerated)
        self._step = self._fitter.fit(self._scales)
        self._transform = start.then(self._step).collapse()
        return Epoch(derived, None if self._moments is None else regenerated, self._transform, error)

    def _erase(self, tokens: Tensor, targets: Tensor, transform: Transform) -> None:
        erase_tokens(self._fitter, self._weights, transform, tokens, targets, self._technique)

    def _fold(self) -> None:
        """From here on ``CᵀC`` and ``C*ᵀC`` stand for the concepts so far."""
        device = self._weights[0].device
        zero = torch.zeros(self._dim, self._dim, dtype=torch.float64, device=device)
        erased, cross = self._moments or (zero, zero)
        if self._concepts:
            pairs = [all_pairs(concept) for concept in self._concepts]
            source, target = (torch.cat([rows(p[i], self._dim) for p in pairs]).to(device) for i in (0, 1))
            erased, cross = torch.addmm(erased, source.T, source), torch.addmm(cross, target.T, source)
        self._moments = erased, cross
        self._concepts.clear()


def _parts(derived: Tensor, concepts: Sequence[Concept]) -> tuple[Tensor, ...]:
    """The rows of each concept."""
    ends = list(accumulate(len(concept.tokens) for concept in concepts))
    return tuple(derived[start:end] for start, end in pairwise([0, *ends]))
