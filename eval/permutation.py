"""Has the runtime changed the distribution? Permutation tests in which the two images of a case may change places.

If it hasn't, the two images of one prompt and seed are exchangeable, so all 2ⁿ ways to swap them within their pairs are
equally likely, and p is the share of ways whose statistic is at least the observed one: exact in finite samples, with
no assumption on how figures are distributed. A swap is a sign s_i = ±1.

**A figure per image** (CLIP score, LPIPS, …), with d_i = judged − reference: the statistic is |Σ s_i d_i| (Fisher's
randomisation test of paired differences).

**Features**, with rows x_i and y_i: the biased estimate of the squared maximum mean discrepancy (Gretton et al., JMLR
13, 2012),

    MMD² = n⁻² Σ_ij h_ij,   h_ij = k(x_i, x_j) + k(y_i, y_j) − k(x_i, y_j) − k(y_i, x_j)

A swap of pair i changes the sign of row and column i of h, so a permuted MMD² is n⁻² sᵀ H s: the kernel is evaluated
once, and a thousand permutations are one matrix product. It sees any change of the distribution, not only of the mean.

With more pairs than can be enumerated, signs are drawn (seeded), and p = (1 + as extreme) / (1 + drawn), which is valid
as well (Phipson & Smyth, 2010). A runtime that rounds is never *exactly* exchangeable, so with enough images p becomes
small for a difference without consequence: set it beside the floor, and bound the difference itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt

from excise.errors import UsageError
from excise.eval.bootstrap import paired
from excise.eval.evaluation import Measure

Real = npt.NDArray[np.float64]
Kernel = Literal["rbf", "polynomial"]

RESAMPLES, SEED = 9999, 0
#: Sums that differ by less, relatively, are the same sum in another order.
_ROUNDING = 1e-12
#: Signs, and rows of H, held at once.
_BATCH, _ROWS = 1 << 22, 1024


def sign_flip_p_value(
    reference: npt.ArrayLike, judged: npt.ArrayLike, *, resamples: int = RESAMPLES, seed: int = SEED
) -> Measure:
    """The two-sided p of Σ (judged − reference) under swaps within pairs; both have shape (n,).

    Raises:
        UsageError: the shapes differ.
    """
    difference = paired(judged, reference)
    if problem := _problem(difference, len(difference)):
        return problem
    moved = difference[difference != 0]
    # Divided by the largest, so that sums neither overflow nor underflow.
    scaled = moved / np.abs(moved).max(initial=1e-300)
    signs, exact = _sign_batches(len(moved), resamples, seed)
    bound = abs(scaled.sum()) - _ROUNDING * np.abs(scaled).sum()
    extreme = total = 0
    for batch in signs:
        extreme += int(np.sum(np.abs(batch @ scaled) >= bound))
        total += len(batch)
    return _p_value(extreme, total, exact, len(difference), "sign flips")


def mmd_p_value(
    reference: npt.NDArray[np.floating],
    judged: npt.NDArray[np.floating],
    *,
    kernel: Kernel = "rbf",
    resamples: int = 999,
    seed: int = SEED,
) -> Measure:
    """The p of the squared MMD of two runtimes' features under swaps within pairs.

    Takes O(n² d) for the kernel and O(n²) a permutation; memory is O(n (d + resamples)).

    Args:
        reference, judged: with shape (n, d), or (n,) for one figure an image; row i of both for the same case.
        kernel: ``rbf``, exp(−‖x − y‖² / 2σ²) with σ the median distance between images of the reference; or
            ``polynomial``, (x·y / d + 1)³, the kernel of KID.

    Raises:
        UsageError: the shapes differ.
    """
    if reference.shape != judged.shape or reference.ndim not in (1, 2):
        raise UsageError(f"paired features need equal shapes, not {reference.shape} and {judged.shape}")
    n = len(reference)
    x, y = (np.asarray(rows, np.float64).reshape(n, -1) for rows in (reference, judged))
    if problem := _problem(np.concatenate([x, y]), n):
        return problem
    signs, exact = _sign_batches(n, resamples, seed)
    drawn: Real = np.concatenate([np.ones((1, n)), *signs])
    squared = np.zeros(len(drawn))
    largest = 0.0
    scale = _median_distance(x, seed)
    for start in range(0, n, _ROWS):
        rows = slice(start, start + _ROWS)
        block = _kernel(x[rows], x, kernel, scale) + _kernel(y[rows], y, kernel, scale)
        block -= _kernel(x[rows], y, kernel, scale) + _kernel(y[rows], x, kernel, scale)
        squared += np.einsum("mi,mi->m", drawn[:, rows] @ block, drawn)
        largest += float(np.abs(block).sum())
    extreme = int(np.sum(squared[1:] >= squared[0] - _ROUNDING * largest))
    return _p_value(extreme, len(squared) - 1, exact, n, f"MMD, {kernel} kernel")


def _sign_batches(n: int, resamples: int, seed: int) -> tuple[Iterator[Real], bool]:
    """Rows of ±1, (…, n), in batches: every pattern where there are no more than ``resamples``, else drawn.

    Raises:
        UsageError: fewer than 99 permutations.
    """
    if resamples < 99:
        raise UsageError(f"{resamples} permutations are too few for a p-value: use 99 at least")
    if n < 31 and 1 << n <= resamples:
        patterns = (np.arange(1 << n)[:, None] >> np.arange(n)) & 1
        return iter([np.asarray(1.0 - 2.0 * patterns, np.float64)]), True
    generator = np.random.default_rng(seed)
    size = max(1, _BATCH // n)
    counts = (min(size, resamples - start) for start in range(0, resamples, size))
    return (1.0 - 2.0 * generator.integers(0, 2, (count, n), np.int8) for count in counts), False


def _kernel(a: Real, b: Real, kernel: Kernel, scale: float) -> Real:
    inner = a @ b.T
    if kernel == "polynomial":
        cubed: Real = (inner / a.shape[1] + 1) ** 3
        return cubed
    squared = (a * a).sum(1)[:, None] + (b * b).sum(1)[None, :] - 2 * inner
    gaussian: Real = np.exp(-np.maximum(squared, 0) / (2 * scale**2))
    return gaussian


def _median_distance(x: Real, seed: int, most: int = 1000) -> float:
    """Median distance between two rows, of at most so many rows; 1 where they are all alike."""
    rows = x if len(x) <= most else x[np.random.default_rng(seed).choice(len(x), most, replace=False)]
    squared = (rows * rows).sum(1)
    distances = np.sqrt(np.maximum(squared[:, None] + squared[None, :] - 2 * rows @ rows.T, 0))
    between = distances[np.triu_indices(len(rows), 1)]
    return float(np.median(between)) if between.size and np.median(between) > 0 else 1.0


def _problem(values: Real, n: int) -> Measure | None:
    missing = int(np.sum(~np.isfinite(values)))
    if n and not missing:
        return None
    error = f"{missing} figures aren't finite" if missing else "no cases: nothing was drawn in both runtimes"
    return Measure(value=None, n=n, unit="p", better="higher", error=error)


def _p_value(extreme: int, total: int, exact: bool, n: int, test: str) -> Measure:
    p = extreme / total if exact else (1 + extreme) / (1 + total)
    method = f"{test}, all {total}" if exact else f"{test}, {total} drawn"
    return Measure(value=p, n=n, unit="p", method=method, better="higher")
