"""Who turns images into features, and how to tell two extractors apart.

``features → statistics → metric``: an extractor gives each image a vector, ``feature_statistics`` adds them up, and
``distribution_distance`` compares two sets of them. Features of two extractors are never compared: every extractor
carries a fingerprint, which statistics keep.

A network's output for an image depends in its last bits on the shape of the batch that the image is in, because
libraries choose their kernels by shape. Extractors here only ever run batches of one shape (``full_batches``), so where
a set of images was cut, or where a run was resumed, doesn't show in the features.
Measured on a CPU: equal to the last bit in whatever company; two batch sizes differ by up to 2e-7.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from excise.errors import UsageError

#: RGB images: one array with shape (n, height, width, 3), or any number of (height, width, 3) that may differ in size.
Images: TypeAlias = npt.NDArray[np.uint8] | Sequence[npt.NDArray[np.uint8]]

#: The name of the network that makes a Fréchet distance *the* FID.
INCEPTION = "Inception"


class Fingerprint(BaseModel):
    """What features depend on, besides the images."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str  #: as in reports
    weights: str = Field(pattern=r"[0-9a-f]{64}")  #: SHA-256 of the network's weights, in hex
    preprocessing: str  #: from uint8 to what the network reads, in words

    def difference(self, other: Fingerprint) -> str | None:
        """The first thing that differs from ``other``, in words; None where nothing does."""
        for field in type(self).model_fields:
            if (ours := getattr(self, field)) != (theirs := getattr(other, field)):
                return f"{field} {ours!r}, not {theirs!r}"
        return None


class FeatureExtractor(Protocol):
    """A network, frozen."""

    @property
    def name(self) -> str:
        """As in reports."""
        ...

    @property
    def fingerprint(self) -> Fingerprint:
        """What its features depend on."""
        ...

    @property
    def dimension(self) -> int:
        """The width d of the features."""
        ...

    def image_features(self, images: Images) -> npt.NDArray[np.float32]:
        """Features with shape (n, d), row i of image i."""
        ...


def distance_name(metric: str, extractor: str) -> str:
    """What a report calls a distance between features: ``FID`` only with Inception's, else ``FID (features of X)``."""
    return metric if extractor == INCEPTION else f"{metric} (features of {extractor})"


def check_images(images: Iterable[npt.NDArray[np.uint8]]) -> None:
    """Raise ``UsageError`` unless every image is uint8 RGB."""
    for image in images:
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or not image.size:
            raise UsageError(
                f"an image must be uint8 with shape (height, width, 3), not {image.dtype} with shape {image.shape}"
            )


def full_batches(images: Images, size: int) -> Iterator[tuple[Sequence[npt.NDArray[np.uint8]], int]]:
    """Batches of exactly ``size`` images, each with the number of them that count: the last one repeats its last image.

    Raises:
        UsageError: ``size`` is below 1, or an image isn't uint8 RGB.
    """
    if size < 1:
        raise UsageError(f"a batch has at least 1 image, not {size}")
    for start in range(0, len(images), size):
        batch = list(images[start : start + size])
        check_images(batch)
        yield batch + batch[-1:] * (size - len(batch)), len(batch)
