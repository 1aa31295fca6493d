"""An edit as what it does to a weight: a right-multiplication, ``W_i ← W_i T_i``.

Every closed form of UCE and RECE changes ``W_i`` (o_i × d) from the right. A *step* is ``M_i = A − Σ_k α_ik B_k``: one
matrix for all layers, except for the scalars ``α_ik`` of technique ``tensor``. A *transform* is a product of steps.
Since ``W_i T_i c = W_i (T_i c)``, the same transform may sit on the weights or on the tokens that go in.

A step from r tokens is ``I + U V`` with U (d × r) and V (r × d), and ``X (I + U V) = X + (X U) V`` costs 4 r d² for a
d × d matrix X, where the product with a whole matrix costs 2 d³.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

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
        change: U with shape (d, r) and V with shape (r, d) where ``shared`` was made as ``I + U V``.
    """

    shared: Tensor
    scaled: Tensor
    scalars: Tensor
    change: tuple[Tensor, Tensor] | None = None

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

    @classmethod
    def low_rank(cls, left: Tensor, right: Tensor) -> Step:
        """``I + left right`` for every site, ``left`` with shape (d, r) and ``right`` with shape (r, d)."""
        shared = left @ right
        shared.diagonal().add_(1)
        return cls(shared, shared.new_zeros(0, *shared.shape), shared.new_zeros(0, 0), (left, right))

    @property
    def is_shared(self) -> bool:
        """Whether every site gets the same matrix."""
        return len(self.scaled) == 0

    def then(self, step: Step) -> Step:
        """This shared step followed by another one, as one step: ``I + U V`` where both are and few tokens went in."""
        if step.change is None:
            return Step.of(self.shared @ step.shared)
        left, right = step.change
        moved = self.shared @ left
        shared = torch.addmm(self.shared, moved, right)
        change = None
        if self.change is not None and self.change[0].shape[1] + left.shape[1] <= len(shared) // 2:
            change = torch.cat([self.change[0], moved], dim=1), torch.cat([self.change[1], right])
        return Step(shared, shared.new_zeros(0, *shared.shape), shared.new_zeros(0, 0), change)

    def applied_to(self, matrix: Tensor) -> Tensor:
        """``matrix @ shared`` for a shared step, by U and V where it has them."""
        if self.change is None:
            return matrix @ self.shared
        left, right = self.change
        return torch.addmm(matrix, matrix @ left, right)

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
                steps[-1] = steps[-1].then(step)
            else:
                steps.append(step)
        return Transform(tuple(steps), self.dim)

    def on_weight(self, weight: Tensor, site: int = 0) -> Tensor:
        """``W_i T_i`` in the dtype of ``weight``, with shape (o, d).

        It is ``W + W (T − I)`` with ``T − I`` from float64, in float32, or in float64 where ``weight`` is that, and
        rounded once to anything narrower. Where ``T − I`` has a low rank it goes through its factors. At SD 1.4's
        shapes the float32 product is 2.4·10⁻⁷ away from the exact one (relative, Frobenius), of which 0.3 are the
        rounding of the result, in less than half of float64's time.

        Raises:
            UsageError: ``weight`` isn't (o, d), or the edit has no such site.
            NumericsError: the result isn't finite in that dtype.
        """
        if weight.ndim != 2 or weight.shape[1] != self.dim:
            raise UsageError(f"a weight of shape {tuple(weight.shape)}: this edit is for (o, {self.dim})")
        original = weight.detach().to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
        if original.dtype == torch.float32 and self._low_rank is not None:
            left, right = (factor.to(original.device) for factor in self._low_rank)
            return finite(torch.addmm(original, original @ left, right).to(weight.dtype))
        if original.dtype == torch.float64:
            change = self._change(site)
        else:
            change = self._shared_change if self.is_shared else self._change(site).to(torch.float32)
        return finite(torch.addmm(original, original, change.to(original)).to(weight.dtype))

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
        known = self._known_factors
        if known is None:
            left, values, right = torch.linalg.svd(self._change(site))
        else:
            # With U = Q A and Vᵀ = P B the rest is an SVD of A Bᵀ, r × r.
            (outer, first), (inner, second) = (torch.linalg.qr(factor) for factor in (known[0], known[1].T))
            left, values, right = torch.linalg.svd(first @ second.T)
            left, right = outer @ left, right @ inner.T
        rank = int((values > tolerance * values[:1]).sum())
        root = values[:rank].sqrt()
        return left[:, :rank] * root, root[:, None] * right[:rank]

    def _change(self, site: int) -> Tensor:
        """``T_i − I`` with shape (d, d), float64."""
        change = self.matrix(site).clone()
        change.diagonal().sub_(1)
        return change

    @cached_property
    def _shared_change(self) -> Tensor:
        """The same of a shared edit in float32, formed once for all weights."""
        return self._change(0).to(torch.float32)

    @property
    def _known_factors(self) -> tuple[Tensor, Tensor] | None:
        """U and V with ``T = I + U V`` where the edit was made so."""
        return self.steps[0].change if len(self.steps) == 1 and self.is_shared else None

    @cached_property
    def _low_rank(self) -> tuple[Tensor, Tensor] | None:
        """L and R in float32 with ``T − I = L R``, R orthonormal, where that product costs less than with ``T − I``.

        U and V as they are may cancel: ``S⁻¹`` is in V. With ``V Vᵀ = A Aᵀ`` they are ``U A`` and ``A⁻¹ V``, in a third
        of the time of a QR decomposition, which is for rows that depend on one another.
        """
        known = self._known_factors
        if known is None or known[0].shape[1] > 0.45 * self.dim:
            return None
        left, right = known
        factor, failed = torch.linalg.cholesky_ex(right @ right.T)
        if int(failed) == 0:
            basis = torch.linalg.solve_triangular(factor, right, upper=False)
            return (left @ factor).to(torch.float32), basis.to(torch.float32)
        basis, mixed = torch.linalg.qr(right.T)
        return (left @ mixed.T).to(torch.float32), basis.T.to(torch.float32).contiguous()
