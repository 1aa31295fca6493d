"""How close any text embedding of bounded norm comes to a concept after an edit: the best attack, solved exactly.

For one token ``c``, edited weights ``W_i T_i`` and a ball of radius r, the margin is

    m(c, r) = min over ‖c'‖ ≤ r of  Σ_i ‖W_i T_i c' − W_i c‖² / Σ_i ‖W_i c‖²

0 is a concept that some embedding brings back entirely, 1 one that nothing brings back any better than ``c' = 0`` does.
It is RECE's eq. 7 (Gong et al., ECCV 2024, arXiv 2407.12383) with a bound on the norm in place of a ridge: a convex
trust-region problem with ``A = Σ T_iᵀ W_iᵀ W_i T_i`` and ``b = Σ T_iᵀ W_iᵀ W_i c``. Its solution is (Moré and
Sorensen, *Computing a trust region step*, SIAM J. Sci. Stat. Comput. 4(3), 1983)

    (A + μ I) c' = b    with μ ≥ 0, ‖c'‖ ≤ r and μ (r − ‖c'‖) = 0

With ``A = V diag(λ) Vᵀ``, computed once, and ``β = Vᵀ b``, the multiplier of every token and radius is 0 or the root of
``1 / ‖β / (λ + μ)‖ = 1 / r``, whose left side is concave and increasing: Newton's iteration from a lower bound climbs
to the root and never passes it (Conn, Gould and Toint, *Trust-Region Methods*, 2000, section 7.3). The hard case needs
a negative λ, and here there is none.

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

from excise.edit.cholesky import finite, is_finite
from excise.edit.gram import gram as gram_of
from excise.edit.tokens import rows, width
from excise.edit.transform import Transform
from excise.errors import NumericsError, UsageError

__all__ = ["RADII", "Margin", "certify", "certify_normal", "certify_weights", "trust_region"]

#: Multiples of each token's own norm.
RADII = (1.0, 2.0, 4.0)

_EPS = torch.finfo(torch.float64).eps
#: Newton's iterations; 11 is the most over 9·10⁴ random problems with conditions up to 10¹⁶.
_ITERATIONS = 100
#: Numbers in a block of (tokens, radii, d): 32 MB.
_BLOCK = 2**22

#: ``Σ‖W_i T_i x − W_i c‖²`` with shape (n, k) and ``b − A x`` with shape (n, k, d), for ``x`` and a range of tokens.
_Evaluate = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _Spectrum:
    """``A = V diag(λ) Vᵀ``.

    Attributes:
        values: λ ≥ 0 with shape (d,).
        vectors: V with shape (d, d), one vector a column.
    """

    values: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, normal: Tensor) -> _Spectrum:
        """Of the symmetric ``normal`` (d, d). Raises ``UsageError`` where it isn't positive semidefinite."""
        if not is_finite(normal):
            raise NumericsError("the edited weights hold inf or nan: look for inf or nan in the model or the edit")
        values, vectors = torch.linalg.eigh(normal)
        if bool(values[0] < -1e-8 * values.abs().max()):
            raise UsageError(f"a normal matrix with an eigenvalue of {values[0]:g}: give Σ TᵀWᵀW T, with none below 0")
        return cls(values.clamp(min=0), vectors)

    def coefficients(self, right: Tensor) -> Tensor:
        """``β`` with shape (n, d) for ``b`` with shape (n, d), 0 where both λ and β are rounding error.

        β is at most ``√λ`` times the size of the concept, so that a direction whose λ is lost may well have a β that
        isn't: that one counts. Where A is clearly singular what remains is the solution of least norm.
        """
        beta = right @ self.vectors
        floor = len(self.values) * _EPS
        lost = (self.values <= floor * self.values[-1]) & (beta.abs() <= floor * right.norm(dim=1, keepdim=True))
        return beta.masked_fill(lost, 0)

    def multipliers(self, beta: Tensor, radius: Tensor) -> Tensor:
        """μ with shape (n, k) for ``beta`` with shape (n, d) and ``radius`` with shape (n, k).

        In units in which the largest λ is 1 and r is 1, every ``|β_j| ≤ λ_j + μ`` and ``‖β‖ ≤ 1 + μ``: that is where
        the iteration starts, so that no term exceeds 1 and nothing is divided by 0.
        """
        scale = float(self.values[-1]) or 1.0
        values = self.values / scale
        scaled = torch.where(radius[..., None] > 0, beta[:, None] / scale / radius[..., None], 0.0)
        mu = torch.maximum((scaled.abs() - values).amax(dim=2), scaled.norm(dim=2) - 1).clamp(min=0)
        for _ in range(_ITERATIONS):
            shifted = values + mu[..., None]
            terms = _quotient(scaled, shifted)
            norm = terms.norm(dim=2)
            slope = _quotient(terms.square(), shifted).sum(dim=2)
            step = _quotient(norm.square() * (norm - 1), slope)
            climbing = (norm > 1 + 8 * _EPS) & (step > 2 * _EPS * mu)
            if not bool(climbing.any()):
                return mu * scale
            mu = torch.where(climbing, mu + step, mu)
        raise NumericsError(f"the secular equation isn't solved after {_ITERATIONS} iterations: look for a huge token")

    def points(self, beta: Tensor, radius: Tensor, multipliers: Tensor) -> Tensor:
        """``c'`` with shape (n, k, d), scaled back to the radius where rounding put it outside."""
        point = _quotient(beta[:, None], self.values + multipliers[..., None]) @ self.vectors.T
        return point * _quotient(radius, point.norm(dim=2)).clamp(max=1)[..., None]


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
    _spectrum: _Spectrum = field(repr=False)
    _right: Tensor = field(repr=False)
    _radius: Tensor = field(repr=False)

    @property
    def total(self) -> Tensor:
        """All tokens together, with shape (k,): the sum of the numerators over the sum of the denominators."""
        return _quotient((self.errors * self.sizes[:, None]).sum(dim=0), self.sizes.sum())

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
    sizes = sizes.where(sizes > _EPS * gram.norm() * concept.square().sum(dim=1), 0.0)

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
    _check(normal, right)
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


def trust_region(normal: Tensor, right: Tensor, radius: Tensor) -> Tensor:
    """``argmin over ‖x‖ ≤ r of xᵀ A x − 2 bᵀ x`` with shape (n, k, d), of least norm where A is clearly singular.

    Args:
        normal: ``A`` with shape (d, d), float64, symmetric and positive semidefinite.
        right: ``b`` with shape (n, d), float64, in the range of A; a part outside it is met on the sphere.
        radius: ``r`` with shape (n, k), float64, 0 or more.

    Raises:
        UsageError: a shape, a negative eigenvalue, or a radius that is negative or not finite.
        NumericsError: inf or nan.
    """
    _check(normal, right)
    if radius.ndim != 2 or len(radius) != len(right):
        raise UsageError(f"radii of shape {tuple(radius.shape)}: give ({len(right)}, k)")
    if not is_finite(radius) or bool((radius < 0).any()):
        raise UsageError("a radius is negative or not finite: give the norms that the embeddings may have")
    spectrum = _Spectrum.of(normal)
    beta = spectrum.coefficients(right)
    return finite(spectrum.points(beta, radius, spectrum.multipliers(beta, radius)))


def _margin(
    normal: Tensor, right: Tensor, sizes: Tensor, tokens: Tensor, radii: Sequence[float], evaluate: _Evaluate
) -> Margin:
    """Solve for all tokens and radii, a block of tokens at a time."""
    radii = tuple(float(multiple) for multiple in radii)
    if not radii or not all(math.isfinite(multiple) and multiple > 0 for multiple in radii):
        raise UsageError(f"radii = {radii}: give one or more positive multiples of a token's norm")
    spectrum = _Spectrum.of(normal)
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
        errors[block] = _quotient(squares, sizes[block, None])
        gaps[block] = _quotient(gap, sizes[block, None])
    return Margin(radii, finite(errors), finite(gaps), sizes, multipliers, spectrum, right, radius)


def _quotient(above: Tensor, below: Tensor) -> Tensor:
    """``above / below``, and 0 where ``below`` isn't positive."""
    return torch.where(below > 0, above / below, 0.0)


def _check(normal: Tensor, right: Tensor) -> None:
    dim = len(normal)
    if normal.shape != (dim, dim) or right.ndim != 2 or right.shape[1] != dim:
        raise UsageError(f"a system of shapes {tuple(normal.shape)} and {tuple(right.shape)}: give (d, d) and (n, d)")
    if not is_finite(right):
        raise NumericsError("the concept's right-hand side holds inf or nan: look for inf or nan in the model")
