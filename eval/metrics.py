"""CLIP score and Fréchet distance, from features with unit rows.

Both depend on whose features they are made of: with the demo's small CLIP neither may be compared with a published one.
"""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt
from cleanfid.fid import frechet_distance

from excise.errors import UsageError


def clip_score(image_features: npt.NDArray[np.float32], text_features: npt.NDArray[np.float32]) -> float:
    """The mean of 100 · max(cos, 0) over pairs (Hessel et al., EMNLP 2021, arXiv 2104.08718, without their factor 2.5).

    Args:
        image_features: unit rows with shape (n, d).
        text_features: unit rows with shape (n, d); row i belongs to image i.

    Raises:
        UsageError: the shapes differ, or there is no pair.
    """
    if image_features.shape != text_features.shape or not len(image_features):
        raise UsageError(f"CLIP score needs pairs, not shapes {image_features.shape} and {text_features.shape}")
    cosines = np.sum(image_features.astype(np.float64) * text_features, axis=1)
    return float(100 * np.maximum(cosines, 0).mean())


def fid(features: npt.NDArray[np.float32], reference: npt.NDArray[np.float32]) -> float:
    """The Fréchet distance between the Gaussians fitted to two sets of features.

    ``|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½)`` (Heusel et al., 2017, arXiv 1706.08500), computed by clean-fid. Name it
    with ``fid_name``: it is *the* FID only with Inception's pool features. With fewer images than features the
    covariances are singular and the distance is biased upwards: it then only compares sets of the same size.

    Args:
        features: with shape (n, d).
        reference: with shape (m, d).

    Raises:
        UsageError: fewer than two rows in a set.
    """
    if min(len(features), len(reference)) < 2:
        raise UsageError(f"a Fréchet distance needs two images a side, not {len(features)} and {len(reference)}")
    a, b = features.astype(np.float64), reference.astype(np.float64)
    with warnings.catch_warnings():
        # clean-fid 0.1.35 calls scipy.linalg.sqrtm(disp=False), which SciPy 1.17 deprecates.
        warnings.filterwarnings("ignore", "The `disp` argument is deprecated", DeprecationWarning)
        distance = frechet_distance(a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False))
    # The matrix square root of singular covariances leaves -1e-7 where the sets are the same.
    return max(0.0, float(distance))


def fid_name(detector: str) -> str:
    """What a report calls ``fid`` of this detector's features."""
    return f"FID (features of {detector})"
