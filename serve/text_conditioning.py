"""What prompts become before the UNet reads them: hidden states for each token and, in SDXL, one vector a prompt.

SDXL's UNet is also told the size of the image that it is to make (Podell et al., *SDXL: Improving Latent Diffusion
Models for High-Resolution Image Synthesis*, 2023, §2.2): the original size, where the crop begins, and the target size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from excise.serve.noise_schedule import Array

#: Numbers of SDXL's ``time_ids``; its refiner's has five.
TIME_IDS = 6


@dataclass(frozen=True)
class TextConditioning:
    """Of n prompts.

    Attributes:
        embeds: hidden states, ``encoder_hidden_states``, float32 with shape (n, t, d).
        pooled: one vector a prompt, ``text_embeds``, float32 with shape (n, p); None where the UNet takes none.
    """

    embeds: Array
    pooled: Array | None = None

    def __len__(self) -> int:
        return len(self.embeds)

    def __getitem__(self, rows: slice | Sequence[int] | npt.NDArray[np.int64]) -> TextConditioning:
        """Of the prompts at these places, in their order."""
        return TextConditioning(self.embeds[rows], None if self.pooled is None else self.pooled[rows])

    def zeroed(self, rows: Sequence[bool]) -> TextConditioning:
        """The same with zeros, hidden states and vector alike, where ``rows``, one for each prompt, says so."""
        if not any(rows):
            return self
        kept = ~np.asarray(rows, bool)
        embeds = np.where(kept[:, None, None], self.embeds, np.float32(0))
        return TextConditioning(
            embeds, None if self.pooled is None else np.where(kept[:, None], self.pooled, np.float32(0))
        )

    @staticmethod
    def joined(parts: Sequence[TextConditioning]) -> TextConditioning:
        """Of all parts' prompts, in their order. There is at least one part, and all have vectors or none has."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return TextConditioning(
            np.concatenate([part.embeds for part in parts]), np.concatenate(pooled) if pooled else None
        )


def time_ids(images: int, height: int, width: int) -> Array:
    """SDXL's sizes of images that are neither scaled nor cut, float32 with shape (images, 6).

    Each row is (height, width, 0, 0, height, width) in pixels, which is what diffusers' pipeline gives unless it is
    told otherwise, for the negative prompt as for the prompt.
    """
    return np.tile(np.array([height, width, 0, 0, height, width], np.float32), (images, 1))
