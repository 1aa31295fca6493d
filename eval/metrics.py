"""CLIP score and Fréchet distance, from features with unit rows.

Both depend on whose features they are made of: with the demo's small CLIP neither may be compared with a published one.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from excise.errors import UsageError
from excise.eval.distribution_distance import frechet_of_features
from excise.eval.feature_extractor import distance_name


def clip_scores(
    image_features: npt.NDArray[np.float32], text_features: npt.NDArray[np.float32]
) -> npt.NDArray[np.float64]:
    """100 · max(cos, 0) of each pair, with shape (n,): Hessel et al., EMNLP 2021, arXiv 2104.08718, without their 2.5.

    Args:
        image_features: unit rows with shape (n, d).
        text_features: unit rows with shape (n, d); row i belongs to image i.

    Raises:
        UsageError: the shapes differ.
    """
    if image_features.shape != text_features.shape:
        raise UsageError(f"CLIP score needs pairs, not shapes {image_features.shape} and {text_features.shape}")
    scores: npt.NDArray[np.float64] = 100 * np.maximum(
        np.sum(image_features.astype(np.float64) * text_features, axis=1), 0
    )
    return scores


def clip_score(image_features: npt.NDArray[np.float32], text_features: npt.NDArray[np.float32]) -> float:
    """The mean of ``clip_scores``.

    Raises:
        UsageError: the shapes differ, or there is no pair.
    """
    scores = clip_scores(image_features, text_features)
    if not len(scores):
        raise UsageError("a mean CLIP score needs pairs, at least one")
    return float(scores.mean())


def fid(features: npt.NDArray[np.float32], reference: npt.NDArray[np.float32]) -> float:
    """The Fréchet distance between two sets of features, as ``distribution_distance.frechet_of_features`` has it.

    Name it with ``fid_name``: it is *the* FID only with Inception's pool features. With fewer images than features the
    covariances are singular and the distance is biased upwards: it then only compares sets of the same size.

    Args:
        features: with shape (n, d).
        reference: with shape (m, d).

    Raises:
        UsageError: fewer than two rows in a set.
    """
    return frechet_of_features(features, reference)


def fid_name(detector: str) -> str:
    """What a report calls ``fid`` of this detector's features."""
    return distance_name("FID", detector)
