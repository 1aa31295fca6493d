"""Compose training and test images: one drawing at a random size and place on a plain background."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from excise.demo.vocabulary import ARTISTS, BACKGROUNDS, OBJECTS, draw_caption

IMAGE_SIZE = 64


@dataclass(frozen=True)
class Batch:
    """Composed images and what they show.

    ``images`` uint8 with shape (n, 64, 64, 3); ``objects``, ``artists``, ``colours`` int64 indices with shape (n,)
    into the vocabulary's dictionaries; ``captions`` one string each.
    """

    images: npt.NDArray[np.uint8]
    objects: npt.NDArray[np.int64]
    artists: npt.NDArray[np.int64]
    colours: npt.NDArray[np.int64]
    captions: list[str]


@functools.cache
def drawings(artwork: Path) -> dict[int, npt.NDArray[np.uint8]]:
    """Edge in pixels → uint8 RGBA with shape (objects, artists, edge, edge, 4), as ``demo/artwork.py`` wrote them."""
    with np.load(artwork) as arrays:
        return {int(key.removeprefix("rgba_")): arrays[key] for key in arrays.files}


class Composer:
    """A seeded stream of composed images."""

    def __init__(self, artwork: Path, seed: int) -> None:
        self._drawings = drawings(artwork)
        self._sizes = sorted(self._drawings)
        self._rng = random.Random(seed)
        self._names = list(OBJECTS)
        self._artists = list(ARTISTS)
        self._colours = list(BACKGROUNDS)

    def compose(self, object: int, artist: int, colour: int) -> npt.NDArray[np.uint8]:
        """One image, uint8 with shape (64, 64, 3); size and place are drawn at random."""
        size = self._rng.choice(self._sizes)
        drawing = self._drawings[size][object, artist]
        image = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.float32)
        image[:] = BACKGROUNDS[self._colours[colour]]
        top, left = (self._rng.randint(0, IMAGE_SIZE - size) for _ in range(2))
        alpha = drawing[..., 3:].astype(np.float32) / 255
        window = image[top : top + size, left : left + size]
        window += alpha * (drawing[..., :3] - window)
        return np.rint(image).astype(np.uint8)

    def draw(self, count: int) -> Batch:
        """``count`` random images with a random caption each."""
        rng = self._rng
        objects = [rng.randrange(len(self._names)) for _ in range(count)]
        artists = [rng.randrange(len(self._artists)) for _ in range(count)]
        colours = [rng.randrange(len(self._colours)) for _ in range(count)]
        images = np.stack([self.compose(*which) for which in zip(objects, artists, colours, strict=True)])
        captions = [
            draw_caption(rng, object=self._names[o], artist=self._artists[a], colour=self._colours[c])
            for o, a, c in zip(objects, artists, colours, strict=True)
        ]
        return Batch(images, np.array(objects), np.array(artists), np.array(colours), captions)
