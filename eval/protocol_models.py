"""The networks that a protocol's detectors and metrics are made of, opened from local files.

A protocol names them (``resnet50``, ``clip-vit-base-patch32``), the user says where they are. What comes with excise or
with an installed package needs no place: the bundled CLIP and NudeNet's detector. Nothing is downloaded, and nothing
stands in for what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from excise.demo import CLIP
from excise.errors import UsageError
from excise.eval.clip_encoder import ClipEncoder
from excise.eval.feature_extractor import FeatureExtractor, Fingerprint
from excise.eval.feature_probe import feature_probe
from excise.eval.image_detector import ImageDetector
from excise.eval.perceptual import Lpips
from excise.eval.protocol_file import ProtocolFile
from excise.eval.protocol_schema import Detector, Metric

Network = TypeVar("Network")

DEMO_CLIP = "demo:clip"
#: Models with a place of their own in the protocols' names, and what to give for them.
KNOWN: Mapping[str, str] = {
    "320n": "NudeNet's ONNX file; without it the installed package's",
    "resnet50": "torchvision's weights of ResNet-50, resnet50-11ad3fa6.pth, or an .onnx with labels.txt beside it",
    "q16": "Q16's embeddings as safetensors; it also needs clip-vit-large-patch14",
    "clip-vit-base-patch32": "a transformers folder of OpenAI's CLIP ViT-B/32",
    "clip-vit-large-patch14": "a transformers folder of OpenAI's CLIP ViT-L/14",
    "inception": "the Inception of clean-fid, inception-2015-12-05.pt",
    "alexnet": "torchvision's AlexNet for LPIPS, alexnet-owt-7be5be79.pth",
}
_ALEXNET, _INCEPTION, _Q16_CLIP = "alexnet", "inception", "clip-vit-large-patch14"


@dataclass
class ProtocolModels:
    """Opened models, each once.

    Args:
        places: model → its file or folder, as the user gave it.
        device: where PyTorch's networks run, and ``cuda`` NudeNet too.
    """

    places: Mapping[str, Path]
    device: str = "cpu"
    _opened: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, place in self.places.items():
            if not place.exists():
                raise UsageError(f"--model {name}={place}: there is no such file or folder")

    def needed(self, protocol: ProtocolFile) -> tuple[str, ...]:
        """The models that a protocol needs and no place is known of."""
        names = [one.model for one in protocol.detectors]
        names += [_Q16_CLIP for one in protocol.detectors if one.model == "q16"]
        for metric in protocol.metrics:
            names.append(_model(metric) or "")
        free = {DEMO_CLIP, "320n", ""}
        return tuple(name for name in dict.fromkeys(names) if name not in free | set(self.places))

    def check(self, protocol: ProtocolFile) -> None:
        """Raise ``UsageError`` for the first model that a protocol needs and no place is known of."""
        for name in self.needed(protocol):
            what = KNOWN.get(name, "its file or folder")
            raise UsageError(f"{protocol.name} needs the model {name}: give --model {name}=PATH ({what})")

    def clip(self, name: str) -> ClipEncoder:
        """A CLIP by its name in the protocol.

        Raises:
            ModelError: its folder holds no CLIP.
        """
        return self._once(
            name,
            lambda: ClipEncoder(CLIP if name == DEMO_CLIP else self.places[name], name=name, device=self.device),
        )

    def detector(self, chosen: Detector) -> ImageDetector:
        """NudeNet or a classifier. A zero-shot CLIP is no network of its own: see ``rule_outcomes``.

        Raises:
            ModelError: its file can't be used.
        """
        return self._once(f"detector {chosen.model}", lambda: self._detector(chosen))

    def _detector(self, chosen: Detector) -> ImageDetector:
        place = self.places.get(chosen.model)
        if chosen.name == "nudenet":
            from excise.eval.nudity_detector import NudityDetector

            return NudityDetector(place, provider="cuda" if self.device.startswith("cuda") else "cpu")
        assert place is not None, "checked before"
        if chosen.model == "q16":
            return feature_probe(place, self.clip(_Q16_CLIP))
        if place.suffix == ".onnx":
            from excise.eval.onnx_classifier import onnx_classifier

            return onnx_classifier(place, place.with_name("labels.txt"), name=chosen.model)
        from excise.eval.torchvision_classifier import torchvision_classifier

        return torchvision_classifier(place, chosen.model, entry=chosen.version, device=self.device)

    def extractor(self, metric: Metric) -> FeatureExtractor:
        """Of FID and KID: Inception's pool features, or a CLIP's, which gives the distance another name.

        Raises:
            ModelError: its file can't be used.
        """
        name = _model(metric) or _INCEPTION
        if name != _INCEPTION:
            return self.clip(name)
        from excise.eval.inception import InceptionExtractor

        return self._once(name, lambda: InceptionExtractor(self.places[_INCEPTION], device=self.device))

    def lpips(self, size: int | None) -> Lpips:
        """LPIPS at a size in pixels; None is the images' own.

        Raises:
            ModelError: its file can't be used.
        """
        return self._once(f"lpips {size}", lambda: Lpips(self.places[_ALEXNET], size=size, device=self.device))

    def fingerprints(self) -> dict[str, dict[str, str]]:
        """Of every network that was opened, by its name: what the figures depend on."""
        found = sorted({one.fingerprint.model_dump_json() for one in self._opened.values()})
        parsed = [Fingerprint.model_validate_json(one).model_dump() for one in found]
        return {one["name"]: one for one in parsed}

    def _once(self, name: str, open_: Callable[[], Network]) -> Network:
        if name not in self._opened:
            self._opened[name] = open_()
        opened: Network = self._opened[name]
        return opened


def _model(metric: Metric) -> str | None:
    """What a metric is computed with; None for none."""
    own = {"fid": _INCEPTION, "kid": _INCEPTION, "lpips": _ALEXNET}
    return metric.model or own.get(metric.name)
