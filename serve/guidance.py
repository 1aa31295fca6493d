"""How a UNet's outputs for several texts become one: the guidance of the denoising loop.

Classifier-free guidance (Ho & Salimans, *Classifier-Free Diffusion Guidance*, 2022) is ε = ε(∅) + w (ε(c) − ε(∅)). As
in diffusers, w ≤ 1 switches it off, and the UNet isn't asked for ε(∅).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from excise.serve.noise_schedule import Array


class Guide(Protocol):
    """The guidance of one batch, with whatever it remembers from step to step."""

    @property
    def guided(self) -> bool:
        """Whether the UNet is asked for more than each image's prompt."""
        ...

    def combine(self, outputs: Sequence[Array], index: int) -> Array:
        """One output with shape (n, c, h, w), of step ``index``.

        ``outputs`` are of the prompts alone or, guided, of the negative prompts, the prompts, and each of the
        guidance's own texts.
        """
        ...

    def keep(self, places: npt.NDArray[np.int64]) -> None:
        """Go on with these of the images only."""
        ...


class Guidance(Protocol):
    """A way to guide: immutable, shared by threads."""

    @property
    def texts(self) -> tuple[str, ...]:
        """What every image is denoised with besides its negative prompt and its prompt."""
        ...

    def start(self, scales: Array) -> Guide:
        """The guidance of one batch with these scales, shape (n). Raises ``UsageError`` where it can't work at one."""
        ...


class ClassifierFree:
    """ε = ε(∅) + w (ε(c) − ε(∅))."""

    texts: tuple[str, ...] = ()

    def start(self, scales: Array) -> ClassifierFreeGuide:
        """The guidance of one batch with these scales, shape (n)."""
        return ClassifierFreeGuide(scales)


class ClassifierFreeGuide:
    """Remembers nothing but the scales: images with w ≤ 1 beside others get ε(c), as they would alone."""

    def __init__(self, scales: Array) -> None:
        self._scales = scales
        self.guided = bool((scales > 1).any())

    def combine(self, outputs: Sequence[Array], index: int) -> Array:
        """ε with shape (n, c, h, w)."""
        if not self.guided:
            return outputs[0]
        unconditional, conditional = outputs
        scales = self._scales.reshape(-1, *(1,) * (conditional.ndim - 1))
        moved = unconditional + scales * (conditional - unconditional)
        return moved if (self._scales > 1).all() else np.where(scales > 1, moved, conditional)

    def keep(self, places: npt.NDArray[np.int64]) -> None:
        """Go on with these of the images only. Whether the UNet is asked for ε(∅) stays as it was."""
        self._scales = self._scales[places]


CLASSIFIER_FREE: Final[Guidance] = ClassifierFree()
