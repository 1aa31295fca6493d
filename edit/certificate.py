"""How close any text embedding of bounded norm comes to a concept after an edit: the best attack, solved exactly.

For one token ``c``, edited weights ``W_i T_i`` and a ball of radius r, the margin is

    m(c, r) = min over ‖c'‖ ≤ r of  Σ_i ‖W_i T_i c' − W_i c‖² / Σ_i ‖W_i c‖²

0 is a concept that some embedding brings back entirely, 1 one that nothing brings back any better than ``c' = 0`` does.
It is RECE's eq. 7 (Gong et al., ECCV 2024, arXiv 2407.12383) with a bound on the norm in place of a ridge: a convex
trust-region problem with ``A = Σ T_iᵀ W_iᵀ W_i T_i`` and ``b = Σ T_iᵀ W_iᵀ W_i c``, which ``trust_region.py`` solves:

    (A + μ I) c' = b    with μ ≥ 0, ‖c'‖ ≤ r and μ (r − ‖c'‖) = 0

Each figure comes with its gap. By convexity no ``x`` in the ball has an objective that is lower by more than
``μ (r² − ‖c'‖²) + 2 ‖ρ‖ (r + ‖c'‖)``, where ``ρ = b − A c' − μ c'`` is what is left of the equation: whatever the
solution's own rounding, no search can get below that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from excise.edit.cholesky import finite
from excise.edit.gram import gram as gram_of
from excise.edit.tokens import rows, width
from excise.edit.transform import Transform
from excise.edit.trust_region import EPS, Spectrum, check, quotient
from excise.errors import UsageError

__all__ = ["RADII", "Margin", "certify", "certify_normal", "certify_weights"]

#: Multiples of each token's own norm.
RADII = (1.0, 2.0, 4.0)

#: Numbers in a block of (tokens, radii, d): 32 MB.
_BLOCK = 2**22

#: ``Σ‖W_i T_i x − W_i c‖²`` with shape (n, k) and ``b − A x`` with shape (n, k, d), for ``x`` and a range of tokens.
_Evaluate = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Margin:
    """What the best embeddings of bounded norm make of each token.

    Attributes:
        radii: k multiples of each token's own norm.
        errors: ``m(c, r)`` with shape (n, k), from 0 to 1; 0 for a token that all weights map to 0.
        gaps: with shape (n, k); the exact minimum is at most this much lower, but for the rounding of A and b.
        sizes: ``Σ_i ‖W_i c‖²`` with shape (n,), the denominators.
        multipliers: μ with shape (n, k), 0 where the bound doesn't bind.
    """

    radii: tuple[float, ...]
    errors: Tensor
    gaps: Tensor
    sizes: Tensor
    multipliers: Tensor
    _spectrum: Spectrum = field(repr=False)
    _right: Tensor = field(repr=False)
    _radius: Tensor = field(repr=False)

    @property
    def total(self) -> Tensor:
        """All tokens together, with shape (k,): the sum of the numerators over the sum of the denominators."""
        return quotient((self.errors * self.sizes[:, None]).sum(dim=0), self.sizes.sum())

    @property
    def worst(self) -> Tensor:
        """The least error of any token that the weights don't map to 0, with shape (k,); 0 where there is none."""
        heard = self.errors[self.sizes > 0]
        return heard.amin(dim=0) if len(heard) else self.errors.new_zeros(len(self.radii))

    def part(self, tokens: slice) -> Margin:
        """The same of some of the tokens: a concept's."""
        cut = (self.errors, self.gaps, self.sizes, self.multipliers)
        errors, gaps, sizes, multipliers = (each[tokens] for each in cut)
        return Margin(
            self.radii, errors, gaps, sizes, multipliers, self._spectrum, self._right[tokens], self._radius[tokens]
        )

    def adversaries(self) -> Tensor:
        """The embeddings ``c'`` that attain ``errors``, with shape (n, k, d), computed anew at each call."""
        beta = self._spectrum.coefficients(self._right)
        return self._spectrum.points(beta, self._radius, self.multipliers)


def certify(gram: Tensor, transform: Tensor, tokens: Tensor, *, radii: Sequence[float] = RADII) -> Margin:
    """The margin of an edit that is shared by all sites.

    The error is taken from ``T c' − c`` in the norm of G, not from an expanded square, which would leave 10⁻¹⁶ of the
    concept's size where the answer is 0: the unedited model has errors near 10⁻²⁸ (10⁻¹⁵ where G is singular).

    Args:
        gram: ``G = Σ_i W_iᵀ W_i`` of the original weights with shape (d, d), float64.
        transform: ``T`` with shape (d, d), float64.
        tokens: ``C`` with shape (n, d), the original embeddings of the concept.
        radii: multiples of each token's own norm.

    Raises:
        UsageError: a shape, or radii that aren't positive and finite.
        NumericsError: inf or nan.
    """
    dim = len(gram)
    if gram.shape != (dim, dim) or transform.shape != (dim, dim):
        raise UsageError(f"a gram of shape {tuple(gram.shape)}, a transform of {tuple(transform.shape)}: give (d, d)")
    concept = rows(tokens, dim).to(gram.device)
    cross = gram @ transform
    sizes = ((concept @ gram) * concept).sum(dim=1)
    # Rounding error is all that is left of a token in the null space of G.
    sizes = sizes.where(sizes > EPS * gram.norm() * concept.square().sum(dim=1), 0.0)

    def evaluate(points: Tensor, block: slice) -> tuple[Tensor, Tensor]:
        missed = concept[block, None] - points @ transform.T
        return ((missed @ gram) * missed).sum(dim=2), missed @ cross

    return _margin(transform.T @ cross, concept @ cross, sizes, concept, radii, evaluate)


def certify_normal(
    normal: Tensor, right: Tensor, sizes: Tensor, tokens: Tensor, *, radii: Sequence[float] = RADII
) -> Margin:
    """The margin of any edit from its normal equations, right to about ``10⁻¹⁵ ‖b‖ ‖c'‖ / size``.

    Args:
        normal: ``A = Σ_i T_iᵀ W_iᵀ W_i T_i`` with shape (d, d), float64.
        right: ``b = Σ_i T_iᵀ W_iᵀ W_i c`` with shape (n, d), float64.
        sizes: ``Σ_i ‖W_i c‖²`` with shape (n,), float64.
        tokens: ``C`` with shape (n, d).
        radii: multiples of each token's own norm.

    Raises:
        UsageError: a shape, a negative eigenvalue, or radii that aren't positive and finite.
        NumericsError: inf or nan.
    """
    check(normal, right)
    concept = rows(tokens, len(normal)).to(normal.device)
    if len(concept) != len(right) or sizes.shape != right.shape[:1]:
        raise UsageError(f"{len(concept)} tokens and sizes of {tuple(sizes.shape)}: give one for each of {len(right)}")

    def evaluate(points: Tensor, block: slice) -> tuple[Tensor, Tensor]:
        descent = right[block, None] - points @ normal
        squares = sizes[block, None] - (points * (right[block, None] + descent)).sum(dim=2)
        return squares.clamp(min=0), descent

    return _margin(normal, right, sizes, concept, radii, evaluate)


def certify_weights(
    weights: Sequence[Tensor], transform: Transform, tokens: Tensor, *, radii: Sequence[float] = RADII
) -> Margin:
    """The margin of an edit on the original ``weights``, (o_i, d) each, whether or not all sites share it.

    Raises as ``certify`` does, and ``UsageError`` where weights and edit differ in width or sites.
    """
    dim = width(weights)
    if dim != transform.dim:
        raise UsageError(f"weights of width {dim} for an edit of width {transform.dim}")
    if transform.is_shared:
        total = gram_of(weights)
        return certify(total, transform.matrix().to(total.device), tokens, radii=radii)
    device = weights[0].device
    concept = rows(tokens, dim).to(device)
    normal = torch.zeros(dim, dim, dtype=torch.float64, device=device)
    right, sizes = torch.zeros_like(concept), torch.zeros_like(concept[:, 0])
    for site, weight in enumerate(weights):
        original = weight.detach().to(torch.float64)
        edited = transform.on_weight(original, site)
        aims = concept @ original.T
        normal.addmm_(edited.T, edited)
        right.addmm_(aims, edited)
        sizes += aims.square().sum(dim=1)
    return certify_normal(normal, right, sizes, concept, radii=radii)


def _margin(
    normal: Tensor, right: Tensor, sizes: Tensor, tokens: Tensor, radii: Sequence[float], evaluate: _Evaluate
) -> Margin:
    """Solve for all tokens and radii, a block of tokens at a time."""
    radii = tuple(float(multiple) for multiple in radii)
    if not radii or not all(math.isfinite(multiple) and multiple > 0 for multiple in radii):
        raise UsageError(f"radii = {radii}: give one or more positive multiples of a token's norm")
    spectrum = Spectrum.of(normal)
    radius = tokens.norm(dim=1, keepdim=True) * tokens.new_tensor(radii)
    errors, gaps, multipliers = (torch.zeros_like(radius) for _ in range(3))
    length = max(1, _BLOCK // (len(radii) * len(normal)))
    for start in range(0, len(tokens), length):
        block = slice(start, start + length)
        beta, bound = spectrum.coefficients(right[block]), radius[block]
        multipliers[block] = spectrum.multipliers(beta, bound)
        mu = multipliers[block]
        points = spectrum.points(beta, bound, mu)
        squares, descent = evaluate(points, block)
        norm = points.norm(dim=2)
        left = (descent - mu[..., None] * points).norm(dim=2)
        gap = mu * (bound.square() - norm.square()).clamp(min=0) + 2 * left * (bound + norm)
        errors[block] = quotient(squares, sizes[block, None])
        gaps[block] = quotient(gap, sizes[block, None])
    return Margin(radii, finite(errors), finite(gaps), sizes, multipliers, spectrum, right, radius)
