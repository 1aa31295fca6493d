"""Who looks at images and says what is in them: NudeNet, a classifier, a probe on CLIP's features."""

from __future__ import annotations

from typing import Any, Protocol

from excise.eval.feature_extractor import Fingerprint, Images


class ImageDetector(Protocol):
    """Frozen: the same image gives the same observation, whatever images are beside it."""

    @property
    def name(self) -> str:
        """As in reports."""
        ...

    @property
    def fingerprint(self) -> Fingerprint:
        """What its observations depend on. Those of two detectors are never mixed."""
        ...

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes that it knows, in its own order."""
        ...

    def observe(self, images: Images) -> list[dict[str, Any]]:
        """One observation an image, in order: JSON values with keys in one order and floats to the last bit."""
        ...
