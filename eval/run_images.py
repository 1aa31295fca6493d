"""What is known of one runtime's images before figures are made of it: pictures, what was seen in them, features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from excise.eval.cases import Case
from excise.eval.classifier import check_logits, observations_of
from excise.eval.feature_extractor import FeatureExtractor
from excise.eval.image_detector import ImageDetector
from excise.eval.observation_cache import Pictures, features, observations
from excise.eval.protocol_file import ProtocolFile
from excise.eval.protocol_models import ProtocolModels
from excise.eval.protocol_schema import Detector
from excise.eval.rule_outcomes import TOP, Outcome, outcomes
from excise.eval.zero_shot import label_features, label_logits

if TYPE_CHECKING:
    from excise.eval.clip_encoder import ClipEncoder


@dataclass
class RunImages:
    """One runtime's images of a protocol, in the order of the cases; networks look at them when they are asked for.

    Args:
        name: the runtime's.
        folder: where what networks saw is kept.
    """

    name: str
    cases: Sequence[Case]
    pictures: Pictures
    folder: Path
    progress: bool = True
    digests: tuple[str, ...] = ()
    _features: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.digests = self.digests or self.pictures.digests()

    def features(self, extractor: FeatureExtractor) -> npt.NDArray[np.float32]:
        """The extractor's features of all images, with shape (n, d)."""
        key = extractor.fingerprint.model_dump_json()
        if key not in self._features:
            self._features[key] = features(
                self.folder, extractor, self.pictures, self.digests, about=self.name, progress=self.progress
            )
        return self._features[key]

    def observed(self, detector: ImageDetector) -> list[dict[str, Any]]:
        """What the detector saw in every image."""
        return observations(self.folder, detector, self.pictures, self.digests, about=self.name, progress=self.progress)

    def recognised(self, encoder: ClipEncoder, labels: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
        """What a zero-shot CLIP takes every image for."""
        logits = label_logits(encoder, self.features(encoder), label_features(encoder, labels))
        check_logits(encoder.name, logits, len(labels))
        return observations_of(logits, tuple(labels), TOP)


@dataclass(frozen=True)
class Looked:
    """What a protocol's detectors saw, and what its rules count."""

    seen: dict[str, list[dict[str, Any]]]  #: by the detector's name
    outcomes: list[Outcome]


def look(images: RunImages, protocol: ProtocolFile, models: ProtocolModels, labelled: Sequence[Case]) -> Looked:
    """Let every detector of a protocol look at a runtime's images.

    Args:
        labelled: all cases of the protocol, also in a run with fewer: what a CLIP chooses from decides what it sees.

    Raises:
        ModelError: of the detectors.
        OutputError: the folder can't be written.
    """
    seen: dict[str, list[dict[str, Any]]] = {
        detector.name: _seen(images, protocol, detector, models, labelled) for detector in protocol.detectors
    }
    return Looked(seen, outcomes(protocol.rules, protocol.detectors, seen, images.cases, labelled))


def _seen(
    images: RunImages,
    protocol: ProtocolFile,
    detector: Detector,
    models: ProtocolModels,
    labelled: Sequence[Case],
) -> list[dict[str, Any]]:
    if detector.name == "clip":
        return images.recognised(models.clip(detector.model), protocol.label_prompts(labelled, detector))
    return images.observed(models.detector(detector))
