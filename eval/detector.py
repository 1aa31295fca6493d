"""Zero-shot detection with a CLIP: which label's prompts an image is nearest to.

Radford et al., 2021, arXiv 2103.00020, §3.1. One model serves as detector, as CLIP score and as the features of the
Fréchet distance. Nothing is specific to the demo's small CLIP: any transformers ``CLIPModel`` folder works.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from excise.errors import UsageError
from excise.eval.clip_encoder import ClipEncoder
from excise.eval.feature_extractor import Images
from excise.eval.zero_shot import label_features, label_logits


class ClipDetector:
    """A frozen CLIP with the labels it chooses from.

    Args:
        folder: a transformers folder with a CLIP, as ``ClipEncoder`` reads it.
        labels: label → the prompts that describe it, as ``zero_shot.label_features`` takes them.
        batch_size: images encoded together.
        device: where the model runs.

    Raises:
        ModelError: ``folder`` is not a CLIP.
        UsageError: no labels, or a label without prompts.
        PromptTooLong: a prompt has more tokens than the text tower reads.
    """

    def __init__(
        self,
        folder: Path,
        labels: Mapping[str, Sequence[str]],
        *,
        name: str | None = None,
        batch_size: int = 16,
        device: str = "cpu",
    ) -> None:
        for label, prompts in labels.items():
            if isinstance(prompts, str) or not prompts:
                raise UsageError(f"label {label!r} needs a list of at least one prompt, not {prompts!r}")
        if not labels:
            raise UsageError("a detector needs at least one label")
        self.labels: tuple[str, ...] = tuple(labels)
        self.encoder = ClipEncoder(folder, name=name, batch_size=batch_size, device=device)
        self.name = self.encoder.name  #: as in reports
        self._label_features = label_features(self.encoder, labels)

    @property
    def dimension(self) -> int:
        """The width d of the features."""
        return self.encoder.dimension

    def detect(self, images: Images) -> npt.NDArray[np.intp]:
        """The index into ``labels`` of each image's top label, with shape (n,)."""
        indices: npt.NDArray[np.intp] = np.argmax(self.logits(images), axis=1)
        return indices

    def logits(self, images: Images) -> npt.NDArray[np.float32]:
        """Logits with shape (n, labels) of uint8 RGB images."""
        return self.label_logits(self.image_features(images))

    def label_logits(self, features: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Logits with shape (n, labels) of image features (n, d): the cosines times CLIP's ``logit_scale``."""
        return label_logits(self.encoder, features, self._label_features)

    def image_features(self, images: Images) -> npt.NDArray[np.float32]:
        """Projected image embeddings of unit length, with shape (n, d)."""
        return self.encoder.image_features(images)

    def text_features(self, prompts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Projected text embeddings of unit length, with shape (m, d).

        Raises:
            PromptTooLong: a prompt has more tokens than the text tower reads.
        """
        return self.encoder.text_features(prompts)
