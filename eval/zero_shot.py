"""Zero-shot labels of a CLIP: which label's prompts an image is nearest to (Radford et al., 2021, arXiv 2103.00020)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.float32]


class TextEncoder(Protocol):
    """What ``ClipEncoder`` offers and labels need."""

    @property
    def logit_scale(self) -> float:
        """What CLIP multiplies cosines by."""

    def text_features(self, prompts: Sequence[str]) -> Rows:
        """Unit rows with shape (m, d)."""


def label_features(encoder: TextEncoder, labels: Mapping[str, Sequence[str]]) -> Rows:
    """Unit rows with shape (labels, d): each the mean of its prompts' unit embeddings, normalised again (§3.1.4).

    Args:
        labels: label → the prompts that describe it, at least one.

    Raises:
        PromptTooLong: a prompt has more tokens than the text tower reads.
    """
    means = np.stack([encoder.text_features(prompts).mean(0) for prompts in labels.values()])
    rows: Rows = means / np.linalg.norm(means, axis=1, keepdims=True)
    return rows


def label_logits(encoder: TextEncoder, features: Rows, labels: Rows) -> Rows:
    """Logits with shape (n, labels): the cosines of image features (n, d) and label features, times ``logit_scale``."""
    return (np.float32(encoder.logit_scale) * features @ labels.T).astype(np.float32, copy=False)
