"""A classifier of images as a detector: what it sees in each, best first.

``torchvision_classifier``, ``onnx_classifier`` and ``feature_probe`` make one; ``recognition`` counts what it saw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from excise.errors import ModelError, UsageError
from excise.eval.feature_extractor import Fingerprint, Images

Logits = npt.NDArray[np.float32]


class Classifier:
    """A frozen network with the labels of its outputs.

    Args:
        name: as in reports.
        labels: of each output, in order. ImageNet's hold two labels twice, so they need not differ.
        fingerprint: what the logits depend on.
        logits: from n images to float32 with shape (n, labels).
        top: labels in an observation.

    Raises:
        UsageError: fewer than two labels, or ``top`` below 1.
    """

    def __init__(
        self,
        name: str,
        labels: Sequence[str],
        fingerprint: Fingerprint,
        logits: Callable[[Images], Logits],
        *,
        top: int = 5,
    ) -> None:
        if len(labels) < 2 or isinstance(labels, str):
            raise UsageError(f"a classifier needs at least two labels, not {len(labels)}")
        if top < 1:
            raise UsageError(f"an observation holds at least 1 label, not {top}")
        self.name, self.fingerprint, self.labels = name, fingerprint, tuple(labels)
        self._logits, self._top = logits, min(top, len(labels))

    def logits(self, images: Images) -> Logits:
        """Logits with shape (n, labels).

        Raises:
            ModelError: another number of outputs than labels, or some that aren't finite.
        """
        if not len(images):
            return np.zeros((0, len(self.labels)), np.float32)
        logits = self._logits(images)
        check_logits(self.name, logits, len(self.labels))
        return logits

    def observe(self, images: Images) -> list[dict[str, Any]]:
        """``{"labels": [the best ``top``, …], "probabilities": [theirs, among all labels]}`` of each image."""
        return observations_of(self.logits(images), self.labels, self._top)


def check_logits(name: str, logits: Logits, labels: int) -> None:
    """Raise ``ModelError`` for logits that aren't finite, or aren't one a label with shape (n, labels)."""
    if logits.ndim != 2 or logits.shape[1] != labels:
        raise ModelError(f"{name} has outputs of shape {logits.shape[1:]} for {labels} labels")
    if not np.isfinite(logits).all():
        raise ModelError(f"{name} gives logits that aren't finite: its weights or their number format are broken")


def observations_of(logits: Logits, labels: Sequence[str], top: int) -> list[dict[str, Any]]:
    """``Classifier.observe``'s observations, of logits with shape (n, labels)."""
    logits = logits.astype(np.float64)
    weights = np.exp(logits - logits.max(1, keepdims=True))
    probabilities = weights / weights.sum(1, keepdims=True)
    # Of equal logits the first label comes first, on every machine.
    best = np.argsort(-logits, axis=1, kind="stable")[:, :top]
    return [
        {"labels": [labels[index] for index in row], "probabilities": one[row].tolist()}
        for row, one in zip(best, probabilities, strict=True)
    ]


def read_labels(file: Path) -> tuple[str, ...]:
    """Labels from a text file in UTF-8, one a line, in the order of the network's outputs.

    Raises:
        ModelError: the file can't be read, or has an empty line.
    """
    if not file.is_file():
        raise ModelError(
            f"{file} is missing: put the classifier's labels there, one a line in the order of its outputs"
        )
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{file} can't be read as UTF-8 text: {error}") from error
    labels = tuple(line.strip() for line in lines)
    if not all(labels):
        raise ModelError(f"{file} has no label in line {labels.index('') + 1}")
    return labels
