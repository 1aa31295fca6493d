"""CLIP score, image by image, so that two runtimes can be compared in pairs.

100 · max(cos, 0) of an image and its prompt: Hessel et al., EMNLP 2021, arXiv 2104.08718, without their factor 2.5. But
for negative cosines it is the ``logits_per_image`` of OpenAI's models, whose scale is 100.

A CLIP reads 77 tokens, and many prompts of I2P are longer. Nothing is cut in silence: without ``truncate`` such a
prompt is an error, and with it every score says whether its prompt was cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from excise.errors import UsageError
from excise.eval.feature_extractor import FeatureExtractor, Fingerprint, Images
from excise.eval.metrics import clip_scores


class TextImageEncoder(FeatureExtractor, Protocol):
    """What ``ClipEncoder`` offers and a CLIP score needs."""

    @property
    def prompt_limit(self) -> int:
        """The most tokens that it reads."""
        ...

    def token_count(self, prompt: str) -> int:
        """The tokens of a prompt before any truncation."""
        ...

    def text_features(self, prompts: Sequence[str], *, truncate: bool = False) -> npt.NDArray[np.float32]:
        """Unit rows with shape (m, d)."""
        ...


@dataclass(frozen=True, eq=False)
class ClipScores:
    """The scores of n images with shape (n,), and whether each one's prompt was cut, with shape (n,)."""

    values: npt.NDArray[np.float64]
    truncated: npt.NDArray[np.bool_]

    @property
    def truncated_count(self) -> int:
        """Images whose prompt was only read in part: to be reported beside the score."""
        return int(self.truncated.sum())

    def mean(self) -> float:
        """The mean score.

        Raises:
            UsageError: no image.
        """
        if not len(self.values):
            raise UsageError("a mean CLIP score needs at least one image")
        return float(self.values.mean())


class ClipScorer:
    """Scores images by their prompts.

    Args:
        encoder: such as a ``ClipEncoder``.
        truncate: read only the first tokens of a prompt that is too long for the encoder.
    """

    def __init__(self, encoder: TextImageEncoder, *, truncate: bool = False) -> None:
        self._encoder, self._truncate = encoder, truncate
        self.name = f"CLIP score ({encoder.name})"

    @property
    def fingerprint(self) -> Fingerprint:
        """The encoder's, and whether prompts are cut."""
        cut = f"; prompts cut at {self._encoder.prompt_limit} tokens" if self._truncate else ""
        theirs = self._encoder.fingerprint
        return theirs.model_copy(update={"name": self.name, "preprocessing": theirs.preprocessing + cut})

    def scores(self, images: Images, prompts: Sequence[str]) -> ClipScores:
        """Score each image by the prompt of the same number.

        Raises:
            UsageError: not one prompt an image, or an image isn't uint8 RGB.
            PromptTooLong: a prompt is longer than the encoder reads, and ``truncate`` isn't set.
        """
        if len(images) != len(prompts):
            raise UsageError(f"CLIP score needs one prompt an image, not {len(prompts)} for {len(images)}")
        # Prompts first: one that is too long is found before the images have been read.
        self._encoder.text_features(prompts, truncate=self._truncate)
        return self.scores_of(self._encoder.image_features(images), prompts)

    def scores_of(self, image_features: npt.NDArray[np.float32], prompts: Sequence[str]) -> ClipScores:
        """The same of image features with shape (n, d) that the encoder made, so that FID can share them.

        Raises:
            UsageError: not one prompt an image, or features of another width.
            PromptTooLong: a prompt is longer than the encoder reads, and ``truncate`` isn't set.
        """
        texts = self._encoder.text_features(prompts, truncate=self._truncate)
        limit = self._encoder.prompt_limit
        truncated = np.array([self._encoder.token_count(prompt) > limit for prompt in prompts], np.bool_)
        return ClipScores(clip_scores(image_features, texts), truncated)
