"""The trust-region problem: the minimum of a convex quadratic in a ball, exactly, for many right-hand sides and radii.

    min over ‖x‖ ≤ r of  xᵀ A x − 2 bᵀ x        A symmetric and positive semidefinite

Its solution is (Moré and Sorensen, *Computing a trust region step*, SIAM J. Sci. Stat. Comput. 4(3), 1983)

    (A + μ I) x = b    with μ ≥ 0, ‖x‖ ≤ r and μ (r − ‖x‖) = 0

With ``A = V diag(λ) Vᵀ``, computed once, and ``β = Vᵀ b``, the multiplier of every right-hand side and radius is 0 or
the root of ``1 / ‖β / (λ + μ)‖ = 1 / r``, whose left side is concave and increasing: Newton's iteration from a lower
bound climbs to the root and never passes it (Conn, Gould and Toint, *Trust-Region Methods*, 2000, section 7.3). The
hard case needs a negative λ, and here there is none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from excise.edit.cholesky import finite, is_finite
from excise.errors import NumericsError, UsageError

__all__ = ["EPS", "Spectrum", "check", "quotient", "trust_region"]

EPS = torch.finfo(torch.float64).eps
#: Newton's iterations; 11 is the most over 9·10⁴ random problems with conditions up to 10¹⁶.
_ITERATIONS = 100


@dataclass(frozen=True)
class Spectrum:
    """``A = V diag(λ) Vᵀ``.

    Attributes:
        values: λ ≥ 0 with shape (d,).
        vectors: V with shape (d, d), one vector a column.
    """

    values: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, normal: Tensor) -> Spectrum:
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
        floor = len(self.values) * EPS
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
            terms = quotient(scaled, shifted)
            norm = terms.norm(dim=2)
            slope = quotient(terms.square(), shifted).sum(dim=2)
            step = quotient(norm.square() * (norm - 1), slope)
            climbing = (norm > 1 + 8 * EPS) & (step > 2 * EPS * mu)
            if not bool(climbing.any()):
                return mu * scale
            mu = torch.where(climbing, mu + step, mu)
        raise NumericsError(f"the secular equation isn't solved after {_ITERATIONS} iterations: look for a huge token")

    def points(self, beta: Tensor, radius: Tensor, multipliers: Tensor) -> Tensor:
        """``c'`` with shape (n, k, d), scaled back to the radius where rounding put it outside."""
        point = quotient(beta[:, None], self.values + multipliers[..., None]) @ self.vectors.T
        return point * quotient(radius, point.norm(dim=2)).clamp(max=1)[..., None]


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
    check(normal, right)
    if radius.ndim != 2 or len(radius) != len(right):
        raise UsageError(f"radii of shape {tuple(radius.shape)}: give ({len(right)}, k)")
    if not is_finite(radius) or bool((radius < 0).any()):
        raise UsageError("a radius is negative or not finite: give the norms that the embeddings may have")
    spectrum = Spectrum.of(normal)
    beta = spectrum.coefficients(right)
    return finite(spectrum.points(beta, radius, spectrum.multipliers(beta, radius)))


def quotient(above: Tensor, below: Tensor) -> Tensor:
    """``above / below``, and 0 where ``below`` isn't positive."""
    return torch.where(below > 0, above / below, 0.0)


def check(normal: Tensor, right: Tensor) -> None:
    """Raise ``UsageError`` for shapes other than (d, d) and (n, d), ``NumericsError`` where ``right`` isn't finite."""
    dim = len(normal)
    if normal.shape != (dim, dim) or right.ndim != 2 or right.shape[1] != dim:
        raise UsageError(f"a system of shapes {tuple(normal.shape)} and {tuple(right.shape)}: give (d, d) and (n, d)")
    if not is_finite(right):
        raise NumericsError("the concept's right-hand side holds inf or nan: look for inf or nan in the model")
