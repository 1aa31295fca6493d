"""How far images are apart, pixel by pixel, in one pass over the files of several runtimes."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from excise.errors import UsageError
from excise.eval.observation_cache import Pictures

Real = npt.NDArray[np.float64]
#: Two runtimes' names → Σ over an image's pixels and channels of the squared difference, with shape (n,).
Movements = Mapping[tuple[str, str], Real]


def movements(
    pictures: Mapping[str, Pictures], pairs: Sequence[tuple[str, str]], *, progress: bool = False
) -> tuple[dict[tuple[str, str], Real], int]:
    """Squared distances of every pair's images, in grey levels, and the values in one image.

    Args:
        pictures: by runtime, row i of all for the same case.

    Raises:
        UsageError: two runtimes' images of one case differ in size.
    """
    count = len(next(iter(pictures.values())))
    sums = {pair: np.zeros(count) for pair in pairs}
    wanted = [name for name in pictures if any(name in pair for pair in pairs)]
    size = 0
    for row in tqdm(range(count), "pixels", unit="image", file=sys.stderr, disable=not (progress and pairs)):
        images = {name: pictures[name][row].astype(np.int32) for name in wanted}
        for first, second in pairs:
            a, b = images[first], images[second]
            if a.shape != b.shape:
                raise UsageError(
                    f"{second} makes images of {b.shape[1]} x {b.shape[0]} pixels, {first} of {a.shape[1]} x "
                    f"{a.shape[0]}: runtimes are compared at one size"
                )
            sums[first, second][row], size = int(np.square(a - b).sum()), a.size
    return sums, size


def psnr_of(squared: Real, values: int) -> Real:
    """The peak signal-to-noise ratio of each pair in dB, with shape (n,): infinite where a pair is equal."""
    with np.errstate(divide="ignore"):
        ratio: Real = 10 * np.log10(255**2 / (squared / values))
    return ratio
