"""What an edited checkpoint of another program moved.

Where a method multiplied all K and V weights by one matrix (UCE, arXiv 2308.14761; RECE, arXiv 2407.12383), it is
the least-squares solution over the weights that moved, of least norm where G is singular:

    T = argmin Σ_i ‖W_i T − W_i'‖²          G (T − I) = Σ_i W_iᵀ (W_i' − W_i)          G = Σ_i W_iᵀ W_i

Everything else is kept as it is, as a difference.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from excise.edit.checkpoint import Weights, few
from excise.edit.cholesky import is_finite
from excise.errors import EditError, UsageError

#: Of each weight's movement, what one matrix may leave out. The published code solves every layer in float32 by an
#: explicit inverse: at d = 768 and random embeddings that is 2.6·10⁻³ away from one matrix. Noise is 0.9 away.
TOLERANCE = 1e-2

_EPS = torch.finfo(torch.float64).eps
_SITE = re.compile(r"\.attn2\.to_[kv]\.weight$")


@dataclass(frozen=True)
class Moved:
    """What a checkpoint changed.

    Attributes:
        compared: how many weights the checkpoint has.
        moved: names of those that differ by more than the rounding to the coarser dtype, in order of name.
        share: part of all the base's parameters that is in them.
        largest: name and value of the largest ``‖W' − W‖ / ‖W‖``.
        sites: those of ``moved`` that read the text.
        shared: ``T`` with shape (d, d), float64, that moves all ``sites``; None where no one matrix does.
        residual: the largest ``‖W_i T − W_i'‖ / ‖W_i' − W_i‖`` over ``sites``; None where T isn't determined.
        rank: of ``T − I``, above what the residual accounts for; None without ``shared``.
        deltas: ``W' − W``, float32, of all of ``moved`` that ``shared`` doesn't move.
    """

    compared: int
    moved: tuple[str, ...]
    share: float
    largest: tuple[str, float]
    sites: tuple[str, ...]
    shared: Tensor | None
    residual: float | None
    rank: int | None
    deltas: dict[str, Tensor] = field(repr=False)

    @property
    def document(self) -> dict[str, Any]:
        """As plain data, without the tensors."""
        return {
            "compared": self.compared,
            "moved": len(self.moved),
            "share_of_parameters": self.share,
            "text_sites_moved": len(self.sites),
            "shared": self.shared is not None,
            "residual": self.residual,
            "rank": self.rank,
            "largest_relative_change": self.largest[1],
        }

    @property
    def report(self) -> list[str]:
        """Lines for people."""
        left = "undetermined" if self.residual is None else f"{self.residual:.2g} of a movement left out"
        same = "no matrix" if self.shared is None else f"one matrix of rank {self.rank}"
        return [
            f"{self.compared} weights compared, {len(self.moved)} moved ({100 * self.share:.3g} % of the parameters)",
            *([f"{len(self.sites)} of them read the text and share {same} ({left})"] if self.sites else []),
            *([f"{len(self.deltas)} kept as differences"] if self.deltas else []),
            f"largest relative change {self.largest[1]:.3g}: {self.largest[0]}",
        ]


def compare(
    base: Weights, new: Weights, *, sites: Collection[str] | None = None, tolerance: float = TOLERANCE
) -> Moved:
    """What ``new`` changes of ``base``; both may read lazily: a few weights are held at a time.

    Args:
        base: the original denoiser's weights, all of them.
        new: the checkpoint's, some or all.
        sites: names of the weights that read the text, all of one width; by default K and V of every ``attn2``.
        tolerance: part of each site's movement that ``shared`` may leave out, besides the rounding of its dtype.

    Raises:
        EditError: weights that the base doesn't have, of another shape, or not finite; nothing in it, or nothing moved.
        UsageError: sites of several widths.
    """
    if unknown := [name for name in new if name not in base]:
        raise EditError(f"{len(unknown)} of {len(new)} weights aren't the base model's: {few(unknown)}")
    moved: list[str] = []
    reads: list[str] = []
    deltas, counted, largest, gram, cross = {}, 0, ("", 0.0), torch.zeros(()), torch.zeros(())
    for name in sorted(new):
        old, now, coarse = _pair(name, base, new)
        # A copy in another precision didn't move.
        if torch.equal(old.to(coarse), now.to(coarse)):
            continue
        moved.append(name)
        change, counted = now - old, counted + old.numel()
        relative = float(change.norm() / old.norm()) if bool(old.any()) else math.inf
        largest = max(largest, (name, relative), key=lambda pair: pair[1])
        if not (_SITE.search(name) if sites is None else name in sites):
            deltas[name] = change.to(torch.float32)
            continue
        if reads and old.shape[1] != len(gram):
            raise UsageError(f"{name} reads text of width {old.shape[1]}, {reads[0]} of {len(gram)}: give one stream")
        reads.append(name)
        gram, cross = gram + old.T @ old, cross + old.T @ change
    if not moved:
        raise EditError(f"none of the checkpoint's {len(new)} weights differs from the base model's: nothing to import")
    shared, residual, rank = _shared(base, new, reads, gram, cross, tolerance) if reads else (None, None, None)
    if shared is None:
        pairs = ((name, _pair(name, base, new)) for name in reads)
        deltas |= {name: (now - old).to(torch.float32) for name, (old, now, _) in pairs}
    share = counted / sum(base[name].numel() for name in base)
    return Moved(len(new), tuple(moved), share, largest, tuple(reads), shared, residual, rank, deltas)


def _pair(name: str, base: Weights, new: Weights) -> tuple[Tensor, Tensor, torch.dtype]:
    """Both weights in float64, and the coarser of their dtypes."""
    old, now = base[name], new[name]
    if old.shape != now.shape:
        raise EditError(f"{name} has shape {tuple(now.shape)}, the base model's {tuple(old.shape)}: it's another model")
    if not is_finite(now):
        raise EditError(f"{name} of the checkpoint holds inf or nan: it is damaged")
    coarse = max(old.dtype, now.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    return old.to(torch.float64), now.to(torch.float64), coarse


def _shared(
    base: Weights, new: Weights, names: Collection[str], gram: Tensor, cross: Tensor, tolerance: float
) -> tuple[Tensor | None, float | None, int | None]:
    """``T``, the largest relative residual and the rank, from ``G`` and ``Σ WᵀΔW`` with shape (d, d)."""
    values, vectors = torch.linalg.eigh(gram)
    used = values > len(gram) * _EPS * values[-1]
    # With no more rows than unknowns, any change whatever is a multiplication.
    if sum(len(base[name]) for name in names) <= int(used.sum()):
        return None, None, None
    change = vectors[:, used] @ ((vectors[:, used].T @ cross) / values[used, None])
    worst, total, fits = 0.0, 0.0, True
    for name in names:
        old, now, coarse = _pair(name, base, new)
        missed, step = float((old + old @ change - now).norm()), float((now - old).norm())
        worst, total = max(worst, missed / step), total + missed**2
        fits &= missed <= tolerance * step + torch.finfo(coarse).eps / 2 * float(now.norm())
    if not fits:
        return None, worst, None
    singular = torch.linalg.svdvals(change)
    # The most that what is left out can add to T, or rounding.
    noise = max(math.sqrt(total / float(values[used][0])), len(gram) * _EPS * float(singular[0]))
    return change + torch.eye(len(gram), dtype=torch.float64), worst, int((singular > noise).sum())
