"""The networks that a protocol's detectors and metrics are made of, opened from local files.

A protocol names them (``resnet50``, ``clip-vit-base-patch32``), the user says where they are. What comes with excise or
with an installed package needs no place: the bundled CLIP and NudeNet's detector. Nothing is downloaded, and nothing
stands in for what is missing.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from excise.demo import CLIP
from excise.errors import UsageError
from excise.eval.feature_extractor import FeatureExtractor, Fingerprint
from excise.eval.image_detector import ImageDetector
from excise.eval.perceptual import Lpips
from excise.eval.protocol_file import ProtocolFile
from excise.eval.protocol_schema import Detector, Metric

if TYPE_CHECKING:
    from excise.eval.clip_encoder import ClipEncoder

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
#: What needs no place.
_FREE = frozenset({DEMO_CLIP, "320n"})
#: The variant of LPIPS at the images' own size.
NATIVE = "native"


@dataclass
class ProtocolModels:
    """Opened models, each once.

    Args:
        places: model → its file or folder, as the user gave it.
        device: where PyTorch's networks run, and ``cuda`` NudeNet too.
        option: what the command that gave the places calls them.

    Raises:
        UsageError: a place where nothing is.
    """

    places: Mapping[str, Path]
    device: str = "cpu"
    option: str = "--model"
    _opened: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, place in self.places.items():
            if not place.exists():
                raise UsageError(f"{self.option} {name}={place}: there is no such file or folder")

    def needed(self, protocol: ProtocolFile) -> tuple[str, ...]:
        """The models that a protocol needs and no place is known of."""
        return tuple(name for name in _models(protocol) if name not in _FREE | set(self.places))

    def check(self, protocols: Sequence[ProtocolFile]) -> None:
        """Look for what can be missing, without opening anything.

        Raises:
            UsageError: a metric that can't be computed as its protocol has it, a model that a protocol needs and no
                place is known of, or a place of a model that none needs.
        """
        for protocol in protocols:
            for metric in protocol.metrics:
                _check_metric(protocol, metric)
            if sum(metric.name == "clip_score" for metric in protocol.metrics) > 1:
                raise UsageError(f"{protocol.name} has two metrics clip_score: one CLIP scores all of a run's images")
            for name in self.needed(protocol):
                what = KNOWN.get(name, "its file or folder")
                raise UsageError(f"{protocol.name} needs the model {name}: give {self.option} {name}=PATH ({what})")
        used = {*KNOWN, *(name for protocol in protocols for name in _models(protocol))} - {DEMO_CLIP}
        for name in self.places:
            if name not in used:
                close = difflib.get_close_matches(name, sorted(used), n=1)
                hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(sorted(used))}"
                raise UsageError(f"{self.option} {name}: no protocol of this run has such a model: {hint}")

    def open(self, protocol: ProtocolFile) -> dict[str, dict[str, str]]:
        """Open all of a protocol's networks, so that a broken file is found before hours of work.

        Returns:
            The fingerprint of each network by its name: what the figures depend on.

        Raises:
            ModelError, UsageError: a file can't be used.
            MissingExtra: a library isn't installed.
        """
        opened: list[Any] = [
            self.clip(one.model) if one.name == "clip" else self.detector(one) for one in protocol.detectors
        ]
        for metric in protocol.metrics:
            if metric.name in ("fid", "kid"):
                opened.append(self.extractor(metric))
            elif metric.name == "lpips":
                opened += [self.lpips(variant) for variant in metric.variants]
            elif metric.model is not None:
                opened.append(self.clip(metric.model))
        prints: list[Fingerprint] = [one.fingerprint for one in opened]
        return {one.name: one.model_dump() for one in sorted(prints, key=lambda one: one.name)}

    def clip(self, name: str) -> ClipEncoder:
        """A CLIP by its name in the protocol.

        Raises:
            ModelError: its folder holds no CLIP.
        """

        def opened() -> ClipEncoder:
            from excise.eval.clip_encoder import ClipEncoder

            return ClipEncoder(CLIP if name == DEMO_CLIP else self.places[name], name=name, device=self.device)

        return self._once(f"clip {name}", opened)

    def detector(self, chosen: Detector) -> ImageDetector:
        """NudeNet or a classifier. A zero-shot CLIP is no network of its own: see ``RunImages.recognised``.

        Raises:
            ModelError: its file can't be used.
        """
        return self._once(f"{chosen.name} {chosen.model} {chosen.version}", lambda: self._detector(chosen))

    def _detector(self, chosen: Detector) -> ImageDetector:
        place = self.places.get(chosen.model)
        if chosen.name == "nudenet":
            from excise.eval.nudity_detector import NudityDetector

            return NudityDetector(place, provider="cuda" if self.device.startswith("cuda") else "cpu")
        assert place is not None, "checked before"
        if chosen.model == "q16":
            from excise.eval.feature_probe import feature_probe

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
        name = metric.model or _INCEPTION
        if name != _INCEPTION:
            return self.clip(name)
        from excise.eval.inception import InceptionExtractor

        return self._once(name, lambda: InceptionExtractor(self.places[_INCEPTION], device=self.device))

    def lpips(self, variant: str) -> Lpips:
        """LPIPS at a size in pixels, or ``native``.

        Raises:
            ModelError: its file can't be used.
            UsageError: a size that AlexNet can't read.
        """
        size = None if variant == NATIVE else int(variant)
        return self._once(f"lpips {size}", lambda: Lpips(self.places[_ALEXNET], size=size, device=self.device))

    def _once(self, name: str, open_: Callable[[], Network]) -> Network:
        if name not in self._opened:
            self._opened[name] = open_()
        opened: Network = self._opened[name]
        return opened


def _models(protocol: ProtocolFile) -> tuple[str, ...]:
    """The names of all models that a protocol is computed with."""
    own = {"fid": _INCEPTION, "kid": _INCEPTION, "lpips": _ALEXNET}
    names = [one.model for one in protocol.detectors]
    names += [_Q16_CLIP for one in protocol.detectors if one.model == "q16"]
    names += [name for metric in protocol.metrics if (name := metric.model or own.get(metric.name))]
    return tuple(dict.fromkeys(names))


def _check_metric(protocol: ProtocolFile, metric: Metric) -> None:
    place = f"{protocol.name}, metric {metric.name}"
    if metric.name == "clip_score" and metric.model is None:
        raise UsageError(f"{place}: name the CLIP that scores, such as model: clip-vit-base-patch32")
    if metric.name in ("lpips", "psnr", "weights_changed", "edit_seconds") and metric.model is not None:
        raise UsageError(f"{place}: it takes no model, and {metric.model} is named")
    if metric.name != "lpips":
        if metric.variants or metric.difference:
            what = "variants" if metric.variants else "difference"
            raise UsageError(f"{place}: {what} is for lpips")
        return
    if not metric.variants:
        raise UsageError(f'{place}: say at which sizes, such as variants: ["64", native]')
    for variant in metric.variants:
        if variant != NATIVE and not (variant.isascii() and variant.isdigit()):
            raise UsageError(f"{place}: {variant!r} is no size: give native, or pixels such as 64")
