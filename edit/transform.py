"""An edit as what it does to a weight: a right-multiplication, ``W_i ← W_i T_i``.

Every closed form of UCE and RECE changes ``W_i`` (o_i × d) from the right. A *step* is ``M_i = A − Σ_k α_ik B_k``: one
matrix for all layers, except for the scalars ``α_ik`` of technique ``tensor``. A *transform* is a product of steps.
Since ``W_i T_i c = W_i (T_i c)``, the same transform may sit on the weights or on the tokens that go in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from excise.edit.cholesky import finite
from excise.errors import UsageError


@dataclass(frozen=True)
class Step:
    """One edit, ``W_i ← W_i (shared − Σ_k scalars[i, k] scaled[k])``, in float64.

    Attributes:
        shared: with shape (d, d).
        scaled: with shape (k, d, d); k = 0 where every site gets the same step.
        scalars: with shape (n_sites, k); k = 0 leaves the number of sites open.
    """

    shared: Tensor
    scaled: Tensor
    scalars: Tensor

    def __post_init__(self) -> None:
        dim, terms = len(self.shared), len(self.scaled)
        shapes = tuple(self.shared.shape), tuple(self.scaled.shape), self.scalars.ndim, self.scalars.shape[-1]
        if shapes != ((dim, dim), (terms, dim, dim), 2, terms):
            given = ", ".join(str(tuple(part.shape)) for part in (self.shared, self.scaled, self.scalars))
            raise UsageError(f"a step of shapes {given}: give (d, d), (k, d, d), (sites, k)")

    @classmethod
    def of(cls, shared: Tensor) -> Step:
        """The same step for every site, ``shared`` with shape (d, d)."""
        return cls(shared, shared.new_zeros(0, *shared.shape), shared.new_zeros(0, 0))

    @property
    def is_shared(self) -> bool:
        """Whether every site gets the same matrix."""
        return len(self.scaled) == 0

    def matrix(self, site: int = 0) -> Tensor:
        """``M_i`` with shape (d, d). Raises ``UsageError`` for a site that the step doesn't have."""
        if self.is_shared:
            return self.shared
        if not 0 <= site < len(self.scalars):
            raise UsageError(f"site {site} of an edit of {len(self.scalars)} sites: give 0 to {len(self.scalars) - 1}")
        scaled: Tensor = torch.tensordot(self.scalars[site], self.scaled, dims=1)
        return self.shared - scaled


@dataclass(frozen=True)
class Transform:
    """``T_i = M_i¹ M_i² …``, the product of ``steps`` in the order in which they were made.

    Attributes:
        steps: () is the identity.
        dim: d, the width of the text encoder's output.
    """

    steps: tuple[Step, ...]
    dim: int

    def __post_init__(self) -> None:
        for step in self.steps:
            if len(step.shared) != self.dim:
                raise UsageError(f"a step for tokens of width {len(step.shared)} in an edit of width {self.dim}")

    @property
    def is_shared(self) -> bool:
        """Whether every site gets the same matrix."""
        return all(step.is_shared for step in self.steps)

    def matrix(self, site: int = 0) -> Tensor:
        """``T_i`` with shape (d, d), float64. Raises ``UsageError`` for a site that the edit doesn't have."""
        if not self.steps:
            return torch.eye(self.dim, dtype=torch.float64)
        product = self.steps[0].matrix(site)
        for step in self.steps[1:]:
            product = product @ step.matrix(site)
        return product

    def then(self, step: Step) -> Transform:
        """This edit followed by ``step``. Raises ``UsageError`` where their widths differ."""
        return Transform((*self.steps, step), self.dim)

    def collapse(self) -> Transform:
        """The same edit with neighbouring shared steps multiplied into one; per-site steps stay as they are."""
        steps: list[Step] = []
        for step in self.steps:
            if steps and step.is_shared and steps[-1].is_shared:
                steps[-1] = Step.of(steps[-1].shared @ step.shared)
            else:
                steps.append(step)
        return Transform(tuple(steps), self.dim)

    def on_weight(self, weight: Tensor, site: int = 0) -> Tensor:
        """``W_i T_i``, computed in float64 and rounded once to the dtype of ``weight``, with shape (o, d).

        Raises:
            UsageError: ``weight`` isn't (o, d), or the edit has no such site.
            NumericsError: the result isn't finite in that dtype.
        """
        if weight.ndim != 2 or weight.shape[1] != self.dim:
            raise UsageError(f"a weight of shape {tuple(weight.shape)}: this edit is for (o, {self.dim})")
        edited = weight.detach().to(torch.float64)
        for step in self.steps:
            edited = edited @ step.matrix(site).to(edited.device)
        return finite(edited.to(weight.dtype))

    def on_tokens(self, tokens: Tensor, site: int = 0) -> Tensor:
        """``T_i c`` for every row c of ``tokens`` with shape (*, d), float64: what ``W_i`` reads in place of c."""
        if tokens.shape[-1] != self.dim:
            raise UsageError(f"tokens of width {tokens.shape[-1]} for an edit of width {self.dim}")
        moved = tokens.detach().to(torch.float64)
        for step in reversed(self.steps):
            moved = moved @ step.matrix(site).T.to(moved.device)
        return moved

    def factors(self, site: int = 0, *, tolerance: float = 1e-13) -> tuple[Tensor, Tensor]:
        """``T_i − I`` as ``left @ right``: the edit is exactly a LoRA.

        Its rank is at most the number of tokens that went into the edit. A step that erased more than d/2 of them has
        rounding errors near 10⁻¹² in the directions beyond; a larger ``tolerance`` leaves those out too.

        Args:
            site: which ``T_i``.
            tolerance: singular values below ``tolerance`` times the largest are dropped.

        Returns:
            ``left`` with shape (d, r) and ``right`` with shape (r, d), float64, each with the roots of the values.
        """
        change = self.matrix(site).clone()
        change.diagonal().sub_(1)
        left, values, right = torch.linalg.svd(change)
        rank = int((values > tolerance * values[0]).sum())
        root = values[:rank].sqrt()
        return left[:, :rank] * root, root[:, None] * right[:rank]
