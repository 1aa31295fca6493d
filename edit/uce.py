"""UCE: concepts are erased and others kept in one closed form (Gandikota et al., WACV 2024, arXiv 2308.14761).

``fitter.py`` has the equation. Here is what goes into it: which tokens of a concept, and the scalars of technique
``tensor``, ``α_i = ⟨W_i C, W_i C*⟩ / ‖W_i C‖²`` over all tokens of a concept. They take from ``W_i C*`` its part along
``W_i C``, as the published code of UCE and RECE does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from excise.edit.fitter import Fitter, Scales
from excise.edit.tokens import Concept, Rule, last_subject_pairs, of_width, rows, width
from excise.edit.transform import Transform
from excise.errors import UsageError

__all__ = ["Scales", "Technique", "check_technique", "erase_tokens", "projections", "uce"]

Technique = Literal["replace", "tensor"]


def uce(
    weights: Sequence[Tensor],
    concepts: Iterable[Concept],
    kept: Iterable[Tensor],
    *,
    scales: Scales,
    technique: Technique = "replace",
    rule: Rule = last_subject_pairs,
) -> Transform:
    """The edit of UCE, eq. 3, as one step.

    Args:
        weights: K and V weights, each with shape (o_i, d), of any dtype; only technique ``tensor`` reads their values.
        concepts: what to erase, and its targets; read once.
        kept: token matrices with shape (n, d), read once.
        scales: s, λ₁ and λ₂; 1, 1 and 0.5 in the published RECE checkpoints.
        technique: ``replace`` aims at the target, ``tensor`` at the part of it that is orthogonal to the concept.
        rule: which tokens of a concept go to which of its target.

    Raises:
        UsageError: no weights, no concepts, or widths that differ.
        NumericsError: a singular system, inf or nan.
    """
    check_technique(technique)
    dim = width(weights)
    fitter = Fitter(dim, device=weights[0].device).keep_all(kept)
    unedited = Transform((), dim)
    for concept in of_width(concepts, dim):
        erase_tokens(fitter, weights, unedited, *rule(concept), technique)
    return unedited.then(fitter.fit(scales))


def erase_tokens(
    fitter: Fitter,
    weights: Sequence[Tensor],
    transform: Transform,
    tokens: Tensor,
    targets: Tensor,
    technique: Technique,
) -> None:
    """Add a concept's ``tokens`` (m, d) and their ``targets`` to a fit on top of the edit so far."""
    tensor = technique == "tensor"
    fitter.erase(tokens, targets, projections(weights, transform, tokens, targets) if tensor else None)


def check_technique(technique: str) -> None:
    """Raise ``UsageError`` for a name that isn't a technique."""
    if technique not in get_args(Technique):
        raise UsageError(f"technique = {technique!r}: give one of {', '.join(get_args(Technique))}")


def projections(weights: Sequence[Tensor], transform: Transform, tokens: Tensor, targets: Tensor) -> Tensor:
    """``α_i = ⟨W_i T_i C, W_i T_i C*⟩ / ‖W_i T_i C‖²`` with shape (len(weights),), float64; 0 where ``W_i T_i C = 0``.

    Args:
        weights: the original weights, each with shape (o_i, d).
        transform: the edit so far.
        tokens: ``C`` with shape (m, d).
        targets: ``C*`` with shape (m, d).
    """
    source, target = rows(tokens, transform.dim), rows(targets, transform.dim)
    alphas = []
    for site, weight in enumerate(weights):
        projection = weight.detach().to(torch.float64).T
        values = transform.on_tokens(source, site).to(weight.device) @ projection
        aims = transform.on_tokens(target, site).to(weight.device) @ projection
        norm = values.square().sum()
        alphas.append(torch.where(norm == 0, 0.0, (values * aims).sum() / norm))
    return torch.stack(alphas)
