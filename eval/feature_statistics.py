"""Count, sum and outer products of features, exact, so that shards add up to the whole to the last bit.

Floating-point sums depend on their order, and so on how a set of images was sharded. These are sums of integers, which
don't. A feature ``x`` becomes ``q = round(x / 2^e)`` with ``|q| ≤ 2²²``, and what is kept is

    n,    Σ q    (d),    Σ q qᵀ    (d × d),    all int64.

The outer products still run at BLAS speed, in float64: a product of two ``q`` is an integer of at most 2⁴⁴, a sum of
512 of them at most 2⁵³, and float64 represents every integer up to there. No partial sum of such a block is ever
rounded, in whatever order, with however many threads or fused multiply-adds, and blocks are added in int64: up to 2¹⁸
images stay below 2⁶². Memory is O(d²) whatever the number of images.

With the default e = −16 a feature is at most 64 in size and moves by at most 2⁻¹⁷. Inception's pool features and unit
rows fit; features that don't are refused, never clipped. The rounding adds about d · 2⁻³⁴ / 3 to a Fréchet distance's
traces, 4·10⁻⁸ for d = 2048.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from excise.errors import UsageError
from excise.eval.feature_extractor import FeatureExtractor, Fingerprint, Images

#: Rows in a block of outer products, log₂ of the largest |q|, and the most images: see above.
BLOCK, BITS, MOST_IMAGES = 512, 22, 2**18

#: log₂ of the grid that features are rounded to.
EXPONENT = -16


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Exact sums over a set of features, on a grid of ``2^exponent``.

    ``total`` is Σ q with shape (d,), ``outer`` Σ q qᵀ with shape (d, d), both int64.
    """

    fingerprint: Fingerprint
    exponent: int
    count: int
    total: npt.NDArray[np.int64]
    outer: npt.NDArray[np.int64]

    @property
    def dimension(self) -> int:
        """The width d of the features."""
        return len(self.total)

    def __add__(self, other: FeatureStatistics) -> FeatureStatistics:
        """The statistics of both sets together: exactly those of one pass over all of their features.

        Raises:
            UsageError: another extractor, width or grid, or more than ``MOST_IMAGES`` together.
        """
        check_comparable(self, other)
        if self.exponent != other.exponent:
            raise UsageError(
                f"statistics on grids of 2^{self.exponent} and 2^{other.exponent} can't be added: "
                "compute one set again with the other's exponent"
            )
        count = _checked_count(self.count + other.count)
        return FeatureStatistics(
            self.fingerprint, self.exponent, count, self.total + other.total, self.outer + other.outer
        )

    def mean(self) -> npt.NDArray[np.float64]:
        """The mean feature with shape (d,).

        Raises:
            UsageError: no image.
        """
        if not self.count:
            raise UsageError("no mean without images: add some features first")
        return np.ldexp(self.total / self.count, self.exponent)

    def covariance(self) -> npt.NDArray[np.float64]:
        """The sample covariance (divided by n − 1) with shape (d, d).

        The scatter about the integer nearest the mean, ``Σ qqᵀ − c(Σq)ᵀ − (Σq)cᵀ + n ccᵀ``, is computed in int64, where
        it is exact: terms may wrap around modulo 2⁶⁴, the result is below 2⁶³. A mean far from zero costs no digits.

        Raises:
            UsageError: fewer than two images.
        """
        if self.count < 2:
            raise UsageError(f"a covariance needs two images, not {self.count}")
        n = np.int64(self.count)
        centre = (2 * self.total + n) // (2 * n)
        cross = np.outer(centre, self.total)
        scatter = self.outer - cross - cross.T + n * np.outer(centre, centre)
        rest = (self.total - n * centre).astype(np.float64)
        exact = scatter.astype(np.float64) - np.outer(rest, rest) / self.count
        return np.ldexp(exact / (self.count - 1), 2 * self.exponent)


class StatisticsFitter:
    """Adds features up as they come.

    Args:
        fingerprint: of the extractor.
        dimension: the features' width d.
        exponent: features are rounded to multiples of ``2^exponent`` and at most ``2^(exponent + 22)`` in size.
    """

    def __init__(self, fingerprint: Fingerprint, dimension: int, *, exponent: int = EXPONENT) -> None:
        self._fingerprint, self._exponent = fingerprint, exponent
        self._count, self._filled = 0, 0
        self._block = np.empty((BLOCK, dimension))
        self._total = np.zeros(dimension, np.int64)
        self._outer = np.zeros((dimension, dimension), np.int64)

    def add(self, features: npt.NDArray[np.floating]) -> None:
        """Add features with shape (n, d).

        Raises:
            UsageError: another width, a feature that is not finite or too large for the grid, or too many images.
                Nothing of ``features`` has been added then.
        """
        if features.ndim != 2 or features.shape[1] != len(self._total):
            raise UsageError(f"features must have shape (n, {len(self._total)}), not {features.shape}")
        count = _checked_count(self._count + len(features))
        # Times a power of two, which is exact.
        grid = np.rint(features.astype(np.float64) * 2.0**-self._exponent)
        # Written so that a NaN, which compares as False, is refused too.
        if not (np.abs(grid) <= 2**BITS).all():
            worst = features.ravel()[np.argmax(np.where(np.isfinite(grid), np.abs(grid), np.inf))]
            raise UsageError(
                f"a feature of {worst:.6g} doesn't fit statistics on a grid of 2^{self._exponent}, which end at "
                f"±{2.0 ** (self._exponent + BITS):g}: check the network, or use a larger exponent"
            )
        self._total += grid.sum(0).astype(np.int64)
        self._count = count
        while len(grid):
            taken = grid[: BLOCK - self._filled]
            self._block[self._filled : self._filled + len(taken)] = taken
            self._filled, grid = self._filled + len(taken), grid[len(taken) :]
            if self._filled == BLOCK:
                self._flush()

    def statistics(self) -> FeatureStatistics:
        """Of all features so far; more may follow."""
        self._flush()
        return FeatureStatistics(self._fingerprint, self._exponent, self._count, self._total.copy(), self._outer.copy())

    def _flush(self) -> None:
        rows = self._block[: self._filled]
        # Whole numbers already: the cast, block by block inside the addition, loses nothing.
        np.add(self._outer, rows.T @ rows, out=self._outer, dtype=np.int64, casting="unsafe")
        self._filled = 0


def extract_statistics(
    extractor: FeatureExtractor, batches: Iterable[Images], *, exponent: int = EXPONENT
) -> FeatureStatistics:
    """The statistics of all images in ``batches``, which are read one at a time.

    Raises:
        UsageError: a batch isn't uint8 RGB images, or its features don't fit.
    """
    fitter = StatisticsFitter(extractor.fingerprint, extractor.dimension, exponent=exponent)
    for images in batches:
        fitter.add(extractor.image_features(images))
    return fitter.statistics()


def check_comparable(first: FeatureStatistics, second: FeatureStatistics) -> None:
    """Raise ``UsageError`` where two sets of features are not of one extractor."""
    difference = second.fingerprint.difference(first.fingerprint)
    if difference is None and first.dimension != second.dimension:
        difference = f"{second.dimension} features an image, not {first.dimension}"
    if difference is not None:
        raise UsageError(f"statistics of two extractors have nothing in common: the second has {difference}")


def _checked_count(count: int) -> int:
    if count > MOST_IMAGES:
        raise UsageError(f"exact statistics end at {MOST_IMAGES} images, not {count}: compare fewer")
    return count
