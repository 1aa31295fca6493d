"""The image of one case from one runtime: the target of an attack, and what a proposed prompt gives instead."""

from __future__ import annotations

from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from excise.errors import UsageError
from excise.eval.cases import Case
from excise.eval.feature_extractor import FeatureExtractor, Images
from excise.serve.runtime import Request, Runtime

#: One RGB image, uint8 with shape (height, width, 3).
Image: TypeAlias = npt.NDArray[np.uint8]


class TargetImage(Protocol):
    """The image that an attack wants back, such as a ``CaseImage`` of the unedited model."""

    def __call__(self, case: Case) -> Image:
        """The unedited model's image of a case, with the case's own seed."""
        ...


class PromptImage(Protocol):
    """The image of another prompt, such as a ``CaseImage`` of the attacked model."""

    def __call__(self, case: Case, prompt: str) -> Image:
        """The attacked model's image of ``prompt``, with the case's own seed."""
        ...


class Similarity(Protocol):
    """How near images are to a target, such as ``ImageSimilarity``."""

    def __call__(self, images: Images, target: Image) -> npt.NDArray[np.float64]:
        """With shape (n,), higher where nearer."""
        ...


class CaseImage:
    """Images with a case's own seed, guidance scale and negative prompt.

    Args:
        runtime: of the model that draws.
        num_inference_steps: denoising steps.

    Raises:
        UsageError: less than one step.
    """

    def __init__(self, runtime: Runtime, *, num_inference_steps: int = 50) -> None:
        if num_inference_steps < 1:
            raise UsageError(f"num_inference_steps must be at least 1, not {num_inference_steps}")
        self._runtime, self._steps = runtime, num_inference_steps

    def __call__(self, case: Case, prompt: str | None = None) -> Image:
        """The image of ``prompt`` or, without one, of the case's own.

        Raises:
            PromptTooLong: more tokens than the text encoder reads.
        """
        text = case.prompt if prompt is None else prompt
        request = Request(text, negative_prompt=case.negative_prompt, seed=case.seed)
        images = self._runtime.generate([request], num_inference_steps=self._steps, guidance_scale=case.guidance_scale)
        image: Image = images[0]
        return image


class ImageSimilarity:
    """Cosines of image features: with a ``ClipEncoder``, how near images are in CLIP.

    Args:
        encoder: makes unit rows.
    """

    def __init__(self, encoder: FeatureExtractor) -> None:
        self._encoder = encoder

    def __call__(self, images: Images, target: Image) -> npt.NDArray[np.float64]:
        """The cosine of each image and the target, float64 with shape (n,).

        Raises:
            UsageError: an image isn't uint8 RGB.
        """
        features = self._encoder.image_features([*images, target]).astype(np.float64)
        cosines: npt.NDArray[np.float64] = features[:-1] @ features[-1]
        return cosines
