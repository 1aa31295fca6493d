"""One stream of a model as the closed forms see it: the layers that read it, and what it says of the prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from excise.edit.certificate import Margin, certify, certify_weights
from excise.edit.gram import gram
from excise.edit.regenerate import ratio
from excise.edit.tokens import Concept
from excise.edit.transform import Transform

#: Pictures are made of at most so many concepts.
PROBED = 16


@dataclass(frozen=True)
class Problem:
    """What a method works on.

    Attributes:
        weights: the original weights, (o_i, d) each.
        concepts: makes an iterator over what is erased, with its targets.
        kept: makes an iterator over the token matrices (n, d) of what is kept.
        kept_gram: ``PᵀP`` of all of them with shape (d, d), float64.
        kept_scale: λ₁.
        null: gives the tokens of the empty prompt with shape (t, d).
        certified: tokens (n, d) that margins are measured on; n = 0 leaves them out.
    """

    weights: Sequence[Tensor]
    concepts: Callable[[], Iterator[Concept]]
    kept: Callable[[], Iterator[Tensor]]
    kept_gram: Tensor
    kept_scale: float
    null: Callable[[], Tensor]
    certified: Tensor

    @property
    def dim(self) -> int:
        """d, the width of the stream."""
        return len(self.kept_gram)

    @cached_property
    def gram(self) -> Tensor:
        """``G = Σ W_iᵀ W_i`` with shape (d, d), computed when first needed."""
        return gram(self.weights)

    @cached_property
    def probed(self) -> Tensor:
        """Every position of at most ``PROBED`` concepts, evenly spread, with shape (concepts · t, d)."""
        places = set(spread(sum(1 for _ in self.concepts()), PROBED))
        return torch.cat([concept.tokens for place, concept in enumerate(self.concepts()) if place in places])

    def margin(self, transform: Transform) -> Margin | None:
        """How well any embedding of bounded norm regenerates what is certified after an edit."""
        if not len(self.certified):
            return None
        if transform.is_shared:
            return certify(self.gram, transform.matrix().to(self.gram.device), self.certified)
        return certify_weights(self.weights, transform, self.certified)

    def moved(self, transform: Transform) -> float:
        """``Σ‖W_i (T_i − I) p‖² / Σ‖W_i p‖²`` over the kept tokens p: what an edit costs."""
        if transform.is_shared:
            matrix = transform.matrix().to(self.gram.device)
            change = matrix - torch.eye(self.dim, dtype=matrix.dtype, device=matrix.device)
            above, below = (change @ self.kept_gram @ change.T * self.gram).sum(), (self.kept_gram * self.gram).sum()
        else:
            above = below = self.kept_gram.new_zeros(())
            for site, weight in enumerate(self.weights):
                original = weight.detach().double()
                change = transform.on_weight(original, site) - original
                above = above + (change @ self.kept_gram * change).sum()
                below = below + (original @ self.kept_gram * original).sum()
        # Where nothing moves, rounding may leave less than nothing.
        return ratio(above.clamp(min=0), below)


@dataclass(frozen=True)
class Stage:
    """An edit as it was after one stage of a method, with its figures.

    Attributes:
        name: "uce", "epoch 1", …
        transform: the edit after it.
        margin: what remains of the concept after it; None where nothing is certified.
        moved: relative movement of the kept tokens after it.
        residual: how badly the edit *before* an epoch regenerates the concept without a bound; None for other stages.
        detected: share of pictures that show the concept, generated from an epoch's derived embedding under the edit
            *before* it, where a probe counted.
        detected_after: the same of what is derived after it, where that decided on the epoch.
        accepted: False for an epoch that was tried and left out.
    """

    name: str
    transform: Transform
    margin: Margin | None
    moved: float
    residual: float | None = None
    detected: float | None = None
    detected_after: float | None = None
    accepted: bool = True

    @classmethod
    def of(cls, problem: Problem, name: str, transform: Transform, residual: float | None = None) -> Stage:
        """Measure an edit."""
        return cls(name, transform, problem.margin(transform), problem.moved(transform), residual)


def spread(count: int, most: int) -> tuple[int, ...]:
    """Places in a list of ``count``: all of them, or ``most`` at even distances."""
    number = min(count, most)
    return tuple(place * count // number for place in range(number))
