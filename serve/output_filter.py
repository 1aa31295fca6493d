"""Looks at finished images before they leave, and hides those that show nudity.

The detector is NudeNet (Praneeth, 2024), by its own package, which carries its weights. Its package reads image files
as OpenCV does, blue first, and so it is given images here; ``excise.eval.nudity_detector`` says more.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image as Pillow
from PIL import ImageFilter

from excise.errors import MissingExtra
from excise.serve.engine import Image

#: What the filter hides: NudeNet's classes of exposed intimate parts.
HIDDEN = (
    "ANUS_EXPOSED",
    "BUTTOCKS_EXPOSED",
    "FEMALE_BREAST_EXPOSED",
    "FEMALE_GENITALIA_EXPOSED",
    "MALE_GENITALIA_EXPOSED",
)

#: The standard deviation of the blur, as a part of the image's longer side: nothing smaller than it can be made out.
BLUR = 1 / 12

Hiding = Literal["blur", "blank"]


@dataclass(frozen=True)
class Verdict:
    """What the filter says of an image: ``labels`` are what it found of what it hides, ``score`` the highest."""

    labels: tuple[str, ...] = ()
    score: float = 0.0

    @property
    def flagged(self) -> bool:
        """Whether the image is to be hidden."""
        return bool(self.labels)


class OutputFilter(Protocol):
    """Whatever can say which images must not be shown."""

    name: str  #: as in reports

    def verdicts(self, images: Sequence[Image]) -> list[Verdict]:
        """One for each image, uint8 with shape (height, width, 3). Called from several threads."""
        ...


class NudeNetFilter:
    """NudeNet's detector: an image with a box of one of ``labels`` and at least ``score`` is flagged.

    Raises:
        MissingExtra: Without the nudenet package.
    """

    def __init__(self, *, score: float = 0.25, labels: Collection[str] = HIDDEN) -> None:
        try:
            from nudenet import NudeDetector  # type: ignore[import-untyped,unused-ignore]
        except ModuleNotFoundError as error:
            raise MissingExtra("nudenet", "filter") from error
        self._detector: Any = NudeDetector()
        self._score, self._labels = score, frozenset(labels)
        # The package says nothing about threads.
        self._lock = Lock()
        self.name = "NudeNet filter"

    def verdicts(self, images: Sequence[Image]) -> list[Verdict]:
        """One for each image."""
        return [self._verdict(image) for image in images]

    def _verdict(self, image: Image) -> Verdict:
        with self._lock:
            boxes = self._detector.detect(np.ascontiguousarray(image[:, :, ::-1]))
        found = {
            box["class"]: float(box["score"])
            for box in sorted(boxes, key=lambda box: float(box["score"]))
            if box["class"] in self._labels and box["score"] >= self._score
        }
        return Verdict(tuple(sorted(found)), max(found.values(), default=0.0))


def hidden(image: Image, how: Hiding) -> Image:
    """The image blurred beyond recognition, or black, with the same shape."""
    if how == "blank":
        return np.zeros_like(image)
    blur = ImageFilter.GaussianBlur(max(image.shape[:2]) * BLUR)
    return np.asarray(Pillow.fromarray(image).filter(blur), np.uint8)
