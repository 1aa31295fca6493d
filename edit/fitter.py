"""UCE's closed form from streamed statistics (Gandikota et al., WACV 2024, arXiv 2308.14761, eq. 3).

Rows of ``C`` (m × d) are tokens to erase, rows of ``C*`` their targets, rows of ``P`` tokens to keep:

    min over W_i of   s ‖W_i Cᵀ − W_i⁰ C*ᵀ‖² + λ₁ ‖(W_i − W_i⁰) Pᵀ‖² + λ₂ ‖W_i − W_i⁰‖²

    S = s CᵀC + λ₁ PᵀP + λ₂ I          W_i = W_i⁰ (I + s (C* − C)ᵀ C S⁻¹)

The right-hand factor is the same for every layer. Technique ``tensor`` aims at ``W_i⁰ c* − α_i W_i⁰ c`` instead, with
a scalar for each layer and concept, and shares ``S`` all the same.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from excise.edit.cholesky import finite, solve
from excise.edit.tokens import rank, rows
from excise.edit.transform import Step
from excise.errors import UsageError

#: Rows of kept tokens that go into one product: long enough for a fast one, 25 MB at d = 768.
_ROWS = 4096


@dataclass(frozen=True)
class Scales:
    """The weights of the three terms.

    Attributes:
        erase: s.
        keep: λ₁.
        ridge: λ₂.

    Raises:
        UsageError: a scale that is negative or not finite.
    """

    erase: float = 1.0
    keep: float = field(kw_only=True)
    ridge: float = field(kw_only=True)

    def __post_init__(self) -> None:
        for name, value in (("erase", self.erase), ("keep", self.keep), ("ridge", self.ridge)):
            if not (math.isfinite(value) and value >= 0):
                raise UsageError(f"{name} = {value:g}: give a finite scale of 0 or more")


class Fitter:
    """Accumulates ``CᵀC``, ``(C* − C)ᵀC`` and ``PᵀP``; ``fit`` solves. Memory is O(d²) for any number of prompts.

    Up to d/2 erased tokens their rows stand for the first two: the solve has that many right-hand sides, the step keeps
    ``U = s (C* − C)ᵀ`` and ``V = C S⁻¹``, and its rank comes out exact (noise 10⁻¹⁵ beyond it; 10⁻¹² by the d × d
    product, which ``S⁻¹`` amplifies).
    Concepts with scalars (technique ``tensor``) keep their rows, one (t, d) matrix each.
    """

    def __init__(self, dim: int, *, device: torch.device | str = "cpu") -> None:
        if dim < 1:
            raise UsageError(f"dim = {dim}: give the width of the text encoder's output")
        self.dim = dim
        # No statistic is written in place: copies share them.
        self._kept = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        self._folded: tuple[Tensor, Tensor] | None = None
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._scaled: list[tuple[Tensor, Tensor]] = []
        self._free: Tensor | None = None

    @property
    def kept(self) -> Tensor:
        """``PᵀP`` of what is kept, with shape (d, d), float64; it stays as it is when the fitter goes on."""
        return self._kept

    def copy(self) -> Fitter:
        """A fitter that starts from these statistics and leaves them alone."""
        other = copy.copy(self)
        other._pairs, other._scaled = list(self._pairs), list(self._scaled)
        return other

    def erase(self, tokens: Tensor, targets: Tensor, scalars: Tensor | None = None) -> Fitter:
        """Send every row of ``tokens`` to its row of ``targets``.

        Args:
            tokens: ``C`` with shape (m, d).
            targets: ``C*`` with shape (m, d).
            scalars: ``α_i`` with shape (n_sites,), which makes the aim ``W_i c* − α_i W_i c``.

        Raises:
            UsageError: other shapes, or scalars for another number of sites than before.
            NumericsError: inf or nan.
        """
        source, target = self._rows(tokens), self._rows(targets)
        if len(source) != len(target):
            raise UsageError(f"{len(source)} tokens to erase and {len(target)} targets: give one target for each token")
        self._pairs.append((source, target - source))
        if sum(len(pair) for pair, _ in self._pairs) > self.dim // 2:
            self._fold()
        if scalars is not None:
            sites = len(self._scaled[0][1]) if self._scaled else len(scalars)
            if scalars.ndim != 1 or len(scalars) != sites:
                raise UsageError(f"scalars of shape {tuple(scalars.shape)}: give one for each of {sites} weights")
            self._scaled.append((source, finite(scalars.to(source))))
        return self

    def erase_moments(self, gram: Tensor, cross: Tensor) -> Fitter:
        """Erase any number of tokens at once, by ``CᵀC`` and ``C*ᵀC``, each float64 with shape (d, d)."""
        self._fold()
        assert self._folded is not None
        erased, change = self._folded
        self._folded = erased + gram, change + cross - gram
        return self

    def hold(self, tokens: Tensor) -> Fitter:
        """Don't move the rows of ``tokens`` (n, d) at all: ``W_i c = W_i⁰ c`` is a constraint, not a term.

        With ``N`` an orthonormal basis of what is orthogonal to them, but for the rounding of a float32 text encoder,
        ``S⁻¹`` becomes ``N (Nᵀ S N)⁻¹ Nᵀ``. It replaces what was held before. Raises as ``erase`` does, and
        ``UsageError`` where no direction is left.
        """
        self._free = orthogonal_to(self._rows(tokens))
        return self

    def keep(self, tokens: Tensor) -> Fitter:
        """Keep what the weights make of every row of ``tokens`` with shape (n, d). Raises as ``erase`` does."""
        kept = self._rows(tokens)
        self._kept = torch.addmm(self._kept, kept.T, kept)
        return self

    def keep_all(self, kept: Iterable[Tensor]) -> Fitter:
        """``keep`` each, reading ``kept`` once; some thousand rows go into one product."""
        batch: list[Tensor] = []
        for tokens in kept:
            batch.append(rows(tokens, self.dim))
            if sum(map(len, batch)) >= _ROWS:
                self.keep(torch.cat(batch))
                batch = []
        return self.keep(torch.cat(batch)) if batch else self

    def keep_gram(self, gram: Tensor) -> Fitter:
        """Keep any number of tokens by their ``PᵀP`` with shape (d, d), float64."""
        if gram.shape != self._kept.shape:
            raise UsageError(f"a PᵀP of shape {tuple(gram.shape)}: give ({self.dim}, {self.dim})")
        self._kept = self._kept + finite(gram.to(self._kept))
        return self

    def fit(self, scales: Scales) -> Step:
        """The step that minimises the three terms (UCE, eq. 3); it stays as it is when the fitter goes on.

        Raises:
            NumericsError: ``S`` is singular (too small a ridge for the tokens given), or the step isn't finite.
        """
        normal = scales.keep * self._kept
        normal.diagonal().add_(scales.ridge)

        def right(rows: Tensor) -> Tensor:
            """``rows S⁻¹``, or ``rows N (Nᵀ S N)⁻¹ Nᵀ``."""
            if self._free is None:
                return solve(normal, rows.T, ridge=scales.ridge, name="ridge").T
            free = self._free
            reduced = free.T @ normal @ free
            return solve(reduced, (rows @ free).T, ridge=scales.ridge, name="ridge").T @ free.T

        if self._folded is not None:
            self._fold()
        if self._folded is None:
            # No pairs leave two (0, d) matrices: the step is the identity.
            source = torch.cat([normal[:0], *(pair[0] for pair in self._pairs)])
            change = torch.cat([normal[:0], *(pair[1] for pair in self._pairs)])
            normal.addmm_(source.T, source, alpha=scales.erase)
            step = Step.low_rank(scales.erase * change.T, right(source))
        else:
            erased, cross = self._folded
            normal.add_(erased, alpha=scales.erase)
            shared = scales.erase * right(cross)
            shared.diagonal().add_(1)
            step = Step.of(shared)
        finite(step.shared)
        if not self._scaled:
            return step
        scaled = [scales.erase * (tokens.T @ right(tokens)) for tokens, _ in self._scaled]
        return Step(step.shared, finite(torch.stack(scaled)), torch.stack([alpha for _, alpha in self._scaled], dim=1))

    def _rows(self, tokens: Tensor) -> Tensor:
        return rows(tokens, self.dim).to(self._kept.device)

    def _fold(self) -> None:
        """From here on ``CᵀC`` and ``(C* − C)ᵀC`` stand for the rows."""
        erased, cross = self._folded or (torch.zeros_like(self._kept), torch.zeros_like(self._kept))
        for source, change in self._pairs:
            erased, cross = torch.addmm(erased, source.T, source), torch.addmm(cross, change.T, source)
        self._folded = erased, cross
        self._pairs.clear()


def orthogonal_to(tokens: Tensor) -> Tensor:
    """``N`` with shape (d, k): an orthonormal basis of what is orthogonal to the rows of ``tokens`` (n, d).

    Directions that they use by no more than a float32 text encoder's rounding are free: ``excise.edit.tokens.rank``.

    Raises:
        UsageError: nothing is.
    """
    _, values, right = torch.linalg.svd(tokens, full_matrices=True)
    used = rank(values)
    if used == len(right):
        raise UsageError(
            f"the held tokens span all {used} dimensions of the text embeddings: hold fewer, or leave out "
            "--conditional-only"
        )
    free: Tensor = right[used:].T.contiguous()
    return free
